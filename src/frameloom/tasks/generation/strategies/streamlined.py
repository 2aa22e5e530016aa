"""Streamlined inference: the same video in less memory and fewer computations, without training.

For whom the model fits and its activations do not. Three parts:

- feature slicer and operator grouping: layers run slice by slice along the axis that they do not mix, a group of
  operators at a time, with the same result (`frameloom.diffusion.slicing`);
- step rehash: deep features of neighbouring steps are nearly the same, so on some steps only the outermost blocks of
  the U-Net run, on the deep feature of the last full step:

      h = first_down(conv_in(x_t));  out = conv_out(last_up(stored_deep, skips of h))

Given a budget in bytes, the fewest slices that meet it are found by measuring one evaluation.

Z. Zhan, Y. Wu, Y. Gong, Z. Meng, Z. Kong, C. Yang, G. Yuan, P. Zhao, W. Niu, Y. Wang, "Fast and Memory-Efficient Video
Diffusion Using Streamlined Inference", NeurIPS 2024, arXiv 2411.01171.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.context import current
from frameloom.diffusion.generator import Generator
from frameloom.diffusion.hooks import patched
from frameloom.diffusion.slicing import sliced
from frameloom.errors import InputError
from frameloom.memory import weight_bytes
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request, activations
from frameloom.tasks.generation.strategies.direct import whole
from frameloom.units import in_bytes

log = logging.getLogger("frameloom")

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
FEWEST = 8


class Streamlined:
    """Slices to fit a budget, and steps that reuse deep features.

    Args:
        budget: bytes that weights and activations may take together; None takes `time` and `space` as they are.
        time, space: slices of the spatial and of the temporal layers.
        rehash: the share of steps that run the outermost blocks alone, 0 to 0.75.
        official: normalise every slice by itself, as the released code does; the result is then another one.
    """

    def __init__(
        self, budget: int | None = None, time: int = 8, space: int = 8, rehash: float = 0.0, official: bool = False
    ) -> None:
        self.budget, self.time, self.space, self.rehash, self.official = budget, time, space, rehash, official

    def check(self, model: Generator, request: Request) -> None:
        if not 0 <= self.rehash <= 0.75:
            raise InputError(f"rehash {self.rehash:g}: the share of reused steps is between 0 and 0.75")
        if min(self.time, self.space) < 1:
            raise InputError("streamlined: the number of slices is 1 or more")
        host = host_of(model)
        if self.rehash and not (hasattr(host, "down_blocks") and len(host.down_blocks) > 1):
            raise InputError(
                "step rehash needs a U-Net with two levels or more, and this model is none; leave rehash away"
            )
        if self.budget is not None:
            self.time, self.space = fit(model, request, self.budget)
        if request.frames % self.time:
            log.info("%d frames in %d slices: the last slice is shorter", request.frames, self.time)

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        share = self.rehash
        if share and request.steps < FEWEST:
            log.warning("%d steps are too few to reuse features between them: rehash is off", request.steps)
            share = 0.0
        with sliced(host_of(model), self.time, self.space, self.official), \
             rehashed(host_of(model), plan(request.steps, share)):  # fmt: skip
            pictures = list(whole(model, request, progress))
        yield from pictures


def host_of(model: Generator) -> nn.Module:
    """The network inside a model."""
    host = getattr(model.denoiser, "host", model)
    if not isinstance(host, nn.Module):
        raise InputError(f"streamlined needs a model whose layers can be reached, and {model.name} is none")
    return host


# --- slices --------------------------------------------------------------------------------------------------------


def measure(model: Generator, request: Request, time: int, space: int) -> int:
    """Peak bytes of the activations of one guided evaluation in so many slices."""
    with sliced(host_of(model), time, space):
        return activations(model, request, request.frames)


def fit(model: Generator, request: Request, budget: int) -> tuple[int, int]:
    """The fewest slices with which weights and activations fit. Raises InputError that says what would."""
    weights = weight_bytes(host_of(model))
    least = None
    for count in CHUNKS:
        took = measure(model, request, count, count)
        if weights + took <= budget:
            log.info("%d slices: %.0f MB of weights and %.0f MB of activations", count, weights / 1e6, took / 1e6)
            return count, count
        if least is not None and took >= least:
            break  # what is left are inputs, outputs and skip connections: more slices change nothing
        least = took
    raise InputError(
        f"--memory-budget {in_bytes(budget)}: this needs at least {in_bytes(weights + least)}: weights "
        f"{in_bytes(weights)}, smallest slices {in_bytes(least)}; fewer frames need less"
    )


# --- step rehash ---------------------------------------------------------------------------------------------------


def plan(steps: int, share: float, first: int = 3) -> frozenset[int]:
    """The steps that run in full: the `first` ones, then so that a share of all is reused, evenly, with the last."""
    reused = min(round(steps * share), max(0, steps - first))
    rest = steps - first
    chosen = {first + int((k + 1) * rest / reused) - 1 for k in range(reused)}
    return frozenset(range(steps)) - chosen


def similar(features: Sequence[Tensor], limit: float, first: int = 3) -> frozenset[int]:
    """The steps to run in full by calibration: the `first`, and those whose deep feature has 1 - cosine > `limit`."""
    full = set(range(first))
    for i in range(first, len(features)):
        cosine = torch.nn.functional.cosine_similarity(features[i].flatten(), features[i - 1].flatten(), dim=0)
        if float(1 - cosine) > limit:
            full.add(i)
    return frozenset(full)


@contextmanager
def rehashed(host: nn.Module, full: frozenset[int]) -> Iterator[None]:
    """Within it, on steps that are not in `full`, all but the outermost blocks of a U-Net are left out."""
    downs, ups = list(getattr(host, "down_blocks", ())), list(getattr(host, "up_blocks", ()))
    if len(downs) < 2:
        yield
        return
    inner = [*downs[1:], *([host.mid_block] if host.mid_block is not None else []), *ups[:-1]]
    marker = object()

    def memory() -> dict[str, Any]:
        return current().remember(marker, "deep")

    def reused() -> bool:
        ctx = current()
        return ctx is not None and ctx.i not in full and "deep" in memory()

    def skipped(module: nn.Module, forward, *args: Any, **kwargs: Any) -> Any:
        if not reused():
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if module in downs:  # nobody reads these, but the host counts them
            count = len(module.resnets) + (1 if module.downsamplers is not None else 0)
            return x, (x,) * count
        return x

    def last(forward, *args: Any, **kwargs: Any) -> Any:
        ctx = current()
        if ctx is None:
            return forward(*args, **kwargs)
        named = "hidden_states" in kwargs
        if reused():
            ctx.report.cache_hits += 1
            deep = memory()["deep"]
            if named:
                kwargs["hidden_states"] = deep
            else:
                args = (deep, *args[1:])
        else:
            memory()["deep"] = kwargs["hidden_states"] if named else args[0]
        return forward(*args, **kwargs)

    with ExitStack() as stack:
        for module in inner:
            before = module.forward
            stack.enter_context(patched(module, lambda *a, _m=module, _f=before, **k: skipped(_m, _f, *a, **k)))
        before = ups[-1].forward
        stack.enter_context(patched(ups[-1], lambda *a, **k: last(before, *a, **k)))
        yield
