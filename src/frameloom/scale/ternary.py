"""Ternary weights in less than a bit each: the quantiser, the dictionary code, and products without decoding.

A row of weights w becomes levels {lo, 0, hi} with lo = min(w, 0) and hi = max(w, 0), every weight going to its nearest
level. Rows are nearly Gaussian, so half of the extreme value is far out and most weights become 0: 88% of a row of 768.
The code lives on those zeros. It maps *variable* runs of weights to *fixed* words of 16 bits: the 2^16 most likely
sequences of 1 to 14 pairs under independent weights with p(0) = 0.885, p(lo) = p(hi) = 0.0575, by longest match. Every
prefix of an entry is an entry, so a match can stop anywhere, and rows are coded one by one, so that a row can be
multiplied with a vector by itself. A file carries, beside the words, the offset of every row (32 bits) and its two
levels (bfloat16).

An entry of the dictionary holds at most three weights that are not zero (0.0575^4 is less likely than its last entry).
A product therefore reads a word, adds at most three values of the input, and moves on: it touches an eighth of the
positions and never makes the matrix. The sums are those of an embedding bag whose table is the input itself.

E. Frantar, D. Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models", 2023, arXiv 2310.16795.
"""

import hashlib
import heapq
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int16, Int32
from torch import Tensor, nn

from frameloom.errors import InputError

ZERO, LOW, HIGH = 0, 1, 2
_PAIR = 9  # symbols of a pair: first + 3 * second


@dataclass(frozen=True)
class Dictionary:
    """The 2^16 most likely sequences of pairs, as tables.

    Attributes:
        lengths: weights of an entry, twice its pairs, `(n,)`.
        trits: its weights, 0 behind its end, `(n, 2 * pairs)` of {0: zero, 1: lo, 2: hi}.
        children: which entry an entry becomes with one more pair, or -1; the last row is the empty entry.
        places: where its non-zero weights are, `(n, most)`; the last one repeated as often as there is room.
        kinds: what they are, `(n, most)`, repeated likewise: writing a weight twice changes nothing.
        slots: `3 * place + kind`, `(n, most)`; padded with 0 (a zero weight), since adding twice would.
        checksum: SHA-256 of lengths and weights.
    """

    zero: float
    pairs: int
    lengths: Int32[Tensor, "n"]
    trits: Int8[Tensor, "n k"]
    children: Int32[Tensor, "m 9"]
    places: Int32[Tensor, "n most"]
    kinds: Int8[Tensor, "n most"]
    slots: Int32[Tensor, "n most"]
    checksum: str

    def __len__(self) -> int:
        return len(self.lengths)


