"""What a network predicts, as the pair (data, noise).

With `x~ = x_t - b*y = a*x0 + c*eps` every parameterisation is an affine map of its output; here are all of them, both
ways. Conversions are in float32 even under autocast: 1/a overflows in half precision near the end of a path.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.paths import Path, spread
from frameloom.errors import InputError

KINDS = ("data", "noise", "v", "velocity", "edm", "velocity-")


@dataclass(frozen=True)
class Prediction:
    """Estimates of the data and of the noise in x_t, each `(b, t, c, h, w)`; an edit may replace one of them."""

    x0: Float[Tensor, "b t c h w"]
    eps: Float[Tensor, "b t c h w"]

    @classmethod
    def from_x0(cls, path: Path, x: Tensor, t: Tensor, x0: Tensor, y: Tensor | None = None) -> "Prediction":
        """Of an estimate of the data: `eps = (x~ - a x0) / c` (zero where nothing is noisy)."""
        a, _, c, x = _parts(path, x, t, y)
        return cls(x0, (x - a * x0) / _safe(c) * (c > 0))

    @classmethod
    def from_eps(cls, path: Path, x: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> "Prediction":
        """Of an estimate of the noise: `x0 = (x~ - c eps) / a`.

        Raises InputError where the path holds nothing but noise: there noise says nothing about the data.
        """
        a, _, c, x = _parts(path, x, t, y)
        if bool((a == 0).any()):
            raise InputError("a network that predicts noise cannot start at a signal-to-noise ratio of 0; "
                             "sample from a lower time, or use one that predicts v or data")  # fmt: skip
        return cls((x - c * eps) / a, eps)


def _safe(value: Tensor) -> Tensor:
    return torch.where(value == 0, torch.ones_like(value), value)


def _parts(path: Path, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = (spread(value, x) for value in path.coef(t))
    x = x if x.dtype == torch.float64 else x.float()
    return a, b, c, x if y is None or not path.bridge else x - b * y


def _turn(path: Path, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Any, ...]:
    """`a, c, a', c', b'y` and the determinant of (x0, eps) -> (x~, u)."""
    a, _, c, x = _parts(path, x, t, y)
    da, db, dc = (spread(value.to(x.dtype), x) for value in path.rates(t))
    drift = 0.0 if y is None else db * y
    return a, c, da, dc, drift, a * dc - da * c, x


def to_prediction(
    kind: str,
    output: Float[Tensor, "b t c h w"],
    x: Float[Tensor, "b t c h w"],
    t: Tensor,
    path: Path,
    y: Tensor | None = None,
) -> Prediction:
    """What a network's raw output says about data and noise.

    Args:
        kind: `"data"` (x0), `"noise"` (eps), `"v"` ((a eps - c x0) / sqrt(a^2 + c^2)), `"velocity"` (dx/dt),
            `"velocity-"` (its negative, as InstaFlow's networks), `"edm"` (F of EDM with unit data) or
            `"difference"` (x_t - x0, as BBDM).
        x: x_t. t: its times, `(b,)` or `(b, t)`.
    """
    output = output if output.dtype == torch.float64 else output.float()
    if kind == "data":
        return Prediction.from_x0(path, x, t, output, y)
    if kind == "noise":
        return Prediction.from_eps(path, x, t, output, y)
    if kind == "v":
        a, _, c, x = _parts(path, x, t, y)
        n = torch.sqrt(a**2 + c**2)
        return Prediction((a * x / n - c * output) / n, (c * x / n + a * output) / n)
    if kind in ("velocity", "velocity-"):
        a, c, da, dc, drift, det, x = _turn(path, x, t, y)
        w = (output if kind == "velocity" else -output) - drift
        return Prediction((dc * x - c * w) / det, (a * w - da * x) / det)
    if kind == "edm":
        a, _, c, rest = _parts(path, x, t, y)
        n = torch.sqrt(a**2 + c**2)
        return Prediction.from_x0(path, x, t, a / n**2 * rest + c / n * output, y)
    if kind == "difference":
        return Prediction.from_x0(path, x, t, x - output, y)
    raise InputError(f"prediction {kind}: a network predicts {', '.join(KINDS)} or difference")


def target(
    kind: str,
    x0: Float[Tensor, "b t c h w"],
    eps: Float[Tensor, "b t c h w"],
    t: Tensor,
    path: Path,
    y: Tensor | None = None,
) -> Float[Tensor, "b t c h w"]:
    """What a network of that kind should have put out: the inverse of `to_prediction`."""
    if kind == "data":
        return x0
    if kind == "noise":
        return eps
    a, b, c = (spread(value, x0) for value in path.coef(t))
    if kind == "v":
        return (a * eps - c * x0) / torch.sqrt(a**2 + c**2)
    if kind in ("velocity", "velocity-"):
        da, db, dc = (spread(value.to(x0.dtype), x0) for value in path.rates(t))
        u = da * x0 + dc * eps + (0 if y is None else db * y)
        return u if kind == "velocity" else -u
    if kind == "edm":
        n = torch.sqrt(a**2 + c**2)
        return (x0 - a / n**2 * (a * x0 + c * eps)) * n / _safe(c)
    if kind == "difference":
        return (a - 1) * x0 + c * eps + (0 if y is None else b * y)
    raise InputError(f"prediction {kind}: a network predicts {', '.join(KINDS)} or difference")
