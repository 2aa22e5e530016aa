"""What an integer costs: Gaussians with a mean and a scale of their own, and a density that is learned.

Each model has two faces. For training it is differentiable: bits = -log2( F(x + 1/2) - F(x - 1/2) ). For a file it is
a row of integer frequencies, made in double precision on the CPU by `gaussian_table` or `FactorisedPrior.tables`
from numbers that both sides hold, and a value that no row covers is escaped, never clamped.

J. Ballé, D. Minnen, S. Singh, S. J. Hwang, N. Johnston, Variational image compression with a scale hyperprior, ICLR
2018, arXiv 1802.01436; D. Minnen, J. Ballé, G. Toderici, Joint autoregressive and hierarchical priors for learned
image compression, NeurIPS 2018, arXiv 1809.02736.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from scipy.special import ndtr
from torch import Tensor, nn

from frameloom.bitstream.rangecoder import Decoder, Encoder, Tables, intervals, table_from_probabilities, thirds
from frameloom.errors import InputError

SCALES = np.exp(np.linspace(np.log(0.11), np.log(256.0), 64))
_FRACTION_BITS = 4
FRACTIONS = 1 << _FRACTION_BITS  # means are kept to a sixteenth, so that the last bit of a float rarely moves a table
_FARTHEST = 1000.0  # standard deviations
_TAIL = 4.5  # standard deviations that a table covers to each side
_ROWS = 1 << 22  # frequencies that the values between two runs of escapes have in their tables, at most
# An escaped value is written in base 16, each digit with a mark of whether another follows.
_DIGITS = np.full(32, 1 << 11, np.int64)
_DIGIT, _FIRST = Tables(_DIGITS[None]), np.zeros(1, np.int64)
_MOST_DIGITS = 8


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def rounded(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The nearest integers; the gradient passes as if nothing had happened (straight-through)."""
    return _Round.apply(x)


