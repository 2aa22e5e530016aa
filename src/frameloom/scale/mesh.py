"""How a job is spread: `pp=2,tp=2,dp=2,schedule=interleaved,v=2,...` in words, and the mesh of ranks that it means."""

import os
from dataclasses import dataclass, fields
from datetime import timedelta
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist

import frameloom
from frameloom.errors import InputError
from frameloom.scale.schedule import schedule

REMAT = ("never", "always", "except_last")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A way to spread training over pp x dp x tp ranks.

    Attributes:
        pp: pipeline stages in a row; v of them live on every rank under `schedule="interleaved"`.
        tp: ranks that share every matrix; neighbours, so that they sit in one machine.
        dp: copies of the model, each with its share of the batch; with `shard` they keep the blocks' weights in shards
            (FSDP2) in place of copies.
        schedule: `1f1b`, `gpipe` or `interleaved`.
        microbatches: parts of a copy's share of the batch; 0 for four a stage.
        remat: `always` keeps what a stage was given and computes the rest again for the backward pass; `except_last`
            spares the last micro-batch, whose backward follows at once.
        balance: what the cuts balance, `flops` or `memory`.
        scatter: with tp, a boundary tensor crosses to the next stage once, in tp parts, and not tp times.
    """

    pp: int = 1
    tp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    v: int = 1
    microbatches: int = 0
    remat: str = "never"
    balance: str = "flops"
    shard: bool = False
    scatter: bool = True

    def __post_init__(self) -> None:
        for name in ("pp", "tp", "dp", "v"):
            if getattr(self, name) < 1:
                raise InputError(f"--parallel {name}={getattr(self, name)}: must be 1 or more")
        if self.remat not in REMAT:
            raise InputError(f"--parallel remat={self.remat}: there are {', '.join(REMAT)}")
        if self.shard and self.dp == 1:
            raise InputError("--parallel shard=on: shards lie on the copies of dp; dp=2 or more is wanted")
        schedule(self.schedule, self.pp, self.m, self.v)

    @property
    def world(self) -> int:
        return self.pp * self.tp * self.dp

    @property
    def m(self) -> int:
        return self.microbatches or 4 * self.pp

    def check_batch(self, size: int) -> None:
        """Raises InputError where a batch of `size` examples does not fall into equal micro-batches."""
        if size % (self.dp * self.m):
            parts = self.dp * self.m
            raise InputError(f"--parallel dp={self.dp},microbatches={self.m}: a batch of {size} does not fall into "
                             f"{parts} equal parts; dp x microbatches = {_divisors(size)} would do")  # fmt: skip

    def check_heads(self, heads: int) -> None:
        """Raises InputError where `heads` attention heads cannot be shared by tp ranks."""
        if heads % self.tp:
            raise InputError(f"--parallel tp={self.tp}: {heads} heads cannot be shared; tp={_divisors(heads)} would")


def _divisors(value: int) -> str:
    found = [n for n in range(1, value + 1) if value % n == 0]
    return f"{', '.join(map(str, found[:-1]))} or {found[-1]}" if len(found) > 1 else "1"


def parse(text: str) -> Parallel:
    """`"pp=2,schedule=gpipe,remat=always"` as a `Parallel`. Raises InputError for a name or a value that is none."""
    kinds = {field.name: type(getattr(Parallel, field.name)) for field in fields(Parallel)}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.strip().partition("=")
        if name not in kinds or not equals:
            raise InputError(f"--parallel {part.strip()}: write NAME=VALUE with {', '.join(kinds)}")
        if kinds[name] is bool:
            found[name] = value.lower() in ("on", "true", "1", "yes")
        elif kinds[name] is int:
            if not value.isdigit():
                raise InputError(f"--parallel {name}={value}: a whole number is wanted")
            found[name] = int(value)
        else:
            found[name] = value
    return Parallel(**found)


def join(parallel: Parallel, device: str, timeout: float = 600.0) -> "dist.DeviceMesh":
    """Join the ranks that torchrun started (or be a world of one) and lay them out as pp x dp x tp.

    Raises InputError where there are more or fewer ranks than `parallel` needs, or torchrun's variables are missing.
    """
    world = parallel.world
    if not dist.is_initialized():
        found = _environment()
        if found is None:
            if world != 1:
                raise InputError(f"--parallel: pp x dp x tp = {world} ranks are wanted and this is one process; start "
                                 f"it with torchrun --nproc-per-node {world} -m frameloom ...")  # fmt: skip
            rank, size, how = 0, 1, f"file://{mkdtemp()}/store"
        else:
            (rank, size), how = found, "env://"
        if size != world:
            raise InputError(f"--parallel: pp x dp x tp = {parallel.pp} x {parallel.dp} x {parallel.tp} = {world}, but "
                             f"{size} ranks were started; --nproc-per-node {world} would do")  # fmt: skip
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend, init_method=how, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    if dist.get_world_size() != world:
        raise InputError(f"--parallel: {world} ranks are wanted and {dist.get_world_size()} are there")
    shape = (parallel.pp, parallel.dp, parallel.tp)
    return dist.init_device_mesh(device.partition(":")[0], shape, mesh_dim_names=("pp", "dp", "tp"))


def _environment() -> tuple[int, int] | None:
    """Rank and world size as torchrun gave them; None where it gave nothing."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names if name in os.environ]
    if not there:
        return None
    if missing := [name for name in names if name not in os.environ]:
        raise InputError(f"{', '.join(missing)}: not set, though {there[0]} is; torchrun sets them all, start it with "
                         "torchrun --nproc-per-node N -m frameloom ...")  # fmt: skip
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def agree(facts: dict[str, Any]) -> None:
    """Every rank must run the same by the same version: raises InputError that names who differs in what."""
    facts = facts | {"version": frameloom.__version__, "torch": torch.__version__}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other.get(name) != value:
                raise InputError(f"rank {rank} was started with {name} {other.get(name)!r} and rank 0 with {value!r}; "
                                 "all ranks must run one command of one version")  # fmt: skip


def lost(error: Exception, patience: float = 3.0) -> InputError:
    """What to say when a collective failed: which ranks are gone.

    Ranks that are still there leave a note in the store that torchrun keeps; those that left none are missing.
    """
    import time

    rank, size = dist.get_rank(), dist.get_world_size()
    reason = " ".join(str(error).split())[:120]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"frameloom/alive/{rank}", "1")
        deadline = time.monotonic() + patience
        missing = set(range(size))
        while missing and time.monotonic() < deadline:
            missing = {one for one in missing if not store.check([f"frameloom/alive/{one}"])}
            time.sleep(0.1)
    except Exception:  # noqa: BLE001 - the store itself may be gone with the rank that held it
        return InputError(
            f"rank {rank}: the others cannot be reached ({reason}); the same command goes on from the last save"
        )
    who = f"rank {', '.join(map(str, sorted(missing)))} is gone" if missing else "the ranks fell out of step"
    return InputError(f"rank {rank}: {who} ({reason}); the same command goes on from the last save")
