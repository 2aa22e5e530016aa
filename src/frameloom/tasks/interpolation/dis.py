"""DIS: interpolation without weights, by dense inverse search flow and many cubic warps.

A picture at phase t is the weighted mean of eight warps: each of the two frames, moved by each of four flows
(forward and backward, estimated at the picture's own size and at twice that; large pictures gain nothing from the
second pair and do without). The errors of the flows are nearly
independent, so the mean is better than the best of them; cubic sampling keeps what bilinear would blur away; and
where the two frames disagree by more than the local contrast explains, a slight blur costs less than a wrong edge.
Where the flow is shorter than its own error the recorded pixels are simply averaged.

Flow: Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016 (see `frameloom.motion.dis`).
"""

from collections.abc import Iterable

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.motion.dis import dis_flows, flows_both_ways, warped_pair
from frameloom.motion.mend import mended


class DIS:
    """Flow both ways, cubic warps by every flow, softened where the two frames disagree."""

    fixed_t = False
    tile = None
    multiple = 1
    least = 1

    def stream(self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False):
        """The flow of each gap as a flow method gives it: `(2, h, w)` in pixels, and the one back or None.

        What its two directions disagree about is mended (`frameloom.motion.mend`).
        """
        before = None
        for frame in frames:
            after = frame[None]
            if before is not None:
                there, back = dis_flows(before, after), dis_flows(after, before)
                yield (
                    mended(there, back, before, after)[0],
                    mended(back, there, after, before)[0] if backward else None,
                )
            before = after

    def between(self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]):
        """The function t -> picture `(3, h, w)`; the flows are estimated once, here."""
        flows = flows_both_ways(frame0, frame1)
        picture0, picture1 = (np.ascontiguousarray(x.cpu().permute(1, 2, 0).numpy()) for x in (frame0, frame1))

        def at(t: float) -> Tensor:
            made = synthesise(picture0, picture1, flows, t)
            return torch.from_numpy(made).permute(2, 0, 1).clamp(0, 1).to(frame0.device)

        return at


def synthesise(
    picture0: np.ndarray, picture1: np.ndarray, flows: list[tuple[np.ndarray, np.ndarray]], t: float
) -> np.ndarray:
    """The picture (h, w, 3) at phase t from two pictures and pairs of flows 0 -> 1 and 1 -> 0, each (h, w, 2)."""
    warped0, warped1, trust = warped_pair(picture0, picture1, flows, t)
    moved = _soften((1 - t) * warped0 + t * warped1, np.abs(warped0 - warped1).mean(-1))
    still = (1 - t) * picture0 + t * picture1
    return still + trust * (moved - still)


def _soften(picture: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Blur where the gap between the two warped frames exceeds what the local gradient explains."""
    gap = cv2.blur(gap * 255, (5, 5))
    grey = picture.mean(-1) * 255
    slope = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=1 / 8))
    doubt = np.clip(gap / (cv2.blur(slope, (5, 5)) + 2) - 0.5, 0, 1) * np.clip((gap - 3) / 3, 0, 1)
    return picture + doubt[..., None] * (cv2.GaussianBlur(picture, (0, 0), 1.0) - picture)
