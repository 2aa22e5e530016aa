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
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from frameloom.cards import card, chosen
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.scale import calibration
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
    host = host_of(description.get("model_type", ""), str(folder))
    checkpoint = Checkpoint(folder)
    network = _skeleton(folder, host)
    report = Report(out)
    with drafted(out) as draft:
        layers = {path: shapes(module) for path, module in experts_of(network).items()}
        for path in layers:
            network.set_submodule(path, _Recorder())
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
            _walk(network, host, shown, held_out, work)
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


class _Recorder(nn.Module):
    """Stands where experts were: notes what it is asked, and says nothing."""

    def forward(self, hidden: Tensor, selection: Tensor, weights: Tensor) -> Tensor:
        self.asked = hidden, selection, weights
        return torch.zeros_like(hidden)


@dataclass
class _Tokens:
    """All tokens of one stack: `x` what experts see, `out` the residual stream that they add to, both `(n, d)`."""

    x: Float[Tensor, "n d"]
    out: Float[Tensor, "n d"]
    token: Tensor
    expert: Tensor
    weight: Tensor
    counts: Bool[Tensor, "n"]  # may enter an H
    kept_from: int  # tokens from here on are held out


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

    def layer(self, path: str, tokens: _Tokens | None) -> None:
        count, number = self.layers[path][0], list(self.layers).index(path)
        wrong, right = 0.0, 0.0
        for turn, begin in enumerate(range(0, count, self.group)):
            members = range(begin, min(begin + self.group, count))
            off, all_ = self._compress(path, members, tokens, f"experts-{number:02d}-{turn:02d}.safetensors")
            wrong, right = wrong + off, right + all_
            self.progress("experts", number * count + members[-1] + 1, len(self.layers) * count)
        if right:
            self.report.error.append(wrong / right)

    def _compress(self, path: str, members: range, tokens: _Tokens | None, name: str) -> tuple[float, float]:
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

    def _hessians(self, path: str, members: range, tokens: _Tokens, wi: Tensor, wo: Tensor) -> tuple[Tensor, Tensor]:
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
        save_file(values, self.draft / name)

    def _answer(self, tokens: _Tokens, one: int, plain: tuple[Tensor, Tensor], packed: list[Tensor]
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


class _Stop(Exception):
    """Ends a forward pass whose first block was reached."""


_ENCODER = object()


@torch.no_grad()
def _walk(model: nn.Module, host: Host, samples: list[Sample], held_out: int, work: _Work) -> None:
    """Take all samples through all blocks, compressing on the way."""
    encoded: list[Tensor] | None = None
    passed, depth = 0, sum(len(getattr(model.get_submodule(name), blocks)) for name, blocks in host.stacks)
    for which, (name, blocks) in enumerate(host.stacks):
        stack = model.get_submodule(name)
        inputs = [sample.ids if which == 0 else _shifted(sample, model.config) for sample in samples]
        marks = [(sample.shown, sample.said)[which] for sample in samples]
        lengths = [len(row) for row in inputs]
        counts = torch.cat([torch.ones(n, dtype=torch.bool) if mark is None else mark
                            for n, mark in zip(lengths, marks, strict=True)])  # fmt: skip
        kept_from = sum(lengths[: len(samples) - held_out])
        counts[kept_from:] = False
        states, calls = _begin(stack, getattr(stack, blocks), inputs, encoded)
        stream = torch.cat(states)
        del states
        for number, block in enumerate(getattr(stack, blocks)):
            path = f"{name}.{blocks}.{number}"
            inner = [(f"{path}.{key}", one) for key, one in block.named_modules() if isinstance(one, _Recorder)]
            asked, begin = [], 0
            for index, part in enumerate(stream.split(lengths)):
                args, kwargs = calls(index)
                answer = block(part[None], *args, **kwargs)
                part.copy_((answer[0] if isinstance(answer, tuple) else answer)[0])
                if inner:
                    asked.append(_visits(host, inner[0][1], work.layers[inner[0][0]][0], begin))
                begin += len(part)
                passed += 1
                work.progress("samples through blocks", passed, depth * len(samples))
            if inner:
                x, token, expert, weight = (torch.cat(rows) for rows in zip(*asked, strict=True))
                del asked
                work.layer(inner[0][0], _Tokens(x, stream, token, expert, weight, counts, kept_from))
        if which == 0 and host.seq2seq:
            encoded = [stack.final_layer_norm(part)[None] for part in stream.split(lengths)]


def _shifted(sample: Sample, config: Any) -> Tensor:
    if sample.target is None:
        raise InputError("a model of two stacks is calibrated on samples with a target each; one has none")
    start = getattr(config, "decoder_start_token_id", None)
    return F.pad(sample.target[:-1], (1, 0), value=(config.pad_token_id or 0) if start is None else start)


def _visits(host: Host, recorder: _Recorder, count: int, begin: int) -> tuple[Tensor, ...]:
    hidden, selection, weights = recorder.asked
    del recorder.asked
    token, expert, weight = host.routes(selection, weights, count)
    return hidden, token + begin, expert, weight


def _begin(stack: nn.Module, blocks: nn.ModuleList, inputs: list[Tensor], encoded: list[Tensor] | None
           ) -> tuple[list[Tensor], Callable[[int], tuple[list, dict]]]:  # fmt: skip
    """What enters the first block for every sample, and with which further arguments blocks are called.

    Masks and positions depend on lengths alone, since there is no padding: they are kept once for every length.
    """
    states: list[Tensor] = []
    known: dict[tuple[int, int], tuple[tuple, dict]] = {}

    def key(index: int) -> tuple[int, int]:
        return len(inputs[index]), encoded[index].shape[1] if encoded else 0

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = len(states)
        states.append((args[0] if args else kwargs["hidden_states"])[0])
        given = encoded[index] if encoded else None
        rest = tuple(_ENCODER if given is not None and value is given else value for value in args[1:])
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        known.setdefault(key(index), (rest, named))
        raise _Stop

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    for index, row in enumerate(inputs):
        extra = {"encoder_hidden_states": encoded[index]} if encoded else {}
        try:
            stack(input_ids=row[None], use_cache=False, **extra)
        except _Stop:
            pass
        except IndexError:
            raise InputError(f"calibration sample {index}: token {int(row.max())} is beyond the model's vocabulary; "
                             "were these tokens made for another model?") from None  # fmt: skip
    handle.remove()
    if hasattr(blocks[0], "layer"):  # Switch, as T5: the first block's table of distances serves all of them
        first = blocks[0].layer[0].SelfAttention
        for block in list(blocks)[1:]:
            block.layer[0].SelfAttention.has_relative_attention_bias = True
            block.layer[0].SelfAttention.relative_attention_bias = first.relative_attention_bias

    def calls(index: int) -> tuple[list, dict]:
        args, kwargs = known[key(index)]
        return [encoded[index] if value is _ENCODER else value for value in args], kwargs

    return states, calls
