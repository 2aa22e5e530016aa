"""What the claims about many ranks share: small models to spread, and functions that ranks run."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from frameloom.memory import PeakMemory
from frameloom.scale.gpipe import Pipeline
from frameloom.scale.job import Run
from frameloom.scale.mesh import join, parse
from frameloom.scale.partition import Part, cuts
from frameloom.scale.probe import CommCounter
from frameloom.tasks.generation.models.stiv import STIV, TINY, WORDS
from frameloom.training.recipe import Recipe

# An 8-block video transformer of the same kind as `loom`, small enough for four ranks on two cores.
SMALL = replace(TINY, width=96, depth=6, heads=6, frames=8, channels=48, codec=4, side=4, text_width=64)
BATCH = 16


def stiv(kind: torch.dtype, seed: int = 0) -> tuple[STIV, tuple[Tensor, ...], dict[str, Tensor]]:
    """The model, and what its first block and all blocks get for a batch of world clips."""
    from frameloom.tasks.generation.data import captioned

    torch.manual_seed(seed)
    model = STIV(SMALL)
    for value in model.parameters():
        nn.init.normal_(value, std=0.05)
    model = model.to(kind).train()
    batch = captioned("world", SMALL.frames, SMALL.side * SMALL.codec, seed, WORDS).batch(list(range(BATCH)), 1.0)
    batch["video"] = batch["video"].to(kind)
    carry, given = model.pipeline_batch(batch)
    return model, carry, given


class TinyGPT(nn.Module):
    """A token model with everything that is easily got wrong: tied embeddings at both ends, and dropout."""

    def __init__(self, width: int = 32, layers: int = 4, vocabulary: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
                           "drop": nn.Dropout(dropout), "norm": nn.LayerNorm(width)}) for _ in range(layers)
        )  # fmt: skip

    def pipeline_blocks(self) -> list[nn.Module]:
        def first(anchor: Tensor, *, ids: Tensor) -> tuple[Tensor]:
            return (self.table(ids[:, :-1]) + anchor,)

        def layer(net: nn.ModuleDict):
            return lambda x, **_: (x + net["drop"](net["down"](F.gelu(net["up"](net["norm"](x))))),)

        def last(x: Tensor, *, ids: Tensor) -> tuple[Tensor]:
            return (F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), ids[:, 1:].flatten())[None],)

        middle = [Part(layer(net), [net]) for net in self.blocks]
        return [Part(first, [self.table]), *middle, Part(last, [self.table])]

    def pipeline_batch(self, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        anchor = torch.zeros(len(batch["ids"]), 1, 1, dtype=self.table.weight.dtype)
        return (anchor,), batch

    def tensor_plan(self) -> dict[str, str]:
        numbers = range(len(self.blocks))
        return {f"blocks.{n}.up": "column" for n in numbers} | {f"blocks.{n}.down": "row" for n in numbers}


def steps_of_gpt(rank: int, words: Sequence[str], steps: int = 3) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and final weights of a few optimiser steps in double precision, spread in each of several ways."""
    found = []
    for text in words:
        parallel = parse(text)
        mesh = join(parallel, "cpu")
        torch.manual_seed(0)
        model = TinyGPT().double().train()
        recipe = Recipe(steps=steps, batch_size=BATCH, lr=1e-2, warmup=1, clip_norm=0.5)
        begins = cuts([1.0] * len(model.pipeline_blocks()), parallel.pp * parallel.v)
        run = Run(model, recipe, parallel, mesh, begins, torch.device("cpu"))
        losses = []
        for step in range(steps):
            ids = torch.randint(64, (BATCH, 9), generator=torch.Generator().manual_seed(step))
            losses.append(run.step({"ids": ids}, step, 0)[0])
        weights = {name: value.full_tensor() if isinstance(value, DTensor) else value.detach()
                   for name, value in run.mine.items()}  # fmt: skip
        found.append((losses, weights))
    return found


