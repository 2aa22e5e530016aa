"""x264, x265 and SVT-AV1 under the same protocol: what everybody has, and what a learned codec must beat.

The file keeps the elementary stream's packets and an index of them, without a muxer's overhead. Groups of
pictures are closed, so a frame decodes from the keyframe before it. At an equal number of bytes these win
over networks fitted to one video on ordinary clips; see benchmarks/compression.py.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from statistics import fmean
from typing import Any, ClassVar

import av
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from frameloom.bitstream.container import Container, parse, whole
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError
from frameloom.metrics import psnr as measure_psnr
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import SectionedCodec, describe, pack_times
from frameloom.video.clip import Clip, Frame
from frameloom.video.colour import native_from_rgb, rgb_from_native

# A search for a size ends within this share below it.
CLOSE_ENOUGH = 0.98
_ENCODES = 8
_STEP = 0.25

# SVT-AV1 reads its verbosity from the environment: 1 is errors only.
os.environ.setdefault("SVT_LOG", "1")


@dataclass(frozen=True)
class Packet:
    """Where a packet lies in the stream, which frame it shows, whether decoding may begin here."""

    start: int
    size: int
    frame: int
    key: bool


class Conventional(SectionedCodec):
    """What the three share. `quality` is the codec's constant rate factor; a smaller one means more bytes."""

    method: ClassVar[str]
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    quality: ClassVar[float]
    worst: ClassVar[int]
    preset: ClassVar[str]
    least_side: ClassVar[int] = 2

    @classmethod
    def options(cls, factor: float | int, keyint: int) -> dict[str, str]:
        raise NotImplementedError

    @classmethod
    def encode(
        cls,
        clip: Clip,
        *,
        size: int | None = None,
        quality: float | int | None = None,
        psnr: float | None = None,
        preset: str | None = None,
        keyint: int = 128,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> bytes:
        """The clip at `quality`, the largest file of at most `size` bytes, or the smallest of at least `psnr` dB.

        The last two take several encodes of the clip.
        A keyframe comes at least every `keyint` frames. 4:2:0, 8 bit, or 10 bit when the clip has more than
        8. `seed` and `device` are what every codec takes; these use no chance, and the CPU.
        """
        if sum(wish is not None for wish in (size, quality, psnr)) > 1:
            raise InputError("--quality and --size: give one of the two")
        if quality is not None and not 0 <= quality <= cls.worst:
            raise InputError(f"--quality {quality:g}: {cls.method} takes 0 (best) to {cls.worst}")
        if keyint < 1:
            raise InputError(f"--keyint {keyint}: a keyframe comes every 1 or more frames")

        def make(factor: float | int) -> bytes:
            return cls._file(clip, factor, preset or cls.preset, keyint, progress)

        if size is not None:
            return cls._fit_size(make, size)
        if psnr is not None:
            return cls._fit_psnr(make, clip, psnr)
        return make(cls.quality if quality is None else quality)

    @classmethod
    def _fit_psnr(cls, make: Callable[[float], bytes], clip: Clip, psnr: float) -> bytes:
        """The smallest file whose frames have `psnr` dB, by halving the range of factors."""

        def measured(data: bytes) -> float:
            frames = zip(cls.decode(data), clip, strict=True)
            return fmean(float(measure_psnr(decoded[None], frame.rgb[None])) for decoded, frame in frames)

        best = make(0.0)
        reached = measured(best)
        if reached < psnr:
            raise InputError(f"--quality {psnr:g}dB: {cls.method} reaches {reached:.2f} dB on this clip at most")
        good, bad = 0, round(cls.worst / _STEP) + 1
        while bad - good > 1:
            middle = (good + bad) // 2
            data = make(middle * _STEP)
            if measured(data) >= psnr:
                best, good = data, middle
            else:
                bad = middle
        return best

    @classmethod
    def _fit_size(cls, make: Callable[[float], bytes], size: int) -> bytes:
        """The largest file within `size`: log(bytes) is nearly linear in the factor, so secants land fast."""
        best: bytes | None = None
        too_large, fits = -_STEP, cls.worst + _STEP
        factor, slope = cls.quality, -math.log(2) / 6
        tried: list[tuple[float, float]] = []
        for _ in range(_ENCODES):
            data = make(factor)
            tried.append((factor, math.log(len(data))))
            if len(data) > size:
                too_large = factor
                if factor >= cls.worst:
                    raise InputError(f"--size {size}: {cls.method} takes at least {len(data)} bytes for this clip")
            else:
                fits = factor
                best = data if best is None or len(data) > len(best) else best
            if (best and len(best) >= CLOSE_ENOUGH * size) or fits - too_large <= _STEP:
                break
            if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
                slope = min((tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0]), -0.01)
            guess = factor + (math.log(size) - 0.01 - tried[-1][1]) / slope
            guess = round(guess / _STEP) * _STEP
            if not too_large < guess < fits:
                guess = round((too_large + fits) / 2 / _STEP) * _STEP
            factor = min(max(guess, 0.0), float(cls.worst))
        return best if best is not None else make(float(cls.worst))

    @classmethod
    def _file(cls, clip: Clip, factor: float | int, preset: str, keyint: int, progress: Progress) -> bytes:
        deep = clip.info.colour.depth > 8
        header = describe(clip, cls.method, {"deep": deep})
        width, height = cls._coded(header.width), cls._coded(header.height)
        context = av.CodecContext.create(cls.encoder, "w")
        context.width, context.height = width, height
        context.pix_fmt = "yuv420p10le" if deep else "yuv420p"
        context.time_base, context.framerate = 1 / header.rate, header.rate
        context.gop_size = keyint
        context.color_range = 2 if header.colour.full_range else 1
        context.colorspace = header.colour.matrix
        context.options = cls.options(factor, keyint) | {"preset": preset}
        packets: list[av.Packet] = []
        count = 0
        try:
            for count, frame in enumerate(clip, start=1):
                packets += context.encode(_native(frame, count - 1, context, header.rate))
                progress(f"encoding {cls.method}", count, header.frames)
            packets += context.encode(None)
        except av.error.FFmpegError as error:
            raise InputError(f"{cls.method} cannot encode {width}x{height} with preset {preset} "
                             f"({error.strerror})") from None  # fmt: skip
        if count != header.frames or len(packets) != count:
            raise InputError(f"{clip.info.name}: announced {header.frames} frames and has {count}")
        payloads = [cls._payload(bytes(packet)) for packet in packets]
        index: list[int] = []
        for place, (packet, payload) in enumerate(zip(packets, payloads, strict=True)):
            ahead = packet.pts - place
            index += [2 * len(payload) + packet.is_keyframe, 2 * ahead if ahead >= 0 else -2 * ahead - 1]
        sections = {"stream": b"".join(payloads), "index": pack_numbers(index)}
        return Container(header, sections | pack_times(clip)).to_bytes()

    @classmethod
    def _payload(cls, packet: bytes) -> bytes:
        return packet

    @classmethod
    def _coded(cls, side: int) -> int:
        """A side as it is coded: even, for 4:2:0, and not below what the encoder takes."""
        return max(side + side % 2, cls.least_side)

    @classmethod
    def decode(cls, data: bytes, frames: Sequence[int] | None = None) -> Iterator[Float[Tensor, "3 h w"]]:
        """The frames asked for; each group of pictures is entered at its keyframe."""
        container = parse(data)
        header = container.header
        if header.method != cls.method or set(header.config) != {"deep"}:
            raise InputError(f"the file was made by {header.method}, not by {cls.method}")
        packets = _read_index(container)
        keys = sorted(packet.frame for packet in packets if packet.key)
        # The frame that `pictures` gives next; none at first.
        position, pictures = header.frames, iter(())
        for number in cls.wanted(header, frames):
            key = keys[bisect_right(keys, number) - 1]
            if number < position or key > position:
                pictures, position = cls._play(container, packets, key), key
            while position <= number:
                native = next(pictures, None)
                position += 1
            if native is None or native.pts != number:
                raise InputError("section 'stream' is damaged; the decoder lost a frame")
            yield rgb_from_native(native, header.colour)[:, : header.height, : header.width].contiguous()

    @classmethod
    def _play(cls, container: Container, packets: list[Packet], key: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from keyframe `key` on, in the order in which they are shown."""
        header, stream = container.header, container.section("stream")
        width, height = cls._coded(header.width), cls._coded(header.height)
        layout = "yuv420p10le" if header.config["deep"] else "yuv420p"
        context = av.CodecContext.create(cls.decoder, "r")
        # PyAV takes the interpreter's lock to log, and holds it while it closes a decoder: a worker thread
        # with something to say of a damaged stream would wait for ever.
        context.thread_count = 1
        context.options = {"max_pixels": str((width + 128) * (height + 128))}
        first = next(place for place, packet in enumerate(packets) if packet.key and packet.frame == key)
        try:
            for packet in [*packets[first:], None]:
                coded = None
                if packet is not None:
                    coded = av.Packet(stream[packet.start : packet.start + packet.size])
                    coded.pts = packet.frame
                    coded.time_base = 1 / header.rate
                for native in context.decode(coded):
                    # "yuvj" is how FFmpeg names full-range pictures of the same layout.
                    found = native.format.name.replace("yuvj", "yuv")
                    if (native.width, native.height, found) != (width, height, layout):
                        raise InputError("section 'stream' is damaged; it holds another video")
                    if native.pts >= key:
                        yield native
        except av.error.FFmpegError as error:
            raise InputError(f"section 'stream' is damaged ({error.strerror})") from None


class X264(Conventional):
    """H.264 by x264."""

    method, encoder, decoder = "x264", "libx264", "h264"
    quality, worst, preset = 23.0, 51, "medium"

    @classmethod
    def options(cls, factor: float | int, keyint: int) -> dict[str, str]:
        return {"crf": f"{factor:g}", "x264-params": f"keyint={keyint}:open-gop=0"}

    @classmethod
    def _payload(cls, packet: bytes) -> bytes:
        # x264 writes its command line into a message unit (type 6) of several hundred bytes.
        units = packet.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
        return b"".join(b"\0\0\1" + unit for unit in units if unit[0] & 31 != 6)


class X265(Conventional):
    """H.265 by x265."""

    method, encoder, decoder = "x265", "libx265", "hevc"
    quality, worst, preset = 28.0, 51, "medium"
    # x265's assembly writes past its buffers when a side is below 64, one coding tree unit.
    least_side = 64

    @classmethod
    def options(cls, factor: float | int, keyint: int) -> dict[str, str]:
        more = f"keyint={keyint}:open-gop=0:info=0:repeat-headers=1:log-level=none"
        return {"crf": f"{factor:g}", "x265-params": more}


class AV1(Conventional):
    """AV1 by SVT-AV1, decoded by dav1d."""

    method, encoder, decoder = "av1", "libsvtav1", "libdav1d"
    quality, worst, preset = 35.0, 63, "6"
    least_side = 64

    @classmethod
    def options(cls, factor: float | int, keyint: int) -> dict[str, str]:
        # Quarters of a rate factor pass only this way; FFmpeg's own option rounds.
        return {"svtav1-params": f"crf={factor:g}:keyint={keyint}:irefresh-type=2"}


def _native(frame: Frame, number: int, context: Any, rate: Fraction) -> av.VideoFrame:
    colour = frame.colour.as_video()
    _, height, width = frame.rgb.shape if frame.native is None else (3, frame.native.height, frame.native.width)
    if (width, height) == (context.width, context.height):
        native = frame.to_native(context.pix_fmt, colour)
    else:
        missing = (0, context.width - width, 0, context.height - height)
        if min(missing) < 0:
            raise InputError(f"frame {number} is {width}x{height}; all frames of a clip must have one size")
        native = native_from_rgb(F.pad(frame.rgb[None], missing, mode="replicate")[0], context.pix_fmt, colour)
    native.pts, native.time_base = number, 1 / rate
    # A decoded frame remembers what it was; left so, it would order a keyframe where there was one before.
    native.pict_type = 0
    return native


def _read_index(container: Container) -> list[Packet]:
    header, index = container.header, container.section("index")
    if type(header.config["deep"]) is not bool:
        raise InputError("the header is damaged; deep must be true or false")
    numbers, end = unpack_numbers(index, 2 * header.frames)
    length = len(container.section("stream"))
    if len(numbers) != 2 * header.frames or end != len(index):
        raise InputError("section 'index' is damaged")
    sizes = [number // 2 for number in numbers[0::2]]
    shown = [place + (ahead // 2 if ahead % 2 == 0 else -(ahead + 1) // 2) for place, ahead in enumerate(numbers[1::2])]
    keys = [bool(number % 2) for number in numbers[0::2]]
    whole(sum(sizes), length, length, "the length of section 'stream'", "section 'index'")
    if sorted(shown) != list(range(header.frames)) or not keys[0] or shown[0] != 0:
        raise InputError("section 'index' is damaged")
    starts = accumulate(sizes, initial=0)
    return [Packet(*row) for row in zip(starts, sizes, shown, keys, strict=False)]
