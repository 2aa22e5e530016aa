"""What a distributed run does, seen from one rank: bytes of every collective, and who was busy when.

Memory is counted by `frameloom.memory.PeakMemory`. All three count what the program asks for and not what a driver or
an allocator makes of it, so that the figures are exact, and the same on every machine.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How many bytes a ring moves over the wire at every rank, for n ranks and s bytes in the *whole* tensor.
_WIRE = {
    "all_reduce": lambda n, s: 2 * (n - 1) / n * s,
    "all_gather": lambda n, s: (n - 1) / n * s,
    "reduce_scatter": lambda n, s: (n - 1) / n * s,
    "all_to_all": lambda n, s: (n - 1) / n * s,
    "broadcast": lambda n, s: s,
    "send": lambda n, s: s,
    "recv": lambda n, s: s,
}

# The names that torch.distributed (`c10d`) and its functional twin (`_c10d_functional`) dispatch under, the collective
# that they are, and the argument that holds the whole tensor: the larger one where the sides differ.
_NAMES = {
    "allreduce_": ("all_reduce", 0), "all_reduce": ("all_reduce", 0), "all_reduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0), "allgather_": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", None), "all_gather_into_tensor_out": ("all_gather", None),
    "_reduce_scatter_base_": ("reduce_scatter", 1), "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0), "reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "alltoall_base_": ("all_to_all", 1), "alltoall_": ("all_to_all", 1), "all_to_all_single": ("all_to_all", 0),
    "broadcast_": ("broadcast", 0), "broadcast": ("broadcast", 0),
    "send": ("send", 0), "recv_": ("recv", 0), "isend": ("send", 0), "irecv": ("recv", 0),
}  # fmt: skip


@dataclass
class Traffic:
    """Calls of one collective on one group, the bytes handed to them, and the bytes a ring puts on the wire."""

    calls: int = 0
    bytes: int = 0
    wire: float = 0.0


class CommCounter(TorchDispatchMode):
    """Collectives of this rank inside the block, by name and mesh dimension.

    >>> with CommCounter(mesh) as counter:
    ...     step()
    >>> counter["all_reduce", "tp"].bytes

    `found` maps (collective, dimension) to `Traffic`; a group that is no dimension of `mesh` goes by its own name, and
    the group of all ranks is `"world"`. Collectives of the backward pass count too.
    """

    def __init__(self, mesh: "dist.DeviceMesh | None" = None) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Traffic] = {}
        self._dims = {"default_pg": "world"}
        if dist.is_initialized():
            self._dims[dist.group.WORLD.group_name] = "world"
        if mesh is not None:
            for name in mesh.mesh_dim_names or ():
                self._dims[mesh.get_group(name).group_name] = name

    def __getitem__(self, key: tuple[str, str]) -> Traffic:
        return self.found.get(key, Traffic())

    def total(self, collective: str) -> Traffic:
        """Of one collective over all groups."""
        rows = [row for (name, _), row in self.found.items() if name == collective]
        return Traffic(sum(r.calls for r in rows), sum(r.bytes for r in rows), sum(r.wire for r in rows))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # its own dispatch calls the plain operations, which come by here again
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.partition("::")[2]
            if name in _NAMES:
                self._note(*_NAMES[name], args)
        return function(*args, **(kwargs or {}))

    def _note(self, collective: str, whole: int | None, args: tuple) -> None:
        group = _group(args)
        size = _bytes(args[whole or 0])
        if whole is None:  # the functional all-gather names its part, and how many there are
            size *= args[1]
        row = self.found.setdefault((collective, self._dims.get(group.group_name, group.group_name)), Traffic())
        row.calls += 1
        row.bytes += size
        row.wire += _WIRE[collective](group.size(), size)


def _group(args: tuple) -> "dist.ProcessGroup":
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    names = [value for value in args if isinstance(value, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a rank did one thing; `begin` and `end` in seconds."""

    rank: int
    name: str
    begin: float
    end: float


class Timeline:
    """Spans of work of many ranks: how busy they were, and a trace that chrome://tracing or Perfetto shows."""

    def __init__(self, spans: Sequence[Span] = ()) -> None:
        self.spans = list(spans)

    @property
    def length(self) -> float:
        """From the first beginning to the last end, in seconds."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - min(span.begin for span in self.spans)

    def idle(self, rank: int) -> float:
        """The share of the whole length in which the rank did nothing (the bubble, as a share of the step)."""
        busy = sum(span.end - span.begin for span in self.spans if span.rank == rank)
        return 1 - busy / self.length if self.spans else 0.0

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace: JSON, one row a rank, times in microseconds from the first span on."""
        first = min((span.begin for span in self.spans), default=0.0)
        events = [{"name": span.name, "ph": "X", "pid": 0, "tid": span.rank, "ts": 1e6 * (span.begin - first),
                   "dur": 1e6 * (span.end - span.begin)} for span in self.spans]  # fmt: skip
        names = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
                 for rank in sorted({span.rank for span in self.spans})]  # fmt: skip
        draft = Path(path).with_name(f".{Path(path).name}.part")
        draft.write_text(json.dumps({"traceEvents": names + events}))
        os.replace(draft, path)
