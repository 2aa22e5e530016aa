"""What streaming takes for windows of several sizes, next to the whole model and the peers, in one run.

    python benchmarks/stream.py [--frames 2] [--rounds 5] [--json]

The transformer is that of the claim: 24 blocks, 414 MB. Each way is a process of its own, and all make a pass in turn;
`cold` passes read the files from the disk again, `warm` ones find them in the system's cache. Compare rows of one run.
"""

import argparse
import json
import sys

from frameloom.claims.superpipeline import Way, checkpoint, measured

WAYS = {"whole": ("whole", {}), "k 2, k' 1": ("stream", {"k": 2, "k_prime": 1}),
        "k 6, k' 1": ("stream", {"k": 6, "k_prime": 1}), "k 6, k' 3": ("stream", {"k": 6, "k_prime": 3}),
        "k 6, k' 6": ("stream", {"k": 6, "k_prime": 6}),
        "k 6, k' 1, 4 kept": ("stream", {"k": 6, "k_prime": 1, "pin": 4}),
        "k 12, k' 1, 10 kept": ("stream", {"k": 12, "k_prime": 1, "pin": 10}), "groups of 6": ("groups", {"k": 6}),
        "groups of 1": ("groups", {"k": 1}), "disk_offload": ("accelerate", {})}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=2, help="of 8 x 8 tokens: how much there is to compute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with checkpoint(0) as folder:
        ways = {name: Way(kind, folder, frames=options.frames, **given) for name, (kind, given) in WAYS.items()}
        try:
            measured(ways, options.rounds, lambda label, done, total: print(label, done, "of", total, file=sys.stderr))
        finally:
            for way in ways.values():
                way.close()
    rows = [{"way": name, "resident MB": round(way.peak / 1e6), "cold ms": round(1e3 * way.seconds("cold")),
             "warm ms": round(1e3 * way.seconds("warm")),
             "read MB a pass": round(way.read / 1e6)}
            for name, way in ways.items()]  # fmt: skip
    assert len(set().union(*(way.digests for way in ways.values()))) == 1
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print("   ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