def gradients(rank: int, words: Sequence[str]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of the video transformer, in single precision, spread in each of several ways."""
    found = []
    for text in words:
        parallel = parse(text)
        mesh = join(parallel, "cpu")
        model, carry, given = stiv(torch.float32)
        blocks = model.pipeline_blocks()
        begins = cuts([1.0] * len(blocks), parallel.pp * parallel.v)
        loss = Pipeline(blocks, begins, parallel, mesh, torch.device("cpu")).step(carry, given)
        found.append((float(loss), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


def alone(parts: int) -> tuple[float, dict[str, Tensor]]:
    """The reference of `gradients`: one process, without any of this, one micro-batch after the other."""
    model, carry, given = stiv(torch.float32)
    losses = []
    for unit in range(parts):
        here = tuple(part.tensor_split(parts)[unit] for part in carry)
        for block in model.pipeline_blocks():
            here = block(*here, **{name: part.tensor_split(parts)[unit] for name, part in given.items()})
        here[0][0].backward()
        losses.append(here[0][0].detach())
    return float(torch.stack(losses).mean()), {n: p.grad / parts for n, p in model.named_parameters()
                                               if p.grad is not None}  # fmt: skip


def memory(rank: int, words: Sequence[str], batch: int, width: int) -> list[int]:
    """Peak bytes of activations of a step on this rank: the spec's eight pairs of matrices, `batch` rows."""
    from frameloom.scale.selftest import Rows

    found = []
    for text in words:
        parallel = parse(text)
        mesh = join(parallel, "cpu")
        model = Rows(width)
        blocks = model.pipeline_blocks()
        begins = cuts([1.0] * len(blocks), parallel.pp * parallel.v)
        pipeline = Pipeline(blocks, begins, parallel, mesh, torch.device("cpu"))
        x = torch.randn(batch, width)
        pipeline.step((x,), {"aim": x})
        with PeakMemory() as meter:  # gradients are there already: what remains is activations
            pipeline.step((x,), {"aim": x})
        found.append(meter.most)
    return found


def traffic(rank: int, words: Sequence[str]) -> list[dict[tuple[str, str], tuple[int, int]]]:
    """Calls and bytes of the collectives of one step of the video transformer, in single precision."""
    from frameloom.scale import megatron

    found = []
    for text in words:
        parallel = parse(text)
        mesh = join(parallel, "cpu")
        model, carry, given = stiv(torch.float32)
        megatron.split(model, model.tensor_plan() if parallel.tp > 1 else {}, mesh)
        blocks = model.pipeline_blocks()
        begins = cuts([1.0] * len(blocks), parallel.pp * parallel.v)
        pipeline = Pipeline(blocks, begins, parallel, mesh, torch.device("cpu"))
        pipeline.step(carry, given)
        with CommCounter(mesh) as counter:
            pipeline.step(carry, given)
        found.append({key: (row.calls, row.bytes) for key, row in counter.found.items()})
    return found


def pace(rank: int, text: str, batch: int, width: int, steps: int = 4) -> float:
    """Seconds of a step of real work (eight pairs of matrices) on this rank; the best of a few."""
    from frameloom.scale.selftest import Rows

    parallel = parse(text)
    mesh = join(parallel, "cpu")
    model = Rows(width)
    blocks = model.pipeline_blocks()
    pipeline = Pipeline(blocks, cuts([1.0] * len(blocks), parallel.pp), parallel, mesh, torch.device("cpu"))
    x = torch.randn(batch, width)
    taken: list[float] = []
    for _ in range(steps + 1):
        dist.barrier()
        begin = time.perf_counter()
        pipeline.step((x,), {"aim": x})
        dist.barrier()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def same(found: Sequence[tuple[Any, dict[str, Tensor]]], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any tensor of any rank from the expected one; 0 is bit for bit."""
    worst = 0.0
    for _, tensors in found:
        for name, value in tensors.items():
            if not torch.equal(value, expected[name]):
                apart = (value - expected[name]).detach().abs().max()
                error = apart / expected[name].detach().abs().max().clamp(min=1e-30)
                worst = max(worst, float(error), 1e-30)
    return worst
