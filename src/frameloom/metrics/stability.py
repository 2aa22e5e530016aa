"""How steady a video is, and what steadying it cost: stability, jitter, cropping, distortion.

S. Liu, L. Yuan, P. Tan, J. Sun, Bundled Camera Paths for Video Stabilization, ACM Transactions on Graphics 32, 2013.
All but jitter are in [0, 1], 1 is best; they are measured on videos, by whatever follows motion there.
"""

import numpy as np
from jaxtyping import Float


def level(path: Float[np.ndarray, "t k"], drift: bool = False) -> Float[np.ndarray, "t k"]:
    """A path less the straight line nearest to it; with `drift` less its mean alone."""
    at = np.stack([np.ones(len(path)), np.arange(len(path))], 1)[:, : 1 if drift else 2]
    return path - at @ np.linalg.lstsq(at, path, rcond=None)[0]


def stability_score(path: Float[np.ndarray, "t k"], drift: bool = False) -> float:
    """The share of slow motion in a camera's path; the lowest over its k components.

    Of each component's power spectrum without its mean: the sum of the second to the sixth frequency (the first being
    the mean) over the sum of all. `path` is the running sum of the motion between frames. A component that does not
    move at all, or evenly, has 1.

    The straight line nearest to a component is taken away first, as before any periodogram: a ramp leaks into all
    frequencies, and an even pan alone has 0.89 then, whatever shakes on top of it. With `drift` it stays, as in most
    published numbers.
    """
    power = np.abs(np.fft.rfft(level(path, drift), axis=0))[1:] ** 2
    total = power.sum(0)
    share = np.where(total > 1e-12, power[:5].sum(0) / np.maximum(total, 1e-12), 1.0)
    return float(share.min())


def jitter(path: Float[np.ndarray, "t k"]) -> float:
    """The root mean square of the path's acceleration over all k components, in the path's units a frame squared.

    0 is best: a camera that stands or moves evenly, however fast.
    """
    return float(np.sqrt(np.square(np.diff(path, 2, axis=0)).sum(1).mean()))


def cropping_ratio(transforms: Float[np.ndarray, "t 3 3"]) -> float:
    """What is left of the field of view: the mean of 1 / scale of the maps from recorded to shown frames, at most 1.

    `scale` is the root of the determinant of the linear part.
    """
    scale = np.sqrt(np.abs(np.linalg.det(transforms[:, :2, :2])))
    return float(np.minimum(1, 1 / scale).mean())


def distortion(transforms: Float[np.ndarray, "t 3 3"]) -> float:
    """The worst frame's ratio of the two singular values of the linear part; 1 where all frames keep their shape."""
    values = np.linalg.svd(transforms[:, :2, :2], compute_uv=False)
    return float((values[:, 1] / values[:, 0]).min())
