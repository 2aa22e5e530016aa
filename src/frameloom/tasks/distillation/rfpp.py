"""2-rectified flow++: one round of reflow, trained so well that a second one has nothing left to do.

For whom wants one to five steps. The straight lines between a teacher's noises and pictures hardly ever cross, so that
the best 2-rectified flow is nearly straight already; what is missing is training where the loss is large, at both ends
of time. On frozen pairs (z, x) of the teacher, x_t = (1 - t) x + t z, v = z - x:

    p(t)   proportional to  e^(a t) + e^(a (1 - t)),  a = 4,  on [1e-5, 1 - 1e-5]
    v_th   = (x_t - D(x_t / (1 - t), t / (1 - t))) / t          the teacher's denoiser D, read as a velocity
    loss   = (1 - t) h(v_th, v) + lpips(x_t - t v_th, x)  [/ t]
    h      = (sqrt(||v_th - v||^2 + c^2) - c) / d,   c = 0.00054 d, d numbers an example
    sample   x_s = (1 - s) x^(x_t) + s z                        back to the noise that the run began with

`frameloom.diffusion.denoiser.rebase` is the second line for any path of the teacher. LPIPS asks for a download; its
place is taken by the same formula on features that are trained on the pairs (`features.py`).

S. Lee, Z. Lin, G. Fanti, "Improving the Training of Rectified Flows", NeurIPS 2024, arXiv 2405.20320.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Denoiser, velocity
from frameloom.diffusion.distill import Metric, Pairs, as_flow
from frameloom.diffusion.guide import Guide
from frameloom.diffusion.objective import UShape, mse, pseudo_huber, uniform
from frameloom.diffusion.paths import spread
from frameloom.diffusion.run import sample
from frameloom.diffusion.step import Grids, Initial, Universal
from frameloom.errors import InputError
from frameloom.tasks.distillation.base import SMALL, Job
from frameloom.tasks.distillation.features import Features, perceptual
from frameloom.training.recipe import Recipe

log = logging.getLogger("frameloom")

LOSSES = ("l2", "huber", "lpips-huber", "lpips-huber/t")
# The end of the densities: x / (1 - t) and lpips / t stay numbers.
FLOOR = 1e-5


@dataclass(frozen=True)
class RFpp:
    """Reflow with the four ingredients, each a switch.

    Args:
        exact: start as the teacher's own velocity; else as InstaFlow does, with the teacher's weights alone.
        density: a of the U-shaped times; 0 is uniform.
        loss: "l2", "huber", "lpips-huber" or "lpips-huber/t".
        features: the share of the updates that the feature network is trained for, on top of the student's.
        pairs, training: how much of everything, where nothing else is said.
    """

    exact: bool = True
    density: float = 4.0
    loss: str = "lpips-huber"
    features: float = 0.1
    pairs: int = 10_000
    training: Recipe = SMALL

    @classmethod
    def config(cls, letter: str, **settings: Any) -> "RFpp":
        """The paper's ladder, each rung with what the ones before it have: A a plain 2-rectified flow, B the exact
        start, C the U-shape, D pseudo-Huber, E LPIPS-Huber, F its LPIPS over t.
        """
        rung = "ABCDEF".find(letter) if len(letter) == 1 else -1
        if rung < 0:
            raise InputError(f"config {letter}: there are A, B, C, D, E and F")
        chosen = LOSSES[max(0, rung - 2)]
        return cls(exact=rung >= 1, density=4.0 if rung >= 2 else 0.0, loss=chosen, **settings)

    def run(self, job: Job) -> Any:
        if self.loss not in LOSSES:
            raise InputError(f"loss {self.loss}: there are {', '.join(LOSSES)}")
        pairs = job.pairs("pairs", job.teacher, guided=True)
        metric = self.metric(job, pairs) if self.loss.startswith("lpips") else None

        def loss(model: Any, noise: Tensor, data: Tensor, cond: Cond) -> Tensor:
            return self.error(model.denoiser, noise, data, cond, self.times(len(noise), noise.device), metric)

        return job.learn("rfpp", job.teacher.student(1, exact=self.exact), pairs, loss, job.training.steps)

    def metric(self, job: Job, pairs: Pairs) -> Metric | None:
        """A perceptual distance from a classifier of the pairs' conditions; None where there is only one condition."""
        classes = int(pairs.which.max()) + 1
        if classes < 2:
            log.warning("one prompt alone gives a feature metric nothing to tell apart: pseudo-Huber is used")
            return None
        model, cond_of = job.teacher, {"which": torch.arange(classes, device=job.device)}
        channels = model.decode(pairs.data[:1].to(job.device)).shape[2]
        torch.manual_seed(job.seed)

        def loss(features: Features, noise: Tensor, data: Tensor, cond: Cond) -> Tensor:
            return F.cross_entropy(features(model.decode(data)), cond["which"])

        steps = max(1, round(self.features * job.training.steps))
        net = job.learn("features", Features(channels, classes).to(job.device), pairs, loss, steps, Cond(cond_of))
        return perceptual(net, model.decode)

    def times(self, count: int, device: torch.device | str = "cpu") -> Float[Tensor, "b"]:
        if self.density:
            return UShape(self.density, FLOOR)(count, device)
        return uniform(count, device).clamp(FLOOR, 1 - FLOOR)

    def error(
        self,
        denoiser: Denoiser,
        noise: Float[Tensor, "b t c h w"],
        data: Float[Tensor, "b t c h w"],
        cond: Cond,
        t: Float[Tensor, "b"],
        metric: Metric | None = None,
    ) -> Float[Tensor, "b"]:
        """The loss of every example; `metric` is the perceptual one, on data."""
        x = denoiser.path.add_noise(data, t, noise)
        made, true = velocity(denoiser, x, t, cond), noise - data
        if self.loss == "l2":
            return mse(made, true)
        if metric is None:
            return pseudo_huber(made, true)
        seen = metric(x - spread(t, x) * made, data)
        return (1 - t) * pseudo_huber(made, true) + (seen / t if self.loss.endswith("/t") else seen)


def sampled(
    denoiser: Denoiser,
    noise: Float[Tensor, "b t c h w"],
    cond: Cond,
    evaluations: int,
    second_order: bool = False,
    guide: Guide | None = None,
) -> Float[Tensor, "b t c h w"]:
    """The paper's sampler: back to the initial noise after every estimate, in so many network evaluations.

    Raises InputError for an even number of them where the order is the second.
    """
    if second_order and evaluations % 2 == 0:
        raise InputError(f"{evaluations} evaluations: N must be odd (it is 2k - 1 evaluations of Heun's method)")
    flow, steps = as_flow(denoiser), (evaluations + 1) // 2 if second_order else evaluations
    return sample(flow, noise, Grids.linear(flow.path, steps), cond, guide=guide, step=Initial(second_order))[0]


def invert(
    denoiser: Denoiser, data: Float[Tensor, "b t c h w"], cond: Cond, steps: int = 50, seed: int = 0
) -> Float[Tensor, "b t c h w"]:
    """The noise that the flow would make `data` of: its ODE from t = 0.001 to 1. Under another condition the way back
    translates the picture; between two noises (on the sphere) lie pictures between two pictures.
    """
    flow, start = as_flow(denoiser), 1e-3
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed)).to(data)
    grid = torch.linspace(start, 1, steps + 1, dtype=torch.float64)
    return sample(flow, (1 - start) * data + start * noise, grid, cond, step=Universal())[0]
