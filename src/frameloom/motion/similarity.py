"""Similarities of the picture plane: what a camera does to a picture, in four numbers a frame.

    p'  =  c + exp(s) R(a) (p - c) + (x, y)            c the picture's centre, p in pixels

The four numbers are (x, y, a, s): pixels, radians, logarithm of the scale. For motions as small as those between
frames, composing two similarities adds their numbers to first order; the path of a camera is therefore their running
sum, and smoothing it is linear.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import correlate1d
from torch import Tensor

# How far a residual may be off before a point counts as moving by itself: from loose to strict, pixels.
_SCALES = (2.0, 1.0, 0.5, 0.5)


def matrix(numbers: Float[np.ndarray, "4"], height: int, width: int) -> Float[np.ndarray, "3 3"]:
    """The similarity of (x, y, a, s) as a matrix for pixel coordinates (x, y, 1) of a picture of that size."""
    x, y, angle, scale = numbers
    cx, cy = (width - 1) / 2, (height - 1) / 2
    cos, sin = math.exp(scale) * math.cos(angle), math.exp(scale) * math.sin(angle)
    return np.array([
        [cos, -sin, cx + x - cos * cx + sin * cy],
        [sin, cos, cy + y - sin * cx - cos * cy],
        [0, 0, 1],
    ])  # fmt: skip


def numbers(matrix: Float[np.ndarray, "r 3"], height: int, width: int) -> Float[np.ndarray, "4"]:
    """(x, y, a, s) of a similarity given as a matrix: the inverse of `matrix`."""
    cx, cy = (width - 1) / 2, (height - 1) / 2
    x, y = matrix[:2] @ (cx, cy, 1)
    cos, sin = matrix[0, 0], matrix[1, 0]
    return np.array([x - cx, y - cy, math.atan2(sin, cos), math.log(math.hypot(sin, cos))])


def rescaled(numbers: Float[np.ndarray, "*n 4"], factor: float | int) -> Float[np.ndarray, "*n 4"]:
    """The same motion in a picture that is `factor` times as large."""
    return numbers * (factor, factor, 1, 1)


def fit_similarity(
    flow: Float[Tensor, "b 2 h w"], weight: Float[Tensor, "b 1 h w"], robust: bool = True
) -> Float[Tensor, "b 4"]:
    """The similarity (x, y, a, s) nearest to a flow, float64; by weighted least squares in closed form.

    `robust` begins with the best of 256 similarities through two points each and repeats the least squares with
    Geman-McClure weights 1 / (1 + (r / scale)^2)^2 of the residuals r, the scale going from two pixels to half of one:
    the largest group of points that agree wins, and what moves by itself is left out. A clip without weight anywhere
    gives zeros.

    M. Fischler, R. Bolles, Random Sample Consensus, CACM 1981; M. Black, A. Rangarajan, On the Unification of Line
    Processes, Outlier Rejection, and Robust Statistics, IJCV 1996.
    """
    _batch, _, height, width = flow.shape
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width)), indexing="ij")
    p = torch.complex(x, y).flatten().to(flow.device)
    f, given = torch.complex(*flow.double().flatten(2).unbind(1)), weight.double().flatten(1)
    if robust:
        linear, shift = _consensus(p, f, given)
    else:
        linear, shift = _least_squares(p, f, given)
    for scale in _SCALES if robust else ():
        linear, shift = _least_squares(p, f, given * _belief(f - linear * p - shift, scale))
    whole = 1 + linear[:, 0]
    return torch.stack([shift[:, 0].real, shift[:, 0].imag, whole.angle(), whole.abs().log()], 1)


def _least_squares(p: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """f = linear * p + shift, all complex numbers: a product turns and scales. Each `(b, 1)`."""
    share = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    mean_p, mean_f = (share * p).sum(1, keepdim=True), (share * f).sum(1, keepdim=True)
    dp = p - mean_p
    spread = (share * dp.abs().square()).sum(1, keepdim=True).clamp(min=1e-9)
    linear = (share * dp.conj() * (f - mean_f)).sum(1, keepdim=True) / spread
    return linear, mean_f - linear * mean_p


def _belief(residual: Tensor, scale: float) -> Tensor:
    return 1 / (1 + residual.abs().square() / scale**2) ** 2


def _consensus(p: Tensor, f: Tensor, weight: Tensor, tries: int = 256, judges: int = 512) -> tuple[Tensor, Tensor]:
    """The similarity through two points with which most of the others agree; points are drawn by their weight."""
    dice = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(weight.cpu() + 1e-12, 2 * tries + judges, replacement=True, generator=dice).to(p.device)
    first, second, judging = drawn.split([tries, tries, judges], 1)
    gap = p[first] - p[second]
    far = gap.abs() > 1
    linear = torch.where(far, (f.gather(1, first) - f.gather(1, second)) / torch.where(far, gap, 1), 0)
    shift = f.gather(1, first) - linear * p[first]
    residual = f.gather(1, judging)[:, None] - linear[..., None] * p[judging][:, None] - shift[..., None]
    best = _belief(residual, 1.0).sum(2).argmax(1, keepdim=True)
    return linear.gather(1, best), shift.gather(1, best)


def similarity_flow(numbers: Float[Tensor, "b 4"], height: int, width: int) -> Float[Tensor, "b 2 h w"]:
    """The flow p' - p of similarities, in pixels."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=numbers.dtype) - (n - 1) / 2 for n in (height, width)), indexing="ij")
    x, y = x.to(numbers.device), y.to(numbers.device)
    shift_x, shift_y, angle, scale = (value[:, None, None] for value in numbers.unbind(1))
    cos, sin = scale.exp() * angle.cos(), scale.exp() * angle.sin()
    return torch.stack([cos * x - sin * y + shift_x - x, sin * x + cos * y + shift_y - y], 1)


