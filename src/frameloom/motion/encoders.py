"""The encoders of flow networks: from frames to what is matched, and to what a refinement starts with.

`basic` is RAFT's, `twins` the transformer of SKFlow and what came after it.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.twins import Twins


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norm and ReLU, added to the input, which a 1x1 convolution fits where it must."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int, fitted: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm1, self.norm2 = _norm(norm, outputs), _norm(norm, outputs)
        self.downsample = None
        if fitted:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), _norm(norm, outputs))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels)


class BasicEncoder(nn.Module):
    """RAFT's encoder: a 7x7 convolution and six residual blocks; frame by frame."""

    def __init__(self, stem: tuple[int, ...], outputs: int, norm: str, stride: int) -> None:
        super().__init__()
        first, second, third = stem
        self.conv1 = nn.Conv2d(3, first, 7, 2, 3)
        self.norm1 = _norm(norm, first)
        widths, strides = (first, first, second, third), (1, 2, stride // 4)
        for i in range(3):
            one = ResidualBlock(widths[i], widths[i + 1], norm, strides[i], fitted=i > 0)
            setattr(self, f"layer{i + 1}",
                    nn.Sequential(one, ResidualBlock(widths[i + 1], widths[i + 1], norm, 1, False)))  # fmt: skip
        self.conv2 = nn.Conv2d(third, outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        x = F.relu(self.norm1(self.conv1(video.flatten(0, 1))))
        x = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return x.unflatten(0, video.shape[:2])


class TwinsEncoder(nn.Module):
    """The Twins stem under the name that the published checkpoints give it, and a fitting layer at small sizes."""

    def __init__(
        self, widths: tuple[int, int], heads: tuple[int, int], outputs: int, stride: int, stacked: bool
    ) -> None:
        super().__init__()
        self.svt = Twins(widths, heads, (4, stride // 4), stacked=stacked)
        self.fit = nn.Identity() if widths[1] == outputs else nn.Conv2d(widths[1], outputs, 1)

    def forward(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        return self.fit(self.svt(video).flatten(0, 1)).unflatten(0, video.shape[:2])
