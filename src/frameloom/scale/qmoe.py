"""QMoE: experts of a mixture in less than a bit a weight, one group of experts in memory at a time.

For someone who wants to keep a large mixture on one machine. All calibration tokens lie in one flat buffer and move
through the model block by block. In a block with experts, its dense part runs first, sample by sample, and tells for
every token where it is routed. Then groups of experts are read from the checkpoint; each expert's tokens give

    H_wi = X^T X        H_wo = A^T A,  A = act(X wi^T)

both from the uncompressed expert in one pass; GPTQ rounds the group to three levels a row in one batch; the code is
written to disk; and the tokens go through the *compressed* experts, x += weight * expert(norm(x)), so that later blocks
make up for earlier ones. Every expert is read once. Memory is that of the activations, the dense part and one group,
however many experts there are.

Tokens held out to measure with travel along. They never enter an H, and are multiplied apart from the others, so that
not even the rounding of a sum depends on them.

E. Frantar, D. Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models", 2023, arXiv 2310.16795.
The code of the weights is in `frameloom.scale.ternary`, the rounding in `frameloom.scale.gptq`.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.atomic import save_tensors
from frameloom.cards import card, chosen
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.scale import calibration
from frameloom.scale.blockwise import Recorder, Tokens, walk
from frameloom.scale.calibration import Sample
from frameloom.scale.experts import Checkpoint, Host, experts_of, host_of, read_config, shapes, skeleton
from frameloom.scale.gptq import DAMPING, GRIDS, gptq, nearest
from frameloom.scale.packed import TOKENIZER, describe, drafted, is_compressed, load, save_dense, stored

__all__ = ["Report", "is_compressed", "load", "quantize"]

log = logging.getLogger(__name__)

# An expert that most tokens are sent to keeps this many times its fair share of them.
TOKEN_CAP = 4


@dataclass
class Report:
    """What was written, and what it cost.

    Attributes:
        weights: expert weights in all.
        bits: bits a weight in the files, with offsets and levels.
        zeros: the share of zero weights.
        ratio: how many times smaller the experts are than in bfloat16.
        error: relative squared error of the experts' answers, on held-out tokens, a layer; empty without any.
        starved: experts that no calibration token was sent to; they are rounded to nearest.
        failed: experts whose H had no Cholesky factor; likewise.
    """

    folder: Path
    weights: int = 0
    bytes: int = 0
    zeroes: int = 0
    error: list[float] = field(default_factory=list)
    starved: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights

    @property
    def zeros(self) -> float:
        return self.zeroes / self.weights

    @property
    def ratio(self) -> float:
        return 16 / self.bits

    def as_dict(self) -> dict[str, Any]:
        return {"out": str(self.folder), "expert_weights": self.weights, "expert_bytes": self.bytes,
                "bits_per_weight": round(self.bits, 4), "times_smaller_than_bf16": round(self.ratio, 2),
                "zeros": round(self.zeros, 4), "error": [round(value, 5) for value in self.error],
                "starved": self.starved, "failed": self.failed}  # fmt: skip


def quantize(
    model: str | Path, out: str | Path, method: str = "auto", *, bits: str = "ternary", pack: str = "auto",
    calib: "str | Path | Sequence[Sample]" = "world", samples: int = 512, held_out: int = 0, group: int = 16,
    damping: float = DAMPING, seed: int = 0, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Compress the experts of a mixture-of-experts model into a new folder.

    Args:
        model: a folder in the Hugging Face layout (Switch Transformers, Mixtral, Qwen2-MoE, Qwen3-MoE).
        out: the folder to make; it must not be there.
        method: `"qmoe"`, or `"rtn"` (round to nearest, no calibration: the baseline).
        bits: `"ternary"`, or `"2"` for four levels.
        pack: `"auto"` for the code that is multiplied without decoding (two bits: plain), `"range"` for range coding:
            near the entropy on disk, decoded when loaded.
        calib: `"world"`, a text file, a safetensors file of tokens, or samples; see `calibration.read`.
        samples: how many to calibrate on.
        held_out: how many further ones travel along to measure with.
        group: experts in memory at a time.
        damping: share of H's mean diagonal that is added to its diagonal.
        seed: of the calibration texts and of what is hidden in them.

    Raises:
        InputError: no such model, one without experts, calibration that cannot be read, activations that are not
            finite, a folder that is there already. Nothing is left under `out` then.
    """
    folder, out = Path(model), Path(out)
    method = card(chosen(method, "quantize"), "quantize").id
    for name, value, known in (("--bits", bits, tuple(GRIDS)), ("--pack", pack, ("auto", "range"))):
        if value not in known:
            raise InputError(f"{name} {value}: there are {' and '.join(known)}")
    for name, value, least in (("--samples", samples, 1), ("--held-out", held_out, 0), ("--group", group, 1)):
        if value < least:
            raise InputError(f"{name} {value}: a whole number of at least {least} is wanted")
    if out.exists():
        raise InputError(f"{out}: is there already; name a folder that is not")
    description = read_config(folder)
    if description.get("method") == "qmoe":
        raise InputError(f"{folder}: its experts are compressed already; give the model that it was made from")
    host = host_of(description.get("model_type", ""), str(folder))
    checkpoint = Checkpoint(folder)
    network = _skeleton(folder, host)
    report = Report(out)
    with drafted(out) as draft:
        layers = {path: shapes(module) for path, module in experts_of(network).items()}
        for path in layers:
            network.set_submodule(path, Recorder())
        checkpoint.fill(network, host)
        for value in network.parameters():
            value.data = value.data.bfloat16().float()  # what is calibrated is what will be loaded
        save_dense(network, draft)
        work = _Work(checkpoint, host, host.between(network.config), draft, report, bits, pack, group, damping,
                     layers, progress, nearest=method == "rtn")  # fmt: skip
        if method == "rtn" and not held_out:
            for path in layers:
                work.layer(path, None)
        else:
            shown = calibration.read(calib, folder, samples + held_out, seq2seq=host.seq2seq, seed=seed)
            if len(shown) <= held_out:
                raise InputError(f"--held-out {held_out}: of {len(shown)} samples none is left to calibrate on")
            counts = {path: found[0] for path, found in layers.items()}
            with torch.no_grad():
                walk(network, host, shown, held_out, counts, work.layer, progress)
        _warn(report)
        for name in TOKENIZER:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
        describe(draft, description, bits, pack, "nearest" if method == "rtn" else "gptq")
    return report


