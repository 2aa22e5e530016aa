"""Is there a cut between two pictures, or no change at all?"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float
from torch import Tensor

from frameloom.motion.dis import dis_flow, pixels, remap

# A cut changes what is in the picture AND leaves nothing to track. Each detector alone fails: a flash changes
# the histogram and tracks well; a fast pan tracks badly and keeps its histogram.
HISTOGRAM_THRESHOLD = 0.25
LOST_THRESHOLD = 0.5
# A mean hides a small thing that moves: the threshold is on the 4x4 block that differs most.
DUPLICATE_THRESHOLD = 1.5 / 255


@dataclass(frozen=True)
class Change:
    """How two pictures differ.

    `histogram`: half the summed difference of their colour histograms, 0 to 1.
    `lost`: the share of pixels whose forward and backward flow disagree or that leave the picture, 0 to 1.
    `difference`: the mean absolute difference of the 4x4 block that differs most, 0 to 1.
    """

    histogram: float
    lost: float
    difference: float

    @property
    def cut(self) -> bool:
        return self.histogram > HISTOGRAM_THRESHOLD and self.lost > LOST_THRESHOLD

    @property
    def duplicate(self) -> bool:
        return self.difference < DUPLICATE_THRESHOLD


def change(first: Float[Tensor, "3 h w"], second: Float[Tensor, "3 h w"]) -> Change:
    """Compare two pictures at thumbnail size (160 pixels wide), a few milliseconds whatever their own size."""
    full = [pixels(picture) for picture in (first, second)]
    difference = _largest_block(cv2.absdiff(*full)) / 255
    small = [_thumbnail(picture) for picture in full]
    histograms = [
        cv2.calcHist([picture], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3).ravel() / (picture.size / 3)
        for picture in small
    ]
    histogram = 0.5 * float(np.abs(histograms[0] - histograms[1]).sum())
    if histogram <= HISTOGRAM_THRESHOLD:
        return Change(histogram, 0.0, difference)
    grey = [_levelled(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)) for picture in small]
    forward, backward = dis_flow(grey[0], grey[1]), dis_flow(grey[1], grey[0])
    back = remap(backward, forward, mode=cv2.INTER_LINEAR)
    gap = np.square(forward + back).sum(-1)
    reach = np.square(forward).sum(-1) + np.square(back).sum(-1)
    error = np.abs(remap(grey[1].astype(np.float32), forward) - grey[0])
    lost = (gap > 0.01 * reach + 0.5) | (error > 24)
    return Change(histogram, float(lost.mean()), difference)


def _levelled(grey: np.ndarray) -> np.ndarray:
    """Of one mean and contrast, so that a flash or a fade between two pictures can still be tracked."""
    values = grey.astype(np.float32)
    return (40 * (values - values.mean()) / max(2.0, float(values.std())) + 128).clip(0, 255).astype(np.uint8)


def _largest_block(difference: np.ndarray) -> float:
    height, width = difference.shape[:2]
    blocks = cv2.resize(difference, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    return float(blocks.max())


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if width <= 160:
        return picture
    return cv2.resize(picture, (160, max(16, round(height * 160 / width))), interpolation=cv2.INTER_AREA)
