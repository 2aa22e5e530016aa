"""Samples through a model, block by block: all of them through one block before any of them meets the next.

That is how a model is compressed whose layers do not fit together: a block's experts can be replaced when all tokens
have told what they need of them, and later blocks then see what the replacement gives. The residual stream of all
samples is one flat buffer; samples go through the dense part of a block one by one, without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.progress import Progress
from frameloom.scale.calibration import Sample
from frameloom.scale.experts import Host


class Recorder(nn.Module):
    """Stands where experts were: notes what it is asked, and says nothing."""

    def forward(self, hidden: Tensor, selection: Tensor, weights: Tensor) -> Tensor:
        self.asked = hidden, selection, weights
        return torch.zeros_like(hidden)


@dataclass
class Tokens:
    """All tokens of one stack at a layer of experts, and their visits to experts.

    Attributes:
        x: what experts see.
        out: the residual stream that they add to.
        token, expert, weight: of every visit: whose it is, to which expert, and the weight of the answer.
        counts: tokens that calibrate.
        kept_from: tokens from here on are held out.
    """

    x: Float[Tensor, "n d"]
    out: Float[Tensor, "n d"]
    token: Int64[Tensor, "v"]
    expert: Int64[Tensor, "v"]
    weight: Float[Tensor, "v"]
    counts: Bool[Tensor, "n"]
    kept_from: int


class _Stop(Exception):
    """Ends a forward pass whose first block was reached."""


_ENCODER = object()


def walk(
    model: nn.Module, host: Host, samples: list[Sample], held_out: int, experts: dict[str, int],
    layer: Callable[[str, Tokens], None], progress: Progress,
) -> None:  # fmt: skip
    """Take all samples through all blocks.

    Args:
        model: with a `Recorder` in the place of each layer's experts. Its blocks add what experts say to the residual
            stream last, as all hosts do.
        host: its family.
        samples: the last `held_out` of them never count as calibration.
        experts: how many there are, by the path of their layer.
        layer: is called once for each of them; it adds the experts' answers to `out`.
        progress: hears of samples times blocks.

    Raises InputError for tokens that the model does not know, and for samples without a target where one is needed.
    """
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
            inner = [(f"{path}.{key}", one) for key, one in block.named_modules() if isinstance(one, Recorder)]
            asked, begin = [], 0
            for index, part in enumerate(stream.split(lengths)):
                args, kwargs = calls(index)
                answer = block(part[None], *args, **kwargs)
                part.copy_((answer[0] if isinstance(answer, tuple) else answer)[0])
                if inner:
                    asked.append(_visits(host, inner[0][1], experts[inner[0][0]], begin))
                begin += len(part)
                passed += 1
                progress("samples through blocks", passed, depth * len(samples))
            if inner:
                x, token, expert, weight = (torch.cat(rows) for rows in zip(*asked, strict=True))
                del asked
                layer(inner[0][0], Tokens(x, stream, token, expert, weight, counts, kept_from))
        if which == 0 and host.seq2seq:
            encoded = [stack.final_layer_norm(part)[None] for part in stream.split(lengths)]


def _shifted(sample: Sample, config: Any) -> Tensor:
    if sample.target is None:
        raise InputError("a model of two stacks is calibrated on samples with a target each; one has none")
    start = getattr(config, "decoder_start_token_id", None)
    return F.pad(sample.target[:-1], (1, 0), value=(config.pad_token_id or 0) if start is None else start)


def _visits(host: Host, recorder: Recorder, count: int, begin: int) -> tuple[Tensor, ...]:
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
