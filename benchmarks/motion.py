"""Flow methods beside classical peers: on held-out world scenes, on a labelled data set, on real footage.

    python benchmarks/motion.py [CLIP...] [--methods dis,splatflow,...] [--data sintel:DIR] [--frames 12]
                                [--size 448x256] [--rest] [--json]

    world      endpoint error in pixels over all, matched and occluded pixels of scenes that training never draws
    data       the same error over all labelled pixels of `--data` (`frameloom.tasks.flow.data.LAYOUTS`)
    warping    mean |I0(p) - I1(p + F(p))| of 255 on the clips, over the pixels that no method takes out of the picture
    there-back mean length in pixels of F(p) + B(p + F(p)), no single pixel more than 10: 0 is consistent
    ms         milliseconds a flow, one direction, at `--size`

Peers: OpenCV's Farneback, scikit-image's TV-L1, and OpenCV's DIS as everybody calls it (`dis-plain`, medium preset;
`dis` looks at the finest scale too). `--rest` goes on with interpolation beside `minterpolate` and stabilisation beside
`deshake` on the same clips. Methods without weights are left out; `splatflow:DIR` names other weights.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import cv2
import torch
from torch import Tensor

from frameloom.cards import cards
from frameloom.claims.flow import errors, held_out
from frameloom.motion.consistency import round_trip
from frameloom.motion.dis import dis_flow, grey_pixels
from frameloom.motion.warp import backward_warp
from frameloom.tasks.flow.base import FlowEstimator, estimate
from frameloom.tasks.flow.data import batches
from frameloom.training import load
from frameloom.training.pretrained import shipped
from interpolation import footage

LONGEST_GAP = 10.0


class Classical:
    """A function of two grey pictures as a flow method."""

    multiple = least = 1

    def __init__(self, flow) -> None:
        self.flow = flow

    def stream(self, frames, backward=False):
        for first, second in itertools.pairwise(grey_pixels(frame) for frame in frames):
            pairs = [(first, second), (second, first)] if backward else [(first, second)]
            made = [torch.from_numpy(self.flow(*pair)).permute(2, 0, 1).float() for pair in pairs]
            yield made[0], made[1] if backward else None


def farneback(first, second):
    return cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 5, 13, 10, 7, 1.5, 0)


def tvl1(first, second):
    from skimage.registration import optical_flow_tvl1

    found = optical_flow_tvl1(first / 255.0, second / 255.0)  # where the second picture's pixels come from, y first
    return found[::-1].transpose(1, 2, 0).copy()


PEERS = {"farneback": farneback, "tvl1": tvl1, "dis-plain": lambda first, second: dis_flow(first, second)}


def opened(name: str) -> FlowEstimator:
    if name in PEERS:
        return Classical(PEERS[name])
    method, _, weights = name.partition(":")
    return load(method, weights or None)


def labelled(method: FlowEstimator, source: str) -> float:
    """Mean endpoint error over the labelled pixels of a data set."""
    clips, total, count = batches(source, 2, (8, 8), 0).clips, 0.0, 0
    for number in range(len(clips)):
        clip = clips[number]
        found = estimate(method, clip["video"][None]).fwd[0]
        distance = torch.linalg.vector_norm(found - clip["flow"], dim=1)[clip["valid"]]
        total, count = total + float(distance.double().sum()), count + distance.numel()
    return total / count


def on_footage(methods: dict[str, FlowEstimator], video: Tensor) -> dict[str, dict[str, float]]:
    """Warping error, there-and-back and milliseconds of every method on frames (t, 3, h, w)."""
    rows, warped, inside = {}, {}, torch.ones(1, dtype=torch.bool)
    for name, method in methods.items():
        begun = time.process_time()
        estimate(method, video[None])
        cost = (time.process_time() - begun) * 1000 / (len(video) - 1)
        found = estimate(method, video[None], backward=True)
        gap, _, seen = round_trip(found.fwd[0], found.bwd[0])
        length = torch.linalg.vector_norm(gap, dim=1, keepdim=True).clamp(max=LONGEST_GAP)
        warped[name] = (video[:-1] - backward_warp(video[1:], found.fwd[0])[0]).abs().mean(1, keepdim=True)
        inside = inside & seen
        rows[name] = {"there-back": round(float(length[seen].mean()), 3), "ms": round(cost, 1)}
    return {name: {"warping": round(255 * float(warped[name][inside].mean()), 3)} | row for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ships = [found.id for found in cards().values() if found.verb == "flow" and shipped(found.id)]
    parser.add_argument("clips", nargs="*")
    parser.add_argument("--methods", default=",".join([*PEERS, "dis", *sorted(ships)]))
    parser.add_argument("--data")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--size", default="448x256")
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = {name: opened(name) for name in options.methods.split(",")}
    rows = []

    def note(part: str, name: str, figures: dict[str, float]) -> None:
        rows.append({"part": part, "method": name} | figures)
        if not options.json:
            print(
                f"{part:12} {name:14}", "   ".join(f"{key} {value:7.3f}" for key, value in figures.items()), flush=True
            )

    scenes = held_out(0)
    for name, method in methods.items():
        note("world", name, errors(method, scenes))
        if options.data:
            note("data", name, {"all": labelled(method, options.data)})
    size = tuple(int(side) for side in options.size.split("x"))
    for path in options.clips:
        video = footage(path, size, options.frames).tensor().float()
        for name, figures in on_footage(methods, video).items():
            note(Path(path).stem, name, figures)
    if options.clips:
        real = [row for row in rows if "warping" in row]
        for name in methods:
            mine = [row for row in real if row["method"] == name]
            note("mean", name, {key: mean(row[key] for row in mine) for key in ("warping", "there-back", "ms")})
    if options.json:
        print(json.dumps(rows))
    if options.rest:
        for other in ("interpolation", "stabilization"):
            subprocess.run([sys.executable, str(Path(__file__).with_name(f"{other}.py")), *options.clips], check=True)


if __name__ == "__main__":
    main()
