"""The frames of a video stream: how many a decoder shows and when, found before any work is done.

One walk over the packets, without decoding, is enough for most files: a packet is a picture and carries its time.
Where that is in doubt (cut recordings, hidden reference pictures, containers that store no times of showing), the
pictures are decoded once and counted: what a decoder shows is what there is.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np

from frameloom.video.times import RegularTimes, standard_rate

# Streams without a container, and codecs whose packets may be pictures that are never shown (VP8) or change between
# whole frames and fields (MPEG-2).
_RAW = {"mpegvideo", "h264", "hevc", "m4v", "vc1", "obu"}
_DECODED = {"vp8", "mpeg2video"}
# Containers that store times of decoding alone; FFmpeg makes those of showing up.
_UNSHOWN = {"avi", "asf"}


@dataclass(frozen=True)
class Index:
    """`shown` is when each frame is shown, in ticks of `tick` seconds; equal only for two pictures in one tick.
    `end` is when the last one stops being shown, in seconds after the first; `rate` an average unless `regular`. Only
    if `seekable` do the `stamps` that the decoder gives the frames find one from anywhere in the file."""

    shown: np.ndarray
    stamps: np.ndarray
    tick: Fraction
    rate: Fraction
    regular: bool
    end: Fraction
    seekable: bool

    @property
    def count(self) -> int:
        return len(self.shown)

    @property
    def origin(self) -> Fraction:
        """The instant of the first frame on the file's own clock, in seconds."""
        return int(self.shown[0]) * self.tick if self.count else Fraction(0)

    def times(self) -> Sequence[Fraction]:
        """The instants of the frames after the first, strictly rising."""
        if self.regular:
            return RegularTimes(self.rate, self.count)
        times = [int(stamp - self.shown[0]) * self.tick for stamp in self.shown]
        # Pictures that the container put on one tick share it out among them.
        for first, size in _runs(self.shown):
            for place in range(1, size):
                times[first + place] += place * self.tick / size
        return times

    def number(self, stamp: int | None, after: int | None) -> int | None:
        """Which frame has this stamp, given the number of the one shown before it (None after a seek); None if that
        cannot be told for certain."""
        if stamp is None:
            return None
        if after is not None:
            return after + 1 if after + 1 < self.count and self.stamps[after + 1] == stamp else None
        low, high = np.searchsorted(self.stamps, stamp, "left"), np.searchsorted(self.stamps, stamp, "right")
        return int(low) if high == low + 1 else None


def _runs(stamps: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, size) of every run of equal stamps."""
    edges = np.flatnonzero(np.diff(stamps, prepend=np.nan, append=np.nan))
    for first, past in pairwise(edges):
        if past - first > 1:
            yield int(first), int(past - first)


UNKNOWN = -(2**63)  # in place of a stamp that a packet lacks


@dataclass
class Walk:
    """What the packets of one video stream say, in the order of decoding."""

    stamps: array = field(default_factory=lambda: array("q"))
    decoding: array = field(default_factory=lambda: array("q"))
    certain: bool = True
    reordered: bool = False
    first_key: int | None = None
    last: tuple[int, int] = (UNKNOWN, 0)

    def add(self, packet: av.Packet) -> None:
        if packet.size == 0:
            return
        stamp = UNKNOWN if packet.pts is None else packet.pts
        if not self.stamps and not packet.is_keyframe:
            self.certain = False  # begins inside a group of pictures
        if packet.is_discard or packet.is_corrupt or packet.pts is None:
            self.certain = False
        elif packet.is_keyframe and self.first_key is None:
            self.first_key = stamp
        elif self.first_key is not None and stamp < self.first_key:
            self.certain = False  # belongs to a group that was cut away
        self.reordered |= bool(self.stamps) and stamp < self.stamps[-1]
        self.stamps.append(stamp)
        self.decoding.append(UNKNOWN if packet.dts is None else packet.dts)
        self.last = max(self.last, (stamp, packet.duration or 0))

    def doubtful(self, container: av.container.InputContainer, stream: av.VideoStream) -> bool:
        """Whether packets may not be pictures, or their stamps not those of the pictures."""
        context = stream.codec_context
        if not self.certain or len(np.unique(self.stamps)) < len(self.stamps) or context.name in _DECODED:
            return True
        # Pictures that wait for others, and none that is shown in another order: perhaps the container says no other.
        waiting = bool(context.has_b_frames) and not self.reordered and len(self.stamps) > 1
        kinds = set(container.format.name.split(","))
        return (waiting or bool(kinds & (_RAW | _UNSHOWN))) and not context.codec.intra_only

    def as_decoded(self, count: int) -> list[int] | None:
        """The times of decoding, rising, if there is one for each of `count` pictures: the k-th one shown has the
        k-th where a container stores no others."""
        if len(self.decoding) != count or UNKNOWN in self.decoding:
            return None
        return sorted(self.decoding)


def stores_no_times(container: av.container.InputContainer) -> bool:
    """Whether a container's times of showing are FFmpeg's guess."""
    return bool(set(container.format.name.split(",")) & _UNSHOWN)


def build(
    stamps: list[int | None],
    walk: Walk,
    unshown: bool,
    tick: Fraction,
    nominal: list[Fraction],
    header_end: Fraction | None,
    seekable: bool,
) -> Index:
    """An index from the stamps of the pictures in the order of showing.

    Args:
        stamps: one for each picture; None where the file has none.
        unshown: whether the container stores no times of showing.
        tick: in seconds; `nominal` the frame rates that the headers name, the most trustworthy first.
        header_end: when the stream ends on the file's clock, by a header that speaks of this stream; None if unknown.
        seekable: whether the stamps were read off a file whose clock goes on steadily.
    """
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        # No times at all: frames are counted, from where the file begins.
        rate = nominal[0] if nominal else Fraction(25)
        start = known[0] if known else 0
        ticks = np.array([start + round(k / (rate * tick)) for k in range(len(stamps))], np.int64)
        return Index(ticks, ticks, tick, rate, True, Fraction(len(stamps)) / rate, False)
    rising = all(early <= late for early, late in pairwise(known))
    found = np.array(sorted(known), np.int64)
    decoded = walk.as_decoded(len(stamps)) if unshown or not rising else None
    shown = found if decoded is None else np.array(decoded, np.int64)
    rate, regular = standard_rate(shown - shown[0], tick, nominal)
    last = int(shown[-1]) * tick
    hold = Fraction(0)
    if not walk.reordered and walk.last[0] == found[-1]:
        hold = walk.last[1] * tick
    if header_end is not None:
        hold = max(hold, header_end - last)
    if regular and hold < Fraction(3, 2) / rate:
        hold = 1 / rate
    end = last + (hold or 1 / rate) - int(shown[0]) * tick
    return Index(shown, found, tick, rate, regular, end, seekable and rising)
