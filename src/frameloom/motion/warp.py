"""Moving pictures along flow: backward (sample where the flow points) and forward (deposit there).

Flow is in pixels, x first; pixel centres lie at whole coordinates, so that a whole flow moves pixels exactly.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    return x, y


def backward_warp(
    image: Float[Tensor, "b c h w"],
    flow: Float[Tensor, "b 2 h w"],
    mode: Literal["bilinear", "bicubic"] = "bilinear",
    padding: Literal["border", "zeros"] = "border",
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b 1 h w"]]:
    """`image` read at every pixel's place plus `flow`, and which of these places lie inside the image."""
    height, width = image.shape[-2:]
    flow = flow.to(image.dtype) if image.dtype == torch.float64 else flow.float()
    x, y = _targets(flow)
    valid = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([x * (2 / max(width - 1, 1)) - 1, y * (2 / max(height - 1, 1)) - 1], dim=-1)
    warped = F.grid_sample(image.to(grid.dtype), grid, mode=mode, padding_mode=padding, align_corners=True)
    return warped.to(image.dtype), valid[:, None]


def forward_splat(
    image: Float[Tensor, "b c h w"],
    flow: Float[Tensor, "b 2 h w"],
    mode: Literal["sum", "average", "linear", "softmax"] = "average",
    importance: Float[Tensor, "b 1 h w"] | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b 1 h w"]]:
    """Every pixel of `image` deposited on the four pixels around its place plus `flow`; the weight received.

    `sum` adds up and conserves mass inside the frame; the others divide by the weight received: `average` by
    bilinear weight, `linear` by weight times `importance` (>= 0), `softmax` by weight times exp(importance).
    Uncovered pixels are 0 with weight 0; pixels without a finite
    flow are left out. Differentiable in image, flow and importance.

    Source: S. Niklaus, F. Liu, "Softmax Splatting for Video Frame Interpolation", CVPR 2020,
    arXiv 2003.05534.
    """
    batch, channels, height, width = image.shape
    if mode in ("linear", "softmax"):
        if importance is None:
            raise ValueError(f"forward_splat: mode {mode!r} needs importance")
        # A shift of the exponents cancels in the division; it only keeps exp in range.
        top = importance.detach().amax((1, 2, 3), keepdim=True)
        weight = importance if mode == "linear" else (importance - top).exp()
    else:
        weight = torch.ones_like(image[:, :1])
    # What goes nowhere in particular is not deposited.
    finite = flow.isfinite().all(1, keepdim=True)
    flow, weight = torch.where(finite, flow, 0), weight * finite
    payload = torch.cat([image * weight, weight], dim=1).flatten(2)

    x, y = _targets(flow)
    left, top_row = x.detach().floor(), y.detach().floor()
    canvas = payload.new_zeros(batch, channels + 1, height * width)
    for column in (left, left + 1):
        for row in (top_row, top_row + 1):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            deposit = payload * (share * inside).flatten(1)[:, None]
            canvas = canvas.scatter_add(2, index.flatten(1)[:, None].expand_as(deposit), deposit)
    splatted, received = canvas.view(batch, channels + 1, height, width).split([channels, 1], dim=1)
    if mode != "sum":
        splatted = splatted / torch.where(received > 0, received, 1)
    return splatted, received
