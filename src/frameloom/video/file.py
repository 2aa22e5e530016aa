"""A video stream of a media file as a source of frames: exact in number and time, from any start.

Opening decodes one frame, to learn size, colour, orientation, interlacing and transparency, and finds the frames
(`frameloom.video.index`).
"""

import itertools
import logging
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av

from frameloom.errors import InputError
from frameloom.video.clip import Frame, Info, Passthrough, Source
from frameloom.video.colour import Colour
from frameloom.video.demux import MAX_PIXELS, Clock, open_input, reason, steady
from frameloom.video.extent import cut_short
from frameloom.video.hdr import Hdr
from frameloom.video.index import UNKNOWN, Index, Walk, build, stores_no_times
from frameloom.video.orientation import of_video

log = logging.getLogger("frameloom")

# Headers that speak of the one stream when they say how long it is; elsewhere that is a guess from the whole file.
_OWN_DURATION = {"mov", "avi", "gif"}


class _Weaver:
    """Makes whole frames of interlaced fields, through libavfilter's bwdif; frames that are whole stay as they are."""

    def __init__(self, first: av.VideoFrame) -> None:
        self.graph = av.filter.Graph()
        self.waiting: deque[int] = deque()
        clock = Fraction(1, 1000)
        nodes = [
            self.graph.add_buffer(width=first.width, height=first.height, format=first.format.name, time_base=clock),
            self.graph.add("bwdif", "mode=send_frame:deint=interlaced"),
            self.graph.add("buffersink"),
        ]
        for source, sink in itertools.pairwise(nodes):
            source.link_to(sink)
        self.graph.configure()

    def push(self, number: int, frame: av.VideoFrame | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Give frame `number` (None at the end); get those that are ready, with their numbers."""
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


class FileSource(Source):
    """One video stream of a media file."""

    def __init__(self, path: Path, stream: int, deinterlace: bool, keep_readable: bool, same_size: bool) -> None:
        self.path, self.stream, self.keep_readable = path, stream, keep_readable
        self.deinterlace, self.same_size = deinterlace, same_size
        self._noted: set[str] = set()
        with open_input(path) as container:
            chosen = self._choose(container)
            first = self._first_frame(container, chosen)
            self._check_fields(first)
            self._interlaced = bool(first.interlaced_frame)
            try:
                # Side data first: PyAV keeps pointers to it that a frame made writable leaves behind.
                orientation, hdr = of_video(first), Hdr.of(first)
                colour = Colour.of(first)
                Frame(Fraction(0), colour, first).rgb  # noqa: B018  (an unusable layout should fail here, not midway)
            except (InputError, ValueError, av.error.FFmpegError) as error:
                raise InputError(f"{path}: {error}") from None
            aspect = Fraction(chosen.sample_aspect_ratio or 1) or Fraction(1)
            self.info = Info(
                width=first.height if orientation.swap else first.width,
                height=first.width if orientation.swap else first.height,
                rate=Fraction(chosen.average_rate or chosen.guessed_rate or chosen.base_rate or 25),
                colour=colour,
                pix_fmt=first.format.name,
                name=path.name,
                codec=chosen.codec_context.name,
                orientation=orientation,
                pixel_aspect=1 / aspect if orientation.swap else aspect,
                hdr=hdr,
            )
            self._raw = first.width, first.height, first.format.name
            self._expected = self._announced(container, chosen)
            companions = bool(container.streams.audio or container.streams.subtitles)
        index = self._index
        self.info = replace(self.info, rate=index.rate, regular=index.regular)
        self.passthrough = Passthrough(path, index.origin, sound=companions, stream=stream, first=index.origin)

    def _check_fields(self, frame: av.VideoFrame, number: int = 0) -> None:
        if frame.interlaced_frame and not self.deinterlace:
            whence = f" from frame {number:,} on" if number else ""
            raise InputError(
                f"{self.path}: the video is interlaced{whence}; add --deinterlace to weave its fields together"
            )

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

    @staticmethod
    def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
        """The stream's decoder; for VP8 and VP9 that say they have alpha, the one that does not pass it over."""
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
        if name is None or stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) != "1":
            return stream.codec_context
        return av.CodecContext.create(name, "r")

    def _first_frame(self, container: av.container.InputContainer, stream: av.VideoStream) -> av.VideoFrame:
        damaged = False
        decoder = self._decoder(stream)
        try:
            for packet in container.demux(stream):
                try:
                    for frame in decoder.decode(packet):
                        return frame
                except av.error.InvalidDataError:
                    damaged = True
        except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
            raise InputError(f"{self.path}: no frame can be decoded ({reason(error)})") from None
        raise InputError(f"{self.path}: {'no frame can be decoded; the file is damaged' if damaged else 'no frames'}")

    @staticmethod
    def _announced(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[int, Fraction | None]:
        """What the headers promise: how many frames (0 if nothing), and when the stream ends on the file's clock."""
        end = None
        if stream.duration and set(container.format.name.split(",")) & _OWN_DURATION:
            end = ((stream.start_time or 0) + stream.duration) * Fraction(stream.time_base)
        elif match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            end = int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])
        return stream.frames, end

    @cached_property
    def _index(self) -> Index:
        walk, clock = Walk(), Clock()
        whole = not cut_short(self.path)
        with open_input(self.path) as container:
            stream = self._choose(container)
            try:
                for packet in steady(container, [stream], clock):
                    walk.add(packet)
            except (av.error.FFmpegError, OSError) as error:
                if not self.keep_readable:
                    raise InputError(self._ends_early(len(walk.stamps), reason(error))) from None
                whole = False
            if not whole and not self.keep_readable:
                raise InputError(self._ends_early(len(walk.stamps)))
            counted = self.keep_readable or self._interlaced or clock.jumps > 0 or walk.doubtful(container, stream)
            stamps = [None if stamp == UNKNOWN else stamp for stamp in sorted(walk.stamps)]
            unshown = stores_no_times(container)
            tick = Fraction(stream.time_base)
            rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
            nominal = [Fraction(rate) for rate in rates if rate]
        if counted:
            with open_input(self.path) as container:
                stream = self._choose(container)
                stamps = []
                for frame in self._decode(container, stream):
                    self._check_fields(frame, len(stamps))
                    stamps.append(frame.pts)
        if clock.jumps:
            times = "once" if clock.jumps == 1 else f"{clock.jumps} times"
            log.warning(
                "%s: its clock jumps %s, as in joined recordings; the parts follow one another", self.path.name, times
            )
        if not stamps:
            raise InputError(f"{self.path}: no frames")
        header_end = self._expected[1] if whole else None
        return build(stamps, walk, unshown, tick, nominal, header_end, seekable=not clock.jumps)

    def _ends_early(self, count: int, why: str = "") -> str:
        expected = self._expected[0] or round((self._expected[1] or 0) * self.info.rate)
        about = f" of about {expected:,}" if expected else ""
        return (
            f"{self.path}: the file ends early: {count:,}{about} frames could be read"
            f"{f' ({why})' if why else ''} (use --keep-readable to go on with those)"
        )

    def times(self) -> Sequence[Fraction]:
        return self._times

    @cached_property
    def _times(self) -> Sequence[Fraction]:
        return self._index.times()

    def end(self) -> Fraction:
        return self._index.end

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
            ready = [(number, native)]
            if self.deinterlace and (weaver is not None or native is not None):
                weaver = weaver or _Weaver(native)
                ready = weaver.push(number, native)
            for index, picture in ready:
                if picture is not None and start <= index < stop:
                    reached = index + 1
                    frame = Frame(times[index], self.info.colour, picture)
                    # Turned as RGB: turning planes would move the chroma samples off their sites.
                    yield frame.turned(self.info.orientation) if self.info.orientation else frame
        if reached < stop and not self.keep_readable:
            raise InputError(self._ends_early(reached))

    def _numbered(self, first: int, stop: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decoded frames `first` to `stop` with their numbers."""
        index = self._index
        begun = False
        if first > 0 and index.seekable:
            for number, native in self._from_keyframe(first):
                if number >= stop:
                    return
                if number >= first:
                    begun = True
                    yield number, self._fitted(number, native)
            if begun:
                return
        # What could not be proven from its time stamp is counted from the beginning.
        with open_input(self.path) as container:
            for number, native in enumerate(self._decode(container, self._choose(container))):
                if number >= min(stop, index.count):
                    return
                if index.seekable and index.stamps[number] != native.pts:
                    raise InputError(self._out_of_step(number))
                if number >= first:
                    yield number, self._fitted(number, native)

    def _from_keyframe(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames from a keyframe before `first` on; none if the stamps do not lead there without a gap."""
        index = self._index
        with open_input(self.path) as container:
            stream = self._choose(container)
            try:
                container.seek(int(index.stamps[first]), stream=stream, backward=True)
            except av.error.FFmpegError:
                return
            before: int | None = None
            for native in self._decode(container, stream, sought=True):
                number = index.number(native.pts, before)
                if number is None or (before is None and number > first):
                    if before is not None and before >= first:
                        raise InputError(self._out_of_step(before + 1))
                    return
                before = number
                yield number, native

    def _out_of_step(self, number: int) -> str:
        return (
            f"{self.path}: at frame {number:,} the decoder shows another picture than the file lists "
            "(use --keep-readable to go by the decoder)"
        )

    def _fitted(self, number: int, native: av.VideoFrame) -> av.VideoFrame:
        """The frame as large as the first one."""
        width, height, name = self._raw
        if (native.width, native.height) != (width, height):
            if not self.same_size:
                raise InputError(
                    f"{self.path}: the picture changes size at frame {number:,}, from {width}x{height} to "
                    f"{native.width}x{native.height}; add --same-size to scale all to the first size"
                )
            native = native.reformat(width=width, height=height, format=name, interpolation="BICUBIC")
        if native.interlaced_frame and not self.deinterlace and "interlaced" not in self._noted:
            self._noted.add("interlaced")
            log.warning(
                "%s: interlaced from frame %s on; --deinterlace weaves its fields together", self.path.name, number
            )
        return native

    def _decode(
        self, container: av.container.InputContainer, stream: av.VideoStream, sought: bool = False
    ) -> Iterator[av.VideoFrame]:
        decoder = self._decoder(stream)
        packets = container.demux(stream) if sought else steady(container, [stream], Clock())
        read = 0
        while True:
            try:
                packet = next(packets)
                pictures = decoder.decode(packet)
            except StopIteration:
                return
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError) as error:
                if self.keep_readable and isinstance(error, av.error.InvalidDataError):
                    continue
                if self.keep_readable:
                    return
                raise InputError(
                    f"{self.path}: the file is damaged after frame {read:,} ({reason(error)}) "
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
        settings = f"{self.stream} {self.deinterlace}{' same size' if self.same_size else ''}"
        return f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns} {settings}"
