"""How alike every cell of one feature map is to the cells about a point of another: the memory of RAFT.

    C[i, j] = <f1_i, f2_j> / sqrt(channels)

at several scales of the second map. Averaging the correlations over j equals correlating with averaged features, so
the two classes here agree to float error: `CorrPyramid` keeps all of C, (hw)^2 numbers, and looks them up;
`LazyCorr` keeps the features and computes what is looked up, in memory of order hw.

Z. Teed, J. Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020, arXiv 2003.12039.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Cells beyond which all pairs are too many: 960x540 at stride 8 has 8,160.
DENSE = 8192


def window(radius: int, like: Tensor) -> Float[Tensor, "n 2"]:
    """The (2 radius + 1)^2 offsets of a lookup, x first.

    The *first* axis of the window moves x: published weights were trained with that order.
    """
    steps = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1)


class CorrPyramid:
    """All correlations of two maps `(b, c, h, w)` at `levels` scales, looked up bilinearly within `radius` cells.

    Called with the places `(b, 2, h, w)` in cells, x first, where the cells of the first map are sought in the second;
    returns `(b, levels * (2 radius + 1)^2, h, w)`, level by level. Outside the map the correlation is 0.
    """

    def __init__(self, first: Tensor, second: Tensor, levels: int = 4, radius: int = 4) -> None:
        self.radius = radius
        batch, channels, height, width = first.shape
        pairs = torch.einsum("bcn,bcm->bnm", first.float().flatten(2), second.float().flatten(2)) / channels**0.5
        level = pairs.reshape(batch * height * width, 1, height, width)
        self.levels = [level]
        for _ in range(levels - 1):
            level = F.avg_pool2d(level, 2)
            self.levels.append(level)

    def __call__(self, places: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b k h w"]:
        batch, _, height, width = places.shape
        centre = places.float().permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        offsets = window(self.radius, centre)[None, None]
        found = []
        for number, level in enumerate(self.levels):
            size = centre.new_tensor([level.shape[-1], level.shape[-2]])
            # Written for pixel centres at (i + 0.5) / size, so that a level of one cell needs no special case.
            at = (2 * (centre / 2**number + offsets) + 1) / size - 1
            read = F.grid_sample(level, at, align_corners=False)
            found.append(read.view(batch, height, width, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2)


class LazyCorr:
    """The same numbers as `CorrPyramid`, computed when they are looked up."""

    def __init__(self, first: Tensor, second: Tensor, levels: int = 4, radius: int = 4) -> None:
        self.radius = radius
        self.first = first.float().flatten(2).transpose(1, 2) / first.shape[1] ** 0.5
        self.levels = [second.float()]
        for _ in range(levels - 1):
            self.levels.append(F.avg_pool2d(self.levels[-1], 2))

    def __call__(self, places: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b k h w"]:
        batch, _, height, width = places.shape
        found = []
        for number, level in enumerate(self.levels):
            centre = places.float().flatten(2) / 2**number
            whole = centre.floor()
            share_x, share_y = (centre - whole).unbind(1)
            # Products with whole cells, one more each way than the window; a lookup mixes four of them.
            side = 2 * self.radius + 2
            products = centre.new_empty(batch, side, side, height * width)
            rows = level.flatten(2).transpose(1, 2)
            levels_height, levels_width = level.shape[-2:]
            for i in range(side):
                for j in range(side):
                    x, y = whole[:, 0] + (i - self.radius), whole[:, 1] + (j - self.radius)
                    inside = (x >= 0) & (x < levels_width) & (y >= 0) & (y < levels_height)
                    cell = (y.clamp(0, levels_height - 1) * levels_width + x.clamp(0, levels_width - 1)).long()
                    there = rows.gather(1, cell[..., None].expand(-1, -1, rows.shape[-1]))
                    products[:, i, j] = (self.first * there).sum(-1) * inside
            mixed = torch.lerp(products[:, :-1], products[:, 1:], share_x[:, None, None])
            mixed = torch.lerp(mixed[:, :, :-1], mixed[:, :, 1:], share_y[:, None, None])
            found.append(mixed.flatten(1, 2).view(batch, -1, height, width))
        return torch.cat(found, 1)


def correlate(first: Tensor, second: Tensor, levels: int, radius: int) -> CorrPyramid | LazyCorr:
    """The dense pyramid for small maps, the lazy one where all pairs are too many (above about 540p at stride 8)."""
    kind = CorrPyramid if first.shape[-2] * first.shape[-1] <= DENSE else LazyCorr
    return kind(first, second, levels, radius)
