"""Losses that more than one method trains with."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def _binomial(like: Tensor) -> Tensor:
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=like.device) / 16
    return (row[:, None] * row).expand(like.shape[1], 1, 5, 5)


def laplacian_pyramid(image: Float[Tensor, "b c h w"], levels: int = 5) -> list[Tensor]:
    """`levels` band-pass pictures, each half the size of the one before, then the low-pass rest.

    Binomial 5x5 filter, reflected borders; every level but the rest is a picture less its own smaller copy,
    brought up by the same filter. The shorter side must be at least 2**(levels+1).
    """
    kernel = _binomial(image)
    bands = []
    for _ in range(levels):
        low = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=image.shape[1])
        # Zeros between the pixels, four times the gain; one replicated pixel keeps the borders full.
        wide = F.conv_transpose2d(
            F.pad(low, (1, 1, 1, 1), mode="replicate"), 4 * kernel, stride=2, groups=image.shape[1]
        )
        bands.append(image - wide[..., 4 : 4 + image.shape[-2], 4 : 4 + image.shape[-1]])
        image = low
    return [*bands, image]


def laplacian_loss(
    estimate: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], levels: int = 5
) -> Float[Tensor, ""]:
    """Sum over the levels of the mean absolute difference of two Laplacian pyramids, in float32.

    Source: P. Bojanowski et al., "Optimizing the Latent Space of Generative Networks", ICML 2018,
    arXiv 1707.05776.
    """
    with torch.autocast(estimate.device.type, enabled=False):
        # The pyramid is linear: one pyramid of the difference is the difference of the pyramids.
        bands = laplacian_pyramid(estimate.float() - target.float(), levels)
        return torch.stack([band.abs().mean() for band in bands]).sum()
