"""Similarity: stabilisation as everybody has it, corners followed and one smooth path for the whole picture.

Corners are followed from frame to frame (Lucas-Kanade on a pyramid), a similarity is fitted to them by random samples
(RANSAC), the running sum of its four numbers is smoothed once by a Gaussian window, and every frame is moved onto the
smooth path. What comes into view at the edges was never recorded; each shot is enlarged by just as much as hides it,
up to a fifth, and beyond that the edge is mirrored. Parallax, rolling shutter and wobble stay.

J. Shi, C. Tomasi, Good Features to Track, CVPR 1994; J.-Y. Bouguet, Pyramidal Implementation of the Lucas Kanade
Feature Tracker, 2000.
"""

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.motion.dis import grey_pixels
from frameloom.motion.similarity import matrix, numbers, path_of, shift_of, smooth

# The most that a shot is enlarged to hide its borders.
LARGEST = 1.2
CORNERS = {"maxCorners": 400, "qualityLevel": 0.01, "minDistance": 8, "blockSize": 3}


def track(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """The similarity `(2, 3)` in pixels from one grey uint8 picture to the next; None with fewer than 8 tracks."""
    corners = cv2.goodFeaturesToTrack(first, **CORNERS)
    if corners is None:
        return None
    moved, found, _ = cv2.calcOpticalFlowPyrLK(first, second, corners, None, winSize=(21, 21), maxLevel=3)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(second, first, moved, None, winSize=(21, 21), maxLevel=3)
    good = (found & returned).ravel().astype(bool) & (np.abs(back - corners).max((1, 2)) < 0.5)
    if good.sum() < 8:
        return None
    cv2.setRNGSeed(0)
    fitted, _ = cv2.estimateAffinePartial2D(corners[good], moved[good], method=cv2.RANSAC, ransacReprojThreshold=1.0)
    return fitted


class Similarity:
    """Tracked corners, one smooth path, enlarged until no border shows."""

    reach = 0

    def motion(self, first: Float[Tensor, "3 h w"], second: Float[Tensor, "3 h w"]) -> np.ndarray | None:
        """(x, y, angle, log scale) of the motion between two frames."""
        fitted = track(grey_pixels(first), grey_pixels(second))
        return None if fitted is None else numbers(fitted, *first.shape[-2:])

    def shot(self, motions: Float[np.ndarray, "n 4"], sigma: float | int, height: int, width: int) -> "SimilarityShot":
        """The shot with those motions on a path under a Gaussian window of `sigma` frames."""
        path = path_of(motions)
        return SimilarityShot(smooth(path, sigma) - path, height, width)


class SimilarityShot:
    """Every frame moved by its correction, all enlarged alike."""

    def __init__(self, correction: Float[np.ndarray, "n 4"], height: int, width: int) -> None:
        self.correction, self.size = correction, (width, height)
        self.residuals = [float(shift_of(correction, height, width).mean())]
        self.maps = [matrix(c, height, width) for c in correction]
        self.zoom = next((z for z in np.linspace(1, LARGEST, 41) if self._hidden(z)), LARGEST)

    def transform(self, k: int, zoom: float | None = None) -> Float[np.ndarray, "3 3"]:
        """From recorded pixels of frame k to shown ones."""
        width, height = self.size
        return matrix(np.array([0, 0, 0, np.log(zoom or self.zoom)]), height, width) @ self.maps[k]

    def _hidden(self, zoom: float) -> bool:
        """Whether the corners of all shown frames lie in the recorded ones."""
        width, height = self.size
        corners = np.array([[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]]).T
        seen = np.stack([(np.linalg.inv(self.transform(k, zoom)) @ corners)[:2] for k in range(len(self.maps))])
        limit = np.array([[width - 1], [height - 1]])
        return bool((seen >= -1e-6).all() and (seen <= limit + 1e-6).all())

    def draw(self, k: int, pictures) -> Float[Tensor, "3 h w"]:
        """Frame k on the smooth path."""
        picture = pictures(k)
        moved = cv2.warpAffine(picture.cpu().permute(1, 2, 0).numpy(), self.transform(k)[:2], self.size,
                               flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)  # fmt: skip
        return torch.from_numpy(moved).permute(2, 0, 1).to(picture.device)
