"""Min-max quantisation of tensors to symbols of so many levels, the scheme of HNeRV (arXiv 2304.02633, section 3.3).

A tensor becomes symbols q in [0, levels) with x ~ low + scale * q. `low` and `scale` are single numbers, or vary
over all axes but one; the choice with the least mean absolute error wins, among those whose pairs of side
numbers are fewer than 2% of the tensor's own numbers. Side numbers are float16, and the search measures its
error with exactly the float16 values that the file keeps. Single pairs of published networks are float32 and stay so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frameloom.errors import InputError

SIDE_SHARE = 0.02
LEVELS = 256  # the most, one byte
_LARGEST = 32752.0  # half of what float16 holds, so that a range fits too
# The stored axis of a tensor that has one pair of side numbers, in float16 and in float32.
WHOLE, WHOLE_SINGLE = 255, 254


@dataclass(frozen=True)
class Quantised:
    """Symbols in the tensor's own shape; `low` and `scale` broadcast. `axis` is None for one pair."""

    symbols: UInt8[Tensor, "..."]
    low: Float[Tensor, "..."]
    scale: Float[Tensor, "..."]
    axis: int | None

    @property
    def single(self) -> bool:
        """Whether the side numbers are float32."""
        return self.low.dtype == torch.float32

    def values(self) -> Tensor:
        return self.low.float() + self.scale.float() * self.symbols.float()


def quantise(tensor: Tensor, levels: int) -> Quantised:
    """The best min-max quantisation of `tensor` to `levels` (2 to 256; 256 is 8 bits).

    Raises InputError when the tensor is not finite or leaves the range of float16.
    """
    tensor = tensor.detach().float().cpu()
    if not (tensor.abs() <= _LARGEST).all():
        raise InputError("weights beyond 32752 cannot be stored; the fit went wrong, lower the learning rate")
    choices = (_along(tensor, axis, levels) for axis in _axes(tensor))
    return min(choices, key=lambda choice: float((choice.values() - tensor).abs().mean()))


def side_shape(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """The shape of the side numbers of a tensor of `shape`: 1 along `axis`, or a single pair."""
    return tuple(1 if axis is None or k == axis else size for k, size in enumerate(shape))


def _axes(tensor: Tensor) -> Iterator[int | None]:
    yield None
    for axis in range(tensor.ndim):
        if math.prod(side_shape(tensor.shape, axis)) < SIDE_SHARE * tensor.numel():
            yield axis


def _along(tensor: Tensor, axis: int | None, levels: int) -> Quantised:
    top = levels - 1
    reduced = tuple(range(tensor.ndim)) if axis is None else (axis,)
    low = tensor.amin(reduced, keepdim=True)
    scale = ((tensor.amax(reduced, keepdim=True) - low) / top).half()
    low = low.half()
    step = scale.float()
    # A scale of zero is a constant: every symbol is zero there.
    symbols = ((tensor - low.float()) / torch.where(step > 0, step, 1.0)).round().clamp(0, top)
    return Quantised(symbols.to(torch.uint8), low, scale, axis)


def pack_sides(tensors: Sequence[Quantised]) -> bytes:
    """The axes and side numbers of several tensors as bytes."""
    parts = []
    for one in tensors:
        whole = WHOLE_SINGLE if one.single else WHOLE
        parts.append(bytes([whole if one.axis is None else one.axis]))
        kind = "<f4" if one.single else "<f2"
        parts += [side.contiguous().numpy().astype(kind).tobytes() for side in (one.low, one.scale)]
    return b"".join(parts)


def unpack_sides(
    data: bytes, shapes: Sequence[Sequence[int]]
) -> list[tuple[int | None, Float[Tensor, "..."], Float[Tensor, "..."]]]:
    """(axis, low, scale) for tensors of the given shapes; InputError when the bytes do not fit them."""
    sides, start = [], 0
    for shape in shapes:
        axis = int.from_bytes(data[start : start + 1])
        kind = np.dtype("<f4" if axis == WHOLE_SINGLE else "<f2")
        axis = None if axis in (WHOLE, WHOLE_SINGLE) else axis
        if start >= len(data) or (axis is not None and axis >= len(shape)):
            raise InputError("the side numbers of the quantiser are damaged")
        start += 1
        shaped = side_shape(shape, axis)
        size = kind.itemsize * math.prod(shaped)
        pair = []
        for _ in range(2):
            if start + size > len(data):
                raise InputError("the side numbers of the quantiser are cut short")
            values = np.frombuffer(data[start : start + size], kind)
            if not np.isfinite(values).all():
                raise InputError("the side numbers of the quantiser are damaged")
            pair.append(torch.from_numpy(values.astype(kind.newbyteorder("="))).reshape(shaped))
            start += size
        sides.append((axis, *pair))
    if start != len(data):
        raise InputError("the side numbers of the quantiser are damaged")
    return sides
