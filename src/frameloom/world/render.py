"""From placed parts to pictures and their labels, a few rows (frames) at a time.

Everything dense follows from one relation: the point seen at depth z through (x, y) has coordinates
`local_from_camera(t) @ (x z, y z, z, 1)` on its part, and the part's own motion and the other frame's camera
are one more matrix. Flow is that matrix and a division; occlusion is a ray cast back at the carried point.

The shade is Lambert's, softened, and is fixed to the surface (the light is seen from the part as it lies at
mid clip): with light that stays in the world or glints at the camera, a turning surface would change its
colour and no flow could warp one frame onto the next exactly.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from frameloom.world import textures
from frameloom.world.scene import BOX, CHECKS, NOISE, PHOTOGRAPH, PLANE, SKY, STRIPES, Scene
from frameloom.world.tracer import NEAR, Vector, bounds, carry, flat_index, trace

OUTPUTS = ("rgb", "depth", "flow", "backward_flow", "occlusion", "backward_occlusion", "masks")
AMBIENT = 0.42
# A carried point is visible when nothing is hit this much (relative) before it.
SLACK = 5e-4
# Columns of the table that shading reads, one row a part and frame.
_LOCAL, _TEXTURE = slice(0, 12), slice(12, 24)
_SCALE, _LIGHT, _LIT, _LOW, _HIGH = slice(24, 27), slice(27, 30), 30, slice(31, 34), slice(34, 37)
_KIND, _SHAPE, _HALF, _FREQUENCY, _PHOTO = 37, 38, 39, 40, 41


@dataclass(frozen=True)
class Parts:
    """The parts of b scenes as arrays, padded to k a scene (shape -1)."""

    shapes: np.ndarray  # (b, k)
    half: np.ndarray  # (b, k)
    bodies: np.ndarray  # (b, k)
    columns: np.ndarray  # (b, k, 30): the columns of the table that do not depend on the frame


def gather(scenes: list[Scene]) -> Parts:
    """Arrays of what does not change over a clip."""
    count = max(len(scene.parts) for scene in scenes)
    shapes = np.full((len(scenes), count), -1)
    half, bodies = np.zeros((len(scenes), count)), np.zeros((len(scenes), count), dtype=int)
    columns = np.zeros((len(scenes), count, 30))
    for b, scene in enumerate(scenes):
        for k, part in enumerate(scene.parts):
            surface = part.surface
            middle = part.place(np.array([scene.duration / 2]))[0, :3, :3]
            scale = np.linalg.norm(middle, axis=0)
            texture = np.empty((3, 4))
            texture[:, :3] = surface.frequency * surface.turn * scale
            texture[:, 3] = surface.offset
            shapes[b, k], half[b, k], bodies[b, k] = part.shape, part.half, part.body
            columns[b, k] = np.concatenate([
                texture.ravel(), 1 / scale, (middle / scale).T @ part.light, [surface.light],
                surface.colours[0], surface.colours[1],
                [surface.texture, part.shape, part.half, surface.frequency, surface.photograph],
            ])  # fmt: skip
    return Parts(shapes, half, bodies, columns)


def place(scenes: list[Scene], cameras: np.ndarray, times: np.ndarray, count: int) -> np.ndarray:
    """Local-from-camera matrices `(b, v, t, k, 4, 4)`; `cameras` are world-from-camera `(b, v, t, 4, 4)`."""
    placed = np.zeros((len(scenes), len(times), count, 4, 4))
    placed[...] = np.eye(4)
    for b, scene in enumerate(scenes):
        for k, part in enumerate(scene.parts):
            placed[b, :, k] = part.place(times)
    return np.linalg.inv(placed)[:, None] @ cameras[:, :, :, None]


class Renderer:
    """Renders rows: one row is one frame of one view of one scene.

    Args:
        local_from_camera: `(r, k, 4, 4)`.
        parts: those of each row, `(r, ...)`.
        focal: `(r,)` focal lengths in units of the shorter side.
    """

    def __init__(
        self, local_from_camera: np.ndarray, parts: Parts, focal: np.ndarray, height: int, width: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.matrices, self.parts, self.device = local_from_camera, parts, device
        self.height, self.width, self.focal = height, width, focal * min(height, width)
        table = np.concatenate([local_from_camera[:, :, :3].reshape(*parts.shapes.shape, 12), parts.columns], -1)
        table[..., _FREQUENCY] /= self.focal[:, None]
        self.table = self._tensor(table)
        self.boxes = bounds(np.linalg.inv(local_from_camera), parts.shapes, parts.half)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, torch.float32)

    def _grid(self, rows: slice, supersample: int) -> tuple[Tensor, Tensor]:
        """Normalised coordinates of pixel centres, `(r, 1, w)` and `(r, h, 1)`."""
        focal = self.focal[rows, None]
        x = ((np.arange(self.width * supersample) + 0.5) / supersample - self.width / 2) / focal
        y = ((np.arange(self.height * supersample) + 0.5) / supersample - self.height / 2) / focal
        return self._tensor(x)[:, None, :], self._tensor(y)[:, :, None]

    def _crops(
        self, rows: slice | np.ndarray, supersample: int, reach: float = 0.0
    ) -> list[tuple[slice, slice] | None]:
        """Where in the picture each part can be seen in any of these rows, and `reach` pixels about it."""
        scale = self.focal[rows, None, None] * supersample
        size = np.array([self.width, self.height] * 2) * supersample
        edges = self.boxes[rows] * scale + size / 2
        edges[self.parts.shapes[rows] < 0] = (np.inf, np.inf, -np.inf, -np.inf)
        low = np.clip(np.floor(edges[..., :2].min(0) - 1 - reach), 0, size[:2]).astype(int)
        high = np.clip(np.ceil(edges[..., 2:].max(0) + 1 + reach), 0, size[:2]).astype(int)
        return [
            (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None
            for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True)
        ]

    def _trace(self, matrices: Tensor, rows: slice, x: Tensor, y: Tensor, crops: list) -> tuple[Tensor, Tensor]:
        half = self._tensor(self.parts.half[rows])
        return trace(matrices, half, self.parts.shapes[rows], x, y, crops)

    def rows(
        self, rows: slice, outputs: set[str], supersample: int, forward: np.ndarray, backward: np.ndarray
    ) -> dict[str, Tensor]:
        """The outputs of some rows; `forward[r]` is the row of the next frame, `backward[r]` of the last."""
        made: dict[str, Tensor] = {}
        table = self.table[rows]
        matrices = table[..., _LOCAL].unflatten(-1, (3, 4))
        labels = outputs - {"rgb"}
        if labels or supersample == 1:
            x, y = self._grid(rows, 1)
            depth, part = self._trace(matrices, rows, x, y, self._crops(rows, 1))
        if "rgb" in outputs:
            if supersample == 1:
                made["rgb"] = self._colour(table, x, y, depth, part, 1)
            else:
                fine_x, fine_y = self._grid(rows, supersample)
                hit = self._trace(matrices, rows, fine_x, fine_y, self._crops(rows, supersample))
                fine = self._colour(table, fine_x, fine_y, *hit, supersample)
                made["rgb"] = torch.nn.functional.avg_pool2d(fine, supersample)
        if "depth" in outputs:
            made["depth"] = depth[:, None]
        if "masks" in outputs:
            made["masks"] = self._tensor(self.parts.bodies[rows]).flatten()[flat_index(part, table.shape[1])]
            made["masks"] = made["masks"].reshape(depth.shape)
        for prefix, other in (("", forward), ("backward_", backward)):
            flow, occlusion = f"{prefix}flow", f"{prefix}occlusion"
            if flow in labels or occlusion in labels:
                target = other[rows]
                moved = self._carried(rows, target, x, y, depth, part)
                focal = self._tensor(self.focal[rows])[:, None, None]
                if flow in labels:
                    dx, dy = (moved[0] - x) * focal, (moved[1] - y) * focal
                    made[flow] = torch.stack([dx, dy], 1)
                if occlusion in labels:
                    made[occlusion] = self._hidden(rows, target, x, y, moved, focal)[:, None]
        return made

    def _carried(self, rows: slice, target: np.ndarray, x: Tensor, y: Tensor, depth: Tensor, part: Tensor) -> Vector:
        """Where the points seen in `rows` are seen in the rows `target`: coordinates and depth there."""
        carried = np.linalg.inv(self.matrices[target]) @ self.matrices[rows]
        matrix = self._tensor(carried[:, :, :3].reshape(-1, 12).T)
        index = flat_index(part, carried.shape[1])
        px, py, pz = carry(
            matrix[:, index].unflatten(0, (3, 4)),
            x.expand(depth.shape).reshape(-1), y.expand(depth.shape).reshape(-1), depth.flatten(),
        )  # fmt: skip
        ahead = pz.clamp(min=NEAR)
        return tuple(a.reshape(depth.shape) for a in (px / ahead, py / ahead, pz))  # type: ignore[return-value]

    def _hidden(self, rows: slice, target: np.ndarray, x: Tensor, y: Tensor, moved: Vector, focal: Tensor) -> Tensor:
        """1 where a carried point leaves the picture, is behind the camera, or has something before it."""
        to_x, to_y, depth = moved
        matrices = self._tensor(self.matrices[target][:, :, :3])
        # A pixel can only meet a part that is within its own displacement of it.
        reach = float(torch.maximum((to_x - x).abs(), (to_y - y).abs()).mul_(focal).amax())
        nearest, _ = self._trace(matrices, rows, to_x, to_y, self._crops(target, 1, reach))
        outside = (to_x.abs() * focal > self.width / 2) | (to_y.abs() * focal > self.height / 2) | (depth < NEAR)
        return (outside | (nearest < depth * (1 - SLACK))).float()

    def _colour(self, table: Tensor, x: Tensor, y: Tensor, depth: Tensor, part: Tensor, supersample: int) -> Tensor:
        columns = table.flatten(0, 1).T.contiguous()
        seen = _Seen(
            columns, flat_index(part, table.shape[1]),
            x.expand(depth.shape).reshape(-1), y.expand(depth.shape).reshape(-1), depth.flatten(),
        )  # fmt: skip
        kind = seen.pick(_KIND)
        low, high = seen.pick(_LOW), seen.pick(_HIGH)
        colour = low.clone()
        for number, function in _TEXTURES.items():
            chosen = (kind == number).nonzero()[:, 0]
            if len(chosen):
                blend = function(seen.only(chosen), 1 / supersample)
                begin = low[:, chosen]
                colour[:, chosen] = begin + (high[:, chosen] - begin) * blend
        chosen = (seen.pick(_LIT) > 0).nonzero()[:, 0]
        if len(chosen):
            colour[:, chosen] *= seen.only(chosen).shade()
        return colour.reshape(3, *depth.shape).transpose(0, 1).clamp_(0, 1)


class _Seen:
    """Points that are seen: their row in the table, their picture coordinates and depths; all flat."""

    def __init__(self, columns: Tensor, index: Tensor, x: Tensor, y: Tensor, z: Tensor) -> None:
        self.columns, self.index, self.x, self.y, self.z = columns, index, x, y, z

    def only(self, chosen: Tensor) -> "_Seen":
        return _Seen(self.columns, *(a.index_select(0, chosen) for a in (self.index, self.x, self.y, self.z)))

    def pick(self, which: slice | int) -> Tensor:
        return self.columns[which].index_select(-1, self.index)

    @cached_property
    def matrix(self) -> Tensor:
        return self.pick(_LOCAL).unflatten(0, (3, 4))

    @cached_property
    def local(self) -> Vector:
        return carry(self.matrix, self.x, self.y, self.z)

    @cached_property
    def normal(self) -> Vector:
        """Outwards on the unit primitive, of any length."""
        local, shape, half = self.local, self.pick(_SHAPE), self.pick(_HALF)
        size = [local[0].abs(), local[1].abs(), torch.where(shape == PLANE, 2.0, local[2].abs())]
        largest = torch.maximum(torch.maximum(size[0], size[1]), size[2])
        # A plane's z is 0 but for rounding; its normal is +z.
        signed = (local[0], local[1], torch.where(shape == PLANE, 1.0, local[2]))
        rounded = (local[0], local[1] - torch.minimum(torch.maximum(local[1], -half), half), local[2])
        flat = (shape == BOX) | (shape == PLANE)
        return tuple(
            torch.where(flat, (s == largest) * (1 - 2 * (c < 0).float()), r)
            for s, c, r in zip(size, signed, rounded, strict=True)
        )  # type: ignore[return-value]

    def shade(self) -> Tensor:
        normal = [n * s for n, s in zip(self.normal, self.pick(_SCALE), strict=True)]
        length = (normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]).sqrt_()
        light = self.pick(_LIGHT)
        wrap = (normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]).div_(length).mul_(0.5).add_(0.5)
        return 1 - self.pick(_LIT) * ((1 - AMBIENT) * (1 - wrap * wrap))

    def footprint(self) -> Tensor:
        """A pixel's size on the texture; it grows with the slant at which the surface is seen."""
        x, y, normal, matrix = self.x, self.y, self.normal, self.matrix
        across = [matrix[0, j] * normal[0] + matrix[1, j] * normal[1] + matrix[2, j] * normal[2] for j in range(3)]
        facing = (across[0] * x).add_(across[1] * y).add_(across[2]).abs_().clamp_(min=1e-6)
        ray = (x * x).add_(y * y).add_(1)
        slant = (across[0] * across[0] + across[1] * across[1] + across[2] * across[2]).mul_(ray).sqrt_().div_(facing)
        return slant.clamp_(max=16).mul_(self.z).mul_(self.pick(_FREQUENCY))

    def coordinates(self) -> Vector:
        """Texture coordinates."""
        x, y, z = self.local
        return tuple(
            (row[0] * x).add_(row[1] * y).add_(row[2] * z).add_(row[3])
            for row in self.pick(_TEXTURE).unflatten(0, (3, 4))
        )  # type: ignore[return-value]


