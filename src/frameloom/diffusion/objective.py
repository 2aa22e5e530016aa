"""A training loss from independent choices: when (time density), what (target), how much (weight), how far (metric).

loss = mean over examples of  w(t) * d(target(network), target)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frameloom.diffusion.paths import Path, spread
from frameloom.errors import InputError

# --- when: densities of t in (0, 1), as functions of a count -----------------------------------------------------


def uniform(count: int, device: torch.device | str = "cpu") -> Tensor:
    """t ~ U(0, 1)."""
    return torch.rand(count, device=device)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std * N(0, 1)). Esser et al., ICML 2024, arXiv 2403.03206."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(count, device=device))


@dataclass(frozen=True)
class UShape:
    """p(t) proportional to e^(a t) + e^(a (1 - t)) on [floor, 1 - floor], by its inverse. arXiv 2405.20320."""

    a: float = 4.0
    floor: float = 1e-5

    def __call__(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        u, side = torch.rand(2, count, device=device, dtype=torch.float64)
        s = torch.log1p(u * math.expm1(self.a)) / self.a
        s = torch.where(side < 0.5, s, 1 - s)
        return (self.floor + (1 - 2 * self.floor) * s).float()


@dataclass(frozen=True)
class LogNormalSigma:
    """EDM's density: ln sigma ~ N(mean, std^2); gives sigma itself, for a path whose time it is. arXiv 2206.00364."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.exp(self.mean + self.std * torch.randn(count, device=device))


# --- how far: distances per example, (b, ...) -> (b,) -------------------------------------------------------------


def mse(made: Tensor, true: Tensor) -> Tensor:
    """Mean squared difference."""
    return (made - true).square().flatten(1).mean(1)


def pseudo_huber(made: Tensor, true: Tensor, scale: float = 0.00054) -> Tensor:
    """(sqrt(||d||^2 + c^2) - c) / n with c = scale * n, n numbers an example. Song and Dhariwal, arXiv 2310.14189."""
    difference = (made - true).flatten(1)
    n = difference.shape[1]
    c = scale * n
    return ((difference.square().sum(1) + c * c).sqrt() - c) / n


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "huber": pseudo_huber}


# --- how much ------------------------------------------------------------------------------------------------------


def min_snr(path: Path, t: Tensor, kind: str, gamma: float = 5.0) -> Tensor:
    """Weights that cap the influence of nearly clean examples. Hang et al., ICCV 2023, arXiv 2303.09556."""
    snr = path.lam(t) ** 2
    capped = snr.clamp(max=gamma)
    weight = {"data": capped, "noise": capped / snr.clamp(min=1e-8), "v": capped / (snr + 1)}
    if kind not in weight:
        raise InputError(f"min-SNR weights are defined for data, noise and v, not for {kind}")
    return weight[kind].float()


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `(b, t, ...)` over all, or over the frames where `mask` `(b, t)` is true."""
    if mask is None:
        return error.mean()
    weight = spread(mask, error).expand_as(error)
    return (error * weight).sum() / weight.sum().clamp(min=1)
