"""Compression: a clip becomes one `.flm` file, and any frame of the file becomes a picture again.

Every method here is a `VideoCodec`. A file names its method, so `decompress` needs the file and nothing else.
The size of a compressed video is the length of its file: bits per pixel = 8 * len(file) / (t * h * w).
"""

import inspect as introspection
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from frameloom.atomic import aside
from frameloom.bitstream.container import Container, Header, parse
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.cards import card, chosen
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.metrics.rate import bits_per_pixel
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.fit import State
from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.times import RegularTimes

_log = logging.getLogger("frameloom.compression")


class VideoCodec(Protocol):
    """What a compression method offers: three class methods over bytes that `bitstream.container` reads."""

    @classmethod
    def encode(cls, clip: Clip, **settings: Any) -> bytes:
        """The whole file. Settings that every codec takes: `size` in bytes, `seed`, `device`, `progress`."""
        ...

    @classmethod
    def decode(cls, data: bytes, frames: Sequence[int] | None = None) -> Iterator[Float[Tensor, "3 h w"]]:
        """RGB in [0, 1] of the frames asked for, in that order; all of them for None."""
        ...

    @classmethod
    def inspect(cls, data: bytes) -> dict[str, Any]:
        """What is in the file: the header, and each section's bytes and bits per pixel."""
        ...


@dataclass(frozen=True)
class Report:
    """What `compress` did. `bits_per_pixel` counts every byte of the file."""

    path: Path
    method: str
    bytes: int
    frames: int
    bits_per_pixel: float
    seconds: float


def compress(
    clip: Clip,
    path: str | Path,
    method: str = "auto",
    *,
    size: int | None = None,
    bpp: float | None = None,
    quality: float | int | str | None = None,
    segment: int | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    **settings: Any,
) -> Report:
    """Write `clip` to `path` as a `.flm` file. Pictures only: sound is not stored.

    `size` is the number of bytes that the file may have; `bpp` says the same in bits a pixel; `quality="35dB"` is the
    PSNR that the decoded frames shall have (a plain number is a conventional codec's own rate factor).
    `method="auto"` is a conventional codec, because at equal size those measure best on ordinary clips; learned codecs
    are asked for by name. Further settings go to the method (`epochs`, `minutes`, `learning_rate`, `strides`, `fit`,
    `loss` for those that fit a network; `preset` for `x264`, `x265`, `av1`). The file appears under its name only when
    it is complete.

    A method that must hold the whole clip takes a long one in segments, each a fit of its own: of `segment` frames, or
    as many as fit in a gigabyte.

    A fit, and `sem`, keeps its state beside the file while it is under way; after a kill, the same call with `resume`
    goes on to the same file.

    Raises InputError for a setting that the method does not have, and for what the method itself refuses.
    """
    path = Path(path)
    check_device(device)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    if bpp is not None:
        if size is not None:
            raise InputError("--bpp and --size: give one of the two")
        if not 0 < bpp < 100:
            raise InputError(f"--bpp {bpp:g}: bits a pixel are above 0")
        size = int(bpp * len(clip) * clip.info.width * clip.info.height / 8)
    if size is not None and size < 1:
        raise InputError(f"--size {size}: the size to aim for is 1 byte or more")
    method = chosen(method, "compress")
    codec, given = codec_and_settings(method, settings | {"quality": quality})
    state = None
    if "state" in introspection.signature(codec.encode).parameters:
        about = f"{method} {size} {segment} {seed} {sorted(given.items())} {clip.source.fingerprint()}"
        given["state"] = state = State(path.with_name(f".{path.name}.state"), about, resume)
    elif resume:
        raise InputError(f"--resume: {method} keeps nothing to go on with; it begins anew in a moment")
    if clip.source.passthrough and clip.source.passthrough.sound:
        _log.warning("%s: its sound or subtitles are not stored; a .flm file holds pictures alone", clip.info.name)
    given |= {"size": size, "seed": seed, "device": device, "progress": progress}
    started = time.perf_counter()
    cut = _segment(clip, method, segment, fitted="weights" in given)
    if cut is None:
        data = codec.encode(clip, **given)
    else:
        from frameloom.tasks.compression.segments import Segments

        data = Segments.encode(codec, clip, cut, **{"state": None} | given)
    needed = "weights" in introspection.signature(codec.decode).parameters
    check_readable(data, str(path), given.get("weights") if needed else None)
    write_whole(path, data)
    if state is not None:
        state.forget()
    header = parse(data).header
    rate = bits_per_pixel(len(data), header.frames, header.height, header.width)
    return Report(path, method, len(data), header.frames, rate, time.perf_counter() - started)


