"""GPipe: a model too deep for one device, cut into stages that work on different micro-batches at the same time.

A mini-batch is cut into m equal micro-batches. Stage k starts on a micro-batch when stage k - 1 has delivered it;
gradients add up over the micro-batches and are applied once, so that a step is that of one device:

    g = 1/m sum_j grad loss(micro-batch j),     idle share of the step (K - 1) / (m + K - 1)

With re-materialisation a stage keeps only what it was given, N numbers in all, and computes the rest again in the
backward pass: peak activations N + (L/K)(N/m) in place of N L. Running statistics of batch normalisation are those of
the whole mini-batch, taken once, whatever m is and however often a forward pass is repeated.

The schedule itself, its sends and receives are those of `torch.distributed.pipelining`.

Y. Huang, Y. Cheng, A. Bapna, O. Firat, M. X. Chen, D. Chen, H. Lee, J. Ngiam, Q. V. Le, Y. Wu, Z. Chen, "GPipe:
Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS 2019, arXiv 1811.06965.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frameloom.errors import InputError
from frameloom.scale.megatron import Boundary, boundary, whole
from frameloom.scale.mesh import Parallel
from frameloom.scale.partition import as_tuple
from frameloom.scale.stock import pipeline_stage, schedule_class


class Stage(nn.Module):
    """Blocks in a row, as one pipeline stage; `first` is the number of the first of them in the model.

    Dropout and the like draw the same numbers for a block and a micro-batch wherever the block lives, and again when
    it is computed again. `receive` and `send` change the form that tensors have between two stages.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, remat: str, m: int,
                 receive: Boundary = whole, send: Boundary = whole) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.first, self.remat, self.m = first, remat, m
        self.receive, self.send = receive, send
        self.random = any(isinstance(one, nn.Dropout) and one.p for one in self.modules())
        self.begin(0)

    def begin(self, seed: int, first: int = 0) -> None:
        """A new step begins; its random numbers hang on `seed` and on the micro-batches' numbers, from `first` on."""
        self.seed, self.unit, self.offset = seed, 0, first

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, a forward pass is only looked at for its shapes and leaves no trace."""
        with recomputing():
            yield
        self.unit -= 1

    def forward(self, *carry: Tensor, **given: Tensor):
        unit, self.unit = self.unit, self.unit + 1
        again = torch.is_grad_enabled() and (
            self.remat == "always" or (self.remat == "except_last" and unit != self.m - 1)
        )
        if not again:
            return self._run(unit, carry, given)
        repeated = iter((False,))  # the first run is the forward pass; all others repeat it

        def run(*carry: Tensor):
            with nullcontext() if next(repeated, True) is False else recomputing():
                return self._run(unit, carry, given)

        versions = [part._version for part in carry]
        made = checkpoint(run, *carry, use_reentrant=False)
        if versions != [part._version for part in carry]:
            last = self.first + len(self.blocks) - 1
            raise InputError(f"blocks {self.first} to {last}: one of them changes its input in place, which cannot be "
                             "computed again; remat=never would do")  # fmt: skip
        return made

    def _run(self, unit: int, carry: tuple[Tensor, ...], given: dict[str, Tensor]):
        carry = self.receive(carry)
        for number, block in enumerate(self.blocks, self.first):
            with self._seeded(unit, number):
                carry = as_tuple(block(*carry, **given), number)
        carry = self.send(carry)
        return carry if len(carry) > 1 else carry[0]

    @contextmanager
    def _seeded(self, unit: int, number: int) -> Iterator[None]:
        if not self.random:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed((self.seed * 1_000_003 + self.offset + unit) * 1_009 + number)
            yield


class Pipeline:
    """The stages of this rank and the schedule that runs them.

    >>> pipeline = Pipeline(model.pipeline_blocks(), begins, parallel, mesh, device)
    >>> loss = pipeline.step(*model.pipeline_batch(batch))      # gradients are there, averaged over the micro-batches

    Args:
        blocks: of the whole model, see `frameloom.scale.partition.Pipelined`.
        begins: the first block of every stage, see `frameloom.scale.partition.cuts`.
        mesh: see `frameloom.scale.mesh.join`.
    """

    def __init__(self, blocks: Sequence[nn.Module], begins: Sequence[int], parallel: Parallel,
                 mesh: "dist.DeviceMesh", device: torch.device) -> None:  # fmt: skip
        p, m = parallel.pp, parallel.m
        self.group, self.copies = mesh.get_group("pp"), mesh.get_group("dp")
        self.rank, self.m, self.device = self.group.rank(), m, device
        ends = [*begins[1:], len(blocks)]
        self.mine = [self.rank + p * chunk for chunk in range(parallel.v)]
        count = p * parallel.v
        gather, scatter = boundary(mesh) if parallel.tp > 1 and parallel.scatter else (whole, whole)
        self.stages = [Stage(blocks[begins[k] : ends[k]], begins[k], parallel.remat, m, gather if k else whole,
                             scatter if k + 1 < count else whole) for k in self.mine]  # fmt: skip
        self.kind, self.count = parallel.schedule, count
        self.schedules: dict[tuple, Any] = {}
        self.first, self.last = self.rank == 0, self.rank == p - 1

    def step(self, carry: tuple[Tensor, ...], given: dict[str, Tensor], seed: int = 0) -> Tensor:
        """One forward and backward pass over all micro-batches; the mean loss, on every rank, in float64.

        Gradients are added to those that are there, averaged over the micro-batches.

        Raises InputError for a batch that m does not divide.
        """
        size = next(iter(given.values())).shape[0] if given else carry[0].shape[0]
        if size % self.m:
            raise InputError(f"microbatches={self.m}: {size} examples do not fall into equal parts")
        losses: list[Tensor] = []
        inputs = carry if self.first else ()
        # The loss is what the last block returns; torch wants a target to hand to its loss function.
        ends = {"target": torch.zeros(self.m, device=self.device), "losses": losses} if self.last else {}
        for stage in self.stages:
            stage.begin(seed, self.copies.rank() * self.m)  # copies draw other numbers than each other
        self._schedule(carry, given).step(*inputs, **ends, **given, return_outputs=False)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.last:
            loss.copy_(torch.stack([one.detach() for one in losses]).mean())
        dist.broadcast(loss, group_src=self.group.size() - 1, group=self.group)
        for stage in self.stages:
            commit(stage, self.copies)
        return loss

    def _schedule(self, carry: tuple[Tensor, ...], given: dict[str, Tensor]) -> Any:
        """The schedule for tensors of these shapes: torch fixes the shapes of one with its first step."""
        key = tuple((value.shape, value.dtype) for value in (*carry, *given.values()))
        if key not in self.schedules:
            wrapped = [pipeline_stage(stage, k, self.count, self.device, self.group)
                       for stage, k in zip(self.stages, self.mine, strict=True)]  # fmt: skip
            many = self.kind == "interleaved"
            self.schedules[key] = schedule_class(self.kind)(wrapped if many else wrapped[0], self.m, loss_fn=_loss)
        return self.schedules[key]


def _loss(made: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    return (made[0] if isinstance(made, tuple) else made)[0]


# --- batch normalisation ---------------------------------------------------------------------------------------------

_REPEATS = 0


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, a forward pass is a repetition for the sake of the backward pass: statistics were taken already."""
    global _REPEATS
    _REPEATS += 1
    try:
        yield
    finally:
        _REPEATS -= 1


class DeferredNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by each micro-batch, with running statistics of the whole mini-batch.

    Sums are collected over the micro-batches and become running statistics at `commit`, once a step; with copies of
    the model (`dp`) over all of them.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError("a batch and channels are wanted")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.track_running_stats:
            return super().forward(x)
        if not _REPEATS and torch.is_grad_enabled():
            with torch.no_grad():
                rows = x.detach().transpose(0, 1).flatten(1).double()
                moments = torch.stack([rows.sum(1), rows.square().sum(1), torch.full_like(rows[:, 0], rows.shape[1])])
                self.moments = moments + getattr(self, "moments", 0.0)
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def commit(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Take what was collected into the running mean and (unbiased) variance."""
        if not hasattr(self, "moments"):
            return
        if group is not None and group.size() > 1:
            dist.all_reduce(self.moments, group=group)
        total, squares, count = self.moments
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
        self.num_batches_tracked += 1
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(variance.to(self.running_var.dtype), rate)
        del self.moments


def defer(model: nn.Module) -> nn.Module:
    """Let every batch normalisation of the model defer its statistics; its weights and names stay."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            module.__class__ = DeferredNorm
    return model


def commit(model: nn.Module, group: "dist.ProcessGroup | None" = None) -> None:
    """At the end of a step: every deferred normalisation takes its statistics."""
    for module in model.modules():
        if isinstance(module, DeferredNorm):
            module.commit(group)
