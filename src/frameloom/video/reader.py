"""`read`: a lazy clip from a file, a folder or glob of pictures, a GIF or a camera.

Opening decodes one frame, to learn size, colour, rotation, interlacing and transparency. The first question
about times walks the container once without decoding (8 bytes a frame are kept), which gives the exact number
of frames, tells constant from variable frame rate, and finds files that end early before any work is done.
"""

import glob
import hashlib
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import torch

from frameloom.errors import InputError
from frameloom.video.clip import Clip, Frame, Info, Passthrough, Source
from frameloom.video.colour import Colour
from frameloom.video.times import RegularTimes, parse_range, parse_rate

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MAX_PIXELS = 16384 * 16384


def read(
    path: str | Path,
    *,
    stream: int = 0,
    range: str | None = None,
    rate: str | float | int | Fraction | None = None,
    deinterlace: bool = False,
    keep_readable: bool = False,
) -> Clip:
    """Open a video. Nothing but its first frame is decoded.

    Args:
        path: a file, a folder or a glob of pictures (`"shots/*.png"`), or a camera (`"/dev/video0"`).
        stream: which of several video streams, counted from 0.
        range: a part of it, `"2.5s:10s"`.
        rate: frames a second of a folder of pictures (24 if not given); files know their own.
        deinterlace: turn interlaced fields into whole frames (bwdif) where they occur.
        keep_readable: go on with the readable frames of a damaged file instead of stopping.

    Raises:
        InputError: no such file, not a video, no picture in it, damaged, interlaced, transparent.
    """
    text = str(path)
    if text.startswith("/dev/"):
        return Clip(CameraSource(text, parse_range(range)[1] if range else None))
    pictures = _pictures(text)
    if pictures is not None:
        source: Source = ImagesSource(pictures, parse_rate(rate or 24, "--rate"), text)
    else:
        source = FileSource(Path(path), stream, deinterlace, keep_readable)
    clip = Clip(source)
    if range:
        start, stop = parse_range(range)
        clip = clip[start : stop if stop is not None else len(clip)]
    return clip


def _pictures(text: str) -> list[Path] | None:
    """The pictures that a folder, a glob or a single picture's name means; None if it means a video file."""

    def number_aware(path: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    path = Path(text)
    if path.is_dir():
        found = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGES), key=number_aware)
        if not found:
            raise InputError(f"{text}: the folder holds no pictures ({', '.join(sorted(IMAGES))})")
        return found
    if path.exists():
        return [path] if path.suffix.lower() in IMAGES else None
    if glob.has_magic(text):
        found = sorted((Path(p) for p in glob.glob(text)), key=number_aware)
        if not found:
            raise InputError(f"{text}: no file matches")
        if any(p.suffix.lower() not in IMAGES for p in found):
            raise InputError(f"{text}: a glob is for pictures; {found[0].name} is not one")
        return found
    raise InputError(f"{text}: no such file")