def check_readable(data: bytes, origin: str, weights: str | Path | None = None) -> None:
    """That a finished file shows its first frame and its last, by the reader that anyone has; a word of failure if not.

    The file is taken apart from its first byte, so a reader that is stricter than the writer is found out in any part
    of it: the header, the index or the table of every section, the stream from its beginning and to its end. Frames
    between are made by the same steps.

    Raises InputError that names the file and says what could not be read.
    """
    try:
        header = CompressedSource(data, origin).header
        ends = CompressedSource(data, origin, sorted({0, header.frames - 1}), weights=weights)
        for frame in ends.frames():
            if frame.rgb.shape != (3, header.height, header.width) or not frame.rgb.isfinite().all():
                raise InputError("a frame of another size, or of numbers that are not finite")
    except InputError as error:
        raise InputError(f"{origin}: not written, for it could not be read back ({error}); this is a fault of "
                         "frameloom's, please report it with the clip") from None  # fmt: skip


def _segment(clip: Clip, method: str, segment: int | None, fitted: bool) -> int | None:
    """Frames of a segment, for methods that hold the whole clip; None to take it whole, as a fitted network is."""
    from frameloom.tasks.compression.segments import length

    if fitted and not card(method).streams:
        if segment is not None:
            raise InputError("--segment: the network in --weights is fitted to the whole clip already")
        return None
    if card(method).streams:
        if segment is not None:
            raise InputError(f"--segment: {method} never holds the whole clip and needs no segments")
        return None
    if segment is None and len(clip) > length(clip):
        segment = length(clip)
        _log.warning("%d frames are more than a fit holds; they are fitted in segments of %d", len(clip), segment)
    return segment


