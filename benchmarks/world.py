"""Clips a second that the synthetic world renders: pictures alone, and with every dense label."""

import argparse
import json
import time

import torch

from frameloom.world import KINDS, World
from frameloom.world.render import OUTPUTS


def clips_per_second(kind: str, outputs: tuple[str, ...], options: argparse.Namespace) -> float:
    """Scene sampling and rendering, from nothing, after one batch to warm up."""
    size, batch = options.size, options.batch
    World(kind, range(batch), options.frames, device=options.device).render(size, size, outputs)
    best = float("inf")
    for repeat in range(options.repeats):
        seeds = range((repeat + 1) * batch, (repeat + 2) * batch)
        start = time.perf_counter()
        made = World(kind, seeds, options.frames, device=options.device).render(size, size, outputs)
        made[outputs[0]].sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return batch / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = {}
    for kind in options.kinds:
        rgb = clips_per_second(kind, ("rgb",), options)
        every = clips_per_second(kind, OUTPUTS, options)
        figures[kind] = {"rgb": round(rgb, 1), "all": round(every, 1)}
        if not options.json:
            print(f"{kind:8} rgb {rgb:7.1f} clips/s   all labels {every:7.1f} clips/s", flush=True)
    if options.json:
        print(json.dumps({"frames": options.frames, "size": options.size, "clips_per_second": figures}))


if __name__ == "__main__":
    main()
