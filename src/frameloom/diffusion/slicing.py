"""The same network in less memory: groups of operators run slice by slice along an axis that none of them mixes.

Spatial layers (per frame) are cut along frames, temporal layers (per pixel) along space, so that intermediates exist
for one slice at a time. What does mix the cut axis is a group normalisation over all frames and pixels: its statistics
are taken from the whole input first and applied slice by slice, which makes every cut exact. Outputs are written into
one tensor made beforehand; concatenating slices would hold them twice.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.hooks import patched

log = logging.getLogger("frameloom")


def spans(size: int, parts: int) -> list[slice]:
    """`size` numbers in at most `parts` runs of equal length, the last one shorter where it does not divide."""
    length = math.ceil(size / max(1, min(parts, size)))
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


@dataclass(frozen=True)
class Statistics:
    """What a group normalisation takes from a whole tensor: mean and 1 / deviation, `(b, groups)`."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Float[Tensor, "b c *rest"], norm: nn.GroupNorm, parts: int = 8) -> "Statistics":
        """Sums over slices in float32, in float64 on a processor: rounding must not show in the result."""
        dtype = torch.float64 if x.device.type == "cpu" else torch.float32
        total = square = 0
        for part in spans(x.shape[-1], parts):
            rows = x[..., part].to(dtype).reshape(len(x), norm.num_groups, -1)
            total, square = total + rows.sum(2), square + rows.square().sum(2)
        count = x[0].numel() // norm.num_groups
        mean = total / count
        return cls(mean, ((square / count - mean**2).clamp(min=0) + norm.eps).rsqrt())

    def apply(self, x: Float[Tensor, "b c *rest"], norm: nn.GroupNorm) -> Float[Tensor, "b c *rest"]:
        """The normalisation of any slice of that tensor."""
        b, c = x.shape[:2]
        each = c // norm.num_groups
        shape = (b, c, *[1] * (x.ndim - 2))
        mean, scale = (value.repeat_interleave(each, 1) for value in (self.mean, self.scale))
        gain, offset = norm.weight, norm.bias
        scale = scale * gain
        return x * scale.view(shape).to(x.dtype) + (offset - mean * scale).view(shape).to(x.dtype)


Forward = Callable[..., Any]


def along_batch(forward: Forward, parts: int, *args: Any, **kwargs: Any) -> Any:
    """A module whose examples (frames, folded into the batch) do not see each other, a few of them at a time.

    Whatever tensor has as many rows as the first is cut with it. Gives what the module gives: a tensor, a tuple of one,
    or an output with a `sample`.
    """
    rows = len(args[0] if args else next(iter(kwargs.values())))

    def cut(value: Any, part: slice) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
        return value[part] if whole else value

    out, shell = None, None
    for part in spans(rows, parts):
        made = forward(
            *(cut(value, part) for value in args), **{key: cut(value, part) for key, value in kwargs.items()}
        )
        tensor = made if isinstance(made, Tensor) else made[0]
        if out is None:
            out, shell = tensor.new_empty(rows, *tensor.shape[1:]), made
        out[part] = tensor
        if not isinstance(shell, Tensor):
            shell = type(made)((out,)) if isinstance(made, tuple) else type(made)(sample=out)
        del made, tensor
    return out if isinstance(shell, Tensor) else shell


