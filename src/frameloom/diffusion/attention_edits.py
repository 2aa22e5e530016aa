"""Edits of a host's attention, as hooks: windows over frames, more keys, a text for every frame, what was looked at.

They work on the attention modules of diffusers, which all have `to_q`, `to_k`, `to_v`, `to_out` and `heads`. A site
gives `(batch, tokens, channels)`; whether the batch is frames or pixels depends on its kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.context import current
from frameloom.diffusion.denoiser import Site

# Split by heads: e channels each.
Heads = Float[Tensor, "b h n e"]
Keys = Float[Tensor, "b h m e"]


def project(attention: nn.Module, x: Float[Tensor, "b n d"], context: Tensor | None = None) -> tuple[Heads, Keys, Keys]:
    """Queries, keys and values, split by heads, through whatever norms the module has for them."""
    source = x if context is None else context
    layers = ((attention.to_q, x), (attention.to_k, source), (attention.to_v, source))
    q, k, v = (rearrange(layer(part), "b n (h d) -> b h n d", h=attention.heads) for layer, part in layers)
    for name in ("norm_q", "norm_k"):
        if (norm := getattr(attention, name, None)) is not None:
            q, k = (norm(q), k) if name == "norm_q" else (q, norm(k))
    return q, k, v


def finish(attention: nn.Module, mixed: Heads) -> Float[Tensor, "b n d"]:
    """The output projection."""
    out = rearrange(mixed, "b h n d -> b n (h d)")
    for layer in attention.to_out:
        out = layer(out)
    return out / getattr(attention, "rescale_output_factor", 1.0)


def context_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The text that a cross-attention was called with."""
    return kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)


# --- windows over frames (FreeNoise, arXiv 2310.15169) ----------------------------------------------------------------


def windows(frames: int, size: int, stride: int) -> list[tuple[int, int]]:
    """`(start, stop)` of windows of `size` every `stride` frames; a last one ends at the end whatever the stride."""
    if frames <= size:
        return [(0, frames)]
    starts = list(range(0, frames - size + 1, stride))
    if starts[-1] + size < frames:
        starts.append(frames - size)
    return [(start, start + size) for start in starts]


def triangle(size: int) -> Tensor:
    """Weights of the frames of a window: 1 .. n/2, n/2 .. 1, or with a single peak where the size is odd."""
    ramp = torch.arange(1, size + 1, dtype=torch.float32)
    return torch.minimum(ramp, ramp.flip(0))


def fused(frames: int, size: int, stride: int, part: Callable[[int, int], Tensor], dim: int) -> Tensor:
    """`part(start, stop)` of every window, averaged by triangle weights along `dim`."""
    spans = windows(frames, size, stride)
    if len(spans) == 1:
        return part(*spans[0])
    total, count = None, torch.zeros(frames)
    weight = triangle(size)
    for start, stop in spans:
        made = part(start, stop)
        shape = [1] * made.ndim
        shape[dim] = stop - start
        w = weight.to(made).view(shape)
        if total is None:
            full = list(made.shape)
            full[dim] = frames
            total = made.new_zeros(full)
        total.narrow(dim, start, stop - start).add_(made * w)
        count[start:stop] += weight
    shape = [1] * total.ndim
    shape[dim] = frames
    return total / count.to(total).view(shape)


def attend_in_windows(q: Heads, k: Keys, v: Keys, size: int, stride: int) -> Heads:
    """Attention inside every window, averaged by triangle weights: what `fused` gives, at the price of one attention.

    With S = exp(q k^T / sqrt(e)), window w gives S_ij / sum over its j' of S_ij' to key j. The sum over windows is
    taken on these few weights, so that every score is computed once, however many windows it is in. Queries come in
    tiles that see the keys about them alone: time and memory grow with the frames, not with their square.
    """
    frames = q.shape[2]
    spans = windows(frames, size, stride)
    inside = q.new_zeros(len(spans), frames, dtype=torch.float32)
    share = torch.zeros_like(inside)
    for number, (start, stop) in enumerate(spans):
        inside[number, start:stop] = 1
        share[number, start:stop] = triangle(stop - start)
    share = share / share.sum(0)
    made = []
    for start in range(0, frames, 4 * size):
        stop = min(start + 4 * size, frames)
        keys = slice(max(0, start - size + 1), min(frames, stop + size - 1))
        here = inside[:, start:stop].any(1)
        rows, seen = share[here, start:stop].T, inside[here, keys]
        scores = ((q[:, :, start:stop] * q.shape[-1] ** -0.5) @ k[:, :, keys].transpose(-1, -2)).float()
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = scores * ((rows / (scores @ seen.T).clamp(min=1e-30)) @ seen)
        made.append(weights.to(v.dtype) @ v[:, :, keys])
    return torch.cat(made, 2)


