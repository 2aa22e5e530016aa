"""Frames of any size for networks whose sides are products of strides, and clips as groups of frames."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frameloom.errors import InputError
from frameloom.motion.cuts import change
from frameloom.video.clip import Clip

log = logging.getLogger("frameloom.compression")


def load_pictures(clip: Clip) -> UInt8[Tensor, "t 3 h w"]:
    """The whole clip in memory, 8 bit, which is said of clips that have more.

    Raises InputError when its frames are not all of one size.
    """
    if clip.info.colour.depth > 8:
        depth = clip.info.colour.depth
        log.warning("%s has %d bits; the fit sees 8", clip.info.name, depth)
    pictures = []
    for number, frame in enumerate(clip):
        pictures.append((frame.rgb * 255).round().to(torch.uint8))
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{one.shape[-1]}x{one.shape[-2]}" for one in (pictures[0], pictures[-1])]
            raise InputError(f"{clip.info.name}: frame {number} is {sizes[1]} and frame 0 is {sizes[0]}; "
                             f"all frames of a clip must have one size")  # fmt: skip
    if not pictures:
        raise InputError(f"{clip.info.name}: no frames")
    return torch.stack(pictures)


def fitted(side: int, product: int, crop: bool) -> int:
    """The multiple of `product` next to `side`: below it for a crop, above it for padding."""
    return side // product * product if crop else -(-side // product) * product


def crop_to(pictures: UInt8[Tensor, "t 3 h w"], height: int, width: int) -> UInt8[Tensor, "t 3 tall wide"]:
    """The middle of every frame."""
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width].contiguous()


def strides_for(height: int, width: int, frames: int, depth: int, size: int) -> tuple[int, ...]:
    """Strides with little padding and a grid of about 2 rows on the short side, as published for 640x1280.

    Embeddings may take a quarter of the size; when no grid is that small, the smallest grid it is.
    """
    short = min(height, width)
    stages = 5 if short >= 128 else 4
    ranked = []
    for strides in itertools.combinations_with_replacement((5, 4, 3, 2), stages):
        product = math.prod(strides)
        tall, wide = fitted(height, product, False), fitted(width, product, False)
        waste = tall * wide / (height * width) - 1
        embeddings = frames * depth * (tall // product) * (wide // product)
        heavy = max(embeddings - size // 4, 0)
        ranked.append((heavy, waste + 0.03 * abs(math.log2(2 * product / short)), strides))
    return min(ranked)[2]


def misfit(height: int, width: int, strides: tuple[int, ...], better: tuple[int, ...]) -> str:
    """What to say of strides that do not divide the frame; `better` are some that do, or nearly."""
    product = math.prod(strides)
    tall, wide = fitted(height, product, True), fitted(width, product, True)
    crop = f"crop to {wide}x{tall} (--fit crop), " if tall and wide else ""
    return (
        f"--strides {listed(strides)}: their product {product} does not divide {width}x{height}; "
        f"{crop}pad (--fit pad) or use strides {listed(better)}"
    )


def listed(strides: Sequence[int]) -> str:
    """As a person types them."""
    return ",".join(map(str, strides))


def grouped(clip: Clip, size: int, split: bool) -> Iterator[tuple[list[Float[Tensor, "3 h w"]], bool]]:
    """Groups of up to `size` frames, and whether a group is known to begin at a cut (only with `split`)."""
    held: list[Tensor] = []
    last, cut, noted = None, False, False
    for number, frame in enumerate(clip):
        picture = frame.rgb
        if picture.shape[-2:] != (clip.info.height, clip.info.width):
            raise InputError(f"{clip.info.name}: frame {number} is {picture.shape[-1]}x{picture.shape[-2]}; all frames "
                             f"of a clip must be {clip.info.width}x{clip.info.height}")  # fmt: skip
        if len(held) == size:
            yield held, cut
            held, cut = [], False
        if last is not None and (held or split) and not noted and change(last, picture).cut:
            if split:
                if held:
                    yield held, cut
                held, cut = [], True
            else:
                noted = True
                log.info("a cut at frame %d lies inside a group; --set split_on_cuts=true ends groups at cuts", number)
        held.append(picture)
        last = picture
    if not held:
        raise InputError(f"{clip.info.name}: no frames")
    yield held, cut
