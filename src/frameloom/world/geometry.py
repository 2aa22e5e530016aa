"""Rigid and affine motion in NumPy float64: what scenes are described with before a tracer sees them.

World axes: x right, y up, z towards the viewer of the default camera. Camera axes (OpenCV): x right, y down,
z forward. Matrices are 4x4 and named target_from_source.
"""

import numpy as np
from jaxtyping import Float

Vectors = Float[np.ndarray, "t 3"]
Rotations = Float[np.ndarray, "t 3 3"]
Poses = Float[np.ndarray, "t 4 4"]
Times = Float[np.ndarray, "t"]


def rotation(axis: tuple[float, float, float], angle: Times) -> Rotations:
    """Rotation by `angle` radians about `axis` (right-handed, any length), one matrix an angle."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)


def pose(linear: np.ndarray, centre: np.ndarray) -> Poses:
    """4x4 matrices from `(t, 3, 3)` or `(3, 3)` linear maps and `(t, 3)` or `(3,)` centres."""
    linear, centre = np.asarray(linear, dtype=float), np.asarray(centre, dtype=float)
    count = max(linear.shape[0] if linear.ndim == 3 else 1, centre.shape[0] if centre.ndim == 2 else 1)
    matrix = np.zeros((count, 4, 4))
    matrix[:, :3, :3], matrix[:, :3, 3], matrix[:, 3, 3] = linear, centre, 1
    return matrix


def look_at(eye: np.ndarray, target: np.ndarray) -> Poses:
    """World-from-camera poses at `eye` that look at `target`, world up on top; `(t, 3)` or `(3,)` each."""
    eye, target = np.broadcast_arrays(np.atleast_2d(eye).astype(float), np.atleast_2d(target).astype(float))
    forward = target - eye
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    return pose(np.stack([right, np.cross(forward, right), forward], -1), eye)


def orbit(world_from_camera: Poses, pivot: np.ndarray, angle: float) -> Poses:
    """The same cameras carried round the vertical axis through `pivot` by `angle` radians."""
    turn = rotation((0.0, 1.0, 0.0), np.array([angle]))[0]
    return pose(turn, pivot - turn @ pivot) @ world_from_camera


def ease(u: np.ndarray) -> np.ndarray:
    """0 to 1 as u goes from 0 to 1, with a short start and stop and constant speed between them."""
    ramp = 0.15
    u = np.clip(u, 0.0, 1.0)
    start, stop = u**2 / (2 * ramp), (1 - ramp) - (1 - u) ** 2 / (2 * ramp)
    return np.where(u < ramp, start, np.where(u > 1 - ramp, stop, u - ramp / 2)) / (1 - ramp)


def project(points: np.ndarray, world_from_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised picture coordinates `(..., 2)` and depths `(...)` of world points; poses broadcast."""
    homogeneous = np.concatenate([points, np.ones_like(points[..., :1])], -1)[..., None]
    camera = (np.linalg.inv(world_from_camera) @ homogeneous)[..., :3, 0]
    return camera[..., :2] / np.maximum(camera[..., 2:], 1e-6), camera[..., 2]
