"""Codecs at one number of bytes: PSNR, MS-SSIM, seconds to encode, frames a second to decode.

    python benchmarks/compression.py                      # a rendered clip, 32 frames of 64x128
    python benchmarks/compression.py clip.mp4 --frames 32 --height 128 --json out.json

HNeRV is fitted first; the length of its file is what the others aim for. The last rows compare the fit's step
as it runs with the plain one (contiguous, float32) and with bfloat16, alternating, in processor seconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from frameloom.cards import card
from frameloom.metrics import bits_per_pixel, ms_ssim, psnr
from frameloom.tasks.compression.fit import fit
from frameloom.tasks.compression.hnerv import HNeRV
from frameloom.tasks.compression.nerv import Learner
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


def measure(method: str, clip: Clip, **settings) -> dict:
    codec = card(method, "compress").load_class()
    target = clip.tensor()
    started = time.perf_counter()
    data = codec.encode(clip, **settings)
    encoded = time.perf_counter()
    decoded = torch.stack(list(codec.decode(data)))
    seconds = time.perf_counter() - encoded
    return {
        "method": method,
        "bytes": len(data),
        "bits_per_pixel": bits_per_pixel(len(data), *target.shape[:1], *target.shape[-2:]),
        "psnr": float(psnr(decoded, target)),
        "ms_ssim": float(ms_ssim(decoded, target)),
        "encode_seconds": encoded - started,
        "decode_fps": len(target) / seconds,
    }


def step_times(clip: Clip, size: int | None, rounds: int = 3) -> list[dict]:
    """Processor milliseconds a step, the median of rounds in which the variants take turns."""
    pictures = clip.bytes_tensor()
    config = HNeRV.plan(*pictures.shape[-2:], len(pictures), size=size)
    variants = {
        "contiguous float32": (torch.contiguous_format, False),
        "channels-last float32": (torch.channels_last, False),
        "channels-last bfloat16": (torch.channels_last, True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (layout, mixed) in variants.items():
            learner = Learner(HNeRV(config)).to(memory_format=layout)
            few = pictures[:8]
            fit(learner, few, epochs=1, mixed=mixed)
            started = time.process_time()
            fit(learner, few, epochs=2, mixed=mixed)
            times[name].append(1000 * (time.process_time() - started) / 8)
    return [{"step": name, "cpu_milliseconds": statistics.median(values)} for name, values in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--size", type=int, help="parameters of the networks")
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
            rows.append(measure(method, clip, size=size, epochs=arguments.epochs, seed=arguments.seed))
        steps = step_times(clip, size)
        size = rows[0]["bytes"]
    rows += [measure(method, clip, size=size) for method in ("x264", "x265", "av1")]
    print(f"{clip.info.name}: {len(clip)} frames of {clip.info.width}x{clip.info.height}")
    for row in rows:
        rate = f"{row['bytes']:8} bytes  {row['bits_per_pixel']:.3f} bpp"
        quality = f"{row['psnr']:.2f} dB  MS-SSIM {row['ms_ssim']:.4f}"
        speed = f"encode {row['encode_seconds']:.1f} s  decode {row['decode_fps']:.0f} fps"
        print(f"{row['method']:6} {rate}  {quality}  {speed}")
    for step in steps:
        print(f"{step['step']:22} {step['cpu_milliseconds']:.1f} ms a step")
    if arguments.json:
        arguments.json.write_text(json.dumps({"clip": clip.info.name, "rows": rows, "steps": steps}, indent=1))


if __name__ == "__main__":
    main()
