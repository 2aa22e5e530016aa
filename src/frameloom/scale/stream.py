"""Superpipeline: run or train a model that is larger than the device, a few of its blocks at a time.

For whom has a model that does not fit: into GPU memory (its weights wait in RAM) or into RAM (they wait on disk). The
model is cut where its structure repeats; embeddings, heads and whatever else is there once stay. Two numbers say how
blocks come and go:

    k    blocks on the device at once: the memory
    k'   of them are swapped, once computed, for the next k': the grain of the transfer, 1 <= k' <= k

With k' < k the next blocks are on their way while those that are there compute. With c seconds to compute a block and
x to load it a pass over n blocks takes

    n (c + x)            for k' = k
    n max(c, x)          for k >= 2 k' (see `pass_time` for everything between)

so that streaming is free where c >= x: for video models, whose activations are large; not for one token at a time.
Passes follow one another around the clock: the tail of one loads the head of the next. Training goes forward and back,
and both turns find k blocks there: 2 (n - k) loads a step. Nothing about the result changes, in any bit.

`pin` is an addition to the paper: that many of the k blocks stay for good, evenly spread, and a pass loads n - pin.

On a GPU blocks can be run and not trained: optimisers keep to the device on which they find a parameter, and no
machine was there to find out how to please them.

R. Abbasi, S. Lim, "Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models", 2024,
arXiv 2410.08791.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frameloom import memory
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.scale.blocks import Block, Parts, take_apart
from frameloom.scale.store import Checkpoint, DiskStore, RamStore, Store
from frameloom.scale.window import Layout, Window, placeholder
from frameloom.units import in_bytes

log = logging.getLogger("frameloom")


def stream(
    model: nn.Module,
    k: int | None = 4,
    k_prime: int | None = None,
    *,
    device: str | torch.device = "cpu",
    store: str | Path | Store | None = None,
    pin: int = 0,
    strict: bool = True,
    budget: int | None = None,
    blocks: Sequence[str] | None = None,
    progress: Progress = silent,
) -> "Streamed":
    """Let the blocks of a model come and go, from now on until `restore()`; the model is changed in place.

    >>> with stream(model, k=4, store="disk"):
    ...     model(x)

    Args:
        model: any module with a list of blocks. On the meta device it takes all its weights from a checkpoint `store`,
            and is never in memory as a whole.
        k: blocks on the device at once; None takes as many as fit the budget.
        k_prime: blocks that are swapped together; half of those that come and go when None.
        device: where it computes; everything that is not in a block moves there.
        store: where blocks wait: `"ram"`, `"disk"` (a scratch file), safetensors that are there (read only; a file or
            folder), or a `Store`. For None it is ram for a GPU, and disk for the CPU, whose device memory is the RAM.
        pin: how many of the k blocks stay for good.
        strict: never more than k blocks. If not, the next k' are loaded on top of them: k + k' at the most.
        budget: bytes that weights may take on the device; half of what is free for k None.
        blocks: names of modules, or of lists of them, to take as blocks instead of those that are found.

    Raises:
        InputError: numbers that do not go together, a budget that is too small (it says which k fits), a model that
            cannot be taken apart (it says what it is made of), a checkpoint that is not this model's.
    """
    check_device(device)
    device = torch.device(device)
    if "_streamed" in model.__dict__:
        raise InputError(f"{type(model).__name__}: is streamed already; call restore() on what stream() gave first")
    parts = take_apart(model, blocks)
    if len(parts.blocks) < 2:
        raise InputError(f"{type(model).__name__}: all its blocks share their weights; there is nothing to stream")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device}: blocks are streamed to cpu or cuda")
    rest = sum(map(_bytes, _rest(model, parts.blocks).values()))
    plan = Plan.of(parts, rest, k, k_prime, pin, strict, budget, device)
    if empty := next((name for name, value in model.named_parameters() if value.is_meta), None):
        if not isinstance(store, str | Path) or store in ("ram", "disk"):
            raise InputError(f"store {store}: {empty} has no values yet (it is on the meta device); give the "
                             "checkpoint that has them as store, or load it first")  # fmt: skip
        parts = _fill_in(model, parts, Checkpoint(store))
    return Streamed(model, parts, plan, device, _open(store, parts.blocks, device, progress))


class Plan:
    """The numbers of a window, settled. `bytes` is what the weights take on the device at the most, `rest` of them what
    always stays, and `whole` what they took before.
    """

    def __init__(self, n: int, k: int, k_prime: int, pin: int, slots: int, rest: int, whole: int) -> None:
        self.n, self.k, self.k_prime, self.pin, self.slots = n, k, k_prime, pin, slots
        self.rest, self.whole, self.bytes = rest, whole, whole

    @staticmethod
    def of(parts: Parts, rest: int, k: int | None, k_prime: int | None, pin: int, strict: bool, budget: int | None,
           device: torch.device) -> "Plan":  # fmt: skip
        n = len(parts.blocks)
        sizes = [Layout.of(block).bytes for block in parts.blocks]
        if k is None and budget is None:
            budget = rest + (_free(device) - rest) // 2
        fits = n if budget is None or rest + sum(sizes) <= budget else max(0, (budget - rest) // max(sizes))
        if k is None:
            k = max(1, fits if strict else 2 * fits // 3)
        _check(k, k_prime, pin, n)
        grain = k_prime or max(1, (k - pin) // 2)
        room = k if strict or k >= n else min(n, k + grain)
        if budget is not None and room > fits:
            told = f"k {fits} fits" if fits else f"not even one block ({in_bytes(max(sizes))}) beside them fits"
            raise InputError(f"budget {in_bytes(budget)}: {room} blocks of {in_bytes(max(sizes))} and {in_bytes(rest)} "
                             f"that always stay are {in_bytes(rest + room * max(sizes))}; {told}")  # fmt: skip
        if k >= n:
            log.warning("k %d: the model has %d blocks, so that all of them are there and none is streamed", k, n)
            room = pin = k = n
        return Plan(n, k, grain, pin, room - pin, rest, rest + sum(sizes))

    @property
    def kept(self) -> frozenset[int]:
        """The blocks that stay, spread evenly so that every load hides behind some of them."""
        return frozenset((2 * j + 1) * self.n // (2 * self.pin) for j in range(self.pin))


def _check(k: int, k_prime: int | None, pin: int, n: int) -> None:
    if k < 1:
        raise InputError(f"k {k}: the window holds 1 block or more; this model has {n}")
    if not 0 <= pin < k:
        raise InputError(f"pin {pin}: of the {k} blocks in the window 0 to {k - 1} can stay; one must come and go")
    if k_prime is not None and not 1 <= k_prime <= k - pin:
        raise InputError(
            f"k2 {k_prime}: between 1 and {k - pin} of the {k} blocks in the window can be swapped together"
        )


class Streamed:
    """A model whose blocks come and go.

    Attributes:
        plan: the numbers. names: of the blocks. tied: of parameters in blocks that stay because others use them too.
        device, store: where it computes, and where blocks wait.
    """

    def __init__(self, model: nn.Module, parts: Parts, plan: Plan, device: torch.device, store: Store) -> None:
        self.model, self.plan, self.device, self.store = model, plan, device, store
        self.names, self.tied = [block.name for block in parts.blocks], parts.tied
        self._blocks, self._rest = parts.blocks, _rest(model, parts.blocks)
        self._was = {name: value.device for name, value in self._rest.items()}
        self._from = next(iter(parts.blocks[0].parameters.values())).device
        for value in self._rest.values():
            value.data = value.data.to(device)
        self.window = Window(parts.blocks, store, plan.slots, plan.k_prime, plan.kept, device)
        plan.bytes = plan.rest + self.window.bytes
        self._forwards = [block.module.__dict__.get("forward") for block in parts.blocks]
        for number, block in enumerate(parts.blocks):
            forward = block.module.forward
            here = functools.partial(self.window.run, number, forward)
            block.module.forward = functools.update_wrapper(here, forward)
        model.__dict__["_streamed"] = True
        if self.tied:
            log.warning("%s: used in more than one place, so that they stay on the device", ", ".join(self.tied))

    @property
    def loads(self) -> int:
        """How many times a block was loaded so far."""
        return self.window.loads

    def __str__(self) -> str:
        plan, store = self.plan, type(self.store).__name__.removesuffix("Store").lower()
        kept = f", {plan.pin} kept" if plan.pin else ""
        return (f"{plan.n} blocks from {store}, k {plan.k}, k' {plan.k_prime}{kept}: at most {in_bytes(plan.bytes)} of "
                f"{in_bytes(plan.whole)} of weights")  # fmt: skip

    def restore(self) -> None:
        """Give the model its weights back, as they are now, and its blocks their own calls; once is enough."""
        if "_streamed" not in self.model.__dict__:
            return
        self.window.close()
        for number, block in enumerate(self._blocks):
            if not isinstance(self.store, RamStore) or self._from.type != "cpu":
                self._bring(number, block)
            if (before := self._forwards[number]) is None:
                del block.module.forward
            else:
                block.module.forward = before
        for name, value in self._rest.items():
            value.data = value.data.to(self._was[name])
            if value.grad is not None:
                value.grad = value.grad.to(value.device)
        del self.model.__dict__["_streamed"]

    def _bring(self, number: int, block: Block) -> None:
        own = {}
        for name, place in self.window.layouts[number].places.items():
            like = {"dtype": place.parameter.dtype, "device": self._from}
            own[name] = place.parameter.data = torch.empty_strided(place.shape, place.stride, **like)
        self.store.fetch(number, own)

    def __enter__(self) -> "Streamed":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()


def pass_time(n: int, k: int, k_prime: int, compute: float, load: float, pin: int = 0, passes: int = 3) -> float:
    """Seconds of a pass over n blocks once passes follow one another, from those of one block: the time model.

    One block computes at a time and one is loaded at a time; a block computes when it is there, and its slot is loaded
    anew when k' are finished, or the pass is over.
    """
    plan = Plan(n, k, k_prime, pin, k - pin, 0, 0)
    turns = [i for i in range(n) if i not in plan.kept]
    ready = dict.fromkeys([*plan.kept, *turns[: plan.slots]], 0.0)
    coming = plan.slots % len(turns)
    clock = loader = begin = 0.0
    for _ in range(passes):
        begin, done = clock, 0
        for i in range(n):
            clock = max(clock, ready[i]) + compute
            done += i not in plan.kept
            if plan.slots >= len(turns) or (done < k_prime and i != turns[-1]):
                continue
            loader = max(loader, clock)
            for _ in range(done):
                loader += load
                ready[turns[coming]] = loader
                coming = (coming + 1) % len(turns)
            done = 0
    return clock - begin


def _rest(model: nn.Module, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Everything that stays: parameters outside of blocks, tied ones, and all buffers, which a pass may change."""
    inside = {id(value) for block in blocks for value in block.parameters.values()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value for name, value in named if id(value) not in inside}


