"""How fast integers are coded, each under a Gaussian of its own, beside the coder used directly.

python benchmarks/coding.py [--values 20000] [--rounds 9] [--json]

`whole tables` gives the coder every symbol's whole table, as any caller of it would who has tables; `constriction` is
that library's own Gaussian model, whose bytes depend on the rounding of `erfc` and which escapes nothing. Nanoseconds
of processor time a value, median of interleaved rounds, on narrow scales (0.1 to 2, what a learned codec mostly has)
and on wide ones (0.1 to 33).
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import constriction
import numpy as np
import torch

from frameloom.bitstream.entropy import Gaussians, get_values, put_values
from frameloom.bitstream.rangecoder import Decoder, Encoder

GAUSSIANS = Gaussians()
DIRECT = constriction.stream.model.QuantizedGaussian(-4000, 4000)
Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drawn(count: int, widest: float) -> Numbers:
    """Values with the means and scales that they come from."""
    chance = torch.Generator().manual_seed(0)
    means = 20 * torch.randn(count, generator=chance, dtype=torch.float64)
    scales = 0.1 * (widest / 0.1) ** torch.rand(count, generator=chance, dtype=torch.float64)
    return (means + scales * torch.randn(count, generator=chance)).round().long(), means, scales


def ours(values: torch.Tensor, means: torch.Tensor, scales: torch.Tensor) -> tuple[Callable, Callable]:
    def encode() -> bytes:
        coder = Encoder()
        GAUSSIANS.put(coder, values, means, scales)
        return coder.to_bytes()

    return encode, lambda data: GAUSSIANS.get(Decoder(data), means, scales).numpy()


def whole_tables(values: torch.Tensor, means: torch.Tensor, scales: torch.Tensor) -> tuple[Callable, Callable]:
    level, fraction, low, order = GAUSSIANS._sorted(means, scales)
    groups = list(GAUSSIANS._batches(level))
    symbols = values.numpy()[order]

    def encode() -> bytes:
        coder = Encoder()
        for scale, start, stop in groups:
            tables = GAUSSIANS._tables[scale].frequencies[fraction[start:stop]]
            put_values(coder, symbols[start:stop], tables, low[start:stop])
        return coder.to_bytes()

    def decode(data: bytes) -> np.ndarray:
        coder, found = Decoder(data), np.empty(len(order), np.int64)
        for scale, start, stop in groups:
            tables = GAUSSIANS._tables[scale].frequencies[fraction[start:stop]]
            found[order[start:stop]] = get_values(coder, tables, low[start:stop])
        return found

    return encode, decode


def direct(values: torch.Tensor, means: torch.Tensor, scales: torch.Tensor) -> tuple[Callable, Callable]:
    symbols, means, scales = values.numpy().astype(np.int32), means.numpy(), scales.numpy()

    def encode() -> bytes:
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(symbols, DIRECT, means, scales)
        return coder.get_compressed().tobytes()

    def decode(data: bytes) -> np.ndarray:
        return constriction.stream.queue.RangeDecoder(np.frombuffer(data, np.uint32)).decode(DIRECT, means, scales)

    return encode, decode


WAYS = {"here": ours, "whole tables": whole_tables, "constriction": direct}


def measured(numbers: Numbers, rounds: int) -> dict[str, dict[str, float]]:
    """Nanoseconds a value and bytes of each way."""
    ways = {name: make(*numbers) for name, make in WAYS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(rounds):
        for name, (encode, decode) in ways.items():
            marks = [time.process_time()]
            data = encode()
            marks.append(time.process_time())
            found = decode(data)
            marks.append(time.process_time())
            if not np.array_equal(found, numbers[0].numpy()):
                raise SystemExit(f"{name}: other values came back")
            times[name].append((marks[1] - marks[0], marks[2] - marks[1]))
            sizes[name] = len(data)
    unit = 1e9 / len(numbers[0])
    return {name: {"encode": round(unit * median(pair[0] for pair in pairs), 1),
                   "decode": round(unit * median(pair[1] for pair in pairs), 1), "bytes": sizes[name]}
            for name, pairs in times.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {name: measured(drawn(options.values, widest), options.rounds)
              for name, widest in (("narrow", 2.0), ("wide", 33.0))}  # fmt: skip
    if options.json:
        print(json.dumps(report))
        return
    for scales, ways in report.items():
        for name, found in ways.items():
            ratios = [f"{found[way] / ways['constriction'][way]:.2f} of constriction's" for way in ("encode", "decode")]
            print(f"{scales:7} {name:13} encode {found['encode']:7.1f} ns ({ratios[0]})  "
                  f"decode {found['decode']:7.1f} ns ({ratios[1]})  {found['bytes']:,} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
