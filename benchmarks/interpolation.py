"""Interpolation methods on real footage: every second frame removed, made again, compared.

    python benchmarks/interpolation.py CLIP... [--methods blend,dis,...] [--frames 48] [--size 448x256] [--json]

For each clip and method: mean PSNR in dB over all removed frames, and over the clean ones (recorded footage holds
repeated and unevenly timed frames; a removed frame is clean when the differences to its two neighbours have a
ratio above 0.7), and milliseconds per made frame. `dis-plain` is OpenCV's DIS with one bilinear warp from each
side: the peer that everybody can write in ten lines. `--methods` takes any method of the task; `vfimamba:DIR`
names other weights.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import mean

import cv2
import numpy as np
import torch

from frameloom.motion.dis import dis_flow, grey_pixels, remap
from frameloom.tasks.interpolation import interpolate
from frameloom.video.clip import Clip
from frameloom.video.reader import read


class PlainDIS:
    """One bilinear warp of each frame by DIS flow at the picture's own size, averaged."""

    def between(self, frame0, frame1):
        first, second = grey_pixels(frame0), grey_pixels(frame1)
        forward, backward = dis_flow(first, second), dis_flow(second, first)
        pictures = [np.ascontiguousarray(x.permute(1, 2, 0).numpy()) for x in (frame0, frame1)]

        def at(t):
            made = (1 - t) * remap(pictures[0], backward, t, cv2.INTER_LINEAR) + t * remap(
                pictures[1], forward, 1 - t, cv2.INTER_LINEAR
            )
            return torch.from_numpy(made).permute(2, 0, 1)

        return at


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(-10 * torch.log10(torch.mean((first - second) ** 2) + 1e-10))


def footage(path: str, size: tuple[int, int], frames: int) -> Clip:
    """The first frames of a clip, area-resized to 8-bit `size`, in memory."""
    clip = read(path)
    pictures = []
    for frame in clip.frames(0, frames):
        pixels = (frame.rgb * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return Clip.from_tensor(torch.stack(pictures), clip.rate, Path(path).stem)


def made_by(method: str, clip: Clip) -> tuple[list[torch.Tensor], float]:
    """The removed frames as `method` makes them, and milliseconds for each."""
    half = clip[::2]
    begun = time.perf_counter()
    if method == "dis-plain":
        kept = half.tensor()
        made = [PlainDIS().between(a, b)(0.5) for a, b in itertools.pairwise(kept)]
    else:
        name, _, weights = method.partition(":")
        whole = [frame.rgb for frame in interpolate(half, "2x", name, weights=weights or None)]
        made = whole[1 : 2 * (len(half) - 1) : 2]
    return made, (time.perf_counter() - begun) * 1000 / len(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+")
    parser.add_argument("--methods", default="blend,dis-plain,minterpolate,dis")
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--size", default="448x256")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = tuple(int(side) for side in options.size.split("x"))
    methods = options.methods.split(",")
    rows = []
    for path in options.clips:
        clip = footage(path, size, options.frames)
        video = clip.tensor()
        removed = range(1, len(video) - 1, 2)
        steps = [float((a - b).abs().mean()) for a, b in itertools.pairwise(video)]
        clean = [min(steps[k - 1], steps[k]) > 0.7 * max(steps[k - 1], steps[k]) for k in removed]
        for method in methods:
            made, cost = made_by(method, clip)
            scores = [psnr(picture.float(), video[k]) for picture, k in zip(made, removed, strict=True)]
            kept = [score for score, good in zip(scores, clean, strict=True) if good]
            rows.append({"clip": clip.info.name, "method": method, "all": round(mean(scores), 2),
                         "clean": round(mean(kept), 2) if kept else None, "ms": round(cost, 1)})  # fmt: skip
            if not options.json:
                print("{clip:12} {method:28} {all:6} dB   clean {clean} dB   {ms} ms".format(**rows[-1]), flush=True)
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        summary = {"clip": "mean", "method": method, "all": round(mean(row["all"] for row in mine), 3),
                   "clean": round(mean(row["clean"] or row["all"] for row in mine), 3),
                   "ms": round(mean(row["ms"] for row in mine), 1)}  # fmt: skip
        rows.append(summary)
        if not options.json:
            print("{clip:12} {method:28} {all:6} dB   clean {clean} dB   {ms} ms".format(**summary))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
