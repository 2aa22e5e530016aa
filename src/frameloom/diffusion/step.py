"""One step to a lower noise level: the universal step, the solvers, the time grids and where fresh noise comes from.

The universal step (arXiv 2010.02502 and many under other names) is

    x_s = a_s x0 + b_s y + c_s (sqrt(1 - r^2) eps + r z),   r = eta sqrt(1 - (lam_t / lam_s)^2)

eta = 0 is DDIM, which on the variance-exploding path and on rectified flows is Euler; eta = 1 is ancestral sampling;
r = 1 is consistency sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from frameloom.diffusion.context import Ctx
from frameloom.diffusion.paths import Path, spread
from frameloom.diffusion.predict import Prediction, target
from frameloom.errors import InputError


@runtime_checkable
class Step(Protocol):
    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor: ...


def universal(
    path: Path, x: Tensor, p: Prediction, t: Tensor, s: Tensor, r: Tensor | float = 0.0,
    z: Tensor | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The step above. Entries with s == t, or without noise, come back as they are: frames that are held."""
    a, b, c = (spread(value, x) for value in path.coef(s))
    _, _, c_t = path.coef(t)
    r = spread(r.to(x.dtype), x) if isinstance(r, Tensor) else r
    noise = p.eps
    if z is not None:
        kept = torch.sqrt((1 - r * r).clamp(min=0)) if isinstance(r, Tensor) else max(0.0, 1 - r * r) ** 0.5
        noise = kept * noise + r * z
    made = a * p.x0 + c * noise
    if y is not None and path.bridge:
        made = made + b * y
    held = (t == s) | (c_t == 0)
    return torch.where(spread(held, x).bool(), x, made.to(x.dtype)) if bool(held.any()) else made.to(x.dtype)


def ancestral_share(path: Path, t: Tensor, s: Tensor, eta: float = 1.0) -> Tensor:
    """r of the universal step: the share of the new noise that is fresh."""
    lam_t, lam_s = path.lam(t), path.lam(s)
    ratio = torch.where(torch.isinf(lam_s), torch.zeros_like(lam_t), lam_t / lam_s)
    return eta * torch.sqrt((1 - ratio**2).clamp(min=0))


@dataclass(frozen=True)
class Universal:
    """`eta` between DDIM (0) and ancestral (1); or a fixed share `r` of fresh noise, 1 for consistency models."""

    eta: float = 0.0
    r: float | None = None

    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        if self.r is None and self.eta == 0:
            return universal(ctx.path, x, p, t, s, y=ctx.y)
        r = ancestral_share(ctx.path, t, s, self.eta) if self.r is None else self.r
        return universal(ctx.path, x, p, t, s, r, ctx.noise(x, ctx), ctx.y)


@dataclass(frozen=True)
class Heun:
    """Second order with two evaluations a step, one on the last: 2n - 1 in all. Karras et al., arXiv 2206.00364."""

    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        path = ctx.path
        if bool((path.coef(s)[2] == 0).all()):
            return universal(path, x, p, t, s)
        a_t, _, c_t = (spread(value, x) for value in path.coef(t))
        a_s, _, c_s = (spread(value, x) for value in path.coef(s))
        there = ctx.evaluate(universal(path, x, p, t, s), s)
        if bool((a_t == 0).any()):  # from pure noise: d(x/c) = x0 d(a/c)
            return c_s * (x / c_t + (a_s / c_s - a_t / c_t) * (p.x0 + there.x0) / 2)
        # d(x/a) = eps d(c/a), which on EDM's path is its own rule.
        return a_s * (x / a_t + (c_s / a_s - c_t / a_t) * (p.eps + there.eps) / 2)


@dataclass(frozen=True)
class DPMpp2M:
    """Second order from the last two estimates of the data. Lu et al., DPM-Solver++, arXiv 2211.01095.

    The first step is of first order, and the last one too when `lower_last`.
    """

    lower_last: bool = False

    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        path, memory = ctx.path, ctx.state.setdefault((id(self), "steps"), {})
        lam_t, lam_s = path.lam(t), path.lam(s)
        before = memory.get("before")
        memory["before"] = (p.x0, lam_t)
        last = bool(torch.isinf(lam_s).all())
        if before is None or last or bool((lam_t == 0).any()) or (self.lower_last and ctx.i == ctx.n - 1):
            return universal(path, x, p, t, s)
        x0, lam = before
        if bool((lam == 0).any()):
            return universal(path, x, p, t, s)
        h, h_before = torch.log(lam_s / lam_t), torch.log(lam_t / lam)
        lean = spread((h / (2 * h_before)).to(x.dtype), x)
        data = p.x0 + lean * (p.x0 - x0)
        a_s, _, c_s = (spread(value, x) for value in path.coef(s))
        _, _, c_t = (spread(value, x) for value in path.coef(t))
        return (c_s / c_t) * x - a_s * spread(torch.expm1(-h).to(x.dtype), x) * data


