"""sem's points of rate on one clip, and x264 at the bytes of each: PSNR, bytes, seconds a frame.

python benchmarks/sem.py clip.mp4 --frames 24 --width 448 --json out.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from frameloom.metrics import psnr
from frameloom.tasks.compression.conventional import X264
from frameloom.tasks.compression.sem import GOP, SEM
from frameloom.video.clip import Clip
from frameloom.video.reader import read


def load(path: str, frames: int, width: int) -> Clip:
    """The first frames of a video, reduced to a width."""
    video = read(Path(path))[:frames].tensor()
    if video.shape[-1] > width:
        height = round(video.shape[-2] * width / video.shape[-1] / 2) * 2
        video = F.interpolate(video, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return Clip.from_tensor((video * 255).round().to(torch.uint8), name=path)


def measured(name: str, codec: type, clip: Clip, **settings) -> dict:
    begun = time.perf_counter()
    data = codec.encode(clip, **settings)
    encoded = time.perf_counter()
    made = list(codec.decode(data))
    decoded = time.perf_counter()
    quality = [float(psnr(one[None], frame.rgb[None])) for one, frame in zip(made, clip, strict=True)]
    return {"codec": name, "bytes": len(data), "psnr": round(sum(quality) / len(quality), 2),
            "encode s/frame": round((encoded - begun) / len(clip), 3),
            "decode s/frame": round((decoded - encoded) / len(clip), 3)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    parser.add_argument("--no-spatial", action="store_true", help="without the spatial prior")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clip = load(arguments.clip, arguments.frames, arguments.width)
    print(f"{clip.info.width}x{clip.info.height}, {len(clip)} frames, {torch.get_num_threads()} threads")
    rows = []
    for rate in arguments.rates:
        rows.append(measured(f"sem, rate {rate:g}", SEM, clip, rate=rate, spatial=not arguments.no_spatial))
        print(rows[-1], flush=True)
        for preset in ("medium", "veryslow"):
            rows.append(measured(f"x264 {preset}", X264, clip, size=rows[-1 - (preset == "veryslow")]["bytes"],
                                 preset=preset, keyint=GOP))  # fmt: skip
            print("   ", rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
