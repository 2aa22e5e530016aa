"""How alike two pictures are: PSNR, SSIM and MS-SSIM of RGB in [0, 1] (`data_range` is 1 throughout)."""

from bisect import bisect_right

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

_FLOOR = 1e-9  # added to the squared error, so that equal pictures measure 90 dB
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11
# The least side for 1, 2 ... 5 scales: the last scale holds the window, and torchmetrics takes the picture.
_SIDES = (11, 22, 44, 99, 176)


def psnr(a: Float[Tensor, "*t c h w"], b: Float[Tensor, "*t c h w"]) -> Float[Tensor, ""]:
    """Mean over frames of -10 log10(MSE of the frame + 1e-9), in dB: what papers on neural codecs print."""
    return (-10 * torch.log10((a - b).square().mean((-3, -2, -1)) + _FLOOR)).mean()


def psnr_of_mean(a: Float[Tensor, "*t c h w"], b: Float[Tensor, "*t c h w"]) -> Float[Tensor, ""]:
    """-10 log10 of the squared error over the whole video, in dB; at most `psnr`."""
    return -10 * torch.log10((a - b).square().mean() + _FLOOR)


def ssim(a: Float[Tensor, "t c h w"], b: Float[Tensor, "t c h w"]) -> Float[Tensor, ""]:
    """Mean structural similarity, 11x11 Gauss window of sigma 1.5; 1 for equal pictures, differentiable.

    Sides below 11 pixels are made 11 by repeating the last row or column.
    """
    return structural_similarity_index_measure(_windowed(a), _windowed(b), data_range=1.0)


def ms_ssim(a: Float[Tensor, "t c h w"], b: Float[Tensor, "t c h w"]) -> Float[Tensor, ""]:
    """Mean multi-scale structural similarity; 1 for equal pictures. Differentiable.

    Five scales need sides of 176 pixels or more, four 99, three 44, two 22: the window of 11 pixels has to fit into
    the smallest scale. Smaller pictures use as many scales as fit, with the weights of those scales summing to 1 again,
    so figures compare only between pictures of one size. Sides below 11 pixels are made 11 by repeating the last row or
    column.
    """
    a, b = _windowed(a), _windowed(b)
    scales = bisect_right(_SIDES, min(a.shape[-2:]))
    weights = tuple(weight / sum(_SCALES[:scales]) for weight in _SCALES[:scales])
    return multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=weights)


def _windowed(pictures: Float[Tensor, "t c h w"]) -> Float[Tensor, "t c tall wide"]:
    """Pictures that the window fits into."""
    missing = (0, max(0, _WINDOW - pictures.shape[-1]), 0, max(0, _WINDOW - pictures.shape[-2]))
    return F.pad(pictures, missing, mode="replicate") if any(missing) else pictures