@dataclass(frozen=True)
class AB2:
    """Adams-Bashforth on dx/dt from the last two velocities; the first step is Euler's."""

    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        memory = ctx.state.setdefault((id(self), "steps"), {})
        v = target("velocity", p.x0, p.eps, t, ctx.path)
        before = memory.get("before")
        memory["before"] = (v, t)
        if before is None:
            return x + spread((s - t).to(x.dtype), x) * v
        v0, t0 = before
        q = spread(((s - t) / (t - t0)).to(x.dtype), x)
        return x + spread((s - t).to(x.dtype), x) * (v + q / 2 * (v - v0))


@dataclass(frozen=True)
class Initial:
    """x_s = a_s x0 + c_s z with z the noise that the run began with: for flows that are nearly straight, where it
    forgets the errors of the steps before. With one step it is Euler's. Lee et al., arXiv 2405.20320.

    Args:
        second_order: Heun's corrector at the re-noised point, 2n - 1 evaluations for n steps.
    """

    second_order: bool = False

    def __call__(self, x: Tensor, p: Prediction, t: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        memory = ctx.state.setdefault((id(self), "noise"), {})
        if "z" not in memory:
            if float(ctx.path.lam(t).max()) > 0.1:
                raise InputError("--solver rfpp: goes back to the noise that a run begins with, and this one begins "
                                 "with a picture in it; take euler or heun")  # fmt: skip
            memory["z"] = x / spread(ctx.path.coef(t)[2], x)
        made = universal(ctx.path, x, p, t, s, 1.0, memory["z"], ctx.y)
        if not self.second_order or bool((ctx.path.coef(s)[2] == 0).all()):
            return made
        there = ctx.evaluate(made, s)
        mean = Prediction((p.x0 + there.x0) / 2, p.eps)
        return universal(ctx.path, x, mean, t, s, 1.0, memory["z"], ctx.y)


STEPS = {
    "euler": Universal(),
    "ddim": Universal(),
    "ancestral": Universal(eta=1.0),
    "lcm": Universal(r=1.0),
    "heun": Heun(),
    "dpmpp2m": DPMpp2M(),
    "ab2": AB2(),
    "rfpp": Initial(),
}


def step(name: str) -> Step:
    """A solver by name. Raises InputError that lists them."""
    if name not in STEPS:
        raise InputError(f"--solver {name}: there are {', '.join(STEPS)}")
    return STEPS[name]


# --- fresh noise ----------------------------------------------------------------------------------------------------


class Fresh:
    """New Gaussian noise at every step, drawn on the processor, so that it does not depend on the device."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)


@dataclass(frozen=True)
class Fixed:
    """The same noise at every step: the initial noise (2-rectified flow++), or one per slot of a stream."""

    z: Tensor

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.z


@dataclass(frozen=True)
class Slots:
    """A pre-drawn noise for every step."""

    z: Sequence[Tensor]

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.z[ctx.i]


@dataclass
class Correlated:
    """Fresh noise that remembers: z = rho z_before + sqrt(1 - rho^2) n, of unit variance throughout."""

    rho: float
    seed: int = 0
    _fresh: Fresh = field(init=False)
    _before: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._fresh = Fresh(self.seed)

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        new = self._fresh(x, ctx)
        if self._before is not None:
            new = self.rho * self._before + (1 - self.rho**2) ** 0.5 * new
        self._before = new
        return new


# --- time grids: (n + 1,) falling times that end at 0, or (n + 1, t) with a column a frame -------------------------


class Grids:
    """Where to stop on the way from noise to data. All are float64."""

    names: ClassVar = ("linear", "leading", "trailing", "karras", "shift")

    @staticmethod
    def linear(path: Path, n: int, end: float = 0.0) -> Tensor:
        """Evenly spaced in time."""
        return torch.linspace(path.t_max, end, n + 1, dtype=torch.float64)

    @staticmethod
    def trailing(path: Path, n: int, end: float = 0.0) -> Tensor:
        """Discrete indices, counted back from the last by `steps / n`, rounded (diffusers' "trailing")."""
        indices = torch.round(path.t_max - torch.arange(n, dtype=torch.float64) * path.t_max / n)
        return torch.cat([indices, torch.tensor([end], dtype=torch.float64)])

    @staticmethod
    def leading(path: Path, n: int, end: float = 0.0, offset: int = 0) -> Tensor:
        """Discrete indices that are multiples of `steps // n` (diffusers' "leading")."""
        ratio = int(path.t_max) // n
        indices = torch.arange(n, dtype=torch.float64).flip(0) * ratio + 1 + offset
        return torch.cat([indices, torch.tensor([end], dtype=torch.float64)])

    @staticmethod
    def karras(path: Path, n: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
        """Noise-to-data ratios from `high` to `low`, evenly spaced in their rho-th root, then 0."""
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return torch.cat([path.t_of_lam(1 / sigma), torch.zeros(1, dtype=torch.float64)])

    @staticmethod
    def shift(path: Path, n: int, by: float = 3.0) -> Tensor:
        """Linear, moved towards the noise: s u / (1 + (s - 1) u). Esser et al., arXiv 2403.03206."""
        u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        return path.t_max * by * u / (1 + (by - 1) * u)

    @staticmethod
    def indices(values: Sequence[float], end: float = 0.0) -> Tensor:
        """These times, then `end`."""
        return torch.tensor([*values, end], dtype=torch.float64)
