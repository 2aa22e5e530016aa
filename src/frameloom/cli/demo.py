"""The tour: two clips made on the spot, slowed down, compressed, and shown on one page."""

import base64
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from frameloom.metrics import ms_ssim, psnr
from frameloom.motion.dis import dis_flow, grey_pixels
from frameloom.progress import Progress
from frameloom.tasks.compression import compress, decompress
from frameloom.tasks.interpolation import interpolate
from frameloom.video.clip import Clip
from frameloom.world import clip as world_clip

RIVALS = ("x264", "x265", "av1")


def run(out: str, *, quick: bool, progress: Progress) -> Path:
    """Write `out/index.html` with its videos inside, and the videos as files beside it; return the page."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    # Networks this small gain nothing from a second thread, and lose tenfold where another program wants the core.
    torch.set_num_threads(1)
    begun = time.perf_counter()
    progress("rendering", 0, 2)
    world = world_clip(seed=3, frames=12 if quick else 24, height=96, width=160, fps=12).save(
        folder / "world.mp4", crf=8
    )
    progress("rendering", 1, 2)
    photo = photographs(12 if quick else 32).save(folder / "photographs.mp4", crf=12)
    progress("rendering", 2, 2)

    times: dict[str, float] = {"rendering both clips": time.perf_counter() - begun}
    begun = time.perf_counter()
    slow = interpolate(photo, slow=4)
    slow.save(folder / "photographs-slow.mp4", crf=14, progress=progress)
    times["slowing down 4x (dis)"] = time.perf_counter() - begun
    smooth_error = hidden_frames(photo)
    cv2.imwrite(str(folder / "flow.png"), flow_picture(photo))

    points = rate_distortion(world, folder, 20 if quick else 100, progress, times)
    page = folder / "index.html"
    page.write_text(_page(folder, photo, points, smooth_error, times))
    return page


def photographs(frames: int, height: int = 216, width: int = 384, fps: int = 24) -> Clip:
    """A camera that drifts and turns over pictures that ship with scikit-image: real texture, known motion."""
    from skimage import data

    pictures = [cv2.resize(image, (900, 900), interpolation=cv2.INTER_AREA)[..., :3]
                for image in (data.astronaut(), data.coffee(), data.chelsea())]  # fmt: skip
    canvas = np.concatenate(pictures, axis=1)
    shots = []
    for k in range(frames):
        u = k / 24
        zoom = 1.9 - 0.25 * u
        matrix = cv2.getRotationMatrix2D((450 + 620 * u, 430 + 60 * np.sin(2 * u)), 6 * np.sin(1.7 * u), 2 / zoom)
        matrix[:, 2] += np.array([width, height]) - np.array([450 + 620 * u, 430 + 60 * np.sin(2 * u)])
        # Twice the size, then the mean of four: a camera's pixel is an area, not a point.
        shot = cv2.warpAffine(
            canvas, matrix, (2 * width, 2 * height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT
        )
        shots.append(cv2.resize(shot, (width, height), interpolation=cv2.INTER_AREA))
    return Clip.from_tensor(torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2).contiguous(), fps, "photographs")


def hidden_frames(clip: Clip) -> dict[str, float]:
    """Mean PSNR in dB of every second frame, hidden and made again, for blending and for the default method."""
    truth = clip.tensor()
    half = clip[::2]
    found = {}
    for method in ("blend", "dis"):
        made = torch.stack([frame.rgb for frame in interpolate(half, "2x", method)])
        hidden = range(1, 2 * (len(half) - 1), 2)
        found[method] = float(psnr(made[list(hidden)], truth[list(hidden)]))
    return found


def flow_picture(clip: Clip) -> np.ndarray:
    """The motion between two frames in the middle: hue is direction, brightness is speed (BGR bytes)."""
    middle = len(clip) // 2
    first, second = (grey_pixels(frame.rgb) for frame in clip.frames(middle, middle + 2))
    flow = dis_flow(first, second, scale=2)
    length, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    value = np.clip(length / max(1e-3, float(np.percentile(length, 99))), 0, 1) * 255
    hsv = np.stack([angle / 2, np.full_like(angle, 220), value], -1).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def rate_distortion(
    clip: Clip, folder: Path, epochs: int, progress: Progress, times: dict[str, float]
) -> list[dict[str, object]]:
    """HNeRV's file and what conventional codecs make of as many bytes."""
    truth = clip.tensor()
    points = []
    goal = None
    for method in ("hnerv", *RIVALS):
        target = folder / f"world-{method}.flm"
        extra = {"epochs": epochs} if method == "hnerv" else {"size": goal}
        report = compress(clip, target, method, progress=progress, **extra)
        goal = goal or report.bytes
        begun = time.perf_counter()
        back = decompress(target)
        decoded = back.tensor()
        back.save(folder / f"world-{method}.mp4", crf=8)
        times[f"encoding with {method}"] = report.seconds
        points.append({"method": method, "bytes": report.bytes, "bpp": report.bits_per_pixel,
                       "psnr": float(psnr(decoded, truth)), "ms_ssim": float(ms_ssim(decoded, truth).mean()),
                       "encode": report.seconds, "decode": len(clip) / (time.perf_counter() - begun)})  # fmt: skip
    return points


