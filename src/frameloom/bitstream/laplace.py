"""Laplace densities of integers, as `entropy` has Gaussians: exp(-|x - mean| / scale) / (2 scale).

Their tails are longer, and their scale may be far below one integer, where a value that is expected costs next to
nothing.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from frameloom.bitstream.entropy import Gaussians
from frameloom.bitstream.rangecoder import table_from_probabilities

LAPLACE_SCALES = np.exp(np.linspace(np.log(0.03), np.log(128.0), 64))
_TAIL = 12.0  # scales that a table covers to each side: exp(-12) is what is left of a distribution


def laplace_bits(
    values: Float[Tensor, "..."], mean: Float[Tensor, "..."], scale: Float[Tensor, "..."], floor: float = 1e-10
) -> Float[Tensor, "..."]:
    """Bits of each value under Laplace(mean, scale) integrated over one integer; differentiable. `floor` bounds them.

    Where the integer holds the mean or touches it, p = 1 - exp(-1 / 2b) cosh(d / b); beyond, both ends lie on one side
    and p = exp(-d / b) sinh(1 / 2b). Each is written with exponents that are never above 0.
    """
    distance = (values - mean).abs()
    near, far = (0.5 - distance) / scale, (0.5 + distance) / scale
    ends = (torch.exp(-near.clamp(min=0)) + torch.exp(-far)) / 2
    tail = -torch.exp(near.clamp(max=0)) * torch.expm1(-1 / scale) / 2
    return -torch.log2(torch.where(near > 0, 1 - ends, tail) + floor)


def laplace_table(mean: float, scale: float, low: int, high: int) -> Integer[np.ndarray, "k"]:
    """Frequencies of the integers low..high under Laplace(mean, scale), and of an escape after them."""
    edges = (np.arange(low, high + 2, dtype=np.float64) - 0.5 - mean) / scale
    below, above = (np.where(x < 0, np.exp(np.minimum(x, 0)) / 2, 1 - np.exp(-np.maximum(x, 0)) / 2)
                    for x in (edges, -edges))  # fmt: skip
    inside = np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return table_from_probabilities(np.append(inside, below[0] + above[-1]))


class Laplaces(Gaussians):
    """Codes integers, each under its own Laplace density; scales between 0.03 and 128."""

    scales, tail = LAPLACE_SCALES, _TAIL
    table = staticmethod(laplace_table)


class LaplacePrior(nn.Module):
    """One Laplace density for each channel: what `FactorisedPrior` is of another shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(2 * torch.rand(channels) - 1)

    def bits(self, values: Float[Tensor, "n c"], floor: float = 1e-8) -> Float[Tensor, "n c"]:
        """Bits of each value, integrated over one integer; differentiable."""
        return laplace_bits(values, self.mean, self.log_scale.exp(), floor)

    @torch.no_grad()
    def tables(self, low: int, high: int) -> Integer[np.ndarray, "c k"]:
        """Frequencies of the integers low..high for every channel, and of an escape after them."""
        means, scales = self.mean.double().tolist(), self.log_scale.double().tolist()
        return np.stack([laplace_table(mean, math.exp(min(max(scale, -10), 11)), low, high)
                         for mean, scale in zip(means, scales, strict=True)])  # fmt: skip
