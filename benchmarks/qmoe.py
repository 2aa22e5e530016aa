"""Products with ternary matrices: from the code, decoded first, and uncompressed, by shape and number of tokens.

    python benchmarks/qmoe.py                     # the shapes of base-128, large-128 and c2048
    python benchmarks/qmoe.py --zeros 0.8

Median milliseconds, taken in turns, one thread. Encoding and decoding are timed as well.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from frameloom.claims.qmoe import independent, timed
from frameloom.scale.ternary import TernaryLinear, dictionary, encode

SHAPES = ((3072, 768), (768, 3072), (4096, 1024), (6144, 2080), (2080, 6144))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, default=0.885)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dictionary()  # is built once, which takes about a second
    draw = torch.Generator().manual_seed(0)
    print(f"{'shape':>12} {'bits':>6} {'encode':>9} {'tokens':>7} {'from code':>10} {'decoded':>10} {'plain':>10}")
    for height, width in SHAPES:
        trits = independent(height, width, options.zeros, 0)
        begun = time.perf_counter()
        words = encode(trits)
        spent = 1e3 * (time.perf_counter() - begun)
        layer = TernaryLinear(*words, torch.randn(height, 2, generator=draw), width)
        plain = layer.dense().contiguous()
        for tokens in options.tokens:
            x = torch.randn(tokens, width, generator=draw)
            found = timed({"code": lambda x=x, layer=layer: layer(x),
                           "decoded": lambda x=x, layer=layer: F.linear(x, layer.dense()),
                           "plain": lambda x=x, plain=plain: F.linear(x, plain)}, 9)  # fmt: skip
            print(f"{f'{height}x{width}':>12} {layer.bits:6.3f} {spent:7.0f}ms {tokens:7} "
                  + " ".join(f"{found[name]:8.2f}ms" for name in ("code", "decoded", "plain")), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
