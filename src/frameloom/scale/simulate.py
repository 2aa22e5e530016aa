"""What a schedule would take: an event for every action, from a few measured numbers.

An action begins when its rank is free and what it needs has arrived:

    begin = max(end of the rank's action before, end of the producer + hop),   end = begin + work + overhead

With no overhead this gives the closed forms of the bubble to the last digit; with the overhead of an action measured
on a machine (`calibrate`), it gives the step times of real processes there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from frameloom.scale.probe import Span, Timeline
from frameloom.scale.schedule import Action, Schedule


@dataclass(frozen=True)
class Costs:
    """Seconds of a stage's forward and backward on one micro-batch; one number for all stages, or one a stage.

    `overhead` is what every action costs its rank besides (launching, waiting on a socket), `hop` the seconds of a
    boundary tensor's way to another rank.
    """

    forward: float | Sequence[float]
    backward: float | Sequence[float]
    overhead: float = 0.0
    hop: float = 0.0

    def of(self, action: Action) -> float:
        table = self.forward if action.kind == "F" else self.backward
        return (table if isinstance(table, float | int) else table[action.stage]) + self.overhead


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """The spans of every rank, from time 0 on."""
    free = [0.0] * schedule.p
    ended: dict[Action, float] = {}
    line = Timeline()
    for rank, action in schedule.walk():
        begin = free[rank]
        need = action.needs(schedule.stages)
        if need is not None:
            away = need.stage % schedule.p != rank
            begin = max(begin, ended[need] + (costs.hop if away else 0.0))
        free[rank] = ended[action] = begin + costs.of(action)
        line.spans.append(Span(rank, f"{action.kind} {action.stage}.{action.unit}", begin, free[rank]))
    return line


def bubble(name: str, p: int, m: int, v: int = 1) -> float:
    """Idle time over the *ideal* time of a step (the Megatron paper's bubble fraction): (p - 1) / (v m)."""
    return (p - 1) / ((v if name == "interleaved" else 1) * m)


def idle_share(name: str, p: int, m: int, v: int = 1) -> float:
    """Idle time as a share of the whole step: (p - 1) / (v m + p - 1)."""
    part = bubble(name, p, m, v)
    return part / (1 + part)


def live(name: str, p: int, m: int, v: int = 1, rank: int = 0) -> int:
    """Micro-batches, times stages, that a rank holds at most: m; p - r; or (v - 1) p + 2 (p - 1 - r) + 1."""
    if name == "interleaved":
        return min(v * m, (v - 1) * p + 2 * (p - 1 - rank) + 1)
    return v * m if name == "gpipe" else min(m, p - rank)


class Sleep(torch.nn.Module):
    """A stage that takes time and no processor: many ranks on two cores then run a real schedule at its real pace.

    Forward sleeps `forward` seconds, backward `backward`; the tensor goes through as it is.
    """

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.gain = torch.nn.Parameter(torch.ones(()))  # a stage without parameters would have no backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(x * self.gain, *self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, x, forward, backward):
        context.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(context.seconds)
        return gradient, None, None


def sleep_table(rank: int, p: int, ways: Sequence[tuple[int, str, int]], forward: float, backward: float,
                steps: int = 3) -> list[float]:  # fmt: skip
    """`sleep_steps` for several (m, schedule, v), one after the other."""
    return [sleep_steps(rank, p, m, name, v, forward, backward, steps) for m, name, v in ways]


def sleep_steps(rank: int, p: int, m: int, name: str, v: int, forward: float, backward: float, steps: int) -> float:
    """The median seconds of a step of sleeping stages on `p` real ranks; to be run by `frameloom.scale.ranks.local`."""
    from torch.distributed.pipelining import PipelineStage

    from frameloom.scale.stock import schedule_class

    device = torch.device("cpu")
    stages = [PipelineStage(Sleep(forward / v, backward / v), rank + p * chunk, p * v, device) for chunk in range(v)]
    made = schedule_class(name)(stages if name == "interleaved" else stages[0], m, loss_fn=_loss)
    x, target = torch.ones(m, 4), torch.zeros(m, 4)
    taken = []
    for _ in range(steps + 1):  # the first step also finds out the shapes
        dist.barrier()
        begin = time.perf_counter()
        made.step(*([x] if rank == 0 else []), **({"target": target} if rank == p - 1 else {}))
        dist.barrier()
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[(steps - 1) // 2]


def _loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (x - target).square().mean()


def calibrate(p: int = 2, m: int = 8, steps: int = 3, seconds: float = 0.01) -> float:
    """The overhead of an action on this machine, in seconds, from the step of a short pipeline of sleeping stages.

    A GPipe step is m + p - 1 pairs of actions one after the other, so what it takes beyond their sleep is theirs.
    """
    from frameloom.scale.ranks import local

    step = max(local(sleep_steps, p, p, m, "gpipe", 1, seconds, seconds, steps))
    return max(0.0, step / (2 * (m + p - 1)) - seconds)
