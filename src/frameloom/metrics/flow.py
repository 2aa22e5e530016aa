"""How far a flow field is from the true one. Flow is (b, t-1, 2, h, w) in pixels, x first."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def endpoint_error(
    flow: Float[Tensor, "b s 2 h w"],
    truth: Float[Tensor, "b s 2 h w"],
    valid: Bool[Tensor, "b s h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean distance between flow and truth in pixels, over the `valid` pixels (all of them for None)."""
    distance = torch.linalg.vector_norm(flow - truth, dim=2)
    return distance.mean() if valid is None else distance[valid].mean()


def outlier_share(
    flow: Float[Tensor, "b s 2 h w"],
    truth: Float[Tensor, "b s 2 h w"],
    valid: Bool[Tensor, "b s h w"] | None = None,
) -> Float[Tensor, ""]:
    """KITTI's Fl-all in percent: pixels off by more than 3 pixels and by more than 5% of the motion."""
    distance = torch.linalg.vector_norm(flow - truth, dim=2)
    outlier = (distance > 3) & (distance > 0.05 * torch.linalg.vector_norm(truth, dim=2))
    return 100 * (outlier if valid is None else outlier[valid]).float().mean()