def _open(path: Path | str, **options) -> av.container.InputContainer:
    try:
        return av.open(str(path), metadata_errors="ignore", **options)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read (permission denied)") from None
    except (av.error.FFmpegError, ValueError, OSError, UnicodeError) as error:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        reason = "the file is empty" if empty else f"not a video that can be read ({_reason(error)})"
        raise InputError(f"{path}: {reason}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split(":")[0].lower()


class _Weaver:
    """Makes whole frames of interlaced fields, through libavfilter's bwdif; passes frames on when `on` is False."""

    def __init__(self, first: av.VideoFrame, on: bool) -> None:
        self.graph = av.filter.Graph() if on else None
        self.waiting: deque[int] = deque()
        if self.graph is None:
            return
        clock = Fraction(1, 1000)
        nodes = [
            self.graph.add_buffer(width=first.width, height=first.height, format=first.format.name, time_base=clock),
            self.graph.add("bwdif", "mode=send_frame"),
            self.graph.add("buffersink"),
        ]
        for given, taken in itertools.pairwise(nodes):
            given.link_to(taken)
        self.graph.configure()

    def push(self, number: int, frame: av.VideoFrame | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Give frame `number` (None at the end); get those that are ready, with their numbers."""
        if self.graph is None:
            if frame is not None:
                yield number, frame
            return
        if frame is not None:
            self.waiting.append(number)
            frame.pts, frame.time_base = number, Fraction(1, 1000)
        self.graph.push(frame)
        while self.waiting:
            try:
                ready = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            yield self.waiting.popleft(), ready


@dataclass(frozen=True)
class _Index:
    """What one walk over a file's packets tells: `pts` of every frame in order (none if the file has no usable
    time stamps), the length of a `tick` and the first frame's instant `origin` in seconds."""

    count: int
    rate: Fraction
    regular: bool
    pts: np.ndarray | None = None
    tick: Fraction = Fraction(1)
    origin: Fraction = Fraction(0)


class FileSource(Source):
    """One video stream of a media file."""

    def __init__(self, path: Path, stream: int, deinterlace: bool, keep_readable: bool) -> None:
        self.path, self.stream, self.keep_readable = path, stream, keep_readable
        with _open(path) as container:
            chosen = self._choose(container)
            first = self._first_frame(container, chosen)
            interlaced = bool(first.interlaced_frame)
            if interlaced and not deinterlace:
                raise InputError(f"{path}: the video is interlaced; add --deinterlace to weave its fields together")
            self.deinterlace = interlaced
            # Degrees counter-clockwise that the decoded picture must be turned to stand upright.
            rotation = int(first.rotation) % 360
            if rotation % 90:
                raise InputError(f"{path}: the video is rotated by {rotation} degrees; only quarter turns are handled")
            width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
            nominal = chosen.average_rate or chosen.guessed_rate or chosen.base_rate or Fraction(25)
            self.info = Info(
                width=width,
                height=height,
                rate=Fraction(nominal),
                colour=self._colour(first),
                pix_fmt=first.format.name,
                name=path.name,
                codec=chosen.codec_context.name,
                rotation=rotation,
                pixel_aspect=self._pixel_aspect(chosen, rotation),
            )
            self._raw_size = first.width, first.height
            self._candidates = [Fraction(r) for r in (chosen.base_rate, chosen.average_rate, chosen.guessed_rate) if r]
            self._expected = self._announced(container, chosen)
            self._has_companions = bool(container.streams.audio or container.streams.subtitles)
        index = self._index
        self.info = replace(self.info, rate=index.rate, regular=index.regular)
        if self._has_companions:
            self.passthrough = Passthrough(path, index.origin)

    def _choose(self, container: av.container.InputContainer) -> av.VideoStream:
        pictures = [s for s in container.streams.video if not (s.disposition & av.stream.Disposition.attached_pic)]
        if not pictures:
            what = "sound but no picture" if container.streams.audio else "no video stream"
            raise InputError(f"{self.path}: the file has {what}")
        if not 0 <= self.stream < len(pictures):
            raise InputError(f"--stream {self.stream}: {self.path} has video streams 0 to {len(pictures) - 1}")
        chosen = pictures[self.stream]
        if chosen.codec_context is None:
            raise InputError(f"{self.path}: its video is in a format that no decoder here knows")
        if chosen.width * chosen.height > MAX_PIXELS:
            raise InputError(f"{self.path}: {chosen.width}x{chosen.height} pixels is more than can be meant")
        chosen.thread_type = "AUTO"
        return chosen

    def _first_frame(self, container: av.container.InputContainer, stream: av.VideoStream) -> av.VideoFrame:
        damaged = False
        try:
            for packet in container.demux(stream):
                try:
                    for frame in packet.decode():
                        return frame
                except av.error.InvalidDataError:
                    damaged = True
        except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
            raise InputError(f"{self.path}: no frame can be decoded ({_reason(error)})") from None
        raise InputError(f"{self.path}: {'no frame can be decoded; the file is damaged' if damaged else 'no frames'}")

    def _colour(self, frame: av.VideoFrame) -> Colour:
        try:
            colour = Colour.of(frame)
            Frame(Fraction(0), colour, frame).rgb  # noqa: B018  (an unusable layout should fail here, not midway)
        except (InputError, ValueError, av.error.FFmpegError) as error:
            raise InputError(f"{self.path}: {error}") from None
        return colour

    @staticmethod
    def _pixel_aspect(stream: av.VideoStream, rotation: int) -> Fraction:
        aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
        return 1 / aspect if rotation % 180 else aspect

    @staticmethod
    def _announced(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[int, float]:
        """What the headers promise: how many frames, and the instant of the end in seconds; 0 for what they omit."""
        end = 0.0
        if stream.duration:
            end = float((stream.duration + (stream.start_time or 0)) * stream.time_base)
        elif match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            end = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
        return stream.frames, end

    @cached_property
    def _index(self) -> _Index:
        stamps: list[int] = []
        unknown = 0
        with _open(self.path) as container:
            stream = self._choose(container)
            try:
                for packet in container.demux(stream):
                    if packet.size == 0 or packet.is_discard:
                        continue
                    if packet.pts is None:
                        unknown += 1
                    else:
                        stamps.append(packet.pts)
            except (av.error.FFmpegError, OSError) as error:
                if not self.keep_readable:
                    raise InputError(self._ends_early(len(stamps) + unknown, _reason(error))) from None
            tick = Fraction(stream.time_base)
        count = len(stamps) + unknown
        frames, end = self._expected
        reached = float((max(stamps, default=0) + 1) * tick)
        if not self.keep_readable and (count < 0.98 * frames - 2 or (not unknown and reached < 0.98 * end - 0.5)):
            raise InputError(self._ends_early(count))
        if unknown or len(set(stamps)) < count:
            return _Index(count, self.info.rate, True)
        pts = np.array(sorted(stamps), np.int64)
        origin = int(pts[0]) * tick
        for rate in self._candidates:
            # Containers round instants to their tick, so a regular rate shows as at most one tick of jitter.
            if np.abs(pts - pts[0] - np.arange(count) / float(rate * tick)).max() <= 1.0:
                return _Index(count, rate, True, pts, tick, origin)
        return _Index(count, Fraction(count - 1) / (int(pts[-1] - pts[0]) * tick), False, pts, tick, origin)

    def _ends_early(self, count: int, reason: str = "") -> str:
        frames, end = self._expected
        expected = frames or round(end * self.info.rate)
        about = f" of about {expected:,}" if expected else ""
        return (
            f"{self.path}: the file ends early: {count:,}{about} frames could be read"
            f"{f' ({reason})' if reason else ''} (use --keep-readable to go on with those)"
        )

    def times(self) -> Sequence[Fraction]:
        index = self._index
        if index.regular:
            return RegularTimes(index.rate, index.count)
        return [int(stamp - index.pts[0]) * index.tick for stamp in index.pts]

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        count = self._index.count
        stop = count if stop is None else min(stop, count)
        if start >= stop:
            return
        times = self.times()
        # A deinterlacer looks one frame back and one ahead; with this margin frame `start` comes out the same.
        margin = 3 if self.deinterlace else 0
        weaver: _Weaver | None = None
        reached = start
        for number, native in itertools.chain(self._numbered(max(0, start - margin), stop + margin), [(-1, None)]):
            if native is not None and (native.width, native.height) != self._raw_size:
                raise InputError(
                    f"{self.path}: the picture changes size at frame {number}, from "
                    f"{self._raw_size[0]}x{self._raw_size[1]} to {native.width}x{native.height}"
                )
            if native is not None and weaver is None:
                weaver = _Weaver(native, self.deinterlace)
            for index, ready in weaver.push(number, native) if weaver else ():
                if start <= index < stop:
                    reached = index + 1
                    yield self._upright(Frame(times[index], self.info.colour, ready))
        if reached < stop and not self.keep_readable:
            raise InputError(self._ends_early(reached))

    def _upright(self, frame: Frame) -> Frame:
        """The way the camera was held. Turned as RGB: turning planes would move the chroma samples off their sites."""
        if not self.info.rotation:
            return frame
        return Frame(frame.time, frame.colour, rgb=torch.rot90(frame.rgb, self.info.rotation // 90, (1, 2)))

    def _numbered(self, first: int, stop: int, seek: bool = True) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decoded frames `first` to `stop` with their numbers, beginning at the nearest keyframe before."""
        index = self._index
        with _open(self.path) as container:
            stream = self._choose(container)
            unproven = seek and first > 0 and index.pts is not None
            if unproven:
                try:
                    container.seek(int(index.pts[first]), stream=stream, backward=True)
                except av.error.FFmpegError:
                    container.seek(0)
            number = -1
            for native in self._decode(container, stream):
                if index.pts is None or native.pts is None:
                    number += 1
                else:
                    number = min(int(np.searchsorted(index.pts, native.pts)), index.count - 1)
                if unproven and number > first:
                    break
                unproven = False
                if number >= stop:
                    return
                if number >= first:
                    yield number, native
        if unproven:
            # Some containers seek past the frame that was asked for; then only the beginning is safe.
            yield from self._numbered(first, stop, seek=False)

    def _decode(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
        packets = container.demux(stream)
        read = 0
        while True:
            try:
                packet = next(packets)
                pictures = packet.decode()
            except StopIteration:
                return
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError) as error:
                if self.keep_readable and isinstance(error, av.error.InvalidDataError):
                    continue
                raise InputError(
                    f"{self.path}: the file is damaged after frame {read:,} ({_reason(error)}) "
                    "(use --keep-readable to go on with what can be read)"
                ) from None
            for picture in pictures:
                read += 1
                if picture.is_corrupt and not self.keep_readable:
                    raise InputError(
                        f"{self.path}: the file is damaged at frame {read:,} "
                        "(use --keep-readable to go on with what can be read)"
                    )
                yield picture

    def inputs(self) -> list[Path]:
        return [self.path]

    def fingerprint(self) -> str:
        state = self.path.stat()
        return f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns} {self.stream} {self.deinterlace}"


class ImagesSource(Source):
    """Pictures in the order of the numbers in their names, one a frame."""

    def __init__(self, paths: list[Path], rate: Fraction, name: str) -> None:
        self.paths = paths
        first = self._load(paths[0])
        colour = Colour.of(first)
        self.info = Info(
            first.width, first.height, rate, colour, first.format.name, name=Path(name).name, codec="pictures"
        )
        self._rgb(paths[0], first)

    @staticmethod
    def _load(path: Path) -> av.VideoFrame:
        with _open(path) as container:
            if not container.streams.video:
                raise InputError(f"{path}: not a picture that can be read")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise InputError(f"{path}: {stream.width}x{stream.height} pixels is more than can be meant")
            try:
                for frame in container.decode(stream):
                    return frame
            except (av.error.FFmpegError, OSError, ValueError) as error:
                raise InputError(f"{path}: not a picture that can be read ({_reason(error)})") from None
        raise InputError(f"{path}: not a picture that can be read")

    def _rgb(self, path: Path, native: av.VideoFrame) -> Frame:
        frame = Frame(Fraction(0), Colour.of(native), native)
        try:
            frame.rgb  # noqa: B018  (transparency is found here, with the name of the file at hand)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return frame

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, len(self.paths))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for number in range(*slice(start, stop).indices(len(self.paths))):
            path = self.paths[number]
            native = self._load(path)
            if (native.width, native.height) != (self.info.width, self.info.height):
                raise InputError(
                    f"{path}: this picture is {native.width}x{native.height}, the first one is "
                    f"{self.info.width}x{self.info.height}; all must be of one size"
                )
            yield self._rgb(path, native).at(Fraction(number) / self.info.rate)

    def inputs(self) -> list[Path]:
        return self.paths

    def fingerprint(self) -> str:
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return f"{self.paths[0].parent.resolve()} {hashlib.sha256(repr(states).encode()).hexdigest()} {self.info.rate}"


class CameraSource(Source):
    """A camera device: frames as they come, without end (or for `seconds`), readable once and from now on."""

    def __init__(self, device: str, seconds: Fraction | None) -> None:
        if "v4l2" not in av.formats_available:
            raise InputError(f"{device}: the installed PyAV was built without camera support (v4l2)")
        self.device, self.seconds = device, seconds
        with _open(device, format="v4l2") as container:
            stream = container.streams.video[0]
            first = next(container.decode(stream))
            self.info = Info(first.width, first.height, Fraction(stream.average_rate or 30), Colour.of(first),
                             first.format.name, regular=False, name=device, codec="camera")  # fmt: skip

    def times(self) -> Sequence[Fraction]:
        if self.seconds is None:
            raise InputError(f"{self.device}: a camera has no end; say how long with --range :10s")
        return RegularTimes(self.info.rate, int(self.seconds * self.info.rate))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        if start:
            raise InputError(f"{self.device}: a camera cannot go back; work on it starts at its first frame")
        limit = len(self.times())
        with _open(self.device, format="v4l2") as container:
            for number, native in enumerate(container.decode(container.streams.video[0])):
                if number >= limit or (stop is not None and number >= stop):
                    return
                yield Frame(Fraction(number) / self.info.rate, self.info.colour, native)

    def fingerprint(self) -> str:
        return f"camera {self.device}"
