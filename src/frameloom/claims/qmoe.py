"""QMoE: sizes of the code, rounding with and without data, and a small mixture of experts before and after."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.claims import mixture
from frameloom.claims.base import Result
from frameloom.memory import peak
from frameloom.progress import Progress
from frameloom.scale import ternary
from frameloom.scale.calibration import Sample
from frameloom.scale.gptq import GRIDS, gptq, nearest
from frameloom.scale.packed import stored
from frameloom.scale.qmoe import load, quantize

PAPER_ZEROS = 0.885
PIECES, HELD_OUT, TEST = 512, 64, 256


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """The code by itself, GPTQ by itself, then all of it on a Mixtral that is trained on the spot."""
    torch.manual_seed(seed)
    sizes, coded, fixed, bound = code_sizes(seed)
    speed, faster = products(seed)
    rounding, better = rounded(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = mixture.train(Path(scratch) / "model", seed, progress=progress)
        ends, losses, ratio = end_to_end(folder, Path(scratch), seed, progress)
        clean = leaves_no_trace(folder, Path(scratch), seed)
        growth = memory_growth(Path(scratch), seed)
    plain, near, kept = losses["bfloat16"], losses["ternary, nearest"], losses["ternary, qmoe"]
    lost = (kept - plain) / (near - plain)
    return Result(
        "qmoe",
        paper="a 1.6-trillion-parameter Switch from 3.2 TB to under 160 GB, 0.8 bits a parameter, at a small loss",
        setting=f"codes on 64 x 2080 independent trits; a Mixtral of 2 x 16 experts (256, 512), trained here on "
        f"captions, calibrated on {PIECES} pieces of {mixture.LENGTH} tokens, measured on {TEST} others, seed {seed}",
        rows=[*sizes, *speed, *rounding, *ends, {"name": "peak memory, 64 experts over 8", "ratio": f"{growth:.3f}"}],
        checks={
            "the code comes back exactly, widths 1 to 97": round_trips(seed),
            "under 0.80 bits at the paper's zeros": coded < 0.80,
            "range coding within 10% of the entropy": bound < 1.10,
            "held-out tokens leave no trace": clean,
            "memory does not grow with experts": growth < 1.10,
        },
        holds=lost < 0.5 and ratio >= 12 and faster > 1 and better,
        summary=f"ternary experts lose {kept - plain:+.4f} nats, {max(lost, 0.0):.0%} of what rounding to nearest "
        f"loses ({near - plain:+.4f}; needs < 50%), {ratio:.1f} times smaller (needs >= 12); products {faster:.1f} "
        f"times as fast from the code as by decoding (needs > 1)",
        notes=[
            f"the code itself takes {fixed - 1:.0%} more than the entropy at the paper's zeros, since its dictionary "
            f"is fixed; range coding, with levels, takes {bound - 1:.0%} more, and has to be decoded when it is loaded",
        ],
    )


def independent(height: int, width: int, zero: float, seed: int) -> Tensor:
    """Trits drawn independently."""
    u = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    return ((u >= zero).to(torch.int8) + (u >= (1 + zero) / 2)).to(torch.int8)


def code_sizes(seed: int) -> tuple[list[dict[str, Any]], float, float, float]:
    """Bits a weight at several densities; at the paper's, that with headers, and both codes' ratio to the entropy."""
    rows, coded, fixed, bound = [], 0.0, 0.0, 0.0
    for zero in (0.70, 0.80, 0.85, PAPER_ZEROS, 0.90, 0.95):
        trits = independent(64, 2080, zero, seed)
        shares = torch.bincount(trits.view(-1).long()) / trits.numel()
        entropy = float(-(shares * shares.log2()).sum())
        layer = ternary.TernaryLinear(*ternary.encode(trits), torch.ones(64, 2), 2080)
        words = 16 * len(layer.w_comp) / trits.numel()
        state = stored(trits, torch.ones(64, 2), "ternary", "range")
        ranged = 8 * sum(value.numel() * value.element_size() for value in state.values()) / trits.numel()
        rows.append(
            {"name": f"code, {zero:.1%} zeros", "words": f"{words:.3f}", "with headers": f"{layer.bits:.3f} bits",
             "entropy": f"{entropy:.3f}", "range-coded": f"{ranged:.3f}"}
        )  # fmt: skip
        if zero == PAPER_ZEROS:
            coded, fixed, bound = layer.bits, words / entropy, ranged / entropy
    return rows + ggml_sizes(), coded, fixed, bound


def ggml_sizes() -> list[dict[str, Any]]:
    """The ternary blocks of llama.cpp, measured where its package is installed."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        return []
    w = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).numpy()
    return [{"name": f"{kind} of gguf", "bits": 8 * quants.quantize(w, GGMLQuantizationType[kind]).nbytes / w.size}
            for kind in ("TQ1_0", "TQ2_0")]  # fmt: skip


def timed(calls: dict[str, Callable[[], object]], turns: int = 15) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn >= 2:
                spent[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in spent.items()}


def products(seed: int, turns: int = 9) -> tuple[list[dict[str, Any]], float]:
    """A matrix as in c2048 with the vectors of a few tokens: from the code, decoded first, and plain float32."""
    levels = torch.tensor([[-0.75, 1.25]]).expand(6144, 2)
    layer = ternary.TernaryLinear(*ternary.encode(independent(6144, 2080, PAPER_ZEROS, seed)), levels, 2080)
    plain, rows, gain = layer.dense().contiguous(), [], float("inf")
    for tokens in (1, 16):
        x = torch.randn(tokens, 2080, generator=torch.Generator().manual_seed(seed))
        spent = timed({"code": lambda x=x: layer(x), "decoded": lambda x=x: F.linear(x, layer.dense()),
                       "plain": lambda x=x: F.linear(x, plain)}, turns)  # fmt: skip
        gain = min(gain, spent["decoded"] / spent["code"])
        rows.append({"name": f"6144 x 2080, {tokens} tokens", "from the code": f"{spent['code']:.1f} ms",
                     "decoded first": f"{spent['decoded']:.1f} ms",
                     "float32, uncompressed": f"{spent['plain']:.1f} ms"})  # fmt: skip
    return rows, gain


