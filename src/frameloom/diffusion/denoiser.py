"""Denoisers: from a noisy input, its times and its conditions to estimates of data and noise. All hosts look alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import current
from frameloom.diffusion.paths import Path, as_times, spread
from frameloom.diffusion.predict import Prediction, to_prediction
from frameloom.errors import InputError


@dataclass(frozen=True)
class Latent:
    """The latents of a model: channels, frames and size of its training, and whether each frame may have its time."""

    channels: int
    frames: int
    height: int
    width: int
    per_frame_time: bool = False

    def shape(self, batch: int = 1, frames: int | None = None) -> tuple[int, int, int, int, int]:
        return (batch, frames or self.frames, self.channels, self.height, self.width)


@dataclass(frozen=True)
class Site:
    """A place inside a host where a method may put something: a module, its kind and where it stands.

    `kind` is one of those of `frameloom.diffusion.adapters.places`; `stage` one of down, mid, up; `level` counts from
    full size.
    """

    name: str
    module: nn.Module
    kind: str
    stage: str = "mid"
    level: int = 0


@runtime_checkable
class Denoiser(Protocol):
    """What a sampler needs of a network."""

    path: Path
    latent: Latent

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction: ...

    def sites(self, kind: str) -> Iterator[Site]: ...


class Plain:
    """A denoiser of any function `network(x, t, cond) -> raw output`; the known end of a bridge is that of the run."""

    def __init__(
        self, network: Callable[[Tensor, Tensor, Cond], Tensor], path: Path, kind: str, latent: Latent
    ) -> None:
        self.network, self.path, self.kind, self.latent = network, path, kind, latent

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        run = current() if self.path.bridge else None
        return to_prediction(self.kind, self.network(x, t, cond), x, t, self.path, run and run.y)

    def sites(self, kind: str) -> Iterator[Site]:
        return iter(())


class Given:
    """Frame replacement on any host: frames that are known stand in the input as they are (STIV, arXiv 2412.07730).

    Reads `given` `(b, t)` (true where known) and `clean` `(b, t, c, h, w)` of the condition; without them, or where a
    guide has nulled `given`, the host sees the noisy frames.
    """

    def __init__(self, base: Denoiser) -> None:
        self.base, self.path, self.latent = base, base.path, base.latent

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        given = cond.get("given")
        if given is None:
            return self.base(x, t, cond)
        mask = spread(given, x).bool()
        found = self.base(torch.where(mask, cond["clean"].to(x.dtype), x), t, cond)
        # What the host says of a known frame is of no use: the estimate there is the frame itself.
        return Prediction.from_x0(self.path, x, t, torch.where(mask, cond["clean"].to(found.x0.dtype), found.x0))

    def sites(self, kind: str) -> Iterator[Site]:
        return self.base.sites(kind)


class Rebased:
    """A denoiser of one Gaussian path, asked on another (`rebase`)."""

    def __init__(self, base: Denoiser, path: Path) -> None:
        if base.path.bridge or path.bridge:
            raise InputError("only paths without a known end can be exchanged for each other")
        self.base, self.path, self.latent = base, path, base.latent
        # The noisiest input that the host was trained on.
        self._floor = float(base.path.lam(torch.tensor(base.path.t_max, dtype=torch.float64)))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        lam = self.path.lam(t)
        if float(lam.min()) < self._floor * (1 - 1e-6) - 1e-12:
            raise InputError(f"a signal-to-noise ratio of {float(lam.min()) ** 2:.3g} was asked for, but this model "
                             f"was trained down to {self._floor**2:.3g} (it is not zero-terminal)")  # fmt: skip
        own = self.base.path.t_of_lam(lam)
        clean = torch.isinf(lam)
        own = torch.where(clean, torch.zeros_like(own), own).to(t.dtype)
        a, _, c = self.path.coef(t)
        a_own, _, c_own = self.base.path.coef(own)
        # Either ratio would do; the larger coefficient is the safe one.
        ratio = torch.where(a > c, a_own / a.clamp(min=1e-30), c_own / c.clamp(min=1e-30))
        found = self.base(x * spread(ratio, x), own, cond)
        return Prediction.from_x0(self.path, x, t, found.x0)

    def sites(self, kind: str) -> Iterator[Site]:
        return self.base.sites(kind)


def rebase(denoiser: Denoiser, path: Path) -> Denoiser:
    """The same denoiser for inputs on another path: two Gaussian paths agree up to scale at equal SNR.

    With `t1` such that lam1(t1) = lam2(t2), the input is `x1 = x2 a1(t1) / a2(t2)` and the estimate of the data is the
    same. The guard: asked for more noise than the host was trained on, it raises InputError.
    """
    return Rebased(denoiser, path)


def velocity(denoiser: Denoiser, x: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
    """dx/dt of the probability flow at x: `a' x0 + c' eps`."""
    times = as_times(t, x)
    found = denoiser(x, times, cond)
    da, _, dc = (spread(value.to(x.dtype), x) for value in denoiser.path.rates(times))
    return da * found.x0 + dc * found.eps