def _embed(path: Path) -> str:
    kind = "video/mp4" if path.suffix == ".mp4" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _video(path: Path, caption: str) -> str:
    return (f'<figure><video src="{_embed(path)}" autoplay loop muted playsinline></video>'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def _plot(points: list[dict]) -> str:
    """Rate against distortion as a small SVG."""
    low, high = min(p["psnr"] for p in points) - 1, max(p["psnr"] for p in points) + 1
    left, right = min(p["bpp"] for p in points) * 0.9, max(p["bpp"] for p in points) * 1.1
    marks = []
    for point in points:
        x = 60 + 400 * (point["bpp"] - left) / (right - left)
        y = 220 - 200 * (point["psnr"] - low) / (high - low)
        colour = "#c33" if point["method"] == "hnerv" else "#357"
        marks.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{colour}"/>'
                     f'<text x="{x + 9:.0f}" y="{y + 4:.0f}">{point["method"]}</text>')  # fmt: skip
    return (f'<svg viewBox="0 0 520 260" width="520"><path d="M60 20V220H500" fill="none" stroke="#999"/>'
            f'<text x="8" y="24">{high:.0f} dB</text><text x="8" y="222">{low:.0f} dB</text>'
            f'<text x="60" y="245">{left:.2f} bits a pixel</text><text x="400" y="245">{right:.2f}</text>'
            f"{''.join(marks)}</svg>")  # fmt: skip


def _page(folder: Path, photo: Clip, points: list[dict], error: dict[str, float], times: dict[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{p['method']}<td>{p['bytes']:,}<td>{p['bpp']:.3f}<td>{p['psnr']:.2f}<td>{p['ms_ssim']:.4f}"
        f"<td>{p['encode']:.1f}<td>{p['decode']:.0f}" for p in points
    )  # fmt: skip
    clock = "".join(f"<tr><td>{name}<td>{seconds:.1f} s" for name, seconds in times.items())
    decoded = "".join(
        _video(folder / f"world-{p['method']}.mp4", f"{p['method']}, {p['bytes']:,} bytes, {p['psnr']:.1f} dB")
        for p in points
    )
    return f"""<!doctype html><meta charset="utf-8"><title>frameloom demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}}
figure{{display:inline-block;margin:.4em;vertical-align:top}}video,img{{width:360px;image-rendering:auto;background:#000}}
figcaption,td,th,text{{font-size:14px}}td,th{{text-align:right;padding:.15em .9em;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}</style>
<h1>frameloom demo</h1>
<h2>Slow motion</h2>
<p>A camera over photographs, {photo.info.width}x{photo.info.height} at {float(photo.rate):g} frames a second, and
the same four times slower: three pictures in four were never recorded. With every second recorded frame hidden and
made again, blending reaches {error["blend"]:.1f} dB and the default method {error["dis"]:.1f} dB.</p>
{_video(folder / "photographs.mp4", "source")}{_video(folder / "photographs-slow.mp4", "four times slower (dis)")}
<figure><img src="{_embed(folder / "flow.png")}">
<figcaption>motion: hue is direction, brightness is speed</figcaption></figure>
<h2>Compression</h2>
<p>A synthetic flight, fitted by HNeRV (a network in a file, any frame decodes alone) and by conventional codecs at
no more bytes. At this size the conventional codecs are better; the table says by how much.</p>
{_video(folder / "world.mp4", "source")}{decoded}
<table><tr><th>method<th>bytes<th>bits a pixel<th>PSNR, dB<th>MS-SSIM<th>encode, s<th>decode, frames/s</tr>
{rows}</table>
{_plot(points)}
<h2>Times</h2><table>{clock}</table>
"""