def _noise(seen: _Seen, pixel: float) -> Tensor:
    return textures.noise(seen.coordinates(), seen.footprint() * pixel)


def _stripes(seen: _Seen, pixel: float) -> Tensor:
    return textures.wave(seen.coordinates()[0], seen.footprint() * pixel).mul_(0.5).add_(0.5)


def _checks(seen: _Seen, pixel: float) -> Tensor:
    footprint = seen.footprint() * pixel
    first, *others = (textures.wave(axis, footprint) for axis in seen.coordinates())
    for wave in others:
        first.mul_(wave)
    return first.mul_(0.5).add_(0.5)


def _sky(seen: _Seen, pixel: float) -> Tensor:
    """From horizon (0) to zenith (1) with soft clouds."""
    x, y, z = seen.local
    clouds = textures.noise((x * 0.9, y * 2.0, z * 0.9), seen.z * seen.pick(_FREQUENCY) * pixel)
    return (y.clamp(0, 1) * 1.6).add_((0.5 - clouds) * 0.5).clamp_(0, 1)


def _photograph(seen: _Seen, pixel: float) -> Tensor:
    a, b, c = seen.coordinates()
    u, v = torch.where(seen.normal[0] != 0, c, a), torch.where(seen.normal[1] != 0, c, b)
    return textures.photograph(seen.pick(_PHOTO).int(), u, v, seen.footprint() * pixel).T


_TEXTURES = {NOISE: _noise, STRIPES: _stripes, CHECKS: _checks, PHOTOGRAPH: _photograph, SKY: _sky}
