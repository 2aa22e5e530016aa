"""InstaFlow: a model of many steps becomes one of a single step, by straightening its paths first.

For whom has a conditional model and no patience. Nothing but words (or classes) is needed: the teacher draws the data,
with its guidance baked in. In the toolkit's time, 1 noise z and 0 data x, with x_t = (1 - t) x + t z:

    reflow      x = ODE[teacher](z | text), kept;   min  E || u_theta(x_t, t | text) - (z - x) ||^2,   t ~ U(0, 1)
    one step    x = ODE[student](z | text), kept;   min  E d(z - u_theta(z, 1 | text), x)

The map of the teacher is too curved to be regressed in one step. Reflow gives every noise another picture, of the same
distribution and nearer to it, and the map that is left is nearly the identity plus something smooth; that one can be.
The student is the teacher's network: told 1000 t for the time, it starts from its weights and learns to put out the
velocity whatever it put out before. (The authors' time runs the other way, and so does their velocity: their published
networks are of the kind "velocity-".)

X. Liu, X. Zhang, J. Ma, J. Peng, Q. Liu, "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image
Generation", ICLR 2024, arXiv 2309.06380.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.distill import one_step_loss, reflow_loss
from frameloom.diffusion.objective import METRICS, uniform
from frameloom.errors import InputError
from frameloom.tasks.distillation.base import SMALL, Job
from frameloom.training.recipe import Recipe

# A network that puts out the data has its velocity divided by t: below this it would learn nothing else.
SMALLEST_TIME = 0.1


@dataclass(frozen=True)
class InstaFlow:
    """Reflow, then one-step distillation from the reflowed model's own pairs.

    Args:
        reflow: the share of the updates that goes into reflow; 0 distils the teacher's own pairs at once (the paper's
            baseline), 1 leaves the 2-rectified flow, for a few Euler steps.
        drop: the share of examples that reflow sees without their condition, for a student that is to be guided again.
        metric: d of the last stage: "mse" or "huber".
        pairs, training: how much of everything, where nothing else is said.
    """

    reflow: float = 0.5
    drop: float = 0.0
    metric: str = "mse"
    pairs: int = 10_000
    training: Recipe = SMALL

    def run(self, job: Job) -> Any:
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric}: there are {', '.join(METRICS)}")
        straightening = round(self.reflow * job.training.steps)
        student, pairs = job.teacher.student(1), job.pairs("pairs", job.teacher, guided=True)
        if straightening:
            student = job.learn("reflow", student, pairs, self.flow_loss, straightening)
            if straightening < job.training.steps:
                pairs = job.pairs("pairs-of-student", student, guided=False)
        if straightening < job.training.steps:
            student = job.learn("one-step", student, pairs, self.last_loss, job.training.steps - straightening)
        return student

    def flow_loss(self, model: Any, noise: Tensor, data: Tensor, cond: Cond) -> Tensor:
        t = uniform(len(noise), noise.device)
        if getattr(model.denoiser, "kind", "") == "data":
            t = t.clamp(min=SMALLEST_TIME)
        return reflow_loss(model.denoiser, noise, data, dropped(cond, self.drop), t)

    def last_loss(self, model: Any, noise: Tensor, data: Tensor, cond: Cond) -> Tensor:
        return one_step_loss(model.denoiser, noise, data, cond, METRICS[self.metric])


def dropped(cond: Cond, share: float) -> Cond:
    """The conditions, with a random share of the examples given the empty one."""
    if not share:
        return cond
    empty, values = cond.null(), {}
    gone = torch.rand(len(next(iter(cond.values.values())))) < share
    for name, value in cond.values.items():
        mask = gone.to(value.device).view(-1, *[1] * (value.ndim - 1))
        values[name] = torch.where(mask, empty[name], value)
    return Cond(values, cond.nulls)