def rounded(seed: int) -> tuple[list[dict[str, Any]], bool]:
    """Relative squared error of outputs on other inputs, and zeros, with and without data."""
    rows, better = [], True
    draw = torch.Generator().manual_seed(seed)
    grid = GRIDS["ternary"]
    for width in (256, 768):
        for kind in ("correlated", "white"):
            mix = torch.randn(width // 8, width, generator=draw)

            def inputs(count: int, kind: str = kind, width: int = width, mix: Tensor = mix) -> Tensor:
                noise = torch.randn(count, width, generator=draw)
                return noise if kind == "white" else torch.randn(count, width // 8, generator=draw) @ mix + noise

            w, x, other = torch.randn(1, 128, width, generator=draw), inputs(8 * width), inputs(2048)
            plain, levels = nearest(w, grid)
            chosen = gptq(w, (x.t() @ x)[None], grid)[0]
            meant = w[0] @ other.t()
            error = [float((grid.spread(s, levels)[0] @ other.t() - meant).square().sum() / meant.square().sum())
                     for s in (plain, chosen)]  # fmt: skip
            zeros = [float((s == 0).float().mean()) for s in (plain, chosen)]
            better &= kind == "white" or error[1] < 0.6 * error[0]
            rows.append({"name": f"128 x {width}, {kind} inputs", "nearest": f"{error[0]:.3f}, {zeros[0]:.1%} zeros",
                         "gptq": f"{error[1]:.3f}, {zeros[1]:.1%} zeros"})  # fmt: skip
    return rows, better


def end_to_end(folder: Path, scratch: Path, seed: int, progress: Progress
               ) -> tuple[list[dict[str, Any]], dict[str, float], float]:  # fmt: skip
    """Loss on held-out pieces of the model as it was, and with its experts compressed in four ways."""
    shown, test = mixture.pieces(PIECES + HELD_OUT, seed + 20), mixture.pieces(TEST, seed + 30)
    losses = {"bfloat16": mixture.loss(mixture.plain(folder), test)}
    rows: list[dict[str, Any]] = [{"name": "bfloat16", "loss": f"{losses['bfloat16']:.4f}", "bits": "16"}]
    for bits in ("2", "ternary"):
        for method in ("rtn", "qmoe"):
            name = f"{'ternary' if bits == 'ternary' else '2 bits'}, {'nearest' if method == 'rtn' else method}"
            out = scratch / f"{bits}-{method}"
            report = quantize(folder, out, method, bits=bits, calib=shown, samples=PIECES, held_out=HELD_OUT,
                              progress=progress)  # fmt: skip
            model = load(out)
            losses[name] = mixture.loss(model, test)
            rows.append(
                {"name": name, "loss": f"{losses[name]:.4f}", "bits": f"{report.bits:.3f}",
                 "smaller": f"{report.ratio:.1f} times", "zeros": f"{report.zeros:.1%}",
                 "error of experts": " and ".join(f"{value:.3f}" for value in report.error)}
            )  # fmt: skip
    found = [layer for layer in model.modules() if isinstance(layer, ternary.TernaryLinear)]
    kept = [value for layer in found for value in stored(layer.trits(), layer.levels, "ternary", "range").values()]
    ranged = 8 * sum(value.numel() * value.element_size() for value in kept) / report.weights
    rows.append({"name": "the same, range-coded", "bits": f"{ranged:.3f}", "smaller": f"{16 / ranged:.1f} times"})
    return rows, losses, report.ratio


def leaves_no_trace(folder: Path, scratch: Path, seed: int) -> bool:
    """The same files whichever order the held-out tokens come in, and however many there are."""
    shown = mixture.pieces(48, seed + 40)
    draw = torch.Generator().manual_seed(seed)
    mixed = [Sample(one.ids[torch.randperm(len(one.ids), generator=draw)]) for one in shown[32:]]
    files = []
    for name, tail in (("in-order", shown[32:]), ("shuffled", mixed), ("fewer", mixed[:5])):
        quantize(folder, scratch / name, calib=shown[:32] + tail, samples=32, held_out=len(tail))
        files.append(json.loads((scratch / name / "config.json").read_text())["files"])
    return files[0] == files[1] == files[2]


def memory_growth(scratch: Path, seed: int) -> float:
    """Peak bytes while 64 experts are compressed over that for 8, both in groups of 8."""
    shown, most = mixture.pieces(32, seed + 50), {}
    for experts in (8, 64):
        model = mixture.train(scratch / f"of-{experts}", seed, width=64, inner=128, experts=experts, steps=0, count=16)
        most[experts] = peak(
            lambda model=model, n=experts: quantize(model, scratch / f"made-{n}", calib=shown, group=8)
        )
    return most[64] / most[8]


def round_trips(seed: int) -> bool:
    """Every width of 1 to 97 at five densities."""
    for width in range(1, 98):
        for zero in (0.0, 0.5, PAPER_ZEROS, 0.99, 1.0):
            trits = independent(3, width, zero, seed + width)
            if not torch.equal(ternary.decode(*ternary.encode(trits), width), trits):
                return False
    return True
