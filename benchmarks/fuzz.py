"""Mutated .flm files of every codec: each must end in one clear error or in frames, in bounded memory and time.

    python benchmarks/fuzz.py --files 10000          # all codecs in turn
    python benchmarks/fuzz.py --files 500 --methods hnerv,sem --seed 3

A file is mutated as it lies (which checksums catch), in one section with its checksum made right again (which reaches
the decoder itself), in its header the same way, or cut short. Work is done in a child process whose address space is
limited; a crash of the child or a file that takes longer than the limit is a failure and is kept for a look.
"""

import argparse
import collections
import json
import multiprocessing
import random
import resource
import signal
import struct
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from frameloom.bitstream.container import Container, parse
from frameloom.cards import card, cards
from frameloom.errors import InputError
from frameloom.tasks.compression.base import compress, decompress
from frameloom.video.clip import Clip
from frameloom.world.world import World

MEMORY, SECONDS = 6 << 30, 30
LEAVES = [0, -1, 1, 2, 3, 7, 1 << 12, 1 << 31, 1 << 62, 0.5, float("inf"), None, "x", [], {}, True, [[]]]
FEW = {"hnerv": {"epochs": 2}, "nerv": {"epochs": 2}, "boost-nerv": {"epochs": 1, "size": 24_000},
       "nirvana": {"iterations": 20, "later": 5}}  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Another file, near enough to the first to be taken seriously by a careless reader."""
    kind = chance.choice(["bytes", "section", "section", "section", "header", "header", "cut"])
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind == "bytes":
        return flipped(data, chance)
    container = parse(data)
    if kind == "section":
        name = chance.choice(list(container.sections))
        payload = flipped(container.sections[name], chance)
        if chance.random() < 0.2:
            payload = payload[: chance.randrange(len(payload) + 1)]
        return Container(container.header, container.sections | {name: payload}).to_bytes()
    if chance.random() < 0.5:
        config = edited(container.header.config, chance)
        return Container(replace(container.header, config=config), container.sections).to_bytes()
    length = struct.unpack_from("<I", data, 10)[0]
    text = bytearray(flipped(data[18 : 18 + length], chance))
    prefix = data[:10] + struct.pack("<II", len(text), zlib.crc32(text))
    return prefix + bytes(text) + data[18 + length :]


def flipped(data: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        if broken:
            broken[chance.randrange(len(broken))] = chance.randrange(256)
    return bytes(broken)


def edited(value, chance: random.Random):
    """The same JSON with one leaf changed."""
    if isinstance(value, dict) and value:
        key = chance.choice(list(value))
        return value | {key: edited(value[key], chance)}
    if isinstance(value, list | tuple) and value:
        place = chance.randrange(len(value))
        return [*value[:place], edited(value[place], chance), *value[place + 1 :]]
    return chance.choice(
        [0, -1, 1, 2, 3, 7, 1 << 12, 1 << 31, 1 << 62, 0.5, float("inf"), None, "x", [], {}, True, [[]]]
    )


def child(path: str, method: str, seed: int, start: int, stop: int, out: str) -> None:
    """Decode mutations `start` to `stop`, writing down each before it is tried and what it came to."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    data = Path(path).read_bytes()
    with Path(out).open("a") as log:
        for number in range(start, stop):
            bad = mutated(data, random.Random(f"{method} {seed} {number}"))
            log.write(json.dumps({"number": number, "outcome": "died"}) + "\n")
            log.flush()
            signal.alarm(SECONDS)
            try:
                for _ in decompress(bad).frames(0, 3):
                    pass
                outcome = "decoded"
            except InputError as error:
                outcome = "refused" if "\n" not in str(error) else "refused in several lines"
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is what this looks for
                outcome = f"{type(error).__name__}: {error}"
            signal.alarm(0)
            log.write(json.dumps({"number": number, "outcome": outcome}) + "\n")
            log.flush()


def run(path: Path, method: str, count: int, seed: int) -> collections.Counter:
    """Outcomes of `count` mutations; a child that dies is replaced and its file counted."""
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    done = 0
    while done < count:
        worker = multiprocessing.get_context("spawn").Process(
            target=child, args=(str(path), method, seed, done, count, str(log))
        )
        worker.start()
        worker.join()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        done = max(line["number"] for line in lines) + 1
    outcomes = {line["number"]: line["outcome"] for line in lines}
    return collections.Counter(outcomes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="in all")
    parser.add_argument("--methods", help="such as hnerv,sem; every codec if absent")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    every = [one.id for one in cards().values() if one.verb == "compress"]
    methods = arguments.methods.split(",") if arguments.methods else every
    video = (World("flyover", [0], frames=6).render(48, 64)["rgb"][0] * 255).round().to(torch.uint8)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            card(method, "compress")
            path = Path(folder, f"{method}.flm")
            compress(Clip.from_tensor(video), path, method, **FEW.get(method, {}))
            outcomes = run(path, method, -(-arguments.files // len(methods)), arguments.seed)
            print(f"{method:12} {path.stat().st_size:7,} bytes  {dict(outcomes)}", flush=True)
            failures += sum(count for outcome, count in outcomes.items() if outcome not in ("decoded", "refused"))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
