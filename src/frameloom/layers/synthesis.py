"""What frame synthesis shares: convolutions with PReLU, local flow refinement, the refinement U-Net.

Source: Z. Huang et al., "Real-Time Intermediate Flow Estimation for Video Frame Interpolation" (RIFE), ECCV
2022, arXiv 2011.06294; submodule names are those of its descendants' published weights.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def conv_prelu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and a PReLU with one slope a channel."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


def resize(x: Float[Tensor, "b c h w"], factor: float | int) -> Float[Tensor, "b c h2 w2"]:
    """Bilinear, pixel areas aligned; sizes are rounded."""
    if factor == 1:
        return x
    size = [round(side * factor) for side in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ConvBlock(nn.Module):
    """`depth` 3x3 convolutions, each with a PReLU."""

    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        sizes = [inputs] + [outputs] * depth
        self.conv = nn.Sequential(*(layer for i in range(depth) for layer in conv_prelu(sizes[i], sizes[i + 1])))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return self.conv(x)


class LocalBlock(nn.Module):
    """Flow and mask updates from images and their warps alone, at 1/`scale` of the full size (IFBlock)."""

    def __init__(self, hidden: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv0 = nn.Sequential(conv_prelu(17, hidden // 2, 2), conv_prelu(hidden // 2, hidden, 2))
        self.convblock = nn.Sequential(*(conv_prelu(hidden, hidden) for _ in range(8)))
        self.lastconv = nn.ConvTranspose2d(hidden, 5, 4, 2, 1)

    def forward(
        self, images: Float[Tensor, "b 13 h w"], flow: Float[Tensor, "b 4 h w"]
    ) -> tuple[Float[Tensor, "b 4 h w"], Float[Tensor, "b 1 h w"]]:
        small = torch.cat([resize(images, 1 / self.scale), resize(flow, 1 / self.scale) / self.scale], 1)
        hidden = self.conv0(small)
        update = resize(self.lastconv(self.convblock(hidden) + hidden).float(), 2 * self.scale)
        return update[:, :4] * (2 * self.scale), update[:, 4:]


class DoubleConv(nn.Module):
    """A 3x3 convolution of stride 2 and one of stride 1."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.conv2 = conv_prelu(inputs, outputs, 2), conv_prelu(outputs, outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv2(self.conv1(x))


class Refinement(nn.Module):
    """U-Net from images, warps, mask, flow and warped features to a residual in [-1, 1]."""

    def __init__(self, c: int):
        super().__init__()
        self.down0, self.down1 = DoubleConv(17 + c, 2 * c), DoubleConv(4 * c, 4 * c)
        self.down2, self.down3 = DoubleConv(8 * c, 8 * c), DoubleConv(16 * c, 16 * c)
        for level, (inputs, outputs) in enumerate([(32, 8), (16, 4), (8, 2), (4, 1)]):
            deconv = nn.ConvTranspose2d(inputs * c, outputs * c, 4, 2, 1)
            setattr(self, f"up{level}", nn.Sequential(deconv, nn.PReLU(outputs * c)))
        self.conv = nn.Conv2d(c, 3, 3, 1, 1)

    def forward(self, images: Float[Tensor, "b 17 h w"], features: list[Tensor]) -> Float[Tensor, "b 3 h w"]:
        """`features`: five levels, those of frame 0 before those of frame 1 in the channels."""
        s0 = self.down0(torch.cat([images, features[0]], 1))
        s1 = self.down1(torch.cat([s0, features[1]], 1))
        s2 = self.down2(torch.cat([s1, features[2]], 1))
        s3 = self.down3(torch.cat([s2, features[3]], 1))
        x = self.up0(torch.cat([s3, features[4]], 1))
        x = self.up1(torch.cat([x, s2], 1))
        x = self.up2(torch.cat([x, s1], 1))
        x = self.up3(torch.cat([x, s0], 1))
        # In bfloat16 the residual would come in steps of 1/256.
        return torch.sigmoid(self.conv(x).float()) * 2 - 1
