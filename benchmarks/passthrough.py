"""What reading and writing through frameloom costs beside the same decode/encode loop written on PyAV.

    python benchmarks/passthrough.py CLIP [--codec h264] [--rounds 3] [--json]

Prints seconds of both, taken in turn in one process, and their ratio (the bar is 1.15 at 1080p).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import av

from frameloom.video.encoding import CODECS
from frameloom.video.reader import read
from frameloom.video.writer import write


def direct(source: Path, target: Path, codec: str) -> None:
    """The plain loop that anybody would write."""
    spec = CODECS[codec]
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        incoming = given.streams.video[0]
        incoming.thread_type = "AUTO"
        options = dict(spec.options) | {"crf": str(spec.crf), "preset": str(spec.preset)}
        outgoing = made.add_stream(spec.encoder, rate=incoming.average_rate, options=options)
        outgoing.width, outgoing.height, outgoing.pix_fmt = incoming.width, incoming.height, "yuv420p"
        outgoing.thread_type = "AUTO"
        for frame in given.decode(incoming):
            frame.pict_type = 0
            made.mux(outgoing.encode(frame))
        made.mux(outgoing.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--codec", default="h264", choices=["h264", "h265", "av1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"frameloom": [], "pyav": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            start = time.perf_counter()
            direct(options.clip, Path(folder) / "direct.mp4", options.codec)
            seconds["pyav"].append(time.perf_counter() - start)
            start = time.perf_counter()
            write(read(options.clip), Path(folder) / "ours.mp4", codec=options.codec)
            seconds["frameloom"].append(time.perf_counter() - start)
    ratio = median(ours / plain for ours, plain in zip(seconds["frameloom"], seconds["pyav"], strict=True))
    report = {"clip": options.clip.name, "codec": options.codec, "ratio": round(ratio, 3)} | {
        name: [round(value, 2) for value in values] for name, values in seconds.items()
    }
    print(json.dumps(report) if options.json else "\n".join(f"{key:10} {value}" for key, value in report.items()))


if __name__ == "__main__":
    main()
