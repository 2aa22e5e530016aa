"""The tensors of a network as sections of a file: quantised symbols, range-coded, and their side numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from frameloom.bitstream.container import Container
from frameloom.bitstream.quantise import Quantised, pack_sides, quantise, unpack_sides
from frameloom.bitstream.rangecoder import pack_symbols, unpack_symbols
from frameloom.errors import InputError


def pack_tensors(name: str, tensors: Sequence[Tensor | Quantised], levels: int) -> dict[str, bytes]:
    """The sections `name`, one stream with one table of frequencies, and `name_sides`."""
    quantised = [one if isinstance(one, Quantised) else quantise(one, levels) for one in tensors]
    symbols = torch.cat([one.symbols.flatten() for one in quantised]).numpy()
    return {name: pack_symbols(symbols, levels), f"{name}_sides": pack_sides(quantised)}


def unpack_tensors(container: Container, name: str, shapes: Sequence[Sequence[int]], levels: int) -> list[Tensor]:
    """The float32 tensors of the given shapes that `pack_tensors` stored, as quantised."""
    counts = [math.prod(shape) for shape in shapes]
    try:
        symbols = unpack_symbols(container.section(name), sum(counts), levels)
        sides = unpack_sides(container.section(f"{name}_sides"), shapes)
    except InputError as error:
        raise InputError(f"section '{name}' is damaged: {error}") from None
    runs = torch.from_numpy(symbols).to(torch.uint8).split(counts)
    return [
        Quantised(run.reshape(tuple(shape)), low, scale, axis).values()
        for run, shape, (axis, low, scale) in zip(runs, shapes, sides, strict=True)
    ]