@dataclass(frozen=True)
class WindowedAttention:
    """At temporal self-attention: queries, keys and values once for all frames, attention window by window."""

    size: int
    stride: int

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Tensor:
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] <= self.size:
            return forward(*args, **kwargs)
        return finish(site.module, attend_in_windows(*project(site.module, x), self.size, self.stride))


@dataclass(frozen=True)
class WindowedBlock:
    """At temporal transformer blocks: the whole block window by window, its positions starting anew in each.

    `lift` `(window, d)`, where a host adds its positions outside of the blocks: what to add to the frames of a window,
    and to take away behind it, so that they are numbered from its start.
    """

    size: int
    stride: int
    lift: Callable[[int, int], Tensor] | None = None

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Tensor:
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if x.shape[1] <= self.size:
            return forward(x, *rest, **kwargs)

        def part(start: int, stop: int) -> Tensor:
            inside = x[:, start:stop]
            if self.lift is None:
                return forward(inside, *rest, **kwargs)
            lift = self.lift(start, stop).to(inside)
            return forward(inside + lift, *rest, **kwargs) - lift

        return fused(x.shape[1], self.size, self.stride, part, dim=1)


# --- text and keys --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPerFrame:
    """At spatial cross-attention: a text of its own for every frame, in the conditional branch alone.

    `texts(site)` gives `(t, n, d)`, or None to leave the host's text in place.
    """

    texts: Callable[[Site], Tensor | None]

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Tensor:
        ctx = current()
        texts = self.texts(site) if ctx is not None and ctx.branch == "cond" else None
        if texts is None:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs.pop("hidden_states")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("encoder_hidden_states", "attention_mask")}
        times = x.shape[0] // texts.shape[0]
        return forward(x, encoder_hidden_states=texts.to(x).repeat(times, 1, 1), **kwargs)


@dataclass
class SeenWords:
    """At spatial cross-attention: how much every pixel looks at some words; `maps` are `(t, h, w)`, mean over heads."""

    words: list[int]
    maps: list[Tensor] = field(default_factory=list)

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Tensor:
        ctx = current()
        if self.words and (ctx is None or ctx.branch in ("cond", "")):
            x = args[0] if args else kwargs["hidden_states"]
            with torch.no_grad():
                q, k, _ = project(site.module, x, context_of(args, kwargs))
                seen = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)[..., self.words]
            side = int(x.shape[1] ** 0.5)
            if side * side == x.shape[1]:
                self.maps.append(seen.mean((1, 3)).view(len(x), side, side))
        return forward(*args, **kwargs)


@dataclass
class SharedKeys:
    """At spatial self-attention: the masked tokens of all frames as more keys and values for each of them.

    `mask` `(t, h, w)` is brought to the site's size; any part of it counts. `record` keeps every site's keys and mask.
    """

    mask: Tensor | None = None
    extend: bool = True
    record: list[tuple[str, Tensor, Tensor]] | None = None

    def wrap(self, site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Tensor:
        ctx = current()
        x = args[0] if args else kwargs["hidden_states"]
        side = int(x.shape[1] ** 0.5)
        active = self.mask is not None and bool(self.mask.any()) and (ctx is None or ctx.branch in ("cond", ""))
        if not active or side * side != x.shape[1] or len(x) != len(self.mask):
            return forward(*args, **kwargs)
        inside = F.interpolate(self.mask[None].float(), size=(side, side), mode="bilinear")[0].flatten(1) > 0
        q, k, v = project(site.module, x)
        if self.record is not None:
            self.record.append((site.name, k, inside))
        if not self.extend:
            return forward(*args, **kwargs)
        extra = [rearrange(value, "b h n d -> h b n d")[:, inside].expand(len(x), -1, -1, -1) for value in (k, v)]
        k, v = torch.cat([k, extra[0]], 2), torch.cat([v, extra[1]], 2)
        return finish(site.module, F.scaled_dot_product_attention(q, k, v))
