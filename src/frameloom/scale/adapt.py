"""What a mixture-of-experts layer costs under every parallelism that its weights allow, and which one to take.

One layout of the weights serves them all (see `frameloom.scale.moe`), so that the choice is a number r, free to change
at every step. With W devices, E experts of H hidden units over S = W/E devices each (1 if there are more experts than
devices), C places a device and expert and b bytes a number, a device puts on the wire in the forward pass

    r = 0    data parallel: all weights come here      (W-1)/W  * E * P
    r >= 1   tokens travel, to r copies of an expert   2 (W-1)/W * r * E C D b  +  (S/r - 1)/S * P'  +  (S-1)/S * D b

P being the bytes of one expert and P' those without its second bias. The backward pass moves as much again. Arithmetic
is the same for all. Few tokens want r = S, many r = 1, more yet r = 0.

C. Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", MLSys 2023, arXiv 2206.03382, sections 3.1 and 3.3.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from frameloom.errors import InputError
from frameloom.scale.layout import Group


class Strategy(NamedTuple):
    """How a layer runs: the parallelism `r`, chunks of the capacity that overlap, ranks of a node (1: one hop)."""

    r: int = 1
    overlap: int = 1
    node: int = 1


@dataclass(frozen=True)
class Shape:
    """A layer on its devices: `devices` W, `experts` E, `dim` D, `hidden` H, `item` bytes of a number.

    Raises:
        InputError: devices and experts of which neither divides the other, or hidden units that do not divide.
    """

    devices: int
    experts: int
    dim: int
    hidden: int
    item: int = 4

    def __post_init__(self) -> None:
        w, e, h = self.devices, self.experts, self.hidden
        if w % e and e % w:
            fit = sorted({n for n in range(1, w + 1) if w % n == 0} | {w * n for n in range(2, e // w + 2)},
                         key=lambda n: (abs(n - e), n))[:3]  # fmt: skip
            raise InputError(f"experts={e} on {w} devices: one must divide the other; "
                             f"{', '.join(map(str, sorted(fit)))} experts would do")  # fmt: skip
        if h % self.shards:
            near = math.ceil(h / self.shards) * self.shards
            raise InputError(f"hidden={h}: an expert is cut over {self.shards} devices, which does not divide it; "
                             f"{near} would do")  # fmt: skip

    @property
    def shards(self) -> int:
        """S, the devices that share an expert."""
        return max(1, self.devices // self.experts)

    @property
    def own(self) -> int:
        """Experts of one device (of which it may hold a slice only)."""
        return max(1, self.experts // self.devices)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Every r that this layout allows: 0 and the divisors of S."""
        return (0, *(r for r in range(1, self.shards + 1) if self.shards % r == 0))

    def check(self, r: int) -> int:
        """`r` itself. Raises InputError for one that the layout does not allow."""
        if r not in self.degrees:
            raise InputError(f"r={r}: {self.experts} experts on {self.devices} devices allow "
                             f"{', '.join(map(str, self.degrees))}")  # fmt: skip
        return r