def temporal_resnet(
    module: nn.Module, parts: int, official: bool, x: Float[Tensor, "b c t h w"], temb: Tensor | None = None
) -> Float[Tensor, "b c t h w"]:
    """SVD's temporal residual block, cut along the width; the result of its first convolution is kept whole.

    `official` normalises every slice by itself, as the released code does: then the output is another one.
    """

    def chain(norm: nn.GroupNorm, source: Tensor, last: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
        known = None if official else Statistics.of(source, norm, parts)
        for part in spans(source.shape[-1], parts):
            inside = norm(source[..., part]) if official else known.apply(source[..., part], norm)
            out[..., part] = last(module.nonlinearity(inside))
        return out

    channels = module.conv1.out_channels
    middle = x.new_empty(len(x), channels, *x.shape[2:])
    chain(module.norm1, x, module.conv1, middle)
    if module.time_emb_proj is not None:
        middle += module.time_emb_proj(module.nonlinearity(temb))[..., None, None].transpose(1, 2)
    out = torch.empty_like(middle)
    chain(module.norm2, middle, lambda value: module.conv2(module.dropout(value)), out)
    del middle
    return out.add_(x if module.conv_shortcut is None else module.conv_shortcut(x))


def temporal_block(
    forward: Forward,
    parts: int,
    x: Float[Tensor, "bt n d"],
    num_frames: int,
    encoder_hidden_states: Tensor | None = None,
) -> Float[Tensor, "bt n d"]:
    """SVD's temporal transformer block, some pixels at a time. Texts stand one per clip and pixel."""
    out = torch.empty_like(x)
    clips, pixels = len(x) // num_frames, x.shape[1]
    texts = None if encoder_hidden_states is None else encoder_hidden_states.unflatten(0, (clips, pixels))
    for part in spans(pixels, parts):
        text = None if texts is None else texts[:, part].flatten(0, 1)
        out[:, part] = forward(x[:, part], num_frames=num_frames, encoder_hidden_states=text)
    return out


def motion_module(
    module: nn.Module,
    parts: int,
    official: bool,
    hidden_states: Float[Tensor, "bt c h w"],
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    num_frames: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """AnimateDiff's motion module (or UNet3D's temporal transformer): norm, projections and blocks, some columns at a
    time.
    """
    x = hidden_states
    b = len(x) // num_frames
    video = x.unflatten(0, (b, num_frames)).transpose(1, 2)
    known = None if official else Statistics.of(video, module.norm, parts)
    out = torch.empty_like(x)
    places = out.unflatten(0, (b, num_frames))
    for part in spans(x.shape[-1], parts):
        cut = video[..., part]
        inside = module.norm(cut.contiguous()) if official else known.apply(cut, module.norm)
        h, w = inside.shape[-2:]
        rows = module.proj_in(inside.permute(0, 3, 4, 2, 1).reshape(b * h * w, num_frames, -1))
        for block in module.transformer_blocks:
            rows = block(rows)
        rows = module.proj_out(rows).view(b, h, w, num_frames, -1).permute(0, 3, 4, 1, 2)
        places[..., part] = rows + cut.transpose(1, 2)
    if not _returns_output(module):
        return out
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModelOutput

    return TransformerTemporalModelOutput(sample=out) if return_dict else (out,)


def _returns_output(module: nn.Module) -> bool:
    return type(module).__name__ == "TransformerTemporalModel"


def along_tokens(forward: Forward, parts: int, x: Float[Tensor, "b n d"], *args: Any, **kwargs: Any) -> Tensor:
    """A feed-forward network, some tokens at a time."""
    out = torch.empty_like(x)
    for part in spans(x.shape[1], parts):
        out[:, part] = forward(x[:, part], *args, **kwargs)
    return out


# What is cut along frames, by the names of diffusers' classes. A transformer of SVD is cut at its blocks.
PER_FRAME = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D", "BasicTransformerBlock")
KNOWN = ("UNetSpatioTemporalConditionModel", "UNetMotionModel", "UNet3DConditionModel", "UNet2DConditionModel")


@contextmanager
def sliced(host: nn.Module, frames: int = 8, space: int = 8, official: bool = False) -> Iterator[list[str]]:
    """Within it the host runs in `frames` slices of its spatial and `space` slices of its temporal layers.

    Gives the names of what is sliced. Of a host of another class only the feed-forward networks are, with a note.
    """
    names: list[str] = []
    with ExitStack() as stack:
        for name, module, stand_in in _stand_ins(host, frames, space, official):
            stack.enter_context(patched(module, stand_in))
            names.append(name)
        yield names


def _stand_ins(host: nn.Module, frames: int, space: int, official: bool) -> Iterator[tuple[str, nn.Module, Forward]]:
    if type(host).__name__ not in KNOWN:
        log.warning("%s is not known to the slicer: its feed-forward networks are sliced, the rest is not",
                    type(host).__name__)  # fmt: skip
        for name, module in host.named_modules():
            if type(module).__name__ == "FeedForward":
                yield name, module, partial(along_tokens, module.forward, space)
        return
    inside: set[nn.Module] = set()
    for name, module in host.named_modules():
        label = type(module).__name__
        if module in inside:
            continue
        if label in ("AnimateDiffTransformer3D", "TransformerTemporalModel"):
            inside.update(module.modules())
            yield name, module, partial(motion_module, module, space, official)
        elif label == "TemporalResnetBlock":
            yield name, module, partial(temporal_resnet, module, space, official)
        elif label == "TemporalBasicTransformerBlock":
            yield name, module, partial(temporal_block, module.forward, space)
        elif label in PER_FRAME:
            inside.update(module.modules())
            yield name, module, partial(along_batch, module.forward, frames)
    yield from _last(host, frames)


def _last(host: nn.Module, frames: int) -> Iterator[tuple[str, nn.Module, Forward]]:
    """The last normalisation, activation and convolution as one group."""
    norm, act, conv = (getattr(host, name, None) for name in ("conv_norm_out", "conv_act", "conv_out"))
    if norm is None or act is None:
        return
    chain = [norm.forward, act.forward, conv.forward]

    def all_three(x: Tensor) -> Tensor:
        for function in chain:
            x = function(x)
        return x

    yield "conv_norm_out", norm, lambda x: x
    yield "conv_act", act, lambda x: x
    yield "conv_out", conv, partial(along_batch, all_three, frames)
