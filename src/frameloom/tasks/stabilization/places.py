"""Where pixels of one picture lie in another: maps of places `(h, w, 2)`, x first, in pixels."""

import cv2
import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor


def lattice(size: tuple[int, int]) -> Float[np.ndarray, "h w 2"]:
    """Every pixel's own place in a picture of `size` (rows, columns)."""
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size[::-1])), -1)


def apply(transform: np.ndarray, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
    """Places moved by a matrix, 2x3 or larger."""
    return (points @ transform[:2, :2].T + transform[:2, 2]).astype(np.float32)


def array(picture: Float[Tensor, "c h w"]) -> Float[np.ndarray, "h w c"]:
    """A picture as OpenCV takes it, on the CPU."""
    return np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())


def sample(picture: np.ndarray, places: np.ndarray, mode: int = cv2.INTER_CUBIC) -> np.ndarray:
    """The picture `(h, w)` or `(h, w, c)` at those places, mirrored at its edges."""
    return cv2.remap(picture, places, None, mode, borderMode=cv2.BORDER_REFLECT_101)


def inside(places: np.ndarray, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Which places lie in a picture of that size, to a thousandth of a pixel."""
    x, y = places[..., 0], places[..., 1]
    return (x >= -1e-3) & (y >= -1e-3) & (x <= size[1] - 1 + 1e-3) & (y <= size[0] - 1 + 1e-3)


def enlarged(places: np.ndarray, small: tuple[int, int], full: tuple[int, int]) -> np.ndarray:
    """A map of places at the size of the flow as one at the recorded size, both (rows, columns); even parts of it stay
    exact.
    """
    if small == full:
        return places
    factor = np.float32([full[1] / small[1], full[0] / small[0]])
    offset = (places + 0.5) * factor - 0.5 - ((lattice(small) + 0.5) * factor - 0.5)
    at = (lattice(full) + 0.5) / factor - 0.5
    return lattice(full) + cv2.remap(offset, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