@cache
def dictionary(zero: float = 0.885, pairs: int = 14, size: int = 1 << 16) -> Dictionary:
    """Build the code's dictionary; the one of published files for the default arguments. Takes about a second.

    Args:
        zero: the probability of a zero weight; the two levels share the rest.
        pairs: the longest entry, in pairs of weights.
        size: the number of entries, 9 (every single pair) to 2^16.
    """
    if not (0 < zero < 1 and 1 <= pairs <= 14 and _PAIR <= size <= 1 << 16):
        raise InputError(f"no dictionary has p(0) = {zero}, {pairs} pairs and {size} entries; 0.885, 14 and 65536 do")
    single = [zero, (1 - zero) / 2, (1 - zero) / 2]
    double = [first * second for first in single for second in single]
    # Ties of equal probability are broken by the sequence; another order of products or of ties is another code.
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < size:
        weight, sequence = heapq.heappop(heap)
        if sequence:
            chosen.append(sequence)
        if len(sequence) < pairs:
            for symbol in range(_PAIR):
                heapq.heappush(heap, (weight * double[symbol], (*sequence, symbol)))
    if len(chosen) < size or not all((symbol,) in set(chosen[: 1 << 12]) for symbol in range(_PAIR)):
        raise InputError(
            f"{size} entries of up to {pairs} pairs at p(0) = {zero} leave out a pair; try 0.885 and 65536"
        )
    index = {sequence: number for number, sequence in enumerate(chosen)} | {(): size}
    lengths = np.array([2 * len(sequence) for sequence in chosen], np.int32)
    flat = np.zeros((size, pairs), np.int8)
    flat[np.arange(pairs) < lengths[:, None] // 2] = [symbol for sequence in chosen for symbol in sequence]
    trits = np.stack([flat % 3, flat // 3], -1).reshape(size, -1)
    children = np.full((size + 1, _PAIR), -1, np.int32)
    for number, sequence in enumerate(chosen):
        children[index[sequence[:-1]], sequence[-1]] = number
    tables = [torch.from_numpy(table) for table in (lengths, trits, children, *_places(trits))]
    checksum = hashlib.sha256(lengths.astype("<i4").tobytes() + trits.tobytes()).hexdigest()
    return Dictionary(zero, pairs, *tables, checksum)


def _places(trits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = (trits > 0).sum(1)
    most = np.arange(max(1, counts.max()))
    order = np.argsort(trits == 0, axis=1, kind="stable")[:, : len(most)].astype(np.int32)
    found = np.take_along_axis(trits, order, 1)
    slots = np.where(found > 0, 3 * order + found, 0).astype(np.int32)
    last = np.minimum(most, np.maximum(counts, 1)[:, None] - 1)
    return np.take_along_axis(order, last, 1), np.take_along_axis(found, last, 1), slots


def encode(trits: Int8[Tensor, "h w"], code: Dictionary | None = None) -> tuple[Int16[Tensor, "n"], Int32[Tensor, "m"]]:
    """The code of a ternary matrix: its words (uint16, kept as int16) and where in them every row begins, `h + 1`.

    Args:
        trits: 0 for zero, 1 for lo, 2 for hi. An odd row gets a zero more.
        code: the dictionary; the published one if None.

    Raises:
        InputError: a matrix of 2^31 weights or more, or without any.
    """
    code = code or dictionary()
    height, width = trits.shape
    if not 0 < height * (width + width % 2) < 1 << 31:
        raise InputError(f"a matrix of {height} x {width} weights cannot be coded; one to 2^31 - 1 weights can")
    table = F.pad(trits, (0, width % 2)).cpu().numpy()
    symbols = np.ascontiguousarray((table[:, 0::2] + 3 * table[:, 1::2]).T).astype(np.int64)
    children, empty = code.children.numpy().reshape(-1), len(code)
    node = np.full(height, empty, np.int64)
    words = np.full((len(symbols) + 1, height), -1, np.int32)
    # All rows walk the trie in step; a row that cannot go on gives its word and begins anew with the same pair.
    for step, symbol in enumerate(symbols):
        child = children[node * _PAIR + symbol]
        stuck = child < 0
        words[step][stuck] = node[stuck]
        node = np.where(stuck, children[empty * _PAIR + symbol], child).astype(np.int64)
    words[-1] = node
    words = words.T
    given = words >= 0
    offsets = np.concatenate([[0], given.sum(1).cumsum()]).astype(np.int32)
    return torch.from_numpy(words[given].astype(np.uint16).view(np.int16)), torch.from_numpy(offsets)


def decode(words: Int16[Tensor, "n"], offsets: Int32[Tensor, "m"], width: int,
           code: Dictionary | None = None) -> Int8[Tensor, "h w"]:  # fmt: skip
    """The matrix that `encode` took. Takes only what `check` lets through."""
    code = code or dictionary()
    even = width + width % 2
    index, begin = _walk(words, code)
    matrix = torch.zeros((len(offsets) - 1) * even, dtype=torch.int8)
    at = (begin[:, None] + code.places.index_select(0, index)).view(-1)
    matrix.scatter_(0, at.long(), code.kinds.index_select(0, index).view(-1))
    return matrix.view(-1, even)[:, :width]


def dense(words: Int16[Tensor, "n"], offsets: Int32[Tensor, "m"], levels: Float[Tensor, "h 2"], width: int,
          code: Dictionary | None = None) -> Float[Tensor, "h w"]:  # fmt: skip
    """The matrix with its levels in place, written in one go: faster than `spread(decode(...))`, and equal to it."""
    code = code or dictionary()
    height, even = len(offsets) - 1, width + width % 2
    index, begin = _walk(words, code)
    table = F.pad(levels, (1, 0)).view(-1)  # 0, lo, hi of every row
    row = torch.repeat_interleave(torch.arange(0, 3 * height, 3, dtype=torch.int32), offsets.diff())
    values = table.index_select(0, (row[:, None] + code.kinds.index_select(0, index)).view(-1))
    at = (begin[:, None] + code.places.index_select(0, index)).view(-1)
    return levels.new_zeros(height * even).scatter_(0, at.long(), values).view(height, even)[:, :width]


def check(words: Int16[Tensor, "n"], offsets: Int32[Tensor, "m"], width: int, code: Dictionary | None = None) -> None:
    """InputError unless words and offsets are those of a matrix whose rows have `width` weights."""
    code = code or dictionary()
    if len(code) < 1 << 16 and bool(((words.int() & 0xFFFF) >= len(code)).any()):
        raise InputError("a word of the code is not in its dictionary; the file is damaged")
    steps = offsets.diff()
    if len(steps) == 0 or int(offsets[0]) or int(offsets[-1]) != len(words) or bool((steps < 1).any()):
        raise InputError("the rows of the code do not cover its words; the file is damaged")
    even = width + width % 2
    if len(steps) * even >= 1 << 31:
        raise InputError(f"a matrix of {len(steps)} x {width} weights cannot be meant; at most 2^31 - 1 weights are")
    ends = torch.cat([offsets.new_zeros(1).long(), _lengths(words, code).long().cumsum(0)])[offsets.long()]
    if bool((ends != even * torch.arange(len(offsets))).any()):
        raise InputError(f"a row of the code has not {width} weights; the file is damaged")


def multiply(x: Float[Tensor, "b w"], words: Int16[Tensor, "n"], offsets: Int32[Tensor, "m"],
             levels: Float[Tensor, "h 2"], code: Dictionary | None = None) -> Float[Tensor, "b h"]:  # fmt: skip
    """`x @ W.T` straight from the code, for the matrix W whose rows have these levels (lo, hi)."""
    code = code or dictionary()
    batch, width = x.shape
    even = width + width % 2
    index, begin = _walk(words, code)
    slots = (3 * (begin % even))[:, None] + code.slots.index_select(0, index)
    # Row 3j + kind of the table is what a weight of that kind at column j adds: to the sum of lo, or to that of hi.
    table = x.new_zeros(even, 3, 2 * batch)
    table[:width, LOW, :batch] = table[:width, HIGH, batch:] = x.t()
    sums = F.embedding_bag(slots.view(-1), table.view(3 * even, -1), offsets[:-1] * slots.shape[1], mode="sum")
    return (sums[:, :batch] * levels[:, :1] + sums[:, batch:] * levels[:, 1:]).t()


def _lengths(words: Tensor, code: Dictionary) -> Tensor:
    return code.lengths.index_select(0, words.int() & 0xFFFF)


def _walk(words: Tensor, code: Dictionary) -> tuple[Tensor, Tensor]:
    # Every row is even in length, so that one running sum over all words tells where each begins in the matrix.
    index = words.int() & 0xFFFF
    lengths = code.lengths.index_select(0, index)
    return index, torch.cumsum(lengths, 0, dtype=torch.int32) - lengths


def levels(w: Float[Tensor, "*e h w"]) -> Float[Tensor, "*e h 2"]:
    """The levels (lo, hi) of every row, as bfloat16 keeps them; (-1, 1) for a row of zeros."""
    found = torch.stack([w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)], -1)
    found = torch.where((found == 0).all(-1, keepdim=True), torch.tensor([-1.0, 1.0]).to(found), found)
    return found.bfloat16().float()


def quantise(w: Float[Tensor, "*e h w"], levels: Float[Tensor, "*e h 2"]) -> Int8[Tensor, "*e h w"]:
    """Every weight as its nearest level: hi above hi/2, lo below lo/2, else zero (at the very half, too)."""
    return (w < levels[..., :1] / 2).to(torch.int8) * LOW + (w > levels[..., 1:] / 2).to(torch.int8) * HIGH


class TernaryLinear(nn.Module):
    """A linear layer without bias whose matrix lives in the code; `y = x W^T`, never decoded.

    Its state has the names of published files: `w_comp` (the words), `row_off` and `ter_minmax` (lo and hi of every
    row by turns, bfloat16).

    Args:
        words, offsets: as `encode` returns them.
        levels: (lo, hi) of every row.
        width: input features.

    Raises:
        InputError: words that are not such a matrix.
    """

    def __init__(self, words: Int16[Tensor, "n"], offsets: Int32[Tensor, "m"], levels: Tensor, width: int) -> None:
        super().__init__()
        check(words, offsets, width)
        if levels.numel() != 2 * (len(offsets) - 1):
            raise InputError(f"{len(offsets) - 1} rows of the code have {levels.numel()} levels; two a row are right")
        self.in_features, self.out_features = width, len(offsets) - 1
        self.register_buffer("w_comp", words)
        self.register_buffer("row_off", offsets)
        self.register_buffer("ter_minmax", levels.reshape(-1).bfloat16())

    @classmethod
    def from_dense(cls, w: Float[Tensor, "h w"]) -> "TernaryLinear":
        """Round a matrix to its nearest levels and code it; a matrix that is ternary by rows comes back as it was."""
        rows = levels(w.float())
        return cls(*encode(quantise(w.float(), rows)), rows, w.shape[1])

    @property
    def levels(self) -> Float[Tensor, "h 2"]:
        return self.ter_minmax.view(-1, 2).float()

    @property
    def bits(self) -> float:
        """Bits of a weight, with its share of offsets and levels."""
        size = sum(value.numel() * value.element_size() for value in self.buffers())
        return 8 * size / (self.in_features * self.out_features)

    def trits(self) -> Int8[Tensor, "h w"]:
        return decode(self.w_comp, self.row_off, self.in_features)

    def dense(self) -> Float[Tensor, "h w"]:
        """The matrix, in float32."""
        return dense(self.w_comp, self.row_off, self.levels, self.in_features)

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b h"]:
        flat = multiply(x.reshape(-1, x.shape[-1]).float(), self.w_comp, self.row_off, self.levels)
        return flat.view(*x.shape[:-1], -1).to(x.dtype)


def spread(trits: Int8[Tensor, "*e h w"], levels: Float[Tensor, "*e h 2"]) -> Float[Tensor, "*e h w"]:
    """Trits as weights."""
    return (trits == LOW) * levels[..., :1] + (trits == HIGH) * levels[..., 1:]
