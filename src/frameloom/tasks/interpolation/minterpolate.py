"""FFmpeg's `minterpolate` filter: block motion with overlapped compensation, the tool most people have.

It works on a stream, not on a pair, so it brings its own source; the instants it makes are the same j / rate.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

import av

from frameloom.video.clip import Frame, Source
from frameloom.video.times import RegularTimes, index_at

# The filter looks two frames back and two ahead; starting this early makes frame k the same from any start.
MARGIN = 6


class MInterpolate:
    """FFmpeg's motion-compensated interpolation with its best settings (bidirectional, variable-size blocks)."""

    fixed_t = False
    tile = None

    def resample(self, source: Source, rate: Fraction) -> Source:
        """`source` at the instants j / rate."""
        return _FilteredSource(source, rate)


class _FilteredSource(Source):
    def __init__(self, base: Source, rate: Fraction) -> None:
        self.base = base
        self.info = replace(base.info, rate=rate, regular=True)
        self.passthrough = base.passthrough

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, ceil(self.base.end() * self.info.rate))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        stop = min(len(self.times()), stop if stop is not None else len(self.times()))
        number = start
        last: Frame | None = None
        for made in self._made(max(0, index_at(self.base.times(), Fraction(start) / self.info.rate) - MARGIN)):
            position = round(made.time * self.info.rate)
            # The filter has nothing to say before its second picture and after its last: hold the nearest.
            while number < min(position + 1, stop):
                yield made.at(Fraction(number) / self.info.rate)
                number += 1
            last = made
            if number >= stop:
                return
        while last is not None and number < stop:
            yield last.at(Fraction(number) / self.info.rate)
            number += 1

    def _made(self, first: int) -> Iterator[Frame]:
        rate, tick = self.info.rate, Fraction(1, 1_000_000)
        graph: av.filter.Graph | None = None
        colour = self.info.colour.as_video()
        pix_fmt = "yuv420p"
        for frame in self.base.frames(first):
            native = frame.to_native(pix_fmt, replace(colour, depth=8))
            if graph is None:
                graph = av.filter.Graph()
                nodes = [
                    graph.add_buffer(width=native.width, height=native.height, format=pix_fmt, time_base=tick),
                    graph.add("minterpolate", f"fps={rate}:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1"),
                    graph.add("buffersink"),
                ]
                for given, taken in itertools.pairwise(nodes):
                    given.link_to(taken)
                graph.configure()
            native.pts, native.time_base = round(frame.time / tick), tick
            graph.push(native)
            yield from self._ready(graph, colour)
        if graph is not None:
            graph.push(None)
            yield from self._ready(graph, colour)

    @staticmethod
    def _ready(graph: av.filter.Graph, colour) -> Iterator[Frame]:
        while True:
            try:
                picture = graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield Frame(picture.pts * Fraction(picture.time_base), replace(colour, depth=8), picture)

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} | minterpolate {self.info.rate}"
