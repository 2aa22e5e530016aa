"""A flow mended where its two directions disagree: what is hidden or lost moves like what looks alike nearby.

    mended(p) = sum_q w(p, q) F(q) / sum_q w(p, q)
    w(p, q)   = exp(-|I(p) - I(q)|^2 / 2 colour^2 - |p - q|^2 / 2 reach^2) c(q)

over places q about p on every fourth pixel, c the confidence of the flow there (`frameloom.motion.consistency`). The
flow stays where it can be believed, and where it explains the picture well and much better than what mends it: a limb
too quick for the way back is not hidden.

A bilateral filter (C. Tomasi, R. Manduchi, "Bilateral Filtering for Gray and Color Images", ICCV 1998) as a
normalised convolution (H. Knutsson, C.-F. Westin, "Normalized and Differential Convolution", CVPR 1993).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from frameloom.motion.consistency import confidence
from frameloom.motion.warp import backward_warp

SURE = 0.25  # pixels by which the two directions of a flow may disagree
COLOUR = 0.1  # of [0, 1]
REACH, APART, PLACES = 14.0, 4, 5  # pixels, pixels between places, places to either side
WELL, BETTER = 0.05, 0.05  # of [0, 1]: how well a flow must explain the picture to stay, and how much better
FLOOR = 0.05  # weight of a pixel's own flow, for where nothing near can be believed


def mended(
    flow: Float[Tensor, "b 2 h w"], back: Float[Tensor, "b 2 h w"],
    first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"],
) -> Float[Tensor, "b 2 h w"]:  # fmt: skip
    """`flow` (pixels, from `first` to `second`, pictures in [0, 1]) with what `back` does not confirm mended."""
    trust = confidence(flow, back, SURE)
    filled = _filled(flow, trust, first)
    unlike = _unlike(flow, first, second)
    better = torch.sigmoid(3 * (_unlike(filled, first, second) - unlike - BETTER) / BETTER)
    stays = better * torch.exp(unlike.square() / (-2 * WELL**2))
    return torch.lerp(flow, filled, (1 - trust) * (1 - stays))


def _filled(flow: Tensor, trust: Tensor, picture: Tensor) -> Float[Tensor, "b 2 h w"]:
    """The weighted mean of the believed flow about every pixel, at half the size of the picture."""
    height, width = flow.shape[-2:]
    size = (-(-height // 2), -(-width // 2))
    small = F.interpolate(torch.cat([flow * trust, trust, picture, flow], 1), size=size, mode="area")
    believed, colour, own = small.split([3, 3, 2], 1)
    apart = APART // 2
    pad = PLACES * apart
    around = F.pad(torch.cat([believed, colour], 1), (pad,) * 4)
    total = torch.cat([FLOOR * own, torch.full_like(own[:, :1], FLOOR)], 1)
    for dy in range(-PLACES, PLACES + 1):
        for dx in range(-PLACES, PLACES + 1):
            top, left = pad + dy * apart, pad + dx * apart
            there, looks = around[..., top : top + size[0], left : left + size[1]].split([3, 3], 1)
            unlike = (looks - colour).square().sum(1, keepdim=True) / (2 * COLOUR**2)
            far = (dy**2 + dx**2) * APART**2 / (2 * REACH**2)
            total = total + there * torch.exp(-unlike - far)
    return F.interpolate(total[:, :2] / total[:, 2:], size=(height, width), mode="bilinear", align_corners=False)


def _unlike(flow: Tensor, first: Tensor, second: Tensor) -> Float[Tensor, "b 1 h w"]:
    """How different the pictures are where the flow leads, in [0, 1], over 3x3 pixels."""
    apart = (backward_warp(second, flow)[0] - first).abs().mean(1, keepdim=True)
    return F.avg_pool2d(apart, 3, 1, 1, count_include_pad=False)
