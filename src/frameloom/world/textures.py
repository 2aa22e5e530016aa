"""Textures: a tile of band-limited noise, and photographs that come with scikit-image, both as mipmaps.

A lookup is given the size of a pixel on the surface and reads the level whose texels have that size, so that
minified textures do not alias.
"""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from jaxtyping import Float, Int32
from torch import Tensor

VOLUME, PHOTO = 64, 512  # texels a side of the finest level
# (function of skimage.data, its file inside the package). Others are downloaded on first use.
PHOTOGRAPHS = (
    ("astronaut", "astronaut.png"),
    ("chelsea", "chelsea.png"),
    ("coffee", "coffee.png"),
    ("rocket", "rocket.jpg"),
    ("hubble_deep_field", "hubble_deep_field.jpg"),
    ("retina", "retina.jpg"),
    ("immunohistochemistry", "ihc.png"),
    ("camera", "camera.png"),
    ("coins", "coins.png"),
    ("moon", "moon.png"),
    ("brick", "brick.png"),
    ("grass", "grass.png"),
    ("gravel", "gravel.png"),
)
PICTURES = tuple(range(10))  # photographs of something
GROUNDS = (10, 11, 12)  # photographs of a material


def _levels(picture: np.ndarray) -> list[np.ndarray]:
    """The picture and its halvings down to one texel, averaged along every axis but the last."""
    levels = [picture]
    while levels[-1].shape[0] > 1:
        level = levels[-1]
        for axis in range(picture.ndim - 1):
            level = (
                level.take(range(0, level.shape[axis], 2), axis) + level.take(range(1, level.shape[axis], 2), axis)
            ) / 2
        levels.append(level)
    return levels


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Pink noise over a 3-torus, mean 0.5, `(64, 64, 64)`; a slice at an oblique angle never repeats."""
    f = np.fft.fftfreq(VOLUME) * VOLUME
    radius = np.sqrt(f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, :] ** 2)
    spectrum = np.where((radius > 1.5) & (radius < 16), 1 / np.maximum(radius, 1) ** 2.3, 0)
    white = np.random.default_rng(0).normal(size=(VOLUME,) * 3)
    noise = np.fft.ifftn(np.fft.fftn(white) * spectrum).real
    return np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1).astype(np.float32)


@lru_cache(maxsize=4)
def _volume(device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([level.ravel() for level in _levels(_noise()[..., None])])).to(device)


@lru_cache(maxsize=1)
def _photographs() -> np.ndarray:
    """Every photograph, cut square and brought to 512 a side, with its mipmap: `(texels, 3)`."""
    folder = Path(skimage.data.__file__).parent
    texels = []
    for name, file in PHOTOGRAPHS:
        if (folder / file).exists():
            picture = getattr(skimage.data, name)()
        else:  # a slimmer scikit-image: noise stands in, so that seeds keep their scenes
            picture = (_noise()[:, :, 0] * 255).astype(np.uint8)
        picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        picture = picture[top : top + side, left : left + side, :3]
        method = cv2.INTER_AREA if side > PHOTO else cv2.INTER_CUBIC
        picture = cv2.resize(picture, (PHOTO, PHOTO), interpolation=method).astype(np.float32) / 255
        texels += [level.reshape(-1, 3) for level in _levels(picture)]
    return np.concatenate(texels)


def gallery() -> Float[np.ndarray, "n 512 512 3"]:
    """Every photograph in [0, 1], cut square and brought to 512 a side."""
    return _photographs().reshape(len(PHOTOGRAPHS), -1, 3)[:, : PHOTO * PHOTO].reshape(-1, PHOTO, PHOTO, 3)


@lru_cache(maxsize=4)
def _atlas(device: torch.device) -> Tensor:
    return torch.from_numpy(_photographs()).to(device)


def _between_levels(size: int, skipped: int, dimensions: int, footprint: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For the two levels about `footprint` (tiles a pixel): texels a side, first texel, weight.

    The `skipped` coarsest levels are not used.
    """
    count = int(np.log2(size)) + 1
    last = count - skipped - 1
    sides = size // 2 ** np.arange(count)
    starts = np.concatenate([[0], np.cumsum(sides**dimensions)[:-1]])
    sides_on, starts_on = (torch.from_numpy(a).to(footprint.device, torch.int32) for a in (sides, starts))
    level = (footprint * size).clamp_(1.0, float(2**last)).log2_()
    low = level.floor().clamp_(0, max(last - 1, 0))
    weight = level - low
    low = low.int()
    return [
        (sides_on[low], starts_on[low], 1 - weight),
        (sides_on[low + 1], starts_on[low + 1], weight),
    ]


def noise(q: tuple[Tensor, Tensor, Tensor], footprint: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Noise in [0, 1] at texture coordinates `q` (in tiles), averaged over `footprint` tiles."""
    volume = _volume(footprint.device)
    total = torch.zeros_like(footprint)
    for side, start, weight in _between_levels(VOLUME, 3, 3, footprint):
        last, scale = side - 1, side.float()
        corners = []
        for axis in q:
            texel = (axis * scale).sub_(0.5)
            floor = texel.floor()
            low = floor.int()
            corners.append((low & last, (low + 1) & last, texel.sub_(floor)))
        (x0, x1, fx), (y0, y1, fy), (z0, z1, fz) = corners
        value = None
        for z, wz in ((z0, 1 - fz), (z1, fz)):
            for y, wy in ((y0, 1 - fy), (y1, fy)):
                row = (z * side + y) * side + start
                line = torch.lerp(volume[row + x0], volume[row + x1], fx).mul_(wy).mul_(wz)
                value = line if value is None else value.add_(line)
        total.add_(value.mul_(weight))
    return total


def photograph(
    number: Int32[Tensor, " n"],
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    footprint: Float[Tensor, " n"],
) -> Float[Tensor, "n 3"]:
    """Colour of photograph `number` at (u, v), one picture a unit, v upwards, mirrored beyond its edges."""
    atlas = _atlas(footprint.device)
    texels = atlas.shape[0] // len(PHOTOGRAPHS)
    total = torch.zeros((len(u), 3), device=u.device)
    u, v = ((1 - (1 - (a - 2 * (a / 2).floor())).abs()) for a in (u, 1 - v))
    for side, start, weight in _between_levels(PHOTO, 0, 2, footprint):
        base, last = number * texels + start, side - 1
        corners = []
        for axis in (u, v):
            texel = (axis * side).sub_(0.5)
            floor = texel.floor()
            low = floor.int()
            corners.append((low.clamp(min=0), torch.minimum(low + 1, last).clamp_(min=0), texel.sub_(floor)))
        (x0, x1, fx), (y0, y1, fy) = corners
        for y, wy in ((y0, 1 - fy), (y1, fy)):
            row = y * side + base
            for x, wx in ((x0, 1 - fx), (x1, fx)):
                total.add_(atlas.index_select(0, row + x).mul_((wx * wy * weight)[:, None]))
    return total


def wave(u: Float[Tensor, " n"], footprint: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """A square wave in [-1, 1] of period 1 with soft edges, softer where a pixel covers more of it."""
    triangle = 1 - 4 * ((u - u.floor()) - 0.5).abs()
    return (triangle / footprint.clamp(min=0.05).mul_(4)).clamp_(-1, 1)