def path_of(motions: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n+1 4"]:
    """Where the scene stands in every frame: the running sum of the motions between frames, 0 in the first."""
    return np.concatenate([np.zeros((1, 4)), np.cumsum(motions, 0)])


def kernel(sigma: float | int) -> Float[np.ndarray, "taps"]:
    """A Gaussian window that sums to 1, cut at three sigma (in frames)."""
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    taps = np.exp(-0.5 * (reach / max(sigma, 1e-9)) ** 2)
    return taps / taps.sum()


def smooth(path: Float[np.ndarray, "t k"], sigma: float | int) -> Float[np.ndarray, "t k"]:
    """A path under a Gaussian window of `sigma` frames: the value at t of the straight line nearest to it there.

    Away from the ends that is the plain weighted mean. At the ends it leans on nobody's frame: an even pan stays
    exactly what it is, and a first frame that shook is moved like any other.

    J. Fan, Design-adaptive Nonparametric Regression, JASA 1992.
    """
    taps = kernel(sigma)
    offset = np.arange(len(taps)) - len(taps) // 2

    def moment(values: np.ndarray, power: int) -> np.ndarray:
        return correlate1d(values, taps * offset.astype(float) ** power, axis=0, mode="constant")

    # Weighted least squares in closed form, from the moments of the frames that there are.
    ones = np.ones((len(path), 1))
    mass, lean, spread = (moment(ones, power) for power in range(3))
    mean, slope = moment(path, 0), moment(path, 1)
    whole = mass * spread - lean**2
    line = (spread * mean - lean * slope) / np.maximum(whole, 1e-12)
    return np.where(whole > 1e-9, line, mean / mass)


def shift_of(numbers: Float[np.ndarray, "*n 4"], height: int, width: int) -> Float[np.ndarray, "*n"]:
    """How far the similarities move the corners of a picture, at most, in pixels (to first order)."""
    x, y, angle, scale = np.moveaxis(np.abs(numbers), -1, 0)
    radius = math.hypot(height, width) / 2
    return np.hypot(x, y) + radius * np.hypot(angle, scale)
