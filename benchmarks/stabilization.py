"""Stabilisers on real footage that was shaken by a known path.

    python benchmarks/stabilization.py CLIP... [--frames 96] [--width 384] [--methods deshake,similarity,...] [--json]

Each clip is shrunk, its middle four fifths are cut out and moved by a known shake (2 to 6 Hz, 1.5% of the width, half a
degree; see `frameloom.claims.fast_stab.hand`); what lies around the cut keeps the input free of borders. Every method
then gets the same frames. Printed, measured on the videos by one corner tracker that is no part of fast-stab:

    stability   share of slow motion in the path of the shown video less its even drift (the lowest of x, y, angle); 1
                is best
    drifting    the same with its drift, as in most published numbers: an even pan has 0.89, shaken or not
    jitter      root mean square acceleration of the shown video in pixels a frame squared; 0 is best. `unshaken` is
                the clip as its own camera moved
    removed     correlation with the known shake of what a method takes out of the shaken clip beyond what it takes
                out of the same clip unshaken (the lowest of x, y, angle)
    cropping    what is left of the field of view; 1 is all
    distortion  worst ratio of the axes of the map from recorded to shown frames; 1 is none
    empty       share of shown pixels that no recorded frame had, in percent (mirrored at the edge; `-`: not told)
    ms          milliseconds a frame, looking and drawing

`deshake` is FFmpeg's filter of that name with its widest search.
"""

import argparse
import itertools
import json
import time
from fractions import Fraction
from pathlib import Path
from statistics import mean

import av
import cv2
import numpy as np
import torch
from torch import Tensor

from frameloom.claims.fast_stab import followed, hand, removed, steadied, taken, view, warps
from frameloom.metrics import cropping_ratio, distortion, jitter, stability_score
from frameloom.training import load
from frameloom.video.clip import Clip
from frameloom.video.reader import read


def shaken(path: str, frames: int, width: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray, Fraction]:
    """The middle of the clip's frames (t, 3, h, w) under a known shake and without, the shake, and the rate."""
    clip = read(path) if Path(path).is_file() else read(path, rate="24")
    pictures = []
    for frame in clip.frames(0, frames):
        array = frame.rgb.permute(1, 2, 0).contiguous().numpy()
        height = round(array.shape[0] * width / array.shape[1])
        pictures.append(torch.from_numpy(cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)))
    wide = torch.stack(pictures).permute(0, 3, 1, 2)
    size = tuple(round(side * 0.4) * 2 for side in wide.shape[-2:])
    shake = hand(len(wide), float(clip.rate), size[1], seed)
    moved = torch.stack([view(w, s, size) for w, s in zip(wide, shake, strict=True)])
    return moved, torch.stack([view(w, 0 * shake[0], size) for w in wide]), shake, clip.rate


def steadiness(path: np.ndarray) -> dict[str, float]:
    scores = {"stability": stability_score(path[:, :3]), "drifting": stability_score(path[:, :3], drift=True),
              "jitter": jitter(path[:, :2])}  # fmt: skip
    return {name: round(value, 3) for name, value in scores.items()}


def deshake(video: Tensor) -> Tensor:
    """FFmpeg's filter over frames in memory."""
    graph = av.filter.Graph()
    height, width = video.shape[-2:]
    nodes = [
        graph.add_buffer(width=width, height=height, format="yuv420p", time_base=Fraction(1, 24)),
        graph.add("deshake", "rx=64:ry=64:edge=mirror"),
        graph.add("buffersink"),
    ]
    for first, second in itertools.pairwise(nodes):
        first.link_to(second)
    graph.configure()
    made = []
    for number, picture in enumerate(video):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 24)
        graph.push(frame)
        made.append(graph.pull().to_ndarray(format="rgb24"))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+")
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--methods", default="deshake,similarity,fast-stab")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for path in options.clips:
        video, calm, shake, rate = shaken(path, options.frames, options.width, options.seed)
        before = followed(video)
        for name, seen in (("unshaken", followed(calm)), ("as recorded", before)):
            rows.append({"clip": Path(path).stem, "method": name, **steadiness(seen), "removed": "-", "cropping": 1.0,
                         "distortion": 1.0, "empty": "-", "ms": 0})  # fmt: skip
        for name in options.methods.split(","):
            begun, empty = time.perf_counter(), "-"
            if name == "deshake":
                made = deshake(Clip.from_tensor(video, rate).tensor())
            else:
                made, source = steadied(video, load(name), rate)
                if name == "fast-stab":
                    empty = round(100 * source.report.mirrored / video[:, 0].numel(), 3)
            seconds = time.perf_counter() - begun
            path_after, maps = followed(made), warps(video, made)
            same = Clip.from_tensor(calm, rate)
            still = deshake(same.tensor()) if name == "deshake" else steadied(calm, load(name), rate)[0]
            size = tuple(video.shape[-2:])
            out = taken(maps, size) - taken(warps(calm, still), size)
            rows.append({"clip": Path(path).stem, "method": name,
                         **steadiness(path_after),
                         "removed": round(removed(out, shake), 3),
                         "cropping": round(cropping_ratio(maps), 3), "distortion": round(distortion(maps), 3),
                         "empty": empty, "ms": round(1000 * seconds / len(video))})  # fmt: skip
        if not options.json:
            for row in rows[-2 - len(options.methods.split(",")) :]:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    for name in ["unshaken", "as recorded", *options.methods.split(",")] if len(options.clips) > 1 else []:
        mine = [row for row in rows if row["method"] == name]
        numbers = {
            key: [row[key] for row in mine if row[key] != "-"] for key in mine[0] if key not in ("clip", "method")
        }
        summary = {key: round(mean(found), 3) if found else "-" for key, found in numbers.items()}
        rows.append({"clip": "mean", "method": name} | summary)
        if not options.json:
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
