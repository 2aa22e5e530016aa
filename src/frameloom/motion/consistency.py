"""Can a flow be believed? Going there and back again must end where it began.

    gap(p) = | F(p) + B(p + F(p)) |

with F the flow from one picture to another and B the flow back. Where a point is hidden in the other picture, or the
estimator lost it, the two do not cancel.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frameloom.motion.warp import backward_warp


def round_trip(
    flow: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 h w"]
) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b 2 h w"], Bool[Tensor, "b 1 h w"]]:
    """F + B(p + F) in pixels (zero for perfect flows), B(p + F) itself, and whether p + F lies in the picture."""
    returned, inside = backward_warp(back, flow)
    return flow + returned, returned, inside


def occlusion(
    flow: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 h w"], share: float = 0.01, slack: float = 0.5
) -> Bool[Tensor, "b 1 h w"]:
    """True where gap^2 > share * (|F|^2 + |B|^2) + slack, or where the flow leaves the picture; pixels.

    N. Sundaram, T. Brox, K. Keutzer, Dense Point Trajectories by GPU-accelerated Large Displacement Optical Flow,
    ECCV 2010.
    """
    gap, returned, inside = round_trip(flow, back)
    reach = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
    return (gap.square().sum(1, keepdim=True) > share * reach + slack) | ~inside


def confidence(
    flow: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 h w"], sigma: float | int = 1.0
) -> Float[Tensor, "b 1 h w"]:
    """exp(-gap^2 / (2 sigma^2)) in [0, 1], sigma in pixels; 0 where the flow leaves the picture.

    The probability that a Gauss-distributed error of that size is harmless, without a network that predicts it.
    """
    gap, _, inside = round_trip(flow, back)
    return torch.exp(gap.square().sum(1, keepdim=True) / (-2 * sigma**2)) * inside
