"""Paths from data to noise: three coefficients of time, and nothing else.

    x_t = a(t) * data + b(t) * prior + c(t) * noise

DDPM, EDM, rectified flow, trigonometric flow and two bridges are each three functions. `lam = a / c` is the square root
of the signal-to-noise ratio; it falls with t. Two Gaussian paths agree up to scale where their lam agree, which is all
that `rebase` (see `denoiser.py`) needs.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.errors import InputError


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A number per clip `(b,)` or per frame `(b, t)`, shaped to multiply `like` `(b, t, c, h, w)`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)).to(like.dtype)


class Path:
    """What every path offers; a leaf gives `_coef` in float64 and its range of times.

    Attributes:
        t_max: where sampling starts.
        bridge: whether `b` is not zero.
    """

    t_max: float = 1.0
    bridge: ClassVar[bool] = False

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`a`, `b`, `c` at `t`, computed in float64, given in float32 (float64 for float64 times)."""
        dtype = t.dtype if t.dtype == torch.float64 else torch.float32
        a, b, c = self._coef(t.double())
        return a.to(dtype), b.to(dtype), c.to(dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of `a`, `b`, `c` by t, as float64, exact by automatic differentiation."""
        with torch.enable_grad():
            at = t.detach().double().requires_grad_()
            parts = self._coef(at)
            found = []
            for part in parts:
                grad = None
                if part.requires_grad:
                    (grad,) = torch.autograd.grad(part.sum(), at, retain_graph=True, allow_unused=True)
                found.append(torch.zeros_like(at) if grad is None else grad)
        return found[0].detach(), found[1].detach(), found[2].detach()

    def lam(self, t: Tensor) -> Tensor:
        """`a / c` as float64: infinite at the data, zero at pure noise."""
        a, _, c = self._coef(t.double())
        return a / c

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of `lam`, by bisection; a leaf that knows better says so."""
        low, high = torch.zeros_like(lam, dtype=torch.float64), torch.full_like(lam, self.t_max, dtype=torch.float64)
        for _ in range(80):
            middle = (low + high) / 2
            cleaner = self.lam(middle) > lam
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return (low + high) / 2

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """`x_t` of data `x0` `(b, t, c, h, w)`; `y` is the known end of a bridge."""
        a, b, c = self.coef(t)
        x = spread(a, x0) * x0 + spread(c, x0) * eps
        return x if y is None else x + spread(b, x0) * y


@dataclass(frozen=True)
class Flow(Path):
    """Rectified flow: a = 1 - t, c = t. Liu et al., ICLR 2023, arXiv 2209.03003."""

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 - t, torch.zeros_like(t), t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Constant, and asked for at every step of the models that most people run.
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, torch.zeros_like(one), one

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return 1 / (1 + lam.double())


@dataclass(frozen=True)
class Trig(Path):
    """a = cos(pi t / 2), c = sin(pi t / 2). Albergo and Vanden-Eijnden, ICLR 2023, arXiv 2209.15571."""

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # At the end the cosine is zero, not the rounding error of pi.
        a = torch.where(t == 1, torch.zeros_like(t), torch.cos(math.pi / 2 * t))
        return a, torch.zeros_like(t), torch.sin(math.pi / 2 * t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.atan2(torch.ones_like(lam, dtype=torch.float64), lam.double()) * 2 / math.pi


@dataclass(frozen=True)
class EDM(Path):
    """Variance exploding: a = 1, c = t = sigma. Karras et al., NeurIPS 2022, arXiv 2206.00364."""

    t_max: float = 80.0

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t), t

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return 1 / lam.double()


@dataclass(frozen=True)
class VP(Path):
    """The discrete variance-preserving path of DDPM: a = sqrt(abar), c = sqrt(1 - abar). arXiv 2006.11239.

    Time is the index of the training step plus one, so that index 0 is t = 1 and t = 0 is the data itself; between two
    indices the logarithm of lam is interpolated. `abar` is the cumulative product of 1 - beta.
    """

    abar: tuple[float, ...]

    @property
    def t_max(self) -> float:
        return float(len(self.abar))

    @classmethod
    def of(
        cls, schedule: str = "linear", steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_snr: bool = False
    ) -> "VP":
        """`"linear"`, `"scaled_linear"` (Stable Diffusion) or `"cosine"` betas; `zero_snr` rescales to end in noise.

        Zero terminal SNR: Lin et al., WACV 2024, arXiv 2305.08891.
        """
        if schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif schedule == "cosine":
            at = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            level = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        else:
            raise InputError(f"schedule {schedule}: a VP path is linear, scaled_linear or cosine")
        return cls.from_abar(torch.cumprod(1 - betas, 0), zero_snr)

    @classmethod
    def from_abar(cls, abar: Tensor, zero_snr: bool = False) -> "VP":
        """Of any cumulative products, such as a diffusers scheduler's `alphas_cumprod`."""
        abar = abar.double()
        if zero_snr:
            root = abar.sqrt()
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            abar = root**2
        return cls(tuple(abar.tolist()))

    @cached_property
    def _log_lam(self) -> Tensor:
        abar = torch.tensor(self.abar, dtype=torch.float64)
        # Not quite zero at a zero-terminal end, so that its logarithm stays a number; `_coef` puts the zero back.
        return 0.5 * (abar.clamp(min=1e-24).log() - torch.log1p(-abar))

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._log_lam.to(t.device)
        at = (t - 1).clamp(0, len(table) - 1)
        low = at.floor().clamp(max=max(len(table) - 2, 0)).long()
        high = (low + 1).clamp(max=len(table) - 1)
        log_lam = torch.lerp(table[low], table[high], at - low)
        # Before index 0 the path goes on straight to the data in a^2.
        abar = torch.sigmoid(2 * log_lam)
        abar = torch.where(t < 1, 1 - (1 - self.abar[0]) * t, abar)
        if self.abar[-1] == 0:
            abar = torch.where(t >= len(table), torch.zeros_like(abar), abar)
        return abar.sqrt(), torch.zeros_like(t), (1 - abar).clamp(min=0).sqrt()


@dataclass(frozen=True)
class BrownianBridge(Path):
    """Between data and a known end y: a = 1 - m, b = m, c = sqrt(2 (m - m^2) v), m from .001 to .999.

    Li et al., BBDM, CVPR 2023, arXiv 2205.07680.
    """

    variance: float = 1.0
    bridge: ClassVar[bool] = True

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = torch.where(t > 0, 0.001 + 0.998 * t, torch.zeros_like(t))
        return 1 - m, m, (2 * (m - m**2) * self.variance).clamp(min=0).sqrt()


@dataclass(frozen=True)
class SteppedBridge(BrownianBridge):
    """The Brownian bridge in `steps` training steps: time is the index of the step plus one, and 0 the data itself."""

    steps: int = 1000

    @property
    def t_max(self) -> float:
        return float(self.steps)

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = torch.where(t > 0, 0.001 + 0.998 * (t - 1) / (self.steps - 1), torch.zeros_like(t))
        return 1 - m, m, (2 * (m - m**2) * self.variance).clamp(min=0).sqrt()


@dataclass(frozen=True)
class GmaxBridge(Path):
    """FrameBridge's VP bridge: with s^2 = (bmax - bmin) t^2 / 2 + bmin t, a = sbar^2 / s1^2, b = s^2 / s1^2,
    c = sbar s / s1, sbar^2 = s1^2 - s^2. Wang et al., ICML 2025, arXiv 2410.15371.
    """

    bmin: float = 0.01
    bmax: float = 50.0
    bridge: ClassVar[bool] = True

    def _coef(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s2 = 0.5 * (self.bmax - self.bmin) * t**2 + self.bmin * t
        s1 = 0.5 * (self.bmax + self.bmin)
        rest = (s1 - s2).clamp(min=0)
        return rest / s1, s2 / s1, (rest * s2).sqrt() / math.sqrt(s1)


def as_times(t: float | Tensor, like: Float[Tensor, "b *rest"]) -> Tensor:
    """A time for every clip of `like`, `(b,)`; a tensor `(b,)` or `(b, t)` passes, `(t,)` is for all clips alike."""
    t = torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None, device=like.device)
    if t.ndim == 0:
        return t.expand(like.shape[0])
    return t
