"""A perceptual distance without a download: the formula of LPIPS on a network that is trained on the spot.

The network learns to tell the conditions of the frozen pairs apart from their pictures; what its layers see is what
the distance compares. Published LPIPS features are better judges of photographs; these know what the teacher draws.

R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", CVPR 2018, arXiv 1801.03924.
"""

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.distill import Metric
from frameloom.errors import InputError

# A teacher's pictures may overshoot black and white a little; other scales are far outside.
SLACK = 0.5


class Features(nn.Module):
    """Three strided convolutions and a classifier over all frames; `layers` gives the activations between."""

    def __init__(self, channels: int, classes: int, width: int = 24) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 2 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if number == 0 else 2, padding=1)
            for number, (a, b) in enumerate(pairwise(widths))
        )
        self.head = nn.Linear(widths[-1], classes)

    def layers(self, video: Float[Tensor, "b t c h w"]) -> list[Tensor]:
        x, found = 2 * video.flatten(0, 1) - 1, []
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
            found.append(x)
        return found

    def forward(self, video: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b n"]:
        last = self.layers(video)[-1].mean((2, 3)).unflatten(0, video.shape[:2])
        return self.head(last.mean(1))

    def distance(self, made: Float[Tensor, "b t c h w"], true: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b"]:
        """LPIPS: squared differences of activations of unit length, summed over channels and layers, mean over places.

        Raises InputError for pictures that are not in [0, 1].
        """
        if float(true.min()) < -SLACK or float(true.max()) > 1 + SLACK:
            raise InputError(f"pictures for the feature metric are in [0, 1]; these are in [{float(true.min()):.2g}, "
                             f"{float(true.max()):.2g}]")  # fmt: skip
        total = made.new_zeros(len(made))
        for a, b in zip(self.layers(made), self.layers(true), strict=True):
            difference = (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)).square().sum(1)
            total = total + difference.mean((1, 2)).unflatten(0, made.shape[:2]).mean(1)
        return total


def perceptual(features: Features, decode: Callable[[Tensor], Tensor]) -> Metric:
    """The distance of two latents by the pictures that they decode to."""
    features.requires_grad_(False)
    return lambda made, true: features.distance(decode(made), decode(true))