def codec_and_settings(method: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The codec of a method, and those settings that are not None.

    Raises InputError for one that it does not have.
    """
    codec = card(method, "compress").load_class()
    known = set(introspection.signature(codec.encode).parameters) - {"clip"}
    given = {key: value for key, value in settings.items() if value is not None}
    if "quality" in given:
        given |= _quality(given.pop("quality"), method, known)
    if unknown := sorted(set(given) - known):
        own = sorted(known - {"size", "seed", "device", "progress", "state", "psnr"})
        raise InputError(f"--{unknown[0]}: {method} has no such setting; it has {', '.join(own)}")
    return codec, given


def _quality(quality: float | int | str, method: str, known: set[str]) -> dict[str, float]:
    """`35dB` as the setting `psnr`, a plain number as the setting `quality`."""
    text = str(quality).strip()
    wanted = text.lower().removesuffix("db")
    try:
        value = float(wanted)
    except ValueError:
        raise InputError(f"--quality {text}: a quality is a PSNR such as 35dB, or a codec's own number") from None
    name = "psnr" if wanted != text.lower() else "quality"
    if name not in known:
        means = "a PSNR such as 35dB" if "psnr" in known else "nothing that it can aim at"
        raise InputError(f"--quality {text}: {method} takes {means}")
    if name == "psnr" and not 5 <= value <= 80:
        raise InputError(f"--quality {text}: a PSNR to aim at is 5 to 80 dB")
    return {name: value}


Region = tuple[int, int, int, int]


def decompress(
    source: str | Path | bytes,
    frames: Sequence[int] | None = None,
    region: Region | None = None,
    weights: str | Path | None = None,
) -> Clip:
    """The clip in a `.flm` file; each frame is decoded when it is asked for.

    A published checkpoint of HNeRV that holds its video (`quant_vid.pth`) is one too, at 24 frames a second.

    `frames` picks frames by number, in any order; they are then shown at the file's own rate. `region` is x, y, width
    and height of a part of every frame. `weights` are those that a learned codec's file was made with, if not the
    shipped ones.
    Raises InputError for a damaged file, a method that is not installed, frames and regions that are not there.
    """
    data, origin = _load(source)
    whole = CompressedSource(data, origin, weights=weights)
    if region is not None:
        x, y, width, height = region
        wide, tall = whole.header.width, whole.header.height
        if not (0 <= x < x + width <= wide and 0 <= y < y + height <= tall):
            raise InputError(f"--region {x},{y},{width},{height}: not within {origin}, which is {wide}x{tall}")
    chosen = None if frames is None else list(frames)
    if chosen == []:
        raise InputError("--frames: no frame is chosen")
    for number in chosen or []:
        if not 0 <= number < whole.header.frames:
            raise InputError(f"--frames {number}: {origin} has frames 0 to {whole.header.frames - 1}")
    return Clip(CompressedSource(data, origin, chosen, region, weights))


def inspect(source: str | Path | bytes) -> dict[str, Any]:
    """The header of a `.flm` file and every section's bytes and bits per pixel.

    Of a published checkpoint of HNeRV: the same of the file that it makes, or, where that takes its video as well
    (`needs`), what network it holds.
    """
    if (published := _published(source)) is not None and published.embeddings is None:
        return published.describe()
    data, origin = _load(source)
    return codec_of(parse(data, origin).header, origin).inspect(data)


def parse_frames(text: str, count: int, flag: str = "--frames") -> list[int]:
    """Frame numbers from `17`, `10:40`, `0,10:20` or `::2`, as Python slices of `count` frames."""
    chosen: list[int] = []
    for part in text.split(","):
        try:
            numbers = [int(edge) if edge.strip() else None for edge in part.split(":")]
            if len(numbers) > 3 or (len(numbers) == 1 and numbers[0] is None):
                raise ValueError
            if len(numbers) == 1:
                found = [numbers[0]] if 0 <= numbers[0] < count else []
            else:
                found = list(range(count))[slice(*numbers)]
        except ValueError:
            raise InputError(f"{flag} {text}: frames are numbers and ranges such as 0,10:20") from None
        if not found:
            raise InputError(f"{flag} {text}: {part.strip()} holds no frame; there are frames 0 to {count - 1}")
        chosen += found
    return chosen


def parse_region(text: str | None) -> Region | None:
    """`x,y,w,h` as four numbers."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--region {text}: a region is x,y,width,height such as 0,0,320,180") from None
    return x, y, width, height


class CompressedSource(Source):
    """Frames of a compressed file, all of them or those in `chosen`; of each, all or `region`."""

    def __init__(
        self,
        data: bytes,
        origin: str,
        chosen: Sequence[int] | None = None,
        region: Region | None = None,
        weights: str | Path | None = None,
    ) -> None:
        self.data, self.chosen, self.region, self.weights = data, chosen, region, weights
        container = parse(data, origin)
        self.header = header = container.header
        self.codec = codec_of(header, origin)
        self._times = None if chosen is not None else unpack_times(container)
        self.info = Info(
            width=header.width if region is None else region[2],
            height=header.height if region is None else region[3],
            rate=header.rate,
            colour=header.colour,
            pix_fmt="yuv420p" if header.colour.depth <= 8 else "yuv420p10le",
            regular=self._times is None,
            name=origin,
            codec=header.method,
            pixel_aspect=header.pixel_aspect,
        )

    def times(self) -> Sequence[Fraction]:
        if self._times is not None:
            return self._times
        return RegularTimes(self.header.rate, self.header.frames if self.chosen is None else len(self.chosen))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        times = self.times()
        numbers = range(len(times))[start:stop]
        wanted = numbers if self.chosen is None else self.chosen[start:stop]
        takes = introspection.signature(self.codec.decode).parameters
        given: dict[str, Any] = {}
        # Some methods need not draw the rest of the frame.
        partly = self.region is not None and "region" in takes
        if partly:
            given["region"] = self.region
        if self.weights is not None:
            if "weights" not in takes:
                raise InputError(f"--weights: files of {self.header.method} hold all that they need")
            given["weights"] = self.weights
        pictures = self.codec.decode(self.data, wanted, **given)
        for number, picture in zip(numbers, pictures, strict=True):
            if self.region is not None and not partly:
                x, y, width, height = self.region
                picture = picture[:, y : y + height, x : x + width].contiguous()
            yield Frame(times[number], self.header.colour, rgb=picture)

    def fingerprint(self) -> str:
        return f"flm {zlib.crc32(self.data):08x} {len(self.data)} {self.chosen} {self.region}"


