"""Closed-form ray intersections with unit primitives, many frames at once, keeping the nearest hit.

A ray of a camera is `depth * (x, y, 1)` with normalised picture coordinates x and y, so the ray parameter
*is* the depth along the optical axis. An affine map takes it into a part's own frame, where the part is a
unit primitive and the parameter stays the same. Only additions, products, quotients and square roots are
used: they are correctly rounded everywhere, so a pixel has the same bits whatever is traced beside it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from frameloom.world.scene import BOX, CAPSULE, PLANE, SPHERE

NEAR, FAR = 1e-2, 1e6
Vector = tuple[Tensor, Tensor, Tensor]


def _dot(a: Vector, b: Vector) -> Tensor:
    return (a[0] * b[0]).add_(a[1] * b[1]).add_(a[2] * b[2])


def _sphere(o: Vector, d: Vector, half: Tensor) -> Tensor:
    a, b, c = _dot(d, d), _dot(o, d), _dot(o, o) - 1
    # Seen from inside (c < 0, a dome) the far root is the surface.
    side = torch.where(c < 0, 1.0, -1.0)
    return (b * b).sub_(a * c).sqrt_().mul_(side).sub_(b).div_(a)


def _box(o: Vector, d: Vector, half: Tensor) -> Tensor:
    near = far = None
    for origin, direction in zip(o, d, strict=True):
        inverse = (direction + 1e-12).reciprocal_()  # never 0 / 0 for rays along a face
        middle, reach = inverse * -origin, inverse.abs()
        enter, leave = middle - reach, middle.add_(reach)
        near = enter if near is None else torch.maximum(near, enter)
        far = leave if far is None else torch.minimum(far, leave)
    return torch.where(near <= far, near, torch.inf)


def _plane(o: Vector, d: Vector, half: Tensor) -> Tensor:
    s = -o[2] / d[2]
    inside = (s * d[0]).add_(o[0]).abs_() <= 1
    inside &= (s * d[1]).add_(o[1]).abs_() <= 1
    return torch.where(inside, s, torch.inf)


def _capsule(o: Vector, d: Vector, half: Tensor) -> Tensor:
    a = (d[0] * d[0]).add_(d[2] * d[2])
    b = (o[0] * d[0]).add_(o[2] * d[2])
    c = o[0] * o[0] + o[2] * o[2] - 1
    side = (b * b).sub_(a * c).sqrt_().neg_().sub_(b).div_(a)
    y = (side * d[1]).add_(o[1])
    # Past an end of the side the hit, if any, is on that end's cap.
    end = torch.where(y > 0, half, -half)
    oy = o[1] - end
    cap_a = a.addcmul_(d[1], d[1])
    cap_b = (oy * d[1]).add_(b)
    cap_c = (oy * oy).add_(c)
    cap = (cap_b * cap_b).sub_(cap_a * cap_c).sqrt_().neg_().sub_(cap_b).div_(cap_a)
    return torch.where(y.abs() <= half, side, cap)


_INTERSECT = {SPHERE: _sphere, BOX: _box, CAPSULE: _capsule, PLANE: _plane}


def trace(
    local_from_camera: Float[Tensor, "r k 3 4"],
    half: Float[Tensor, "r k"],
    shapes: np.ndarray,
    x: Float[Tensor, "#r #h w"],
    y: Float[Tensor, "#r h #w"],
    crops: Sequence[tuple[slice, slice] | None],
) -> tuple[Float[Tensor, "r h w"], UInt8[Tensor, "r h w"]]:
    """Depth of the nearest hit and the part that is hit.

    Args:
        local_from_camera: for each row (a frame of a scene) and part.
        half: half length of capsules.
        shapes: `(r, k)` shape of each part, -1 where a row has none.
        x, y: normalised picture coordinates: a grid (`(1, 1, w)` and `(1, h, 1)`) or a map each.
        crops: for each part the rows and columns of the picture outside which it is never seen; None:
        nowhere.
    """
    rows, count = half.shape
    height, width = y.shape[1], x.shape[2]
    depth = torch.full((rows, height, width), FAR, device=half.device)
    part = torch.zeros((rows, height, width), dtype=torch.uint8, device=half.device)
    grid = x.shape[1] == 1 and y.shape[2] == 1
    for k in range(count):
        crop = crops[k]
        if crop is None:
            continue
        ys, xs = crop
        for shape in np.unique(shapes[:, k]):
            if shape < 0:
                continue
            which = np.flatnonzero(shapes[:, k] == shape)
            whole = len(which) == rows
            index = slice(None) if whole else torch.from_numpy(which).to(half.device)
            matrix = local_from_camera[index, k, :, :, None, None]
            cx, cy = (x[:, :, xs], y[:, ys]) if grid else (x[:, ys, xs], y[:, ys, xs])
            if not whole and cx.shape[0] > 1:
                cx, cy = cx[index], cy[index]
            direction = tuple((matrix[:, i, 0] * cx + matrix[:, i, 2]) + matrix[:, i, 1] * cy for i in range(3))
            origin = tuple(matrix[:, i, 3] for i in range(3))
            s = _INTERSECT[int(shape)](origin, direction, half[index, k, None, None])
            held = depth[index, ys, xs]
            # A miss is NaN or infinite: both fail a comparison.
            closer = (s > NEAR).logical_and_(s < held)
            if whole:
                held.copy_(torch.where(closer, s, held))
                part[:, ys, xs].masked_fill_(closer, k)
            else:
                depth[index, ys, xs] = torch.where(closer, s, held)
                part[index, ys, xs] = part[index, ys, xs].masked_fill_(closer, k)
    return depth, part


def carry(
    matrix: Float[Tensor, "3 4 n"], x: Float[Tensor, " n"], y: Float[Tensor, " n"], depth: Float[Tensor, " n"]
) -> Vector:
    """Points `depth * (x, y, 1)` under one affine map each."""
    px, py = x * depth, y * depth
    return tuple((row[0] * px).add_(row[1] * py).add_(row[2] * depth).add_(row[3]) for row in matrix)  # type: ignore[return-value]


def flat_index(part: UInt8[Tensor, "r h w"], count: int) -> Int32[Tensor, " n"]:
    """Index of each pixel's part in a table of rows times parts."""
    rows = torch.arange(part.shape[0], device=part.device, dtype=torch.int32)[:, None, None] * count
    return (part.int() + rows).flatten()


