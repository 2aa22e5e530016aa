"""`read`: a lazy clip from a file, a folder, glob or pattern of pictures, a GIF or a camera."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av

from frameloom.errors import InputError
from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import Colour
from frameloom.video.demux import open_input
from frameloom.video.file import FileSource
from frameloom.video.pictures import ImagesSource, pictures
from frameloom.video.times import RegularTimes, parse_range, parse_rate


def read(
    path: str | Path,
    *,
    stream: int = 0,
    range: str | None = None,
    rate: str | float | int | Fraction | None = None,
    deinterlace: bool = False,
    keep_readable: bool = False,
    same_size: bool = False,
) -> Clip:
    """Open a video. Its first frame is decoded and its frames are found; see `frameloom.video.index`.

    Args:
        path: a file, a folder, a glob or a pattern of pictures (`"shots/*.png"`, `"shot_%04d.exr"`), or a camera
            (`"/dev/video0"`).
        stream: which of several video streams, counted from 0.
        range: a part of it, `"2.5s:10s"`.
        rate: frames a second of a folder of pictures (24 if not given); files know their own.
        deinterlace: turn interlaced fields into whole frames (bwdif) where they occur.
        keep_readable: go on with the readable frames of a damaged file instead of stopping.
        same_size: scale pictures to the first one's size where a stream changes it, instead of stopping.

    Raises:
        InputError: no such file, not a video, no picture in it, damaged, interlaced, transparent.
    """
    text = str(path)
    if text.startswith("/dev/"):
        return Clip(CameraSource(text, parse_range(range)[1] if range else None))
    paths = pictures(text)
    if paths is not None:
        source: Source = ImagesSource(paths, parse_rate(rate or 24, "--rate"), text)
    else:
        source = FileSource(Path(path), stream, deinterlace, keep_readable, same_size)
    clip = Clip(source)
    if range:
        start, stop = parse_range(range)
        clip = clip[start : stop if stop is not None else len(clip)]
    return clip


class CameraSource(Source):
    """A camera device: frames as they come, without end (or for `seconds`), readable once and from now on."""

    def __init__(self, device: str, seconds: Fraction | None) -> None:
        if "v4l2" not in av.formats_available:
            raise InputError(f"{device}: the installed PyAV was built without camera support (v4l2)")
        self.device, self.seconds = device, seconds
        with open_input(device, format="v4l2") as container:
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
        with open_input(self.device, format="v4l2") as container:
            for number, native in enumerate(container.decode(container.streams.video[0])):
                if number >= limit or (stop is not None and number >= stop):
                    return
                yield Frame(Fraction(number) / self.info.rate, self.info.colour, native)

    def fingerprint(self) -> str:
        return f"camera {self.device}"
