"""Which encoder, pixel format and settings a file is written with, and one line for everything they cannot keep."""

import logging
import os
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from frameloom.errors import InputError
from frameloom.video.clip import Info
from frameloom.video.colour import Colour
from frameloom.video.hdr import Hdr
from frameloom.video.pixels import Layout, layout_of, lossless_format

log = logging.getLogger("frameloom")

# SVT-AV1 writes a banner of its settings to the terminal, past every log callback; 1 is errors alone.
os.environ.setdefault("SVT_LOG", "1")


@dataclass(frozen=True)
class Codec:
    """An encoder: its FFmpeg name, the quality and preset it starts from, and what it can hold."""

    encoder: str
    crf: int | None
    crf_range: tuple[int, int]
    preset: str | None
    depth: int = 8
    odd_420: bool = False
    options: tuple[tuple[str, str], ...] = ()


CODECS = {
    "h264": Codec("libx264", 18, (0, 51), "medium"),
    "h265": Codec("libx265", 22, (0, 51), "medium", depth=10, options=(("x265-params", "log-level=error"),)),
    "av1": Codec("libsvtav1", 30, (1, 63), "8", depth=10, odd_420=True),
    "vp9": Codec("libvpx-vp9", 31, (0, 63), "4", odd_420=True,
                 options=(("b:v", "0"), ("row-mt", "1"), ("deadline", "good"))),
    "ffv1": Codec("ffv1", None, (0, 0), None, depth=16, odd_420=True, options=(("level", "3"),)),
}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the bytes of a segment, so that two runs can be compared."""

    encoder: str
    options: tuple[tuple[str, str], ...]
    pix_fmt: str
    colour: Colour
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    pixel_aspect: Fraction

    def __str__(self) -> str:
        settings = " ".join(f"{key}={value}" for key, value in self.options if key in ("crf", "preset", "cpu-used"))
        return f"{self.encoder} {self.width}x{self.height} {self.pix_fmt} {settings}".strip()


def encoding_for(
    info: Info, codec: str, crf: int | None, preset: str | None, tick: Fraction, suffix: str = ".mkv"
) -> Encoding:
    """Choose pixel format and options for one of `CODECS` in a file of the kind that `suffix` names; says (once, in
    the log) what cannot be kept.

    Raises InputError for an unknown codec, a crf out of its range, or a preset where there are none.
    """
    if codec not in CODECS:
        raise InputError(f"--codec {codec}: no such codec; there are {', '.join(CODECS)}")
    spec = CODECS[codec]
    if crf is not None and not spec.crf_range[0] <= crf <= spec.crf_range[1]:
        low, high = spec.crf_range
        raise InputError(f"--crf {crf}: {codec} takes {f'{low} to {high}' if high else 'no crf, it is lossless'}")
    if preset and spec.preset is None:
        raise InputError(f"--preset {preset}: {codec} has no presets")
    short, long = sorted((info.width, info.height))
    if codec == "av1" and (short < 4 or (short < 32 and long > 64)):
        # SVT-AV1 does not come back from such pictures.
        raise InputError(
            f"--codec av1: SVT-AV1 takes no {info.width}x{info.height}, but sides from 32 on, or from 4 where none is "
            "above 64; use vp9 or ffv1"
        )
    pix_fmt, colour = _pixels(info, codec)
    options = dict(spec.options) | {"chroma_sample_location": colour.siting}
    if spec.crf is not None:
        options["crf"] = str(spec.crf if crf is None else crf)
    if spec.preset is not None:
        options["cpu-used" if codec == "vp9" else "preset"] = preset or spec.preset
    if suffix == ".avi":
        options["bf"] = "0"  # AVI has no times of showing: what is shown in another order than decoded loses its own
    if codec == "h264" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # x264's AVX-512 code reads beyond the picture when its width is no multiple of 64: the same input then
        # encodes to different bytes from run to run, and a resumed file would not equal an undisturbed one.
        options["x264-params"] = "asm=AVX2"
    if codec == "h265" and min(info.width, info.height) < 64:
        # x265's assembly writes past its buffers when a side is below one coding tree unit.
        options["x265-params"] += ":no-asm=1"
    if codec == "ffv1" and short < 16:
        options["slices"] = "1"  # as many parts as FFV1 takes by itself need that many rows of chroma
    if info.hdr is not None:
        _keep_hdr(options, codec, info.hdr)
    return Encoding(
        spec.encoder, tuple(sorted(options.items())), pix_fmt, colour, info.width, info.height, info.rate, tick,
        info.pixel_aspect,
    )  # fmt: skip


def _pixels(info: Info, codec: str) -> tuple[str, Colour]:
    """The pixel format and colour of what is encoded: for ffv1 the source's own, else 4:2:0 at what depth there is."""
    spec, given = CODECS[codec], layout_of(info.pix_fmt)
    if codec == "ffv1":
        name = lossless_format(info.pix_fmt)
        if given.floating:
            log.warning("floating-point input is written at 16 bit by ffv1")
        return name, replace(info.colour, depth=layout_of(name).depth)
    depth = 8 if given.depth == 8 or spec.depth == 8 else 10
    if given.depth > depth:
        more = ", ".join(name for name, other in CODECS.items() if other.depth > depth)
        log.warning("%d-bit input is written at %d bit by %s; --codec %s keeps more", given.depth, depth, codec, more)
    odd = (info.width % 2 or info.height % 2) and not spec.odd_420
    name = Layout("yuv", depth, across=1 if odd else 2, down=1 if odd else 2).name
    if given.model == "yuv" and given.across * given.down < 4 and not odd:
        log.warning("%s colour is written as 4:2:0 by %s; --codec ffv1 keeps it", given.sampling, codec)
    return name, replace(info.colour.as_video(), depth=depth)


def _keep_hdr(options: dict[str, str], codec: str, hdr: Hdr) -> None:
    """HDR10's static metadata in the words of the encoders that have words for it."""
    light = hdr.light and f"{hdr.light[0]},{hdr.light[1]}"
    if codec == "h265":
        screen = hdr.screen(50_000, 10_000)
        parts = [options["x265-params"], "hdr10=1", "repeat-headers=1"]
        parts += [f"master-display={screen}"] if screen else []
        parts += [f"max-cll={light}"] if light else []
        options["x265-params"] = ":".join(parts)
    elif codec == "av1":
        screen = hdr.screen(1, 1)
        parts = [f"mastering-display={screen}"] if screen else []
        parts += [f"content-light={light}"] if light else []
        options["svtav1-params"] = ":".join(parts)
    else:
        log.warning(
            "the mastering display and light levels of HDR10 are not kept by %s; --codec h265 and av1 do", codec
        )