def _open(store: str | Path | Store | None, blocks: Sequence[Block], device: torch.device,
          progress: Progress) -> Store:  # fmt: skip
    tensors = [block.parameters for block in blocks]
    if isinstance(store, Store):
        return store
    store = store or ("disk" if device.type == "cpu" else "ram")
    if store == "ram":
        if device.type == "cpu":
            log.warning("store ram with device cpu: the blocks are copied from RAM to RAM, which saves nothing; "
                        "store disk does")  # fmt: skip
        return RamStore(tensors, pin=device.type == "cuda")
    if store == "disk":
        return DiskStore.written(tensors, progress=progress)
    return DiskStore.of(Checkpoint(store), tensors)


def _fill_in(model: nn.Module, parts: Parts, checkpoint: Checkpoint) -> Parts:
    """Give a model on the meta device what always stays, and placeholders for its blocks."""
    rest = _rest(model, parts.blocks)
    entries = checkpoint.entries({name: value for name, value in rest.items() if value.is_meta})
    for block in parts.blocks:
        checkpoint.entries(block.parameters)  # whatever is wrong is found out before anything is changed
    made = {id(value): placeholder(value) for block in parts.blocks for value in block.parameters.values()}
    for name, entry in entries.items():
        made[id(rest[name])] = torch.empty_like(rest[name], device="cpu")
        entry.read(made[id(rest[name])])
    # A tensor cannot move from the meta device: the modules get new ones.
    own: dict[int, Tensor] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, value in group.items():
                if value is None or not value.is_meta:
                    continue
                if id(value) not in own:
                    new = made[id(value)]
                    own[id(value)] = nn.Parameter(new, value.requires_grad) if group is module._parameters else new
                group[name] = own[id(value)]
    return Parts([Block(block.name, block.module, {name: own[id(value)] for name, value in block.parameters.items()})
                  for block in parts.blocks], parts.tied)  # fmt: skip


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
