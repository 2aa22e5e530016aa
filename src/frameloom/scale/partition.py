"""Where to cut a model into pipeline stages: what each block costs, and the cuts that balance it.

A model that can be cut offers `pipeline_blocks()`: modules that take and return a tuple of tensors, all of them with
the same keywords besides (`Pipelined`). Costs are counted without computing, on the meta device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from frameloom.cards import card
from frameloom.errors import InputError


class Part(nn.Module):
    """A piece of a model as a pipeline block: `call(*carry, **given)` computes it, with the parameters of `own`."""

    def __init__(self, call, own: Sequence[nn.Module], extra: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()
        self.call = call
        self.own = nn.ModuleList(own)
        self.extra = nn.ParameterList(extra)

    def forward(self, *carry: Tensor, **given: Tensor) -> Any:
        return self.call(*carry, **given)


@runtime_checkable
class Pipelined(Protocol):
    """A model whose training step runs as a row of blocks.

    `pipeline_batch(batch)` draws whatever is random and returns the tensors of the first block and keywords that every
    block gets, all with the batch as their first dimension. `pipeline_blocks()` are the blocks in order: each takes the
    tuple that the one before returned, floating-point tensors with the batch first; the last returns the mean loss of
    what it was given, as a tensor `(1,)`. `pipeline_example(n)` is a batch of n empty examples, to count costs by.
    """

    def pipeline_blocks(self) -> list[nn.Module]: ...

    def pipeline_batch(self, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]: ...

    def pipeline_example(self, count: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Block:
    """What one block costs on one micro-batch.

    `flops` of the forward pass (two a multiply-add); `parameters` as a count; `saved` bytes that its backward pass
    keeps; `boundary` bytes of what it hands on.
    """

    flops: float
    parameters: int
    saved: int
    boundary: int


def profile(blocks: Sequence[nn.Module], carry: tuple[Tensor, ...], given: dict[str, Tensor]) -> list[Block]:
    """The cost of every block; nothing is computed if modules and tensors are on the meta device.

    Raises InputError for a block that does not return tensors.
    """
    found = []
    for number, block in enumerate(blocks):
        own = {value.untyped_storage()._cdata for value in block.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, own=own, kept=kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            carry = as_tuple(block(*carry, **given), number)
        found.append(Block(float(counter.get_total_flops()), sum(value.numel() for value in block.parameters()),
                           sum(kept.values()), sum(t.numel() * t.element_size() for t in carry)))  # fmt: skip
    return found


def costs(method: str, size: str, examples: int) -> list[Block]:
    """What every pipeline block of a method costs on `examples` examples; counted on the meta device.

    Raises InputError for a method whose training step is no row of blocks.
    """
    kind = card(method).load_class()
    if not issubclass(kind, Pipelined):
        raise InputError(f"{method}: its training step is not a row of blocks; stiv's is")
    with torch.device("meta"):
        model = kind(kind.preset(size)).train()
        carry, given = model.pipeline_batch(model.pipeline_example(examples))
        return profile(model.pipeline_blocks(), carry, given)


def as_tuple(made: Any, number: int) -> tuple[Tensor, ...]:
    """What a block returned, as a tuple of tensors. Raises InputError, naming the block, for anything else."""
    made = made if isinstance(made, tuple) else (made,)
    if not all(isinstance(part, Tensor) for part in made):
        kinds = ", ".join(type(part).__name__ for part in made)
        raise InputError(f"block {number} returns {kinds}; a pipeline block returns a tensor or a tuple of tensors")
    return made


def cuts(costs: Sequence[float], stages: int) -> list[int]:
    """Where every stage begins: the contiguous cut with the least maximum, and among those the least variance.

    Exact, by dynamic programming in O(blocks^2 stages). (GPipe minimises the variance, torchgpipe the maximum.)

    Raises InputError where there are fewer blocks than stages.
    """
    count = len(costs)
    if stages > count:
        raise InputError(f"pp x v = {stages}: the model has {count} blocks; {count} stages at most")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, float))])
    segment = sums[None, :] - sums[:, None]  # [i, j]: blocks i..j-1

    def best(value: np.ndarray, join) -> tuple[float, list[int]]:
        reach = np.full(count + 1, np.inf)
        reach[0] = 0.0
        back = []
        for _ in range(stages):
            table = np.where(np.tri(count + 1, k=-1, dtype=bool).T, join(reach[:, None], value), np.inf)
            back.append(table.argmin(0))
            reach = table.min(0)
        ends, at = [], count
        for choice in reversed(back):
            at = int(choice[at])
            ends.append(at)
        return float(reach[count]), ends[::-1]

    most, _ = best(segment, np.maximum)
    within = np.where(segment <= most * (1 + 1e-12), segment**2, np.inf)
    return best(within, np.add)[1]


def balance(found: Sequence[Block], by: str) -> list[float]:
    """The number to balance: `flops`, or `memory` (weights, gradients and Adam's moments, and what is kept)."""
    if by == "flops":
        return [block.flops for block in found]
    if by == "memory":
        return [16.0 * block.parameters + block.saved + block.boundary for block in found]
    raise InputError(f"balance={by}: there are flops and memory")
