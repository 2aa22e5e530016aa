"""The window of a superpipeline: a few slots on the device that the weights of many blocks take turns in.

A slot is one flat piece of memory that is never given back, so that loading allocates nothing. A thread of its own
copies from the store into slots that are free while the blocks in the other slots compute.

What comes next is known: after block i of a forward pass come i + 1, ..., n - 1 and then 0 again, or, where gradients
are kept, n - 1 back to 0. So whenever k' blocks are finished, those that are needed last of all give their slots to
those that are needed first and are not there. In a forward pass this slides the window along; at the turn between
forward and backward it does nothing, since the blocks that come next are the ones that are there. A block that is
needed and not there, because the order was not what it had been, is loaded then and there: slower, never wrong.

Autograd keeps views of weights for the backward pass. A view of a slot would read another block's weights by then, so
what is kept instead is an address (block, offset, shape), and the view is made when the backward pass asks for it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from frameloom.errors import InputError
from frameloom.scale.blocks import Block
from frameloom.scale.store import ALIGNMENT, Store


@dataclass(frozen=True)
class Place:
    """Where a parameter is in a slot: at `begin` bytes."""

    parameter: nn.Parameter
    begin: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a block's parameters lie in a slot of `bytes`: every one begins where an allocation of its own might.

    Matrix products may round otherwise on memory that is less aligned.
    """

    places: dict[str, Place]
    bytes: int

    @staticmethod
    def of(block: Block) -> "Layout":
        places, end = {}, 0
        for name, value in block.parameters.items():
            # A placeholder has no strides of its own; its weights come as a file has them.
            stride = torch.empty(value.shape, device="meta").stride() if is_placeholder(value) else value.stride()
            places[name] = Place(value, end, value.shape, stride)
            end += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
        return Layout(places, end)


