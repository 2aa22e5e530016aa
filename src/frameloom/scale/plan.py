"""How to spread a model over n devices: every legal (p, t, d, b, v), what it takes in memory and time, the best first.

The analytic model of Megatron's PTD-P. A step of m micro-batches over p stages of which each rank holds v takes

    (m + (p - 1)/v) (t_f + t_b) + the copies' gradient exchange,
    t_f = F b/(t X) + all-reduces of the split matrices + the boundary's way,   t_b = 2 t_f (3 with recomputation)

for F floating-point operations of a stage's forward pass on one example, b examples in a micro-batch and X the rate
that a device really reaches. For the GPT family the paper's closed forms give parameters, operations and days.

Everything here is arithmetic: what was measured on real processes is the simulator behind it (`frameloom claim
megatron`); no figure of a plan has been measured on the devices that it names.

D. Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
arXiv 2104.04473. Activations: V. Korthikanti et al., arXiv 2205.05198.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from frameloom.cards import card
from frameloom.errors import InputError
from frameloom.scale.partition import Block, costs, cuts
from frameloom.scale.probe import Timeline
from frameloom.scale.schedule import schedule
from frameloom.scale.simulate import Costs, live, simulate

# 16-bit weights and gradients, 32-bit weights and Adam's two moments.
BYTES_A_PARAMETER = 18
# Of what a transformer layer keeps for its backward pass, the share that t ranks each keep whole (the rest is split).
REPLICATED = 10 / 34


@dataclass(frozen=True)
class Device:
    """Makers' figures: 16-bit FLOP/s, bytes of memory, bytes a second within a node and to another node."""

    flops: float
    memory: float
    link: float
    net: float
    per_node: int = 8


DEVICES = {
    "a100": Device(312e12, 80e9, 300e9, 25e9),
    "h100": Device(989e12, 80e9, 450e9, 50e9),
    "h200": Device(989e12, 141e9, 450e9, 50e9),
}


