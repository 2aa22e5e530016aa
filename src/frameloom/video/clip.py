"""`Clip`: a description of a video and a way to get its frames. Nothing is computed until frames are asked for.

A clip reads from a `Source`; verbs wrap a source in another source, so a chain of verbs is a chain of
generators and holds one window in memory. Any source can start at any frame, which is what makes slicing,
random access and resuming after a kill the same thing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frameloom.errors import InputError
from frameloom.video.colour import BT709, Colour, as_native, native_from_rgb, rgb_from_native
from frameloom.video.hdr import Hdr
from frameloom.video.orientation import UPRIGHT, Orientation
from frameloom.video.times import RegularTimes, index_at, show_duration, show_rate


@dataclass(frozen=True)
class Info:
    """What is known of a clip before its frames are read.

    `rate` is frames a second; when `regular` is False the rate is an average and the times are what counts.
    `pix_fmt` is the native layout of decoded frames (`"yuv420p"`, `"yuv420p10le"`, `"rgb24"`); `orientation` the
    turn, already applied, that the file asked for; `pixel_aspect` the width of a pixel over its height; `hdr` the
    static metadata of HDR10.
    """

    width: int
    height: int
    rate: Fraction
    colour: Colour
    pix_fmt: str = "yuv420p"
    regular: bool = True
    name: str = "clip"
    codec: str = ""
    orientation: Orientation = UPRIGHT
    pixel_aspect: Fraction = Fraction(1)
    hdr: Hdr | None = None


class Frame:
    """One picture at one instant; it stays as the decoder made it until somebody asks for RGB.

    `time` is in seconds from the start of the clip. `rgb` is float32 `(3, h, w)` in [0, 1].
    """

    __slots__ = ("_rgb", "colour", "native", "time")

    def __init__(
        self, time: Fraction, colour: Colour, native: av.VideoFrame | None = None, rgb: Tensor | None = None
    ) -> None:
        self.time, self.colour, self.native, self._rgb = time, colour, native, rgb

    @property
    def rgb(self) -> Float[Tensor, "3 h w"]:
        if self._rgb is None:
            self._rgb = rgb_from_native(self.native, self.colour)
        return self._rgb

    def at(self, time: Fraction) -> "Frame":
        """The same picture at another instant."""
        return Frame(time, self.colour, self.native, self._rgb)

    def turned(self, orientation: Orientation) -> "Frame":
        """The same picture laid upright."""
        return Frame(self.time, self.colour, rgb=orientation(self.rgb))

    def to_native(self, pix_fmt: str, colour: Colour) -> av.VideoFrame:
        """As a frame for an encoder; not a number changed where the format can hold them and the colour is the same."""
        untouched = None if self.native is None else as_native(self.native, self.colour, pix_fmt, colour)
        return native_from_rgb(self.rgb, pix_fmt, colour) if untouched is None else untouched


@dataclass(frozen=True)
class Passthrough:
    """What travels with a clip from the file `path`: its title, dates and attachments; while `timed` also what runs
    beside the pictures, chapters and the packets of sound and subtitles, those within [start, stop) seconds.

    `origin` is the instant of the clip's first frame on the file's own clock; `stop` None means to the end,
    and a `start` of None keeps what comes before the first picture too (encoder priming samples). `sound` says
    whether there are sound or subtitles, `stream` which of the file's videos this is, `first` when that begins.
    """

    path: Path
    origin: Fraction
    start: Fraction | None = None
    stop: Fraction | None = None
    timed: bool = True
    sound: bool = True
    stream: int = 0
    first: Fraction = Fraction(0)


class Source:
    """Where a clip's frames come from. Subclasses give `info`, `times`, `frames` and `fingerprint`."""

    info: Info
    base: "Source | None" = None
    passthrough: Passthrough | None = None

    def times(self) -> Sequence[Fraction]:
        """The instant of every frame in seconds, ascending, the first at 0. May read the container once."""
        raise NotImplementedError

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames `start` to `stop`, one at a time. Frame k is the same whatever the start."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Says what these frames depend on; equal fingerprints mean equal frames. Used to resume safely."""
        raise NotImplementedError

    def inputs(self) -> list[Path]:
        """The files that are being read: the ones that must not be written."""
        return self.base.inputs() if self.base else []

    def end(self) -> Fraction:
        """The instant at which the last frame stops being shown; a frame's usual time after its start."""
        times = self.times()
        return (times[-1] + 1 / self.info.rate) if len(times) else Fraction(0)