@dataclass(frozen=True)
class Address:
    """A tensor that was kept for the backward pass and lies in a slot, as where it will be then."""

    block: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Slot:
    """Memory on the device for the weights of one block after another."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.flat = torch.empty(count, dtype=torch.uint8, device=device)
        self.loading: Future | None = None
        self.versions: list[int] = []  # of the parameters when the slot and the store held the same
        self.idle: Any = None  # on a GPU, the event after which nobody computes with what is in it

    def views(self, layout: Layout) -> dict[str, Tensor]:
        found = {}
        for name, place in layout.places.items():
            dtype = place.parameter.dtype
            flat = self.flat[place.begin : place.begin + place.shape.numel() * dtype.itemsize].view(dtype)
            found[name] = flat.as_strided(place.shape, place.stride)
        return found

    def holds(self, value: Tensor) -> bool:
        """Whether a tensor lies in this slot."""
        plain = type(value) in (Tensor, nn.Parameter) and value.device == self.flat.device
        return plain and value.untyped_storage().data_ptr() == self.flat.data_ptr()

    def at(self, address: Address) -> Tensor:
        found = torch.empty(0, dtype=address.dtype, device=self.flat.device)
        return found.set_(self.flat.untyped_storage(), address.offset, address.shape, address.stride)


class Window:
    """Blocks in slots. `need` a block before it computes, `finish` it after; the rest happens by itself.

    Args:
        keep: numbers of blocks that get a slot for good; the others take turns in `slots` slots.
        batch: how many blocks are finished before they are swapped (k').

    Attributes:
        loads: copies from the store so far. misses: those that nobody had foreseen.
    """

    def __init__(self, blocks: Sequence[Block], store: Store, slots: int, batch: int, keep: frozenset[int],
                 device: torch.device) -> None:  # fmt: skip
        self.blocks, self.store, self.batch, self.keep, self.device = blocks, store, batch, keep, device
        self.layouts = [Layout.of(block) for block in blocks]
        self.loads = self.misses = 0
        own = [store.homes(number) for number in range(len(blocks))]
        self._trainable = None not in own
        self._homes = [home or {name: placeholder(place.parameter) for name, place in layout.places.items()}
                       for home, layout in zip(own, self.layouts, strict=True)]  # fmt: skip
        self._order = list(range(len(blocks)))
        self._trace: list[int] = []
        self._current: int | None = None
        self._addressed = False
        self._done = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        largest = max((self.layouts[i].bytes for i in self._order if i not in keep), default=0)
        with torch.inference_mode(False):
            free = [Slot(largest, device) for _ in range(slots)]
            kept = {i: Slot(self.layouts[i].bytes, device) for i in sorted(keep)}
        self.slots = [*free, *kept.values()]
        for layout, homes in zip(self.layouts, self._homes, strict=True):
            _attach(layout, homes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="frameloom-stream")
        self._where: dict[int, Slot] = {}
        for i, slot in kept.items():
            self._load(i, slot)
        streamed = [i for i in self._order if i not in keep]
        for i, slot in zip(streamed, free, strict=False):
            self._load(i, slot)
        self._free = free[len(streamed) :]

    @property
    def bytes(self) -> int:
        """Of all slots together: what the blocks take on the device, whatever happens."""
        return sum(slot.flat.numel() for slot in self.slots)

    def need(self, i: int) -> Slot:
        """The slot with the weights of block `i`, which are then the data of its parameters."""
        before, self._current = self._current, i
        if before not in (None, i):
            self._finished(before)
        self._learn(i)
        slot = self._where.get(i)
        if slot is None:
            self.misses += 1
            slot = self._where[i] = self._load(i, self._room(i))
        if slot.loading is not None:
            if slot.versions != self._versions(i):  # changed in the store since, as by loading other weights
                slot.loading.result()
                self._load(i, slot)
            event = slot.loading.result()
            slot.loading = None
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
            _attach(self.layouts[i], slot.views(self.layouts[i]))
        return slot

    def finish(self, i: int) -> None:
        """Block `i` has computed its output."""
        # In a backward pass a block's forward runs again to be differentiated next: it is not finished yet.
        if not _in_backward() and self._current == i:
            self._current = None
            self._finished(i)

    def run(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call of block `i` with its weights there."""
        slot = self.need(i)
        try:
            self._addressed = False
            with self._kept_for_backward(i, slot):
                out = forward(*args, **kwargs)
                # A block may return a weight of its own, which will be another block's before it is read.
                return tree_map_only(Tensor, lambda value: value.clone() if slot.holds(value) else value, out)
        finally:
            self.finish(i)

    def close(self) -> None:
        """Stop loading, and let go of the slots; parameters have the store's tensors, or placeholders, as data."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for i in self._where:
            self._send_home(i)
        self._where.clear()
        self.slots.clear()
        self._free.clear()

    # --- which block goes, and which comes ---

    def _learn(self, i: int) -> None:
        """Remember the order in which blocks run, which need not be that of their definition."""
        if _in_backward():
            return
        if i in self._trace:  # a pass that leaves some blocks out, and the next one has begun
            self._order, self._trace = self._trace, []
        self._trace.append(i)
        if len(self._trace) == len(self.blocks):
            self._order, self._trace = self._trace, []

    def _coming(self, i: int) -> list[int]:
        """All blocks in the order in which they are needed next, after block `i`; last those that were left out."""
        at = self._order.index(i) if i in self._order else -1
        before, after = self._order[: max(at, 0)], self._order[at + 1 :]
        others = [block for block in range(len(self.blocks)) if block != i and block not in self._order]
        if _in_backward():
            return [*reversed(before), i, *after, *others]  # and then from the front again: 0 is in `before`
        if self._addressed:  # its weights will be wanted again by a backward pass
            return [*after, i, *reversed(before), *others]
        return [*after, *before, i, *others]

    def _finished(self, i: int) -> None:
        slot = self._where[i]
        if self._side is not None:
            slot.idle = torch.cuda.current_stream(self.device).record_event()
        self._done += i not in self.keep
        at_end = i == self._order[-1] and not _in_backward()
        if self._done < self.batch and not at_end:
            return
        self._done = 0
        coming = self._coming(i)
        rank = {block: number for number, block in enumerate(coming)}
        for block in coming:
            if block in self._where:
                continue
            slot = self._free.pop() if self._free else self._evict(rank, later_than=rank[block])
            if slot is None:
                return
            self._load(block, slot)

    def _evict(self, rank: dict[int, int], later_than: int) -> Slot | None:
        """The slot of the block that is needed last, if that is late enough."""
        able = [block for block in self._where if block not in self.keep and block != self._current]
        last = max(able, key=rank.__getitem__, default=None)
        if last is None or rank[last] <= later_than:
            return None
        self._send_home(last)
        slot = self._where.pop(last)
        if slot.loading is not None:
            slot.loading.result()
            slot.loading = None
        return slot

    @torch.no_grad()
    def _send_home(self, i: int) -> None:
        """Take a block's weights out of the window; what an optimiser made of them goes into the store."""
        slot, homes = self._where[i], self._homes[i]
        if slot.loading is None and self._trainable and slot.versions != self._versions(i):
            for name, view in slot.views(self.layouts[i]).items():
                homes[name].copy_(view)
        _attach(self.layouts[i], homes)

    def _versions(self, i: int) -> list[int]:
        return [place.parameter._version for place in self.layouts[i].places.values()]

    def _room(self, i: int) -> Slot:
        """A slot for a block that is needed at once."""
        if self._free:
            return self._free.pop()
        coming = self._coming(i)
        slot = self._evict({block: number for number, block in enumerate(coming)}, later_than=-1)
        assert slot is not None  # there is at least one slot whose block is neither kept nor computing
        return slot

    # --- the copies ---

    def _load(self, i: int, slot: Slot) -> Slot:
        self._where[i] = slot
        self.loads += 1
        slot.versions = self._versions(i)
        slot.loading = self._thread.submit(self._fill, i, slot)
        return slot

    @torch.no_grad()
    def _fill(self, i: int, slot: Slot) -> Any:
        views = slot.views(self.layouts[i])
        if self._side is None:
            self.store.fetch(i, views)
            return None
        with torch.cuda.stream(self._side):
            if slot.idle is not None:
                self._side.wait_event(slot.idle)
            self.store.fetch(i, views)
            return self._side.record_event()

    # --- what the backward pass needs ---

    def _kept_for_backward(self, i: int, slot: Slot) -> AbstractContextManager:
        if not torch.is_grad_enabled():
            return nullcontext()
        if any(value.requires_grad for value in self.blocks[i].parameters.values()):
            self._check_trainable(i)
        # Hooks of checkpointing or of activation offload are around this block; only the innermost are called.
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(value: Tensor) -> Any:
            if slot.holds(value):
                self._addressed = True
                return Address(i, value.dtype, value.shape, value.stride(), value.storage_offset())
            return outer[0](value) if outer else value

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Address):
                return self.need(kept.block).at(kept)
            return outer[1](kept) if outer else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _check_trainable(self, i: int) -> None:
        if not self._trainable:
            raise InputError(f"{self.blocks[i].name}: its weights stand in a store that cannot be written, so that it "
                             "cannot be trained; use store ram or disk, or run it under torch.no_grad()")  # fmt: skip
        if self._side is not None:
            raise InputError(f"{self.blocks[i].name}: streamed blocks are trained on the cpu only; stream with device "
                             "cpu, or run it under torch.no_grad()")  # fmt: skip


def placeholder(like: Tensor) -> Tensor:
    """Of the right shape, without memory, and not-a-number all over, so that whoever computes with it notices."""
    return _not_a_number(like.dtype).expand(like.shape)


@functools.cache
def _not_a_number(dtype: torch.dtype) -> Tensor:
    return torch.full((1,), float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def is_placeholder(value: Tensor) -> bool:
    return value.untyped_storage().nbytes() < value.numel() * value.element_size()


@torch.no_grad()
def _attach(layout: Layout, data: Mapping[str, Tensor]) -> None:
    for name, place in layout.places.items():
        place.parameter.data = data[name]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