def wire(shape: Shape, capacity: int, r: int) -> float:
    """Bytes that a device sends in the forward pass of a layer with `capacity` places a device and expert."""
    w, s, b = shape.devices, shape.shards, shape.item
    second = math.ceil(shape.dim / s) * s * b
    expert = (2 * shape.hidden * shape.dim + shape.hidden) * b
    if shape.check(r) == 0:
        return (w - 1) / w * shape.experts * (expert + second)
    tokens = 2 * (w - 1) / w * r * shape.experts * capacity * shape.dim * b
    return tokens + ((s // r - 1) / s * expert + (s - 1) / s * second if s > 1 else 0)


def cheapest(shape: Shape, capacity: int) -> int:
    """The r that sends least; of equals the one that gathers least."""
    return min(reversed(shape.degrees), key=lambda r: wire(shape, capacity, r))


@dataclass(frozen=True)
class Links:
    """A cluster for `seconds`: nodes of `node` devices; latency in seconds and bandwidth in bytes a second of each.

    The defaults are round figures of NVLink inside a node of eight and 200 Gb/s InfiniBand between nodes, and are
    assumptions: what they predict is a simulation.
    """

    node: int = 8
    near_latency: float = 5e-6
    near_rate: float = 200e9
    far_latency: float = 15e-6
    far_rate: float = 25e9


def all_to_all_seconds(devices: int, size: float | int, links: Links, two_hops: bool = False) -> float:
    """Simulated time of an all-to-all of `size` bytes a device: a message to every other device, one after another."""
    node = min(links.node, devices)
    nodes, piece = devices // node, size / devices
    if two_hops:
        return ((node - 1) * (links.near_latency + nodes * piece / links.near_rate)
                + (nodes - 1) * (links.far_latency + node * piece / links.far_rate))  # fmt: skip
    return ((node - 1) * (links.near_latency + piece / links.near_rate)
            + (devices - node) * (links.far_latency + piece / links.far_rate))  # fmt: skip


def gather_seconds(devices: int, size: float | int, links: Links) -> float:
    """Simulated time of a ring all-gather to `size` bytes in all; a ring is as slow as its slowest link."""
    near = devices <= links.node
    latency, rate = (links.near_latency, links.near_rate) if near else (links.far_latency, links.far_rate)
    return (devices - 1) * (latency + size / devices / rate)


def seconds(shape: Shape, capacity: int, r: int, links: Links, two_hops: bool = False) -> float:
    """Simulated time of a layer's communication, forward and back; see `Links`."""
    s, b = shape.shards, shape.item
    expert = (2 * shape.hidden * shape.dim + shape.hidden + shape.dim) * b
    if shape.check(r) == 0:
        return 2 * gather_seconds(shape.devices, shape.experts * expert, links)
    tokens = r * shape.experts * capacity * shape.dim * b
    return 2 * (2 * all_to_all_seconds(shape.devices, tokens, links, two_hops)
                + gather_seconds(s // r, expert / r, links))  # fmt: skip


def crossings(shape: Shape, capacities: Sequence[int], cost: Callable[[Shape, int, int], float] = wire) -> dict:
    """The r that costs least for growing capacities, each with the first capacity at which it is taken."""
    found: dict[int, int] = {}
    for capacity in sorted(capacities):
        best = min(reversed(shape.degrees), key=lambda r: cost(shape, capacity, r))
        found.setdefault(best, capacity)
    return found


class Tuner:
    """Finds the fastest strategy for every load by trying each once, while the work goes on.

    A dictionary from buckets of the capacity (powers of two) to times. In a bucket every candidate is run `tries` times
    after one run that is not counted; from then on the fastest is taken. Ranks agree on the slowest rank's times.

    >>> strategy = tuner.choose(capacity)
    >>> tuner.record(capacity, strategy, seconds)
    """

    def __init__(self, candidates: Iterable[Strategy], group: Group = None, tries: int = 1) -> None:
        self.candidates, self.group, self.tries = tuple(candidates), group, tries
        self.times: dict[int, dict[Strategy, list[float]]] = {}
        self.best: dict[int, Strategy] = {}

    @staticmethod
    def bucket(capacity: int) -> int:
        return max(capacity - 1, 0).bit_length()

    def choose(self, capacity: int) -> Strategy:
        """What to run now; every rank must ask in the same order."""
        bucket = self.bucket(capacity)
        if bucket in self.best:
            return self.best[bucket]
        times = self.times.setdefault(bucket, {one: [] for one in self.candidates})
        for one in self.candidates:
            if len(times[one]) <= self.tries:
                return one
        slowest = torch.tensor([min(times[one][1:]) for one in self.candidates], dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self.group)
        self.best[bucket] = self.candidates[int(slowest.argmin())]
        return self.best[bucket]

    def settled(self, capacity: int) -> bool:
        """Whether the search for this load is over."""
        return self.bucket(capacity) in self.best

    def record(self, capacity: int, strategy: Strategy, seconds: float) -> None:
        """How long a run of `choose`'s strategy took."""
        bucket = self.bucket(capacity)
        if bucket not in self.best:
            self.times.setdefault(bucket, {one: [] for one in self.candidates})[strategy].append(seconds)