class TensorSource(Source):
    """Frames that are already in memory: `(t, c, h, w)`, uint8 or float in [0, 1]."""

    def __init__(self, video: Tensor, rate: Fraction, name: str) -> None:
        self.video = video
        _, _, height, width = video.shape
        self.info = Info(width, height, rate, Colour(BT709, False), name=name)

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, self.video.shape[0])

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for k in range(*slice(start, stop).indices(self.video.shape[0])):
            picture = self.video[k]
            rgb = picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
            yield Frame(Fraction(k) / self.info.rate, self.info.colour, rgb=rgb)

    def fingerprint(self) -> str:
        return f"tensor {tuple(self.video.shape)} {float(self.video.double().sum()):.6f} at {self.info.rate}"


class View(Source):
    """Frames `start`, `start + step`, ... before `stop` of another source, re-timed to begin at 0."""

    def __init__(self, base: Source, start: int, stop: int, step: int = 1) -> None:
        self.base, self.start, self.stop, self.step = base, start, stop, step
        times = base.times()
        self.origin = times[start] if start < len(times) else Fraction(0)
        self.info = replace(base.info, rate=base.info.rate / step)
        if base.passthrough is not None and stop > start:
            whole_end = stop >= len(times)
            ahead = base.passthrough
            self.passthrough = replace(
                ahead,
                origin=ahead.origin + self.origin,
                start=ahead.origin + self.origin if start > 0 else ahead.start,
                stop=ahead.stop if whole_end else ahead.origin + times[stop],
            )

    def times(self) -> Sequence[Fraction]:
        if self.base.info.regular:
            return RegularTimes(self.info.rate, len(range(self.start, self.stop, self.step)))
        return [time - self.origin for time in self.base.times()[self.start : self.stop : self.step]]

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        wanted = range(self.start, self.stop, self.step)[start:stop]
        if not wanted:
            return
        for offset, frame in enumerate(self.base.frames(wanted[0], wanted[-1] + 1)):
            if offset % self.step == 0:
                yield frame.at(frame.time - self.origin)

    def end(self) -> Fraction:
        times = self.base.times()
        return (times[self.stop] if self.stop < len(times) else self.base.end()) - self.origin

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()}[{self.start}:{self.stop}:{self.step}]"


class MappedSource(Source):
    """A picture-by-picture function over another source; keeps its times and its sound."""

    def __init__(
        self, base: Source, function: Callable[[Tensor], Tensor], label: str, info: Info | None = None
    ) -> None:
        self.base, self.function, self.label = base, function, label
        self.info = info or base.info
        self.passthrough = base.passthrough

    def times(self) -> Sequence[Fraction]:
        return self.base.times()

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for frame in self.base.frames(start, stop):
            yield Frame(frame.time, self.info.colour, rgb=self.function(frame.rgb))

    def end(self) -> Fraction:
        return self.base.end()

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} | {self.label}"


class Retimed(Source):
    """The same frames at another, regular rate: slower or faster. The sound does not fit any more and stays away."""

    def __init__(self, base: Source, rate: Fraction) -> None:
        self.base = base
        self.info = replace(base.info, rate=rate, regular=True)
        if base.passthrough is not None:
            self.passthrough = replace(base.passthrough, timed=False, sound=False)

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, len(self.base.times()))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for number, frame in enumerate(self.base.frames(start, stop), start):
            yield frame.at(Fraction(number) / self.info.rate)

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} at {self.info.rate}"


