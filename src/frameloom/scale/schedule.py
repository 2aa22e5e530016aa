"""Pipeline schedules as data: for every rank, the order of its forwards and backwards.

A model is cut into `stages`; stage s lives on rank s mod p, so that with v stages a rank, a batch goes round v times.
A mini-batch is cut into m micro-batches, and a schedule says in which order a rank works on which of them. Here they
can be checked, simulated (`frameloom.scale.simulate`), counted and drawn; they are executed by
`torch.distributed.pipelining`.

GPipe: Y. Huang et al., arXiv 1811.06965. 1F1B and interleaved 1F1B: D. Narayanan et al., arXiv 2104.04473.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from frameloom.errors import InputError


class Action(NamedTuple):
    """One piece of work: the forward (`F`) or the backward (`B`) of a stage on a micro-batch."""

    kind: Literal["F", "B"]
    stage: int
    unit: int

    def __str__(self) -> str:
        return f"{self.kind}{self.unit} of {self.stage}"

    def needs(self, stages: int) -> "Action | None":
        """The action whose output comes in from another stage (for the last stage's backward: its own forward)."""
        if self.kind == "F":
            return Action("F", self.stage - 1, self.unit) if self.stage else None
        return Action("F" if self.stage == stages - 1 else "B", min(self.stage + 1, stages - 1), self.unit)


@dataclass(frozen=True)
class Schedule:
    """`ranks[r]` is what rank r does, in order; `v` stages live on every rank and there are `m` micro-batches."""

    ranks: tuple[tuple[Action, ...], ...]
    m: int
    v: int = 1

    @property
    def p(self) -> int:
        return len(self.ranks)

    @property
    def stages(self) -> int:
        return self.p * self.v

    def walk(self) -> "list[tuple[int, Action]]":
        """All actions with their ranks in an order that respects every dependency.

        Raises ValueError, naming what waits for what, if there is none: the ranks would wait for each other for ever.
        """
        done: set[Action] = set()
        order: list[tuple[int, Action]] = []
        at = [0] * self.p
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(self.ranks):
                while at[rank] < len(actions):
                    action = actions[at[rank]]
                    need = action.needs(self.stages)
                    if need is not None and need not in done:
                        break
                    done.add(action)
                    order.append((rank, action))
                    at[rank] += 1
                    moved = True
        for rank, actions in enumerate(self.ranks):
            if at[rank] < len(actions):
                action = actions[at[rank]]
                raise ValueError(f"deadlock: rank {rank} waits with {action} for {action.needs(self.stages)}")
        return order

    def check(self) -> None:
        """Raises ValueError unless every stage does every micro-batch once each way, on its own rank, in a possible
        order.
        """
        seen: set[Action] = set()
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if action.stage % self.p != rank:
                    raise ValueError(f"{action} is on rank {rank}; stage {action.stage} lives on rank "
                                     f"{action.stage % self.p}")  # fmt: skip
                if action in seen:
                    raise ValueError(f"{action} is there twice")
                seen.add(action)
        for stage in range(self.stages):
            for unit in range(self.m):
                for kind in ("F", "B"):
                    if Action(kind, stage, unit) not in seen:
                        raise ValueError(f"{Action(kind, stage, unit)} is missing")
        if len(seen) != 2 * self.stages * self.m:
            raise ValueError("a stage or a micro-batch is there that does not exist")
        self.walk()

    def live(self, rank: int) -> int:
        """The most micro-batches, times stages, whose activations the rank holds at once."""
        now = most = 0
        for action in self.ranks[rank]:
            now += 1 if action.kind == "F" else -1
            most = max(most, now)
        return most


def gpipe(p: int, m: int, v: int = 1) -> Schedule:
    """All forwards, then all backwards (v = 1); with v > 1 breadth first: a stage after the other."""
    ranks = []
    for rank in range(p):
        mine = [rank + p * chunk for chunk in range(v)]
        forward = [Action("F", stage, unit) for stage in mine for unit in range(m)]
        ranks.append(tuple(forward + [Action("B", stage, unit) for stage in reversed(mine) for unit in range(m)]))
    return Schedule(tuple(ranks), m, v)


def one_forward_one_backward(p: int, m: int, v: int = 1) -> Schedule:
    """Rank r begins with p - 1 - r forwards, then alternates, so that it never holds more than p - r micro-batches."""
    if v != 1:
        raise InputError(f"v={v}: 1f1b holds one stage a rank; schedule=interleaved holds more")
    ranks = []
    for rank in range(p):
        warm = min(m, p - 1 - rank)
        order = [Action("F", rank, unit) for unit in range(warm)]
        for unit in range(m - warm):
            order += [Action("F", rank, warm + unit), Action("B", rank, unit)]
        ranks.append(tuple(order + [Action("B", rank, unit) for unit in range(m - warm, m)]))
    return Schedule(tuple(ranks), m)


def interleaved(p: int, m: int, v: int = 2) -> Schedule:
    """1F1B over v stages a rank: micro-batches go in groups of p through the first stage, the second, ... of a rank.

    Raises InputError where p does not divide m.
    """
    if m % p:
        raise InputError(f"microbatches={m}: schedule=interleaved takes whole groups of pp={p}; "
                         f"{nearest(m, p)} would do")  # fmt: skip
    ranks = []
    for rank in range(p):
        warm = min(v * m, 2 * (p - 1 - rank) + (v - 1) * p)

        def forward(k: int, rank: int = rank) -> Action:
            group, within = divmod(k, p * v)
            return Action("F", within // p * p + rank, group * p + within % p)

        def backward(k: int, rank: int = rank) -> Action:
            group, within = divmod(k, p * v)
            return Action("B", (v - 1 - within // p) * p + rank, group * p + within % p)

        order = [forward(k) for k in range(warm)]
        for k in range(v * m - warm):
            order += [forward(warm + k), backward(k)]
        ranks.append(tuple(order + [backward(k) for k in range(v * m - warm, v * m)]))
    return Schedule(tuple(ranks), m, v)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
}


def schedule(name: str, p: int, m: int, v: int = 1) -> Schedule:
    """A schedule by name. Raises InputError for a name or numbers that do not fit, with those that would."""
    if name not in SCHEDULES:
        raise InputError(f"schedule={name}: there are {', '.join(SCHEDULES)}")
    for key, value in (("pp", p), ("microbatches", m), ("v", v)):
        if value < 1:
            raise InputError(f"{key}={value}: must be 1 or more")
    return SCHEDULES[name](p, m, v)


def nearest(value: int, divisor: int) -> str:
    """The multiples of `divisor` on either side of `value`: `6 or 8`."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else str(divisor)
