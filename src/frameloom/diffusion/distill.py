"""Distillation: the frozen pairs of a teacher, and the losses that make a student of few steps out of them.

A teacher's ODE ties every noise z to one picture x. The store keeps such pairs once and for all: pairs that were drawn
anew in every epoch would be another method (plain flow matching). Of the noise only its seed is kept. On the flow
x_t = (1 - t) x + t z with the velocity u = z - x,

    reflow      E d(u_theta((1 - t) x + t z, t), z - x)      straightens the paths, and keeps where they end
    one step    E d(z - u_theta(z, 1), x)                    makes the first step the last
    S           E integral of || (z - x_end) - u ||^2 dt      is 0 where paths are straight: what one step gets wrong
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from frameloom.atomic import save_tensors
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import Ctx
from frameloom.diffusion.denoiser import Denoiser, rebase, velocity
from frameloom.diffusion.guide import Guide
from frameloom.diffusion.objective import mse
from frameloom.diffusion.paths import Flow, as_times
from frameloom.diffusion.predict import Prediction, target
from frameloom.diffusion.run import Edit, sample
from frameloom.diffusion.step import Grids, Step, Universal, universal
from frameloom.errors import InputError
from frameloom.progress import Progress, silent

Metric = Callable[[Tensor, Tensor], Tensor]
# From noise (b, t, c, h, w) and its condition to data of that shape.
Draw = Callable[[Tensor, Cond], Tensor]

SHARD = 256


# --- frozen pairs ---------------------------------------------------------------------------------------------------


STOCHASTIC = ("reflow needs an ODE sampler: this solver draws fresh noise, and noise and picture would not belong to "
              "each other; take euler, heun or dpmpp2m")  # fmt: skip


def check_ode(step: Step) -> None:
    """Raises InputError for a solver that is known to draw noise."""
    if isinstance(step, Universal) and (step.eta or step.r):
        raise InputError(STOCHASTIC)


def no_noise(x: Tensor, ctx: Ctx) -> Tensor:
    """The noise policy of an ODE: there is none to be had, whatever the solver is called."""
    raise InputError(STOCHASTIC)


def ode(denoiser: Denoiser, grid: Tensor, step: Step, guide: Guide | None = None) -> Draw:
    """The deterministic map of a denoiser from noise to data; a stochastic solver is refused when it is first used."""
    scale = float(denoiser.path.coef(grid[0])[2])
    return lambda noise, cond: sample(denoiser, scale * noise, grid, cond, guide=guide, step=step, noise=no_noise)[0]


def regrown(seeds: Int[Tensor, "n"], shape: tuple[int, ...]) -> Float[Tensor, "n t c h w"]:
    """The unit noises of some seeds, one a seed, whatever the batch they are drawn in."""
    generator = torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(seed)) for seed in seeds.tolist()])


class Pairs:
    """A folder of finished pairs, read whole into memory; `batch` makes it the data of the training loop.

    `pairs.json` says how they were made; every shard `pairs-N.safetensors` holds `seed` (n,), `data` (n, t, c, h, w)
    and `which` (n,), the number of each pair's condition.
    """

    def __init__(self, folder: str | Path, seed: int = 0) -> None:
        self.folder, self.seed = Path(folder), seed
        self.note = json.loads((self.folder / "pairs.json").read_text())
        parts = []
        for name in _shards(self.folder, self.note["count"], self.note["shard"]):
            try:
                parts.append(load_file(name))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{name}: not a shard of pairs ({type(error).__name__}); remove it, and the same "
                                 "command makes it again") from None  # fmt: skip
        self.data, self.which = (torch.cat([part[name] for part in parts]) for name in ("data", "which"))
        self.noise = regrown(torch.cat([part["seed"] for part in parts]), self.data.shape[1:])

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: list[int], progress: float = 0.0) -> dict[str, Tensor]:
        """As many random pairs as there are indices; they depend on the first of them alone."""
        chosen = np.random.default_rng([self.seed, indices[0]]).integers(len(self), size=len(indices))
        return {"noise": self.noise[chosen], "data": self.data[chosen], "which": self.which[chosen]}


def make_pairs(
    folder: str | Path,
    draw: Draw,
    cond: Cond,
    count: int,
    shape: tuple[int, ...],
    note: dict,
    *,
    seed: int = 0,
    shard: int = SHARD,
    device: torch.device | str = "cpu",
    label: str = "pairs",
    progress: Progress = silent,
) -> Pairs:
    """Draw `count` pairs into a folder, shard by shard; after a stop the same call goes on to the same store.

    Args:
        draw: the teacher's map (see `ode`).
        cond: a row for every condition; the pairs take them in turn.
        shape: `(t, c, h, w)` of one example.
        note: what else `pairs.json` is to say of their making: `teacher` (its digest), `solver`, `steps`, `guidance`.

    Raises:
        InputError: the folder holds pairs of another teacher or of other settings.
    """
    if count < 1:
        raise InputError(f"--pairs {count}: a student needs at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, note | {"count": count, "shape": list(shape), "seed": seed, "shard": shard})
    # The generator of the noise takes 32 bits of a seed.
    seeds = torch.randint(2**32, (count,), generator=torch.Generator().manual_seed(seed))
    rows = len(next(iter(cond.values.values()))) if cond.values else 1
    which = torch.arange(count) % rows
    names = _shards(folder, count, shard)
    for number, name in enumerate(names):
        if not name.is_file():
            part = slice(number * shard, (number + 1) * shard)
            noise = regrown(seeds[part], shape).to(device)
            with torch.no_grad():
                data = draw(noise, cond.rows(which[part].to(device)))
            tensors = {"seed": seeds[part], "data": data.float().cpu(), "which": which[part]}
            save_tensors({key: value.contiguous().clone() for key, value in tensors.items()}, name)
        progress(label, number + 1, len(names))
    return Pairs(folder, seed)


def _shards(folder: Path, count: int, shard: int) -> list[Path]:
    return [folder / f"pairs-{number:05d}.safetensors" for number in range(-(-count // shard))]


def _claim(folder: Path, note: dict) -> None:
    """A folder is the pairs of one teacher, made in one way: later calls must agree."""
    path = folder / "pairs.json"
    if not path.is_file():
        (folder / "pairs.tmp").write_text(json.dumps(note, indent=2) + "\n")
        os.replace(folder / "pairs.tmp", path)
        return
    found = json.loads(path.read_text())
    if found.get("teacher") != note.get("teacher"):
        raise InputError(f"{folder}: made with another teacher ({found.get('teacher')}, not {note.get('teacher')}); "
                         "pairs of two teachers do not mix, choose another -o")  # fmt: skip
    if other := [key for key in note if found.get(key) != note[key]]:
        raise InputError(f"{folder}: pairs made with another {other[0]} ({str(found.get(other[0]))[:40]}, not "
                         f"{str(note[other[0]])[:40]}); choose another -o")  # fmt: skip


# --- losses: (b,), an error an example ------------------------------------------------------------------------------


def as_flow(denoiser: Denoiser) -> Denoiser:
    """A denoiser of any Gaussian path as a rectified flow: with EDM's this is the EDM-initialised velocity network
    v = (x_t - D(x_t / (1 - t), t / (1 - t))) / t of 2-rectified flow++.
    """
    return denoiser if isinstance(denoiser.path, Flow) else rebase(denoiser, Flow())


def reflow_loss(
    denoiser: Denoiser,
    noise: Float[Tensor, "b t c h w"],
    data: Float[Tensor, "b t c h w"],
    cond: Cond,
    t: Float[Tensor, "b"],
    metric: Metric = mse,
) -> Float[Tensor, "b"]:
    """How far the velocity between a noise and its own data is from the straight one."""
    x = denoiser.path.add_noise(data, t, noise)
    return metric(velocity(denoiser, x, t, cond), target("velocity", data, noise, t, denoiser.path))


def jump(denoiser: Denoiser, x: Tensor, t: float | Tensor, s: float | Tensor, cond: Cond) -> Tensor:
    """From time t to s `(b,)` at once, along the estimate: what consistency and one-step losses compare."""
    t, s = as_times(t, x), as_times(s, x)
    return universal(denoiser.path, x, denoiser(x, t, cond), t, s)


def one_step_loss(denoiser: Denoiser, noise: Tensor, data: Tensor, cond: Cond, metric: Metric = mse) -> Tensor:
    """How far one step from the noise ends from its own data."""
    return metric(jump(denoiser, noise, float(denoiser.path.t_max), 0.0, cond), data)


# --- measures ---------------------------------------------------------------------------------------------------------


class _Velocities(Edit):
    """Keeps the velocity of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_x0(self, p: Prediction, x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        self.found.append(target("velocity", p.x0, p.eps, t, ctx.path))
        return p


def straightness(
    denoiser: Denoiser, noise: Float[Tensor, "b t c h w"], cond: Cond, steps: int = 100, guide: Guide | None = None
) -> float:
    """S = E integral of ||(z - x_end) - u||^2 dt along the Euler paths of a flow: 0 where they are straight."""
    flow, velocities = as_flow(denoiser), _Velocities()
    end, _ = sample(flow, noise, Grids.linear(flow.path, steps), cond, guide=guide, edits=[velocities])
    errors = [(noise - end - u).square().flatten(1).sum(1) for u in velocities.found]
    return float(torch.stack(errors).mean())


def transport_cost(noise: Float[Tensor, "n t c h w"], data: Float[Tensor, "n t c h w"]) -> Float[Tensor, "n"]:
    """||x - z||^2 of every pair; reflow never makes its mean larger."""
    return (data - noise).square().flatten(1).sum(1)
