"""Is this machine set up to run over many ranks? A few local ranks find out, against one process.

Everything is exact or has a bound that is printed; nothing hangs for longer than its time-out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from frameloom.progress import Progress, silent
from frameloom.scale import megatron
from frameloom.scale.gpipe import Pipeline
from frameloom.scale.mesh import join, parse
from frameloom.scale.partition import Part, cuts
from frameloom.scale.ranks import RankFailed, local
from frameloom.scale.schedule import schedule
from frameloom.scale.simulate import Costs, calibrate, simulate, sleep_steps

WIDTH, BATCH, BLOCKS = 16, 8, 8


@dataclass(frozen=True)
class Check:
    """One thing that must be so, whether it was, and what was seen."""

    name: str
    good: bool
    seen: str


class Rows(nn.Module):
    """The smallest model that can be cut, split and copied: residual pairs of matrices, and a squared error."""

    def __init__(self, width: int = WIDTH, depth: int = BLOCKS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})
            for _ in range(depth)
        )

    def pipeline_blocks(self) -> list[nn.Module]:
        def layer(net: nn.ModuleDict, last: bool) -> Callable:
            def call(x: Tensor, *, aim: Tensor) -> tuple[Tensor]:
                x = x + net["down"](torch.tanh(net["up"](x)))
                return ((x - aim).square().mean()[None] if last else x,)

            return call

        return [Part(layer(net, net is self.layers[-1]), [net]) for net in self.layers]

    def pipeline_batch(self, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (batch["x"],), {"aim": batch["aim"]}

    def tensor_plan(self) -> dict[str, str]:
        numbers = range(len(self.layers))
        return {f"layers.{n}.up": "column" for n in numbers} | {f"layers.{n}.down": "row" for n in numbers}


def rows(kind: torch.dtype) -> tuple[Rows, tuple[Tensor, ...], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Rows().to(kind)
    carry, given = model.pipeline_batch(
        {"x": torch.randn(BATCH, WIDTH, dtype=kind), "aim": torch.randn(BATCH, WIDTH, dtype=kind)}
    )
    return model, carry, given


def alone(parts: int, kind: torch.dtype) -> dict[str, Tensor]:
    """Gradients of one process that takes the micro-batches one after the other."""
    model, carry, given = rows(kind)
    for unit in range(parts):
        here = tuple(part.tensor_split(parts)[unit] for part in carry)
        for block in model.pipeline_blocks():
            here = block(*here, **{name: part.tensor_split(parts)[unit] for name, part in given.items()})
        here[0][0].backward()
    return {name: value.grad / parts for name, value in model.named_parameters()}


def spread(rank: int, words: list[str], kind: torch.dtype) -> list[float]:
    """The largest relative error of this rank's gradients against `alone`, spread in each of several ways; 0 where
    they are equal bit for bit.
    """
    return [_error(text, kind) for text in words]


def _error(text: str, kind: torch.dtype) -> float:
    parallel = parse(text)
    mesh = join(parallel, "cpu")
    model, carry, given = rows(kind)
    shared = megatron.split(model, model.tensor_plan() if parallel.tp > 1 else {}, mesh)
    blocks = model.pipeline_blocks()
    begins = cuts([1.0] * len(blocks), parallel.pp * parallel.v)
    pipeline = Pipeline(blocks, begins, parallel, mesh, torch.device("cpu"))
    copies, which = parallel.dp, mesh["dp"].get_local_rank()
    pipeline.step(tuple(part.tensor_split(copies)[which] for part in carry),
                  {name: part.tensor_split(copies)[which] for name, part in given.items()})  # fmt: skip
    megatron.add_up([model.get_parameter(name) for name in shared], mesh.get_group("tp"))
    megatron.average(model.parameters(), mesh.get_group("dp"))
    expected, worst = alone(parallel.m * copies, kind), 0.0
    for name, value in model.named_parameters():
        if value.grad is not None:
            gradient = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            worst = max(worst, float(error))
    return worst


def collectives(rank: int) -> list[str]:
    """The names of the collectives that gave a wrong answer."""
    world = dist.get_world_size()
    wrong = []

    def check(name: str, found: Tensor, expected: Tensor) -> None:
        if not torch.equal(found, expected):
            wrong.append(name)

    ones = torch.full((world,), float(rank + 1))
    total = ones.clone()
    dist.all_reduce(total)
    check("all_reduce", total, torch.full((world,), world * (world + 1) / 2))
    half = ones.to(torch.bfloat16)
    dist.all_reduce(half)
    check("all_reduce in bfloat16", half, torch.full((world,), world * (world + 1) / 2, dtype=torch.bfloat16))
    parts = [torch.empty(world) for _ in range(world)]
    dist.all_gather(parts, ones)
    check("all_gather", torch.stack(parts)[:, 0], torch.arange(1.0, world + 1))
    # Uneven parts: rank r sends r + 1 numbers to everyone.
    mine = torch.full((world * (rank + 1),), float(rank))
    got = torch.empty(sum(r + 1 for r in range(world)))
    dist.all_to_all_single(got, mine, [r + 1 for r in range(world)], [rank + 1] * world)
    check("all_to_all", got, torch.cat([torch.full((r + 1,), float(r)) for r in range(world)]))
    there, back = torch.full((3,), float(rank)), torch.empty(3)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, there, (rank + 1) % world),
                                    dist.P2POp(dist.irecv, back, (rank - 1) % world)])  # fmt: skip
    for work in works:
        work.wait()
    check("send and receive", back, torch.full((3,), float((rank - 1) % world)))
    return wrong


def selftest(ranks: int = 2, progress: Progress = silent) -> list[Check]:
    """Run every check with `ranks` local ranks (2 or 4)."""
    even = {2: "pp=2", 4: "pp=4"}[ranks]
    exact = [f"{even},schedule=gpipe,microbatches=8,remat=always", f"{even},schedule=1f1b,microbatches=8",
             f"{even},schedule=interleaved,v=2,microbatches=8"]  # fmt: skip
    near = ["tp=2,microbatches=2", "dp=2,microbatches=2"] if ranks == 2 else ["pp=2,tp=2,microbatches=2",
            "pp=2,dp=2,microbatches=2", "tp=2,dp=2,microbatches=2"]  # fmt: skip
    found: list[Check] = []

    def add(names: list[str], work: Callable[[], list[tuple[bool, str]]]) -> None:
        try:
            made = work()
        except RankFailed as error:
            made = [(False, str(error).splitlines()[0])] * len(names)
        found.extend(Check(name, good, seen) for name, (good, seen) in zip(names, made, strict=True))
        progress("checks", len(found), 2 + len(exact) + len(near))

    def all_right() -> list[tuple[bool, str]]:
        wrong = sorted({name for names in local(collectives, ranks, timeout=60.0) for name in names})
        return [(not wrong, f"wrong: {', '.join(wrong)}" if wrong else "all as they must be")]

    def equal() -> list[tuple[bool, str]]:
        errors = zip(*local(spread, ranks, exact, torch.float32), strict=True)
        return [(max(one) == 0, "bit for bit" if max(one) == 0 else f"differs by {max(one):.1e}") for one in errors]

    def close() -> list[tuple[bool, str]]:
        errors = zip(*local(spread, ranks, near, torch.float64), strict=True)
        return [(max(one) < 1e-11, f"within {max(one):.0e} in double precision (bound 1e-11)") for one in errors]

    def pace() -> list[tuple[bool, str]]:
        overhead = calibrate(ranks)
        took = max(local(sleep_steps, ranks, ranks, 8, "1f1b", 1, 0.02, 0.04, 3))
        said = simulate(schedule("1f1b", ranks, 8), Costs(0.02, 0.04, overhead=overhead)).length
        # Another program's burst slows real steps down and says nothing about the set-up: half as much again passes.
        return [(took < 1.5 * said, f"{1e3 * took:.0f} ms a step, simulated {1e3 * said:.0f} ms with "
                                    f"{1e3 * overhead:.2f} ms an action")]  # fmt: skip

    add([f"collectives on {ranks} ranks"], all_right)
    add(exact, equal)
    add(near, close)
    add(["pace of a pipeline"], pace)
    return found