@dataclass(frozen=True)
class GPT:
    """A model of the GPT family, by the closed forms of the paper (s: tokens of an example, V: vocabulary)."""

    width: int
    layers: int
    heads: int
    sequence: int = 2048
    vocabulary: int = 51200

    @property
    def parameters(self) -> float:
        """12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h))."""
        h, layers = self.width, self.layers
        inner = 1 + 13 / (12 * h) + (self.vocabulary + self.sequence) / (12 * layers * h)
        return 12 * layers * h * h * inner

    def flops(self, batch: int, recompute: bool = True) -> float:
        """Of one iteration: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)), or 72 and 12 where nothing is computed again."""
        h, layers, s = self.width, self.layers, self.sequence
        outer, logits = (96, 16) if recompute else (72, 12)
        return outer * batch * s * layers * h * h * (1 + s / (6 * h) + self.vocabulary / (logits * layers * h))

    def days(self, tokens: float, devices: int, achieved: float) -> float:
        """About 8 T P / (n X) seconds for T tokens on n devices that reach X FLOP/s each, in days."""
        return 8 * tokens * self.parameters / (devices * achieved) / 86400

    def blocks(self) -> list[Block]:
        """Costs of an example: the embedding, the layers, and the logits."""
        h, s, v, a = self.width, self.sequence, self.vocabulary, self.heads
        layer = Block(24 * s * h * h * (1 + s / (6 * h)), 12 * h * h + 13 * h, round(s * h * (34 + 5 * a * s / h)),
                      2 * s * h)  # fmt: skip
        return [Block(0.0, (v + s) * h, 0, 2 * s * h), *[layer] * self.layers, Block(2.0 * s * h * v, 0, 4 * s * v, 4)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to spread a model, and what it takes; `share` is the bubble as a share of the step."""

    p: int
    t: int
    d: int
    b: int
    v: int
    m: int
    remat: bool
    memory: float
    seconds: float
    share: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @property
    def name(self) -> str:
        return "interleaved" if self.v > 1 else "1f1b"

    def words(self) -> str:
        """As `train --parallel` takes it."""
        extra = f",v={self.v}" if self.v > 1 else ""
        return (f"pp={self.p},tp={self.t},dp={self.d},schedule={self.name}{extra},microbatches={self.m}"
                f"{',remat=always' if self.remat else ''}")  # fmt: skip

    def timeline(self) -> Timeline:
        """The simulated step of one pipeline."""
        return simulate(schedule(self.name, self.p, self.m, self.v), Costs(self.forward, self.backward))


def plans(blocks: Sequence[Block], heads: int, batch: int, devices: int, device: Device, *, efficiency: float = 0.45,
          most: int = 8) -> list[Plan]:  # fmt: skip
    """Every legal way that fits into the devices' memory, the fastest first.

    Args:
        blocks: costs of one example, with 16-bit activations (`frameloom.scale.partition.profile`, `GPT.blocks`).
        batch: examples of a step, over all copies.
        efficiency: the share of the maker's FLOP/s that a device reaches.
        most: the largest micro-batch and the largest v that are tried.

    Raises InputError where nothing fits (by how much, and what would help most), or nothing divides.
    """
    flops = [block.flops for block in blocks]
    begins = cache(lambda stages: cuts(flops, stages))
    found, nearest = [], None
    for t in _powers(min(device.per_node, devices)):
        for p in range(1, devices // t + 1):
            if heads % t or devices % (p * t) or p > len(blocks):
                continue
            d = devices // (p * t)
            for b in _powers(most):
                m, rest = divmod(batch, b * d)
                if rest or not m:
                    continue
                for v in _powers(most) if p > 1 and m % p == 0 else (1,):
                    if p * v > len(blocks):
                        continue
                    for remat in (False, True):
                        one = _plan(blocks, begins(p * v), p, t, d, b, v, m, remat, device, efficiency)
                        if one.memory <= device.memory:
                            found.append(one)
                        elif nearest is None or one.memory < nearest.memory:
                            nearest = one
    if not found and nearest is None:
        raise InputError(f"--devices {devices}: no p x t x d = {devices} divides {heads} heads and a batch of {batch}")
    if not found:
        over = nearest.memory / device.memory
        raise InputError(f"--devices {devices}: nothing fits; the least is {nearest.memory / 1e9:.3g} GB a device with "
                         f"{nearest.words()}, {over:.2g} times what there is; --devices {_above(devices, over)} would "
                         "help most")  # fmt: skip
    return sorted(found, key=lambda one: one.seconds)


def _plan(blocks: Sequence[Block], begins: Sequence[int], p: int, t: int, d: int, b: int, v: int, m: int, remat: bool,
          device: Device, efficiency: float) -> Plan:  # fmt: skip
    ends = [*begins[1:], len(blocks)]
    rate = device.flops * efficiency * t
    # A layer's output is summed over the t ranks twice on the way there and twice back.
    ring = 2 * (t - 1) / t / device.link
    across = device.net if p * t > device.per_node else device.link
    name = "interleaved" if v > 1 else "1f1b"
    forward, backward, held = [], [], []
    for begin, end in zip(begins, ends, strict=True):
        mine = blocks[begin:end]
        sums = sum(2 * block.boundary for block in mine if block.saved) * ring * b
        hop = mine[-1].boundary * b / t / across if p > 1 else 0.0
        pure = sum(block.flops for block in mine) * b / rate + sums
        forward.append(pure + hop)
        backward.append((3 if remat else 2) * pure + hop)
        inner = [block.saved * (REPLICATED + (1 - REPLICATED) / t) * b for block in mine]
        handed = blocks[begin - 1].boundary * b if begin else mine[0].boundary * b
        held.append((handed if remat else sum(inner), max(inner, default=0.0) if remat else 0.0))
    memory = 0.0
    for rank in range(p):
        stages = range(rank, p * v, p)
        weights = sum(block.parameters for s in stages for block in blocks[begins[s] : ends[s]])
        kept = live(name, p, m, v, rank) / v * sum(held[s][0] for s in stages) + max(held[s][1] for s in stages)
        memory = max(memory, BYTES_A_PARAMETER * weights / t + kept)
    pair = max(f + g for f, g in zip(forward, backward, strict=True))
    heaviest = max(sum(block.parameters for s in range(r, p * v, p) for block in blocks[begins[s] : ends[s]])
                   for r in range(p))  # fmt: skip
    far = device.net if p * t * d > device.per_node else device.link
    exchange = 2 * (d - 1) / d * 2 * heaviest / t / far
    step = (m * v + p - 1) * pair
    return Plan(p=p, t=t, d=d, b=b, v=v, m=m, remat=remat, memory=memory, seconds=step + exchange,
                share=(p - 1) / (v * m + p - 1), forward=tuple(forward), backward=tuple(backward))  # fmt: skip


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _above(devices: int, times: float) -> int:
    more = devices
    while more < devices * times:
        more *= 2
    return more


@cache
def blocks_of(model: str, size: str) -> tuple[list[Block], int, int, float, GPT | None]:
    """Blocks of one example, heads, batch, steps and, for `gpt:...`, its closed forms.

    Args:
        model: the id of a method whose training step is a row of blocks, or `gpt:width=...,layers=...,heads=...`.

    Raises InputError for a model that is neither.
    """
    if model.startswith("gpt:"):
        shape = parse_gpt(model)
        return shape.blocks(), shape.heads, 1536, 0.0, shape
    kind = card(model).load_class()
    recipe = kind.recipe(size)
    # Counted in float32; training keeps activations in 16 bits.
    half = [Block(one.flops, one.parameters, one.saved // 2, one.boundary // 2) for one in costs(model, size, 1)]
    return half, kind.preset(size).heads, recipe.batch_size, float(recipe.steps), None


def parse_gpt(text: str) -> GPT:
    """`gpt:width=12288,layers=96,heads=96`. Raises InputError for anything else."""
    names = ("width", "layers", "heads", "sequence", "vocabulary")
    found = {}
    for part in text.removeprefix("gpt:").split(","):
        name, _, value = part.partition("=")
        if name not in names or not value.isdigit():
            raise InputError(f"{text}: write gpt:width=12288,layers=96,heads=96 with {', '.join(names)}")
        found[name] = int(value)
    if missing := [name for name in names[:3] if name not in found]:
        raise InputError(f"{text}: {', '.join(missing)} must be given")
    return GPT(**found)


def plan(model: str, *, size: str = "paper", devices: int, device: str | Device = "h100", batch: int | None = None,
         efficiency: float = 0.45, trace: str | Path | None = None) -> list[Plan]:  # fmt: skip
    """Ways to spread a model over `devices`, the fastest first; `trace` writes the best one's step as a Chrome trace.

    >>> import frameloom as fl
    >>> fl.plan("stiv", devices=512)[0].words()

    Raises InputError as `blocks_of` and `plans` do.
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise InputError(f"--device {device}: there are {', '.join(DEVICES)}")
        device = DEVICES[device]
    if devices < 1:
        raise InputError(f"--devices {devices}: must be 1 or more")
    blocks, heads, usual, _, _ = blocks_of(model, size)
    found = plans(blocks, heads, batch or usual, devices, device, efficiency=efficiency)
    if trace is not None:
        found[0].timeline().save(trace)
    return found
