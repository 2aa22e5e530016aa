"""Rate and distortion of every codec on real clips, as docs/verbs/compress.md shows it.

    python benchmarks/rate.py pool.mp4 nasa.mp4 [--frames 24] [--bpp 0.2,0.4,0.8] [--minutes 1.5] [--methods ...]
    python benchmarks/rate.py pool.mp4 nasa.mp4 --save       # also writes docs/measured/compress.json

The same numbers as `frameloom rd`, several clips in one table.
"""

import argparse
import json
import logging
import os
from datetime import date
from pathlib import Path
from typing import Any

from frameloom.tasks.compression.rd import LEARNED, Point, against, rate_distortion
from frameloom.video.reader import read

KEPT = Path(__file__).parents[1] / "docs" / "measured" / "compress.json"


def row(clip: str, point: Point) -> dict[str, Any]:
    return {"clip": clip, "method": point.method, "bytes": point.bytes, "bits a pixel": round(point.bits_per_pixel, 4),
            "PSNR (dB)": round(point.psnr, 2), "MS-SSIM": round(point.ms_ssim, 4),
            "encode (s)": round(point.encode_seconds, 1), "decode (frames/s)": round(point.decode_fps)}  # fmt: skip


def differences(clip: str, points: list[Point]) -> str:
    told = {name: "no quality in common" if value is None else f"{value:+.0f}%"
            for name, value in against(points).items()}  # fmt: skip
    return f"{clip}: " + ", ".join(f"{name} {value}" for name, value in told.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--bpp", default="0.2,0.4,0.8")
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--methods", default=",".join(LEARNED))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    rows, compared, shapes = [], [], []
    for path in options.clips:
        clip, name = read(path)[: options.frames], Path(path).stem
        points = rate_distortion(clip, options.methods.split(","), [float(one) for one in options.bpp.split(",")],
                                 minutes=options.minutes)  # fmt: skip
        for point in points:
            rows.append(row(name, point))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        shapes.append(f"`{name}` at {clip.info.width}x{clip.info.height}")
        compared.append(differences(name, points))
        print("BD-rate against x264,", compared[-1], flush=True)
    if options.save:
        clips = " ".join(Path(path).name for path in options.clips)
        note = (f"The first {options.frames} frames of {' and '.join(shapes)}. Networks were fitted for "
                f"{options.minutes:g} minutes a point; `nirvana` has 32, 64 and 128 sines in place of sizes; `sem` "
                f"cannot make some of the small files. BD-rate against x264: {'; '.join(compared)}.")  # fmt: skip
        kept = {"command": f"python benchmarks/rate.py {clips} --frames {options.frames} --bpp {options.bpp} "
                           f"--minutes {options.minutes:g} --save",
                "note": note, "machine": f"{os.uname().machine}, {os.cpu_count()} cores, one thread, "
                                         f"{date.today()}", "rows": rows}  # fmt: skip
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
