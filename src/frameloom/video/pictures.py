"""Sequences of pictures as a source of frames: a folder, a glob, a numbered pattern or a single picture."""

import glob
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av

from frameloom.errors import InputError
from frameloom.video.clip import Frame, Info, Source
from frameloom.video.colour import LINEAR, SRGB, Colour
from frameloom.video.demux import MAX_PIXELS, open_input, reason
from frameloom.video.orientation import of_picture
from frameloom.video.times import RegularTimes

log = logging.getLogger("frameloom")

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".exr", ".dpx", ".tga", ".jp2"}
_PATTERN = re.compile(r"%(0(\d+))?d")


def pictures(text: str) -> list[Path] | None:
    """The pictures that a folder, a glob, a pattern (`shot_%04d.exr`) or one picture's name means; None if it means
    a video file. In the order of the numbers in their names.

    Raises InputError: nothing there, or no pictures.
    """
    path = Path(text)
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in IMAGES]
        if not found:
            raise InputError(f"{text}: the folder holds no pictures ({', '.join(sorted(IMAGES))})")
    elif path.exists():
        return [path] if path.suffix.lower() in IMAGES else None
    elif match := _PATTERN.search(path.name):
        before, after = re.escape(path.name[: match.start()]), re.escape(path.name[match.end() :])
        digits = rf"\d{{{match[2]},}}" if match[2] else r"\d+"
        name = re.compile(f"{before}{digits}{after}")
        found = [p for p in path.parent.iterdir() if name.fullmatch(p.name)] if path.parent.is_dir() else []
        if not found:
            raise InputError(f"{text}: no file matches")
    elif glob.has_magic(text):
        found = [Path(p) for p in glob.glob(text)]
        if not found:
            raise InputError(f"{text}: no file matches")
    else:
        raise InputError(f"{text}: no such file")
    others = [p for p in found if p.suffix.lower() not in IMAGES]
    if others:
        raise InputError(f"{text}: several files together are pictures; {others[0].name} is not one")
    return sorted(found, key=_numbers)


def _numbers(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _note_gaps(paths: list[Path], name: str) -> None:
    """Say which numbers are missing between those that are there; every tenth, say, is a step and no gap."""
    parts = [_numbers(path) for path in paths]
    varying = [k for k in range(len(parts[0])) if len({str(part[k : k + 1]) for part in parts}) > 1]
    if len({len(part) for part in parts}) > 1 or len(varying) != 1 or varying[0] % 2 == 0:
        return
    numbers = [part[varying[0]] for part in parts]
    steps = Counter(late - early for early, late in pairwise(numbers))
    usual = max(steps, key=lambda step: (steps[step], -step), default=1)
    gaps = [(early + usual, late - usual) for early, late in pairwise(numbers) if late - early > usual]
    if gaps:
        low, high = gaps[0]
        first = f"{low}" if low == high else f"{low} to {high}"
        more = f" and {len(gaps) - 1} other gaps" if len(gaps) > 1 else ""
        log.warning("%s: number %s is missing%s; the frames beside a gap follow one another", name, first, more)


class ImagesSource(Source):
    """Pictures in the order of the numbers in their names, one a frame, upright by their EXIF tags."""

    def __init__(self, paths: list[Path], rate: Fraction, name: str) -> None:
        self.paths = paths
        native = self._load(paths[0])
        first = self._frame(paths[0], native)
        _, height, width = first.rgb.shape
        self.info = Info(
            width, height, rate, first.colour, native.format.name, name=Path(name).name, codec="pictures",
            orientation=of_picture(paths[0]),
        )  # fmt: skip
        _note_gaps(paths, self.info.name)
        if int(native.color_trc) == LINEAR and first.colour.transfer == SRGB:
            log.warning(
                "%s: linear light is shown through the sRGB curve, and what is brighter than white is white",
                self.info.name,
            )

    @staticmethod
    def _load(path: Path) -> av.VideoFrame:
        with open_input(path) as container:
            if not container.streams.video:
                raise InputError(f"{path}: not a picture that can be read")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise InputError(f"{path}: {stream.width}x{stream.height} pixels is more than can be meant")
            try:
                for frame in container.decode(stream):
                    return frame
            except (av.error.FFmpegError, OSError, ValueError) as error:
                raise InputError(f"{path}: not a picture that can be read ({reason(error)})") from None
        raise InputError(f"{path}: not a picture that can be read")

    @staticmethod
    def _frame(path: Path, native: av.VideoFrame) -> Frame:
        try:
            frame = Frame(Fraction(0), Colour.of(native, siting="center"), native)
            frame.rgb  # noqa: B018  (transparency is found here, with the name of the file at hand)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        orientation = of_picture(path)
        return frame.turned(orientation) if orientation else frame

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, len(self.paths))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        for number in range(*slice(start, stop).indices(len(self.paths))):
            path = self.paths[number]
            frame = self._frame(path, self._load(path))
            _, height, width = frame.rgb.shape
            if (width, height) != (self.info.width, self.info.height):
                raise InputError(
                    f"{path}: this picture is {width}x{height}, the first one is "
                    f"{self.info.width}x{self.info.height}; all must be of one size"
                )
            yield frame.at(Fraction(number) / self.info.rate)

    def inputs(self) -> list[Path]:
        return self.paths

    def fingerprint(self) -> str:
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return f"{self.paths[0].parent.resolve()} {hashlib.sha256(repr(states).encode()).hexdigest()} {self.info.rate}"
