"""Many files at once: the time of a batch against a command for every file, and against what its own units allow.

    python benchmarks/batch.py [--files 12] [--workers 2] [--rounds 2] [--json]

Clips of the world of 6 to 60 frames are interpolated to 3/2 of their rate by `dis`, in four ways in one run: a command
for every file, one after the other; the same by `xargs -P`; a batch with one worker; a batch with several. Of each
the quickest round counts, and all four must end in the same bytes. The last one's seconds per unit give the makespans
that list scheduling would have with no time between units: longest first (what a batch does) and as listed. No order
can beat max(longest, sum / workers); Graham's bound for longest first is 4/3 - 1/(3 workers) of the best. The last
lines simulate a thousand workers with heavy-tailed units.
"""

import argparse
import heapq
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = ["--fps", "1.5x", "--method", "dis", "--preset", "ultrafast"]


def makespan(seconds: list[float], workers: int) -> float:
    """When the last unit ends if every free worker takes the next of the list."""
    free = [0.0] * workers
    for unit in seconds:
        heapq.heappush(free, heapq.heappop(free) + unit)
    return max(free)


def bound(seconds: list[float], workers: int) -> float:
    return max(max(seconds), sum(seconds) / workers)


def clips(folder: Path, count: int) -> list[Path]:
    from frameloom.world import clip

    draw = random.Random(0)
    paths = []
    for number in range(count):
        frames = round(6 * 10 ** draw.random())
        path = folder / f"{number:03}.mp4"
        clip(seed=number, frames=frames, height=96, width=160, fps=24).save(path)
        paths.append(path)
    return paths


def timed(command: list[str], **options) -> tuple[float, str]:
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, **options)
    return time.perf_counter() - begun, done.stdout


def measure(folder: Path, count: int, workers: int, rounds: int) -> dict:
    paths = clips(folder, count)
    one = f'"{sys.executable}" -m frameloom interpolate "$1" "$2/$(basename "$1")" {" ".join(FLAGS)}'
    outs = {name: folder / name for name in ("loop", "xargs", "one", "batch")}
    found: dict[str, float] = {}
    report: dict = {}
    for _ in range(rounds):  # in turn, so that a busy minute of the machine does not fall on one of them alone
        for name, out in outs.items():
            many = workers if name in ("xargs", "batch") else 1
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            if name in ("loop", "xargs"):
                call = ["xargs", "-0", "-P", str(many), "-I", "{}", "sh", "-c", one, "_", "{}", str(out)]
            else:
                call = [sys.executable, "-m", "frameloom", "batch", "interpolate", str(folder / "*.mp4"), "--out",
                        str(out), "--workers", str(many), "--json", "--", *FLAGS]  # fmt: skip
            seconds, printed = timed(call, input="\0".join(map(str, paths)))
            if name == "batch" and seconds < found.get(name, float("inf")):
                report = json.loads(printed)
            found[name] = min(seconds, found.get(name, float("inf")))
    for path in paths:
        assert len({(out / path.name).read_bytes() for out in outs.values()}) == 1, f"{path.name} differs"
    by_name = sorted((row["output"], row["seconds"]) for row in report["files"])
    listed = [seconds for _, seconds in by_name]
    begin = min(row["begun"] for row in report["files"])
    end = max(row["begun"] + row["seconds"] for row in report["files"])
    return {
        "files": count, "workers": workers, "seconds": {name: round(value, 1) for name, value in found.items()},
        "first unit to last": round(end - begin, 2), "sum of units": round(sum(listed), 1), "longest": max(listed),
        "no order beats": round(bound(listed, workers), 2),
        "longest first, ideally": round(makespan(sorted(listed, reverse=True), workers), 2),
        "as listed, ideally": round(makespan(listed, workers), 2),
        "Graham's bound": round(bound(listed, workers) * (4 / 3 - 1 / (3 * workers)), 2),
        "faster than a command each": round(found["loop"] / found["batch"], 2),
        "faster than xargs": round(found["xargs"] / found["batch"], 2),
    }  # fmt: skip


def simulate(workers: int = 1000) -> list[dict]:
    """Share of the workers' time that is work, with log-normal units (sigma 1), by units for each worker."""
    draw = random.Random(0)
    rows = []
    for each in (1, 2, 5, 20, 100):
        seconds = [draw.lognormvariate(0.0, 1.0) for _ in range(workers * each)]
        row = {"units a worker": each}
        for name, order in (("longest first", sorted(seconds, reverse=True)), ("as listed", seconds)):
            row[name] = round(sum(seconds) / workers / makespan(order, workers), 3)
        row["at best"] = round(sum(seconds) / workers / bound(seconds, workers), 3)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.files, options.workers, options.rounds)
    simulated = simulate()
    if options.json:
        print(json.dumps({"measured": found, "simulated": simulated}))
        return
    for key, value in found.items():
        print(f"{key:28} {value}")
    for row in simulated:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
