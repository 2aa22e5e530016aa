"""What sampling with our loop costs beside diffusers' own pipelines, and whether the latents are the same.

    python benchmarks/diffusion.py [--weights FOLDER ...] [--only NAME,...] [--rounds 5] [--steps 10] [--device cpu]

Random pipelines of diffusers' real classes, or saved ones. Both loops take turns in one process; prints the largest
difference over the largest value (the bar is 1e-5), the median ratio of seconds (1.02) and the ratio of peak memory of
tensors, weights left out (1).
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch

from frameloom.diffusion.pipeline import Pipeline, load_pipeline
from frameloom.memory import peak as tensors_alive

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_pipelines import MAKERS, run_ours, run_theirs, saved, start

# Large enough that the network, not the loop, takes the time.
SIZES = {
    "text-to-video": {"frames": 8, "height": 48, "width": 48},
    "animatediff": {"frames": 8, "height": 48, "width": 48},
    "latte": {"height": 96, "width": 96},
    "svd": {"frames": 4, "height": 48, "width": 48},
    "cogvideox": {"frames": 9, "height": 320, "width": 320},
    "wan": {"frames": 17, "height": 320, "width": 320},
    "ltx": {"frames": 17, "height": 128, "width": 128},
}


def peak(call, device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return tensors_alive(call)


def seconds(call, device: str) -> float:
    begin = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(made: Pipeline, rounds: int, steps: int, device: str) -> dict[str, float]:
    noise, picture = (None if value is None else value.to(device) for value in start(made, 1))

    def ours():
        return run_ours(made, noise, picture, steps)

    def theirs():
        return run_theirs(made, noise, picture, steps)

    one, other = ours().float(), theirs().float()  # warms up as well
    memory = peak(ours, device) / peak(theirs, device)
    ratios, times = [], []
    for i in range(rounds):  # in turn, and each first as often as second
        pair = {}
        for name, call in (("ours", ours), ("theirs", theirs))[:: 1 if i % 2 else -1]:
            pair[name] = seconds(call, device)
        ratios.append(pair["ours"] / pair["theirs"])
        times.append(pair["theirs"])
    return {
        "difference": float((one - other).abs().max() / other.abs().max().clamp(min=1)),
        "time_ratio": round(median(ratios), 3),
        "peak_ratio": round(memory, 3),
        "diffusers_seconds": round(median(times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="*", default=[], help="folders of saved pipelines instead of random ones")
    parser.add_argument("--only", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        names = [] if options.weights else options.only.split(",")
        jobs = [(where, where, {}) for where in options.weights]
        jobs += [(name, str(saved(name, Path(folder))), MAKERS[name][1] | SIZES.get(name, {})) for name in names]
        for name, where, sizes in jobs:
            made = load_pipeline(where, options.device, **sizes)
            row = {"pipeline": name} | compare(made, options.rounds, options.steps, options.device)
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                print(f"{name:16} difference {row['difference']:.1e}  time x{row['time_ratio']:.3f} "
                      f"({row['diffusers_seconds']} s)  peak x{row['peak_ratio']:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