def noisy(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` plus noise between -1/2 and 1/2: what rounding looks like to a density while training."""
    return x + torch.rand_like(x) - 0.5


def gaussian_bits(
    values: Float[Tensor, "..."], mean: Float[Tensor, "..."], scale: Float[Tensor, "..."], floor: float = 2.0**-64
) -> Float[Tensor, "..."]:
    """Bits of each value under N(mean, scale^2) integrated over one integer; differentiable, in float32 at least.

    `floor` is added to the probability and so bounds the bits: by default at what the longest escape takes.
    """
    # By symmetry both ends are taken on the side where the distribution function does not saturate at 1, and as
    # logarithms, since in float32 the function itself is 0 from 6 deviations on.
    distance = (values - mean).abs().to(torch.promote_types(values.dtype, torch.float32))
    # Logarithms, too, leave what a float holds; by then the floor alone counts.
    distance = torch.minimum(distance, _FARTHEST * scale + 0.5)
    upper, lower = (torch.special.log_ndtr((half - distance) / scale) for half in (0.5, -0.5))
    inside = upper + torch.log(-torch.expm1(lower - upper))
    return -torch.logaddexp(inside, torch.full_like(inside, floor).log()) / math.log(2)


def gaussian_table(mean: float, scale: float, low: int, high: int) -> Integer[np.ndarray, "k"]:
    """Frequencies of the integers low..high under N(mean, scale^2), and of an escape after them."""
    edges = np.arange(low, high + 2, dtype=np.float64) - 0.5 - mean
    below = ndtr(edges / scale)
    above = ndtr(-edges / scale)
    inside = np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return table_from_probabilities(np.append(inside, below[0] + above[-1]))


class Gaussians:
    """Codes integers, each under its own Gaussian, whose mean and scale the two sides compute alike.

    Scales go to the nearest (in ratio) of 64 between 0.11 and 256, means to a sixteenth, so there are 1,024 tables.
    In the bytes all values of one scale come together, the least scale first, and what they escape follows them.
    """

    scales, tail = SCALES, _TAIL
    table = staticmethod(gaussian_table)

    def __init__(self) -> None:
        self._reach = np.ceil(self.tail * self.scales).astype(np.int64) + 1
        self._tables = [
            Tables(np.stack([self.table(f / FRACTIONS, scale, -reach, reach + 1) for f in range(FRACTIONS)]))
            for scale, reach in zip(self.scales, self._reach.tolist(), strict=True)
        ]
        every = [intervals(tables) for tables in (*(one.frequencies for one in self._tables), _DIGITS)]
        starts, ends = (np.concatenate([edges[..., cut].ravel() for edges in every])
                        for cut in (slice(None, -1), slice(1, None)))  # fmt: skip
        self._which, self._frequencies = thirds(starts, ends)
        self._size = 2 * self._reach + 3
        self._begins = np.cumsum(FRACTIONS * self._size) - FRACTIONS * self._size

    def put(self, coder: Encoder, values: Int[Tensor, "n"], means: Float[Tensor, "n"], scales: Float[Tensor, "n"]):
        """Take values in; the same means and scales, in the same order, get them back."""
        level, fraction, low, order = self._sorted(means, scales)
        size = self._size[level]
        symbols = values.cpu().numpy().astype(np.int64)[order] - low
        outside = (symbols < 0) | (symbols >= size - 1)
        at = self._begins[level] + fraction * size + np.where(outside, size - 1, symbols)
        if outside.any():
            digits, counts = _spelled(symbols[outside])
            stops = np.array([stop for _, _, stop in self._batches(level)])
            after = stops[np.searchsorted(stops, np.flatnonzero(outside), side="right")].repeat(counts)
            at = np.insert(at, after, len(self._which) - len(_DIGITS) + digits)
        coder.put_thirds(self._which[at], self._frequencies.take(at, 0))

    def get(self, coder: Decoder, means: Float[Tensor, "n"], scales: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
        """The values that `put` took. Raises InputError for bytes that it cannot have made."""
        level, fraction, low, order = self._sorted(means, scales)
        symbols = np.empty(len(low), np.int64)
        for scale, start, stop in self._batches(level):
            found = coder.get_rows(self._tables[scale], fraction[start:stop])
            symbols[start:stop] = found
            for place in np.flatnonzero(found == self._size[scale] - 1):
                symbols[start + place] = _escaped(coder)
        values = np.empty_like(symbols)
        values[order] = symbols + low
        return torch.from_numpy(values)

    def _sorted(self, means: Float[Tensor, "n"], scales: Float[Tensor, "n"]) -> tuple[np.ndarray, ...]:
        """By scale: the scale's number, the mean's sixteenth, the integer where the table begins; and the order."""
        means, scales = (x.detach().cpu().numpy().astype(np.float64) for x in (means, scales))
        if not (np.isfinite(means).all() and np.isfinite(scales).all()):
            raise InputError("the entropy model's numbers are not finite")
        least, most = self.scales[0], self.scales[-1]
        step = np.log(self.scales[1] / least)
        level = np.round(np.log(np.clip(scales, least, most) / least) / step).astype(np.uint8)
        order = np.argsort(level, kind="stable")
        level = level[order].astype(np.int64)
        sixteenths = np.round(np.clip(means[order], -1e6, 1e6) * FRACTIONS).astype(np.int64)
        return level, sixteenths & (FRACTIONS - 1), (sixteenths >> _FRACTION_BITS) - self._reach[level], order

    def _batches(self, level: Integer[np.ndarray, "n"]) -> Iterator[tuple[int, int, int]]:
        """Each scale that occurs, with where its values begin and end; escapes follow so many of them at most."""
        counts = np.bincount(level)
        end = 0
        for scale in np.flatnonzero(counts).tolist():
            begin, end = end, end + int(counts[scale])
            most = max(1, _ROWS // int(self._size[scale]))
            for start in range(begin, end, most):
                yield scale, start, min(start + most, end)

    def digest(self) -> int:
        """A checksum of all tables: two machines that agree on it decode each other's files."""
        return zlib.crc32(b"".join(tables.frequencies.astype("<i4").tobytes() for tables in self._tables))


class FactorisedPrior(nn.Module):
    """A density for each channel, learned: F is a chain of x <- softplus(h) x + b, x <- x + tanh(a) tanh(x).

    The chain ends in a sigmoid, so F rises from 0 to 1 whatever its parameters. Its coefficients are not bounded by
    a family of shapes, and one chain of `steps` per channel is all there is to store.
    """

    def __init__(self, channels: int, steps: int = 4) -> None:
        super().__init__()
        self.stretch = nn.Parameter(0.01 * torch.randn(steps, channels))
        self.shift = nn.Parameter(0.01 * torch.randn(steps, channels))
        self.bend = nn.Parameter(0.01 * torch.randn(steps - 1, channels))

    def logits(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """F before its sigmoid."""
        for step in range(len(self.stretch)):
            x = F.softplus(self.stretch[step]) * x + self.shift[step]
            if step < len(self.bend):
                x = x + torch.tanh(self.bend[step]) * torch.tanh(x)
        return x

    def bits(self, values: Float[Tensor, "n c"], floor: float = 1e-9) -> Float[Tensor, "n c"]:
        """Bits of each value, integrated over one integer; differentiable."""
        lower, upper = self.logits(values - 0.5), self.logits(values + 0.5)
        # Where both ends lie near 1, the same difference is taken from the other side, where it is not lost.
        side = -torch.sign(lower + upper).detach()
        inside = (torch.sigmoid(side * upper) - torch.sigmoid(side * lower)).abs()
        return -torch.log2(inside + floor)

    @torch.no_grad()
    def tables(self, low: int, high: int) -> Integer[np.ndarray, "c k"]:
        """Frequencies of the integers low..high for every channel, and of an escape after them."""
        twin = FactorisedPrior(self.stretch.shape[1], len(self.stretch)).double()
        twin.load_state_dict({name: value.detach().cpu().double() for name, value in self.state_dict().items()})
        edges = torch.arange(low, high + 2, dtype=torch.float64) - 0.5
        logits = twin.logits(edges[:, None].expand(-1, self.stretch.shape[1]))
        below, above = torch.sigmoid(logits).numpy(), torch.sigmoid(-logits).numpy()
        inside = np.where(below[:-1] > 0.5, above[:-1] - above[1:], below[1:] - below[:-1])
        every = np.concatenate([inside, (below[0] + above[-1])[None]])
        return np.stack([table_from_probabilities(column) for column in every.T])


def put_values(
    coder: Encoder,
    values: Integer[np.ndarray, "n"],
    tables: Integer[np.ndarray, "n k"],
    lows: Integer[np.ndarray, "n"],
) -> None:
    """Code values whose tables begin at `lows` and end in an escape; what is escaped follows, digit by digit."""
    escape = tables.shape[1] - 1
    symbols = values - lows
    outside = (symbols < 0) | (symbols >= escape)
    coder.put_each(np.where(outside, escape, symbols), tables)
    coder.put(_spelled(symbols[outside])[0], _DIGITS)


def get_values(
    coder: Decoder, tables: Integer[np.ndarray, "n k"], lows: Integer[np.ndarray, "n"]
) -> Integer[np.ndarray, "n"]:
    """The values that `put_values` coded. Raises InputError for an escape that never ends."""
    symbols = coder.get_each(tables).astype(np.int64)
    for place in np.flatnonzero(symbols == tables.shape[1] - 1):
        symbols[place] = _escaped(coder)
    return symbols + lows


def _spelled(distances: Integer[np.ndarray, "n"]) -> tuple[Integer[np.ndarray, "m"], list[int]]:
    """The digits of escaped values, one value after the other, and how many each has."""
    digits, counts = [], []
    for distance in distances.tolist():
        number = 2 * distance if distance >= 0 else -2 * distance - 1
        spelled = [number >> shift & 15 for shift in range(0, max(number.bit_length(), 1), 4)]
        if len(spelled) > _MOST_DIGITS:
            raise ValueError(f"{distance} is too far from what was expected to be coded")
        digits += [digit + 16 * (place + 1 < len(spelled)) for place, digit in enumerate(spelled)]
        counts.append(len(spelled))
    return np.array(digits, np.int64), counts


def _escaped(coder: Decoder) -> int:
    """The distance that `_spelled` wrote."""
    number = 0
    for place in range(_MOST_DIGITS):
        (digit,) = coder.get_rows(_DIGIT, _FIRST)
        number |= int(digit & 15) << 4 * place
        if digit < 16:
            return number // 2 if number % 2 == 0 else -(number + 1) // 2
    raise InputError("the coded symbols are damaged")
