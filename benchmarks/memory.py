"""Peak resident memory of a streaming verb on a clip, and on the clip eight times over; the bar is 5% more.

    python benchmarks/memory.py CLIP [--times 8] [--method dis] [--json]

Each run is a process of its own; its peak is what the operating system reports when it ends.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import av


def repeat(source: Path, target: Path, times: int) -> None:
    """The video packets of `source`, `times` over, without re-encoding."""
    with av.open(str(target), "w") as out:
        copy = None
        offset = 0
        for _ in range(times):
            with av.open(str(source)) as given:
                stream = given.streams.video[0]
                copy = copy or out.add_stream_from_template(stream, opaque=True)
                last = 0
                for packet in given.demux(stream):
                    if packet.size == 0:
                        continue
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    last = max(last, packet.pts + (packet.duration or 1))
                    packet.stream = copy
                    out.mux(packet)
            offset = last


def peak(arguments: list[str]) -> int:
    """Peak resident bytes of `frameloom ARGUMENTS`."""
    process = subprocess.Popen([sys.executable, "-m", "frameloom", *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"frameloom {' '.join(arguments)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--method", default="dis")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        once, many = Path(folder) / "once.mp4", Path(folder) / "many.mp4"
        repeat(options.clip, once, 1)
        repeat(options.clip, many, options.times)
        row = {"clip": options.clip.name, "method": options.method, "times": options.times}
        for name, path in (("once", once), ("many", many)):
            row[name] = peak(["interpolate", str(path), str(Path(folder) / "out.mp4"), "--fps", "1.5x",
                              "--method", options.method, "--preset", "ultrafast"])  # fmt: skip
    row["ratio"] = round(row["many"] / row["once"], 3)
    print(json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
