"""What the probes of a distributed run count, on real processes."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from frameloom.memory import peak
from frameloom.scale.probe import CommCounter, Span, Timeline
from frameloom.scale.ranks import RankFailed, local


def test_peak_memory_counts_what_is_made_and_not_the_weights():
    layer, x = nn.Linear(1000, 1000), torch.randn(1, 1000)
    assert peak(lambda: layer(x)) == 4000


def _traffic(rank: int) -> dict:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = torch.ones(4, 8, requires_grad=True)
    with CommCounter(mesh) as counter:
        model(x).sum().backward()
        part = torch.ones(3, dtype=torch.float64)
        if rank == 0:
            dist.send(part, 1)
        else:
            dist.recv(part, 0)
    return {key: (row.calls, row.bytes, row.wire) for key, row in counter.found.items()}


def test_collectives_of_both_passes_are_counted_by_mesh_dimension():
    first, second = local(_traffic, 2)
    # forward: the sum behind the row-split matrix; backward: the input's gradient behind the column-split one
    assert first["all_reduce", "tp"] == second["all_reduce", "tp"] == (2, 2 * 4 * 8 * 4, 2 * 4 * 8 * 4)
    assert first["send", "tp"] == second["recv", "tp"] == (1, 24, 24)  # the mesh is the world


def _second_dies(rank: int) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_a_rank_that_fails_is_named_and_does_not_hang_the_others():
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed.*on purpose"):
        local(_second_dies, 2, timeout=30.0)


def test_idle_time_and_trace_of_a_timeline(tmp_path):
    line = Timeline([Span(0, "F 0", 1.0, 3.0), Span(1, "F 0", 3.0, 5.0)])
    assert line.length == 4.0
    assert line.idle(0) == line.idle(1) == 0.5
    line.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"name": "F 0", "ph": "X", "pid": 0, "tid": 1, "ts": 2e6, "dur": 2e6} in events
