"""Black bars around a picture of another shape: they stand still while the picture inside them is steadied."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from frameloom.video.clip import Clip, Frame, MappedSource, Source

LOOKS = 5  # frames, spread over the clip, that tell where the bars are
DARK = 28 / 255
LEAST = 0.01  # of the side; what is thinner is an edge of the picture

Box = tuple[slice, slice]


def picture_in_bars(clip: Clip) -> Box | None:
    """Rows and columns of the picture between black bars, None without bars. Looks at a few frames."""
    count = len(clip)
    looks = [next(clip.frames(number)).rgb.amax(0) for number in sorted({count * k // LOOKS for k in range(LOOKS)})]
    lit = torch.stack(looks).amax(0) > DARK
    spans = []
    for axis in (1, 0):
        there = lit.any(axis).nonzero().flatten().tolist()
        side = lit.shape[1 - axis]
        if not there:
            return None
        low, high = there[0], there[-1] + 1
        spans.append(slice(low if low > LEAST * side else 0, high if side - high > LEAST * side else side))
    box = spans[0], spans[1]
    whole = all(span == slice(0, side) for span, side in zip(box, lit.shape, strict=True))
    return None if whole else box


class InsideBars(Source):
    """Another source whose picture inside the bars went through `change`; the bars are the recorded ones."""

    def __init__(self, base: Source, box: Box, change: Callable[[Source], Source]) -> None:
        self.base, self.box = base, box
        rows, columns = box
        size = replace(base.info, height=rows.stop - rows.start, width=columns.stop - columns.start)
        self.inner = change(MappedSource(base, lambda rgb: rgb[:, rows, columns].contiguous(), f"inside {box}", size))
        self.info, self.passthrough = base.info, base.passthrough

    @property
    def report(self) -> object:
        return self.inner.report

    def times(self) -> Sequence[Fraction]:
        return self.base.times()

    def end(self) -> Fraction:
        return self.base.end()

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for frame, inside in zip(self.base.frames(start, stop), self.inner.frames(start, stop), strict=True):
            rgb = frame.rgb.clone()
            rgb[:, *self.box] = inside.rgb
            yield Frame(frame.time, self.info.colour, rgb=rgb)

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()} | in bars"