def bounds(camera_from_local: np.ndarray, shapes: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Exact boxes `(..., 4)` (x0, y0, x1, y1) of parts in normalised picture coordinates.

    A sphere's picture is a conic whose extent is read off the dual quadric; a capsule's is that of its two
    end spheres; a box's and a plane's that of their corners. A part that reaches behind the camera is
    unbounded.
    """
    box = np.empty((*shapes.shape, 4))
    box[..., :2], box[..., 2:] = np.inf, -np.inf
    linear, centre = camera_from_local[..., :3, :3], camera_from_local[..., :3, 3]
    for end in (-1.0, 1.0):
        tip = centre + end * half[..., None] * linear[..., 1]
        dual = linear @ np.swapaxes(linear, -1, -2) - tip[..., :, None] * tip[..., None, :]
        round_ = (shapes == SPHERE) | (shapes == CAPSULE)
        ahead = (dual[..., 2, 2] < 0) & (tip[..., 2] > 0)
        scale = np.where(ahead, dual[..., 2, 2], -1.0)
        for axis in (0, 1):
            middle = dual[..., axis, 2]
            root = np.sqrt(np.maximum(middle**2 - dual[..., axis, axis] * dual[..., 2, 2], 0))
            low, high = (middle + root) / scale, (middle - root) / scale
            box[..., axis] = np.where(round_, np.where(ahead, np.minimum(box[..., axis], low), -np.inf), box[..., axis])
            box[..., axis + 2] = np.where(
                round_, np.where(ahead, np.maximum(box[..., axis + 2], high), np.inf), box[..., axis + 2]
            )
    for corner in np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=float):
        flat = (shapes == PLANE)[..., None] & np.array([False, False, True])
        point = (linear @ np.where(flat, 0.0, corner)[..., None])[..., 0] + centre
        cornered = ((shapes == BOX) | (shapes == PLANE))[..., None]
        ahead = point[..., 2:] > NEAR
        seen = point[..., :2] / np.where(ahead, point[..., 2:], 1.0)
        low, high = np.where(ahead, seen, -np.inf), np.where(ahead, seen, np.inf)
        box[..., :2] = np.where(cornered, np.minimum(box[..., :2], low), box[..., :2])
        box[..., 2:] = np.where(cornered, np.maximum(box[..., 2:], high), box[..., 2:])
    return box