class SectionedCodec:
    """What every codec here shares: checking the frames asked for, and `inspect`."""

    @classmethod
    def inspect(cls, data: bytes) -> dict[str, Any]:
        container = parse(data)
        header = container.header
        shape = header.frames, header.height, header.width
        sizes = {name: len(payload) for name, payload in container.sections.items()}
        sizes = {"header": len(data) - sum(sizes.values())} | sizes
        return {
            "method": header.method,
            "width": header.width,
            "height": header.height,
            "frames": header.frames,
            "rate": str(header.rate),
            "config": header.config,
            "bytes": len(data),
            "bits_per_pixel": bits_per_pixel(len(data), *shape),
            "sections": {name: {"bytes": n, "bits_per_pixel": bits_per_pixel(n, *shape)} for name, n in sizes.items()},
        }

    @staticmethod
    def wanted(header: Header, frames: Sequence[int] | None) -> Sequence[int]:
        """The frames asked for; InputError for a number that the file does not have."""
        chosen = range(header.frames) if frames is None else frames
        for number in (chosen[0], chosen[-1]) if isinstance(chosen, range) and chosen else chosen:
            if not 0 <= number < header.frames:
                raise InputError(f"frame {number} is not in the file, which has 0 to {header.frames - 1}")
        return chosen


def describe(clip: Clip, method: str, config: dict[str, Any]) -> Header:
    """The header of a file that holds `clip`."""
    return Header(
        method=method,
        config=config,
        width=clip.info.width,
        height=clip.info.height,
        frames=len(clip),
        rate=clip.rate,
        colour=clip.info.colour.as_video(),
        pixel_aspect=clip.info.pixel_aspect,
    )


def pack_times(clip: Clip) -> dict[str, bytes]:
    """The section that keeps the instants of a clip without a constant rate; nothing for the others."""
    if clip.info.regular:
        return {}
    times = list(clip.times)
    unit = math.lcm(*(time.denominator for time in times))
    ticks = [int(time * unit) for time in times]
    steps = [after - before for before, after in zip([0, *ticks], ticks, strict=False)]
    return {"times": pack_numbers([unit, *steps])}


def unpack_times(container: Container) -> list[Fraction] | None:
    """What `pack_times` kept; None for a constant rate."""
    if "times" not in container.sections:
        return None
    numbers, end = unpack_numbers(container.sections["times"], container.header.frames + 1)
    if len(numbers) != container.header.frames + 1 or end != len(container.sections["times"]) or not numbers[0]:
        raise InputError("section 'times' is damaged")
    times, tick = [], 0
    for step in numbers[1:]:
        tick += step
        times.append(Fraction(tick, numbers[0]))
    return times


def _published(source: str | Path | bytes) -> Any:
    """The authors' checkpoint in a file that is not of ours; None for all else."""
    if isinstance(source, bytes) or Path(source).suffix not in (".pth", ".pt"):
        return None
    from frameloom.tasks.compression.hnerv import HNeRV
    from frameloom.tasks.compression.official import Official

    return Official(HNeRV, source)


def _load(source: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "the data"
    try:
        published = _published(source)
        return Path(source).read_bytes() if published is None else published.as_file(), str(source)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None


def codec_of(header: Header, origin: str) -> Any:
    """The codec that made a file. Raises InputError for one that is not installed."""
    if header.method == "segments":
        from frameloom.tasks.compression.segments import Segments

        return Segments
    try:
        return card(header.method, "compress").load_class()
    except InputError:
        raise InputError(f"{origin}: made by a method that is not installed here") from None


def write_whole(path: Path, data: bytes) -> None:
    """The bytes under the name, all of them or none."""
    try:
        with aside(path) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