def _skeleton(folder: Path, host: Host) -> nn.Module:
    from transformers import AutoConfig

    try:
        return skeleton(AutoConfig.from_pretrained(folder, local_files_only=True), host)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a strange config makes it raise
        raise InputError(f"{folder}: its config.json builds no model ({type(error).__name__}: "
                         f"{str(error).splitlines()[0] if str(error) else ''})") from None  # fmt: skip


def _warn(report: Report) -> None:
    for names, why in ((report.starved, "no calibration token was sent to them"),
                       (report.failed, "their H had no Cholesky factor")):  # fmt: skip
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            log.warning("%d experts were rounded to nearest, since %s: %s", len(names), why, shown)


@dataclass
class _Work:
    """Compresses layers, group by group."""

    checkpoint: Checkpoint
    host: Host
    between: Callable[[Tensor], Tensor]
    draft: Path
    report: Report
    bits: str
    pack: str
    group: int
    damping: float
    layers: dict[str, tuple]
    progress: Progress
    nearest: bool  # round to nearest: tokens only measure

    def layer(self, path: str, tokens: Tokens | None) -> None:
        count, number = self.layers[path][0], list(self.layers).index(path)
        wrong, right = 0.0, 0.0
        for turn, begin in enumerate(range(0, count, self.group)):
            members = range(begin, min(begin + self.group, count))
            off, all_ = self._compress(path, members, tokens, f"experts-{number:02d}-{turn:02d}.safetensors")
            wrong, right = wrong + off, right + all_
            self.progress("experts", number * count + members[-1] + 1, len(self.layers) * count)
        if right:
            self.report.error.append(wrong / right)

    def _compress(self, path: str, members: range, tokens: Tokens | None, name: str) -> tuple[float, float]:
        """One group; all that it needed is free when this returns."""
        wi, wo = (torch.stack(both) for both in zip(*(self.checkpoint.expert(self.host, path, one)
                                                      for one in members), strict=True))  # fmt: skip
        h_wi, h_wo = self._hessians(path, members, tokens, wi, wo) if tokens and not self.nearest else (None, None)
        found = {"wi": self._round(wi, h_wi, path, members), "wo": self._round(wo, h_wo, path, members)}
        self._save(path, members, found, name)
        wrong, right = 0.0, 0.0
        for index, one in enumerate(members if tokens else ()):
            pair = [GRIDS[self.bits].spread(symbols[index], rows[index]) for symbols, rows in found.values()]
            off, all_ = self._answer(tokens, one, (wi[index], wo[index]), pair)
            wrong, right = wrong + off, right + all_
        return wrong, right

    def _hessians(self, path: str, members: range, tokens: Tokens, wi: Tensor, wo: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (w.new_zeros(len(members), w.shape[2], w.shape[2]) for w in (wi, wo))
        counted = tokens.counts[tokens.token]
        cap = TOKEN_CAP * max(1, int(counted.sum()) // self.layers[path][0])
        for index, one in enumerate(members):
            at = tokens.token[counted & (tokens.expert == one)][:cap]
            if not len(at):
                self.report.starved.append(f"{path}.{one}")
                continue
            x = tokens.x[at]
            inner = self.between(F.linear(x, wi[index]))
            torch.mm(x.t(), x, out=first[index])
            torch.mm(inner.t(), inner, out=second[index])
        if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
            raise InputError(f"{path}: the model's activations are not finite on this calibration; "
                             "its weights are damaged, or overflow in float32")  # fmt: skip
        return first, second

    def _round(self, w: Tensor, hessian: Tensor | None, path: str, members: range) -> tuple[Tensor, Tensor]:
        if not torch.isfinite(w).all():
            raise InputError(f"{path}: an expert among {members[0]} to {members[-1]} has weights that are not finite")
        if hessian is None:
            return nearest(w, GRIDS[self.bits])
        symbols, rows, failed = gptq(w, hessian, GRIDS[self.bits], damping=self.damping)
        self.report.failed += [f"{path}.{members[index]}" for index in failed.nonzero()[:, 0].tolist()]
        return symbols, rows

    def _save(self, path: str, members: range, found: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
        values = {}
        for matrix, (symbols, rows) in found.items():
            self.report.weights += symbols.numel()
            self.report.zeroes += int((GRIDS[self.bits].spread(symbols, rows) == 0).sum())
            for index, one in enumerate(members):
                for key, value in stored(symbols[index], rows[index], self.bits, self.pack).items():
                    values[f"{path}.expert_{one}.{matrix}.{key}"] = value
        self.report.bytes += sum(value.numel() * value.element_size() for value in values.values())
        save_tensors(values, self.draft / name)

    def _answer(self, tokens: Tokens, one: int, plain: tuple[Tensor, Tensor], packed: list[Tensor]
                ) -> tuple[float, float]:  # fmt: skip
        """Add a compressed expert's answers to its tokens; squared error and square of those that are held out."""
        off = all_ = 0.0
        mine = tokens.expert == one
        for held in (False, True):  # apart: the shape of a product may decide how it is rounded
            visits = (mine & ((tokens.token >= tokens.kept_from) == held)).nonzero()[:, 0]
            if not len(visits):
                continue
            at = tokens.token[visits]
            x, weight = tokens.x[at], tokens.weight[visits, None]
            said = weight * self._expert(x, *packed)
            if held:
                meant = weight * self._expert(x, *plain)
                off, all_ = float((said - meant).square().sum()), float(meant.square().sum())
            tokens.out.index_add_(0, at, said)
        return off, all_

    def _expert(self, x: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
        return F.linear(self.between(F.linear(x, wi)), wo)
