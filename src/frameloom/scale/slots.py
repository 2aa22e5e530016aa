"""A key-value cache of equal slots, one a request, whose occupied slots lie side by side.

Every layer holds its keys and values as one array `(slots, heads, length, width)`, allocated once. Request i owns
segment i of all of them. As long as the occupied slots are contiguous, a decoding step is one dense computation on the
rows `[lo, hi)`, whatever step each request is at. When requests in the middle end, the others close ranks with as few
copies as can be (`minimal_moves`), and of a segment only what is filled is copied.

Part of Flover: see `frameloom.scale.flover` for the reference.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


def minimal_moves(occupied: Sequence[bool]) -> list[tuple[int, int]]:
    """Which slots to copy where, `(source, target)` in order, so that the occupied ones lie side by side.

    With a slots occupied, every window of a slots is a place where they could end up, at the cost of those outside it;
    the cheapest is taken (the first of equals), so that a - max(occupied inside a window) segments are copied, and
    no plan of single copies needs fewer. Outside occupants fill the window's gaps in increasing order.
    """
    count, total = sum(occupied), len(occupied)
    if count == 0:
        return []
    inside = sum(occupied[:count])
    best, begin = inside, 0
    for start in range(1, total - count + 1):
        inside += occupied[start + count - 1] - occupied[start - 1]
        if inside > best:
            best, begin = inside, start
    window = range(begin, begin + count)
    outside = [slot for slot, taken in enumerate(occupied) if taken and slot not in window]
    gaps = [slot for slot in window if not occupied[slot]]
    return list(zip(outside, gaps, strict=True))


class View:
    """The part of the cache that the next forward pass works on; all layers share one.

    `rows` is the range of slots, `positions` `(rows, tokens)` the columns that the new keys and values are written
    to, `columns` how many columns are read.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.rows, self.columns = slice(0, 0), 0
        self.positions = torch.zeros(0, 1, dtype=torch.long)

    def mask(self) -> Bool[Tensor, "rows 1 tokens columns"]:
        """What every new token may see: its own request's columns up to its own."""
        columns = torch.arange(self.columns, device=self.positions.device)
        return (columns <= self.positions[..., None])[:, None]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, for all slots."""

    is_sliding = False

    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not whatever was there: a masked column counts with weight 0, and 0 times NaN is NaN.
        shape = self.view.slots, key_states.shape[1], self.view.length
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Float[Tensor, "rows heads tokens k"], value_states: Float[Tensor, "rows heads tokens v"],
        *args: object, **kwargs: object
    ) -> tuple[Float[Tensor, "rows heads columns k"], Float[Tensor, "rows heads columns v"]]:  # fmt: skip
        """Write the new tokens of every row at its own position; everything that the rows hold, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self.view
        row = torch.arange(len(key_states), device=key_states.device)[:, None]
        keys, values = self.keys[view.rows], self.values[view.rows]
        keys[row, :, view.positions] = key_states.transpose(1, 2)
        values[row, :, view.positions] = value_states.transpose(1, 2)
        return keys[:, :, : view.columns], values[:, :, : view.columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.columns, 0

    def get_seq_length(self) -> int:
        return self.view.columns

    def get_max_length(self) -> int:
        return self.view.length


class SlotCache(Cache):
    """The cache that a transformers model is called with; `look` first says where.

    Args:
        layers: how many layers the model has.
        slots: requests that it holds.
        length: tokens of a request, prompt and answer together.
    """

    def __init__(self, layers: int, slots: int, length: int) -> None:
        self.view = View(slots, length)
        super().__init__(layers=[SlotLayer(self.view) for _ in range(layers)])

    def look(self, rows: slice, positions: Int[Tensor, "rows tokens"], columns: int) -> Bool[Tensor, "rows 1 tokens c"]:
        """Turn to the rows and positions of the next forward pass; the mask that it needs."""
        self.view.rows, self.view.positions, self.view.columns = rows, positions, columns
        return self.view.mask()

    def move(self, source: int, target: int, filled: int) -> int:
        """Copy the first `filled` columns of one slot over another; the bytes copied."""
        moved = 0
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                part[target, :, :filled] = part[source, :, :filled]
                moved += part[source, :, :filled].numel() * part.element_size()
        return moved

    def scrub(self, slot: int) -> None:
        """Zero a slot, so that a number that is none cannot reach its next occupant through a masked column."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot].zero_()
                layer.values[slot].zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first forward pass."""
        held = [part for layer in self.layers if layer.is_initialized for part in (layer.keys, layer.values)]
        return sum(part.numel() * part.element_size() for part in held)
