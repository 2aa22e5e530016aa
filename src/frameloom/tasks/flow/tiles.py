"""Large pictures in parts: every tile is a video of its own to the method, and their flows are blended.

What a learned method needs grows with the square of a picture's area (the attention of GMA) or is too large to hold at
once; a tile bounds both. A method then aggregates within a tile alone, and motion longer than the overlap is seen from
one side only, so pictures that can be taken whole are better taken whole.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.errors import InputError

OVERLAP = 96  # pixels that neighbours share, over which one fades into the other


class Tiled:
    """A method by tiles of `side` pixels: itself a `FlowEstimator`.

    All tiles go forward a gap at a time, so that only as many frames are held as the method itself looks at.

    Raises InputError for a side that is no longer than the overlap or that the method cannot see anything in.
    """

    def __init__(self, method: Any, side: int) -> None:
        self.method, self.multiple, self.least = method, method.multiple, method.least
        self.centred = getattr(method, "centred", False)
        self.side = side - side % method.multiple
        if self.side <= OVERLAP or self.side < method.least:
            raise InputError(f"--tile {side}: tiles share {OVERLAP} pixels with their neighbours, and this method sees "
                             f"nothing in less than {method.least}; ask for more")  # fmt: skip

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Float[Tensor, "2 h w"], Float[Tensor, "2 h w"] | None]]:
        """The flow of each gap between frames, and the one back if wanted."""
        source = iter(frames)
        first = next(source, None)
        if first is None:
            return
        height, width = first.shape[-2:]
        places = list(product(spans(height, self.side, self.multiple), spans(width, self.side, self.multiple)))
        shares = [_fade(y, height)[:, None] * _fade(x, width)[None] for y, x in places]
        total = torch.zeros(height, width)
        for (y, x), share in zip(places, shares, strict=True):
            total[slice(*y), slice(*x)] += share
        shared = _Shared(first, source, places)
        del first
        parts = [self.method.stream(shared.part(number), backward) for number in range(len(places))]
        for found in zip(*parts, strict=True):
            yield tuple(_blended(flows, places, shares, total) if flows[0] is not None else None
                        for flows in zip(*found, strict=True))  # fmt: skip


class _Shared:
    """Frames that several tiles read, each at its own pace; a frame goes when all have had it.

    (`itertools.tee` lets go of 57 at a time.)
    """

    def __init__(self, first: Tensor, rest: Iterator[Tensor], places: list) -> None:
        self.held, self.rest, self.places = deque([first]), rest, places
        self.gone, self.done = 0, [0] * len(places)

    def part(self, number: int) -> Iterator[Float[Tensor, "3 a b"]]:
        """The frames of one tile."""
        y, x = self.places[number]
        while True:
            at = self.done[number] - self.gone
            if at == len(self.held):
                fresh = next(self.rest, None)
                if fresh is None:
                    return
                self.held.append(fresh)
                del fresh
            cut = self.held[at][:, slice(*y), slice(*x)].clone()
            self.done[number] += 1
            while self.gone < min(self.done):
                self.held.popleft()
                self.gone += 1
            yield cut
            del cut


def spans(length: int, side: int, multiple: int) -> list[tuple[int, int]]:
    """Starts and stops of as few tiles of `side` as cover `length` with the overlap, evenly, on multiples."""
    if length <= side:
        return [(0, length)]
    count = -(-(length - OVERLAP) // (side - OVERLAP))
    starts = [round(k * (length - side) / (count - 1) / multiple) * multiple for k in range(count)]
    return [(start, start + side) for start in starts]


def _fade(span: tuple[int, int], length: int) -> Float[Tensor, "n"]:
    """The share of a tile along one axis: it falls towards the sides that have a neighbour, and not at the edges."""
    at = torch.arange(span[1] - span[0], dtype=torch.float32) + 1
    before = at if span[0] > 0 else torch.full_like(at, OVERLAP)
    after = at.flip(0) if span[1] < length else torch.full_like(at, OVERLAP)
    return torch.minimum(before, after).clamp(max=OVERLAP) / OVERLAP


def _blended(flows: tuple[Tensor, ...], places: list, shares: list[Tensor], total: Tensor) -> Float[Tensor, "2 h w"]:
    made = flows[0].new_zeros(2, *total.shape, dtype=torch.float32)
    for flow, (y, x), share in zip(flows, places, shares, strict=True):
        made[:, slice(*y), slice(*x)] += flow.float() * share.to(flow.device)
    return made / total.to(made.device)
