"""Rate and distortion: the same clip by several codecs at the same sizes, measured on what their files show.

Every point is a file that was made and decoded. The conventional codecs are always among them.
"""

import html
import inspect as introspection
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from frameloom.cards import card, cards
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.metrics import bd_rate, bits_per_pixel, ms_ssim, psnr
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import codec_and_settings
from frameloom.video.clip import Clip

_log = logging.getLogger("frameloom.compression")

CONVENTIONAL = ("x264", "x265", "av1")
LEARNED = ("hnerv", "boost-nerv", "nirvana", "sem")
BITS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Point:
    """One file of one codec. PSNR in dB, as `metrics.psnr`; `decode_fps` in frames a second, from the first frame."""

    method: str
    bytes: int
    bits_per_pixel: float
    psnr: float
    ms_ssim: float
    encode_seconds: float
    decode_fps: float


def measure(clip: Clip, method: str, *, progress: Progress = silent, **settings: Any) -> Point:
    """Encode a clip, decode the file and compare. Settings are those of `compress`."""
    codec, given = codec_and_settings(method, settings)
    target = clip.tensor()
    started = time.perf_counter()
    data = codec.encode(clip, progress=progress, **given)
    encoded = time.perf_counter()
    decoded = torch.stack(list(codec.decode(data)))
    seconds = time.perf_counter() - encoded
    if decoded.shape != target.shape:
        raise InputError(f"{method} gave back {tuple(decoded.shape)} of {tuple(target.shape)}; rd needs whole frames")
    rate = bits_per_pixel(len(data), len(target), *target.shape[-2:])
    quality = float(psnr(decoded, target)), float(ms_ssim(decoded, target))
    return Point(method, len(data), rate, *quality, encoded - started, len(target) / seconds)


def rate_distortion(
    clip: Clip,
    methods: Sequence[str] | None = None,
    bits: Sequence[float] = BITS,
    *,
    minutes: float | None = None,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Point]:
    """Points of every method at every number of `bits` a pixel; the conventional codecs first.

    A codec that cannot make a file so small is left out there, with a note that says why. `minutes` and `epochs` are
    for those that fit a network to the clip, a minute a point if neither is given.

    Raises InputError when nothing could be measured.
    """
    check_device(device)
    if minutes is None and epochs is None:
        minutes = 1.0
    if not bits or min(bits) <= 0:
        raise InputError("--bpp: bits a pixel are numbers above 0, such as 0.05,0.1,0.2")
    known = cards()
    learned = [name for name in methods or LEARNED if name not in CONVENTIONAL]
    points = []
    for method in [*CONVENTIONAL, *(name for name in learned if methods or name in known)]:
        codec = card(method, "compress").load_class()
        accepted = introspection.signature(codec.encode).parameters
        own = {"minutes": minutes, "epochs": epochs, "device": device, "seed": seed}
        own = {name: value for name, value in own.items() if name in accepted}
        pixels = len(clip) * clip.info.width * clip.info.height
        # A codec whose files follow from the video has points of its own in place of sizes.
        wishes = getattr(codec, "points", [{"size": int(goal * pixels / 8)} for goal in sorted(bits)])
        for wish in wishes:
            try:
                points.append(measure(clip, method, progress=progress, **wish, **own))
            except InputError as error:
                _log.warning("%s at %s is left out: %s", method, ", ".join(f"{k} {v}" for k, v in wish.items()), error)
    if not points:
        raise InputError("no codec can make a file of these sizes; ask for more bits a pixel")
    return points