class Clip:
    """A video, lazily. `clip[10:40]` is by frame, `clip[2.0:4.0]` by second, `clip[::2]` every second frame."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @staticmethod
    def from_tensor(video: Tensor, rate: float | int | Fraction = 24, name: str = "clip") -> "Clip":
        """A clip over `(t, c, h, w)`: uint8, or float in [0, 1]."""
        if video.ndim != 4 or video.shape[1] != 3:
            raise InputError(f"a video tensor is (t, 3, h, w); this one is {tuple(video.shape)}")
        return Clip(TensorSource(video, Fraction(rate).limit_denominator(1_000_000), name))

    @property
    def info(self) -> Info:
        return self.source.info

    @property
    def rate(self) -> Fraction:
        return self.source.info.rate

    @property
    def times(self) -> Sequence[Fraction]:
        return self.source.times()

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame's start to the last frame's end."""
        return self.source.end()

    def __len__(self) -> int:
        return len(self.source.times())

    def __iter__(self) -> Iterator[Frame]:
        return self.source.frames()

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames `start` to `stop` (by number), one at a time."""
        return self.source.frames(start, stop)

    def __getitem__(self, key: Any) -> "Clip":
        if not isinstance(key, slice):
            raise TypeError("a clip is cut with a slice: clip[10:40] by frame, clip[2.0:4.0] by second")
        times = self.times

        def number(edge: Any) -> int | None:
            if isinstance(edge, float | Fraction):
                return index_at(times, Fraction(edge).limit_denominator(1_000_000))
            return edge

        start, stop, step = slice(number(key.start), number(key.stop), key.step).indices(len(times))
        if step < 1:
            raise InputError("a clip is cut forwards: the step is 1 or more")
        if start >= stop:
            raise InputError(f"the cut {key.start}:{key.stop} holds no frame; the clip has {len(times)} frames "
                             f"over {show_duration(float(self.duration))}")  # fmt: skip
        return Clip(View(self.source, start, stop, step))

    def windows(self, size: int, overlap: int = 0) -> Iterator[Float[Tensor, "t 3 h w"]]:
        """Windows of `size` frames, each beginning `size - overlap` frames after the one before.

        Every frame is in some window; the last window may be shorter. Memory: one window.
        """
        if not 0 <= overlap < size:
            raise ValueError(f"overlap {overlap} must be at least 0 and below the window size {size}")
        held: list[Tensor] = []
        fresh = 0
        for frame in self:
            held.append(frame.rgb)
            fresh += 1
            if len(held) == size:
                yield torch.stack(held)
                held, fresh = held[size - overlap :], 0
        if fresh:
            yield torch.stack(held)

    def tensor(self) -> Float[Tensor, "t 3 h w"]:
        """The whole clip in memory, float32 in [0, 1]."""
        pictures = [frame.rgb for frame in self]
        if not pictures:
            raise InputError(f"{self.info.name}: no frames")
        return torch.stack(pictures)

    def bytes_tensor(self) -> UInt8[Tensor, "t 3 h w"]:
        """The whole clip in memory, rounded to 8 bit: a quarter of `tensor()`."""
        return torch.stack([(frame.rgb * 255).round().to(torch.uint8) for frame in self])

    def map(self, function: Callable[[Tensor], Tensor], label: str) -> "Clip":
        """A clip whose pictures are `function(rgb)`; `label` names the function when work is resumed."""
        return Clip(MappedSource(self.source, function, label))

    def enlarged(self, times: int) -> "Clip":
        """Every pixel as a square of `times` by `times`."""
        if times == 1:
            return self
        info = replace(self.info, width=self.info.width * times, height=self.info.height * times)

        def blocks(rgb: Tensor) -> Tensor:
            return rgb.repeat_interleave(times, 1).repeat_interleave(times, 2)

        return Clip(MappedSource(self.source, blocks, f"{times} times as large", info))

    def retimed(self, rate: Fraction) -> "Clip":
        """The same frames shown at `rate` frames a second, without the sound."""
        return Clip(Retimed(self.source, rate))

    def save(self, path: str | Path, **options: Any) -> "Clip":
        """Encode to a file and return the clip read back from it; see `frameloom.video.writer.write`."""
        from frameloom.video.reader import read
        from frameloom.video.writer import write

        return read(write(self, Path(path), **options))

    def __repr__(self) -> str:
        info = self.info
        sound = ", audio" if self.source.passthrough and self.source.passthrough.sound else ""
        return (f"Clip({info.width}x{info.height}, {show_rate(info.rate)} fps, "
                f"{show_duration(float(self.duration))}{sound})")  # fmt: skip
