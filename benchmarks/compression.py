"""Codecs at one number of bytes: PSNR, MS-SSIM, seconds to encode, frames a second to decode.

    python benchmarks/compression.py                      # a rendered clip, 32 frames of 64x128
    python benchmarks/compression.py clip.mp4 --frames 32 --height 128 --json out.json

HNeRV is fitted first; the length of its file is what the others aim for. The last rows compare the fit's step as it
runs with the plain one (contiguous, float32, Adam as it comes), alternating, in processor milliseconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from frameloom.tasks.compression.fit import fit
from frameloom.tasks.compression.fitted import half_pays
from frameloom.tasks.compression.hnerv import HNeRV
from frameloom.tasks.compression.nerv import Learner
from frameloom.tasks.compression.rd import measure, report
from frameloom.video.clip import Clip


def load(path: str | None, frames: int, height: int) -> Clip:
    """The first frames of a video, reduced to a height; or a rendered clip."""
    if path is None:
        from frameloom.world.world import World

        width = 2 * height
        video = World("flyover", [0], frames=frames).render(height, width)["rgb"][0]
    else:
        from frameloom.video.reader import read

        video = read(Path(path))[:frames].tensor()
        width = round(video.shape[-1] * height / video.shape[-2] / 2) * 2
        video = F.interpolate(video, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return Clip.from_tensor((video * 255).round().to(torch.uint8), name=path or "rendered")


def step_times(clip: Clip, size: int | None, rounds: int = 3) -> list[dict]:
    """Processor milliseconds a step, the median of rounds in which the variants take turns."""
    pictures = clip.bytes_tensor()
    config = HNeRV.plan(*pictures.shape[-2:], len(pictures), size=size)
    variants = {
        "plain": (torch.contiguous_format, False, torch.optim.Adam),
        "channels-last, fused Adam": (torch.channels_last, False, None),
        "and bfloat16": (torch.channels_last, True, None),
    }
    chosen = "and bfloat16" if half_pays("cpu", config) else "channels-last, fused Adam"
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (layout, mixed, optimiser) in variants.items():
            learner = Learner(HNeRV(config)).to(memory_format=layout)
            few = pictures[:8]
            fit(learner, few, epochs=1, mixed=mixed, optimiser=optimiser)
            started = time.process_time()
            fit(learner, few, epochs=2, mixed=mixed, optimiser=optimiser)
            times[name].append(1000 * (time.process_time() - started) / 8)
    return [
        {"step": name, "cpu_milliseconds": statistics.median(values), "chosen": name == chosen}
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--size", type=int, help="bytes of every file")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-fit", action="store_true", help="only x264, x265 and av1, at --size bytes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clip = load(arguments.clip, arguments.frames, arguments.height)
    rows, steps, size = [], [], arguments.size
    if not arguments.no_fit:
        for method in ("hnerv", "nerv"):
            rows.append(measure(clip, method, size=size, epochs=arguments.epochs, seed=arguments.seed))
        steps = step_times(clip, size)
        size = rows[0].bytes
    rows += [measure(clip, method, size=size) for method in ("x264", "x265", "av1")]
    print(f"{clip.info.name}: {len(clip)} frames of {clip.info.width}x{clip.info.height}")
    for row in rows:
        rate = f"{row.bytes:8} bytes  {row.bits_per_pixel:.3f} bpp"
        quality = f"{row.psnr:.2f} dB  MS-SSIM {row.ms_ssim:.4f}"
        print(f"{row.method:6} {rate}  {quality}  encode {row.encode_seconds:.1f} s  decode {row.decode_fps:.0f} fps")
    for step in steps:
        mark = "  <- what a fit of this size does" if step["chosen"] else ""
        ratio = steps[0]["cpu_milliseconds"] / step["cpu_milliseconds"]
        print(f"{step['step']:26} {step['cpu_milliseconds']:8.1f} ms a step  {ratio:.2f}x{mark}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report(rows, clip) | {"steps": steps}, indent=1))


if __name__ == "__main__":
    main()