def against(points: Sequence[Point], anchor: str = "x264") -> dict[str, float | None]:
    """BD-rate of every method in percent of the anchor's rate; None where the curves share no quality."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        curves.setdefault(point.method, []).append((point.bits_per_pixel, point.psnr))
    found: dict[str, float | None] = {}
    for method, curve in curves.items():
        if method != anchor:
            try:
                found[method] = bd_rate(curves.get(anchor, []), curve)
            except (InputError, ValueError):
                found[method] = None
    return found


def report(points: Sequence[Point], clip: Clip) -> dict[str, Any]:
    """Everything that was measured, as plain values."""
    return {"clip": clip.info.name, "frames": len(clip), "width": clip.info.width, "height": clip.info.height,
            "points": [asdict(point) for point in points], "bd_rate_against_x264": against(points)}  # fmt: skip


_COLOURS = ("#444444", "#888888", "#b8860b", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}}
td,th{{text-align:right;padding:.15em .9em;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}
svg{{width:49%;min-width:24em}}text{{font:12px system-ui,sans-serif}}</style>
<h1>{title}</h1><p>{frames} frames of {width}x{height}. Every point is a file that was written and decoded; bits a pixel
count all of its bytes.</p>{plots}
<table><tr><th>codec<th>bytes<th>bits a pixel<th>PSNR, dB<th>MS-SSIM<th>encode, s<th>decode, frames/s</tr>{rows}</table>
<p>BD-rate against x264 (below 0: fewer bits for the same PSNR): {differences}</p>
"""


def page(points: Sequence[Point], clip: Clip) -> str:
    """One HTML file with two plots and the table, readable offline."""
    rows = "".join(
        f"<tr><td>{point.method}<td>{point.bytes:,}<td>{point.bits_per_pixel:.4f}<td>{point.psnr:.2f}"
        f"<td>{point.ms_ssim:.4f}<td>{point.encode_seconds:.1f}<td>{point.decode_fps:.0f}</tr>"
        for point in points
    )
    said = [
        f"{method} {'no quality in common' if value is None else f'{value:+.1f}%'}"
        for method, value in against(points).items()
    ]
    # MS-SSIM in dB, since its last hundredth is where codecs differ.
    plots = plot(points, "PSNR, dB", [point.psnr for point in points]) + plot(
        points, "MS-SSIM, dB: -10 log(1 - x)", [-10 * math.log10(max(1 - point.ms_ssim, 1e-6)) for point in points]
    )
    differences = ", ".join(said) or "nothing to compare"
    return _PAGE.format(title=html.escape(clip.info.name), frames=len(clip), width=clip.info.width, rows=rows,
                        height=clip.info.height, plots=plots, differences=differences)  # fmt: skip


def plot(points: Sequence[Point], label: str, heights: Sequence[float]) -> str:
    """Curves over the logarithm of bits a pixel, as SVG."""
    left, right, top, bottom = 55, 470, 15, 300
    across = [math.log2(point.bits_per_pixel) for point in points]

    def scaled(value: float, values: Sequence[float], start: int, stop: int) -> float:
        low, high = min(values), max(values)
        return start + (stop - start) * ((value - low) / (high - low) if high > low else 0.5)

    marks = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#ccc"/>']
    for step in range(5):
        high = min(heights) + (max(heights) - min(heights)) * step / 4
        wide = min(across) + (max(across) - min(across)) * step / 4
        y, x = scaled(high, heights, bottom, top), scaled(wide, across, left, right)
        marks.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{high:.1f}</text>')
        marks.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{2**wide:.3g}</text>')
    marks.append(
        f'<text x="{left}" y="{bottom + 36}">bits a pixel</text><text x="{left + 5}" y="{top + 14}">{label}</text>'
    )
    for number, method in enumerate(dict.fromkeys(point.method for point in points)):
        colour = _COLOURS[number % len(_COLOURS)]
        curve = sorted(
            (scaled(across[k], across, left, right), scaled(heights[k], heights, bottom, top))
            for k, point in enumerate(points)
            if point.method == method
        )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in curve]
        marks.append(f'<text x="{left + 90 + 75 * (number % 5)}" y="{bottom + 36 + 16 * (number // 5)}" '
                     f'fill="{colour}">{method}</text>')  # fmt: skip
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 360" font-family="sans-serif" font-size="12">'
    return f"{head}{''.join(marks)}</svg>"
