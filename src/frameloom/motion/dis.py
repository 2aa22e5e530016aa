"""Dense inverse search: optical flow with no weights, through OpenCV.

Kroeger, Timofte, Dai, Van Gool. Fast Optical Flow using Dense Inverse Search. ECCV 2016, arXiv 1603.03590.
"""

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Pixels of motion up to which a flow is more error than motion; from here to twice this the warps fade in.
STILL = 0.5
# Up to so many pixels a second pair of flows at twice the size pays: 0.1 dB at 448x256, 0.04 dB for three times the
# time at 1920x1080.
FINE = 512 * 512


def pixels(frame: Float[Tensor, "3 h w"]) -> np.ndarray:
    """An RGB picture in [0, 1] as uint8 `(h, w, 3)`, the form in which OpenCV takes pictures."""
    return np.rint(frame.detach().cpu().permute(1, 2, 0).numpy() * 255).clip(0, 255).astype(np.uint8)


def grey_pixels(frame: Float[Tensor, "3 h w"]) -> np.ndarray:
    """Luma of an RGB picture as uint8 `(h, w)`, the form in which OpenCV's trackers take pictures."""
    return cv2.cvtColor(pixels(frame), cv2.COLOR_RGB2GRAY)


def dis_flow(
    first: np.ndarray, second: np.ndarray, *, scale: int = 1, finest: int = 1, patch: int = 8, stride: int = 4
) -> np.ndarray:
    """Flow `(h, w, 2)` float32 in pixels from `first` to `second`, grey uint8 `(h, w)`.

    `scale` 2 estimates at twice the size (cubic), which finds smaller motions; the result is in pixels of the
    pictures that were given.
    """
    height, width = first.shape
    if scale != 1:
        size = width * scale, height * scale
        first = cv2.resize(first, size, interpolation=cv2.INTER_CUBIC)
        second = cv2.resize(second, size, interpolation=cv2.INTER_CUBIC)
    # The coarsest patch must fit: tiny pictures are padded, and the padding cut off again.
    pad_h, pad_w = max(0, 32 - first.shape[0]), max(0, 32 - first.shape[1])
    if pad_h or pad_w:
        first, second = (cv2.copyMakeBorder(x, 0, pad_h, 0, pad_w, cv2.BORDER_REPLICATE) for x in (first, second))
    engine = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    engine.setFinestScale(finest)
    engine.setPatchSize(patch)
    engine.setPatchStride(stride)
    flow = engine.calc(first, second, None)
    flow = flow[: flow.shape[0] - pad_h, : flow.shape[1] - pad_w]
    if scale != 1:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / scale
    return flow


def dis_flows(first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2 h w"]:
    """The flow in pixels of pairs of pictures in [0, 1], down to the finest scale; on the device of the pictures."""
    found = [dis_flow(grey_pixels(a), grey_pixels(b), finest=0) for a, b in zip(first, second, strict=True)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(first.device)


def remap(picture: np.ndarray, flow: np.ndarray, amount: float = 1.0, mode: int = cv2.INTER_CUBIC) -> np.ndarray:
    """`picture` (h, w, c) sampled at x + amount * flow(x), edges repeated."""
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        picture,
        columns + amount * flow[..., 0],
        rows + amount * flow[..., 1],
        mode,
        borderMode=cv2.BORDER_REPLICATE,
    )


def flows_both_ways(
    frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Flows 0 -> 1 and 1 -> 0, each `(h, w, 2)` in pixels; up to `FINE` pixels also those estimated at twice the size.

    The errors of the flows are nearly independent, so that warps by all of them average well.
    """
    first, second = grey_pixels(frame0), grey_pixels(frame1)
    scales = (1, 2) if first.size <= FINE else (1,)
    return [(dis_flow(first, second, scale=scale), dis_flow(second, first, scale=scale)) for scale in scales]


def warped_pair(
    picture0: np.ndarray, picture1: np.ndarray, flows: list[tuple[np.ndarray, np.ndarray]], t: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both pictures `(h, w, 3)` moved to phase t, each the mean of its warps by every flow, and how far to trust that.

    The third, `(h, w, 1)`, is 0 where the flows are shorter than their own error and 1 from twice that on.
    """
    warped0, warped1 = np.zeros_like(picture0), np.zeros_like(picture1)
    share = 1 / (2 * len(flows))
    for forward, backward in flows:
        warped0 += share * (remap(picture0, forward, -t) + remap(picture0, backward, t))
        warped1 += share * (remap(picture1, forward, 1 - t) + remap(picture1, backward, t - 1))
    length = sum(np.linalg.norm(flow, axis=-1) for pair in flows for flow in pair) * share
    return warped0, warped1, np.clip(cv2.blur(length, (9, 9)) / STILL - 1, 0, 1)[..., None]
