"""The autoencoder of CBB: from a picture to a small latent, and back with both neighbours at hand.

Sizes are those of `frameloom.tasks.interpolation.cbb.Config`, where the method and its reference are.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.warp import backward_warp

# No number of a latent is further from zero.
BOUND = 2.0


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(math.gcd(groups, inputs), inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(math.gcd(groups, outputs), outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1),
        )  # fmt: skip
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return self.shortcut(x) + self.body(x)


class WindowAttention(nn.Module):
    """Pixels ask the pixels of several maps: neighbours of one window, or with `grid` pixels spread over the picture.

    Windows and grids are `window` a side and take turns, as in MaxViT (Tu et al., ECCV 2022, arXiv 2204.01697), with
    its bias by relative place. Sides must be divisible by `window`.
    """

    def __init__(self, channels: int, head: int, window: int, groups: int, grid: bool):
        super().__init__()
        self.heads, self.window = channels // head, window
        self.cut = "(i y) (j x)" if grid else "(y i) (x j)"
        self.norm = nn.GroupNorm(math.gcd(groups, channels), channels)
        self.query, self.out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.memory = nn.Conv2d(channels, 2 * channels, 1)
        self.bias = nn.Parameter(torch.zeros(self.heads, (2 * window - 1) ** 2))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = at[:, None] - at[None] + window - 1
        self.register_buffer("apart", apart[..., 0] * (2 * window - 1) + apart[..., 1], persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"], maps: Float[Tensor, "b n c h w"]) -> Float[Tensor, "b c h w"]:
        sides = {"i": self.window, "j": self.window}
        query = rearrange(self.query(self.norm(x)), f"b (g d) {self.cut} -> (b y x) g (i j) d", g=self.heads, **sides)
        memory = self.memory(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
        key, value = rearrange(memory, f"b n (two g d) {self.cut} -> two (b y x) g (n i j) d", two=2, g=self.heads,
                               **sides)  # fmt: skip
        bias = self.bias[:, self.apart].repeat(1, 1, maps.shape[1]).to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        size = {"y": x.shape[-2] // self.window, "x": x.shape[-1] // self.window}
        return x + self.out(rearrange(found, f"(b y x) g (i j) d -> b (g d) {self.cut}", **sides, **size))


class Encoder(nn.Module):
    """A picture in [0, 1] to its latent within `BOUND`, at 1/stride of the size, and the features of every level."""

    def __init__(self, widths: tuple[int, ...], latent: int, window: int, head: int, groups: int):
        super().__init__()
        last = widths[-1]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(ResBlock(before, width, groups), nn.Conv2d(width, width, 3, 2, 1))
            for before, width in zip((widths[0], *widths), widths, strict=False)
        )
        self.attention = nn.ModuleList(WindowAttention(last, head, window, groups, grid) for grid in (False, True))
        self.out = nn.Sequential(
            ResBlock(last, last, groups), nn.GroupNorm(groups, last), nn.SiLU(), nn.Conv2d(last, 8, 3, padding=1),
            nn.Conv2d(8, latent, 1),
        )  # fmt: skip
        # A latent begins as the mean colour of its pixels, and learns what else is worth saying.
        self.colour = nn.Conv2d(3, latent, 1, bias=False)
        nn.init.dirac_(self.colour.weight)
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def forward(self, picture: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b c h2 w2"], list[Tensor]]:
        x, features = self.stem(2 * picture - 1), []
        for level in self.levels:
            x = level(x)
            features.append(x)
        for attention in self.attention:
            x = attention(x, x[:, None])
        # Bounded, so that the noise of the bridge and the codebook have a scale to be right for.
        colour = self.colour(F.avg_pool2d(3 * picture - 1.5, 2 ** len(self.levels)))
        return BOUND * torch.tanh((colour + self.out(x)).float() / BOUND), features


class Codebook(nn.Module):
    """Latents to the nearest of `codes` vectors; gradients pass as if nothing had happened (VQ-VAE, arXiv 1711.00937).

    The codes begin spread over all latents that there can be, so that none is out of reach.
    """

    def __init__(self, codes: int, channels: int, commitment: float = 0.25):
        super().__init__()
        self.commitment = commitment
        self.codes = nn.Parameter(torch.empty(codes, channels).uniform_(-BOUND, BOUND))

    def forward(self, latent: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""]]:
        """The codes, and the loss that draws codes and latents together."""
        flat = latent.permute(0, 2, 3, 1)
        nearest = torch.cdist(flat.detach().flatten(0, 2), self.codes.detach()).argmin(1)
        code = self.codes[nearest].view_as(flat).permute(0, 3, 1, 2)
        loss = F.mse_loss(code, latent.detach()) + self.commitment * F.mse_loss(latent, code.detach())
        return latent + (code - latent).detach(), loss


def moved_by(maps: Float[Tensor, "b 2 c h2 w2"], motion: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 c h2 w2"]:
    """Maps of both neighbours, of any stride, where `motion` (pixels, from the middle to frame 1) has them meet."""
    stride = motion.shape[-1] // maps.shape[-1]
    way = F.avg_pool2d(torch.stack([-motion, motion], 1).flatten(0, 1), stride) / stride
    return backward_warp(maps.flatten(0, 1), way)[0].unflatten(0, maps.shape[:2])


class Decoder(nn.Module):
    """A latent and two neighbours that were moved to the middle, to the frame between them."""

    def __init__(self, widths: tuple[int, ...], latent: int, window: int, head: int, groups: int):
        super().__init__()
        self.stem = nn.Conv2d(3 * latent, widths[-1], 3, padding=1)
        self.merge, self.attention, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            self.merge.append(ResBlock(3 * width, width, groups))
            self.attention.append(nn.ModuleList(
                WindowAttention(width, min(head, width // 2), window, groups, grid)
                for grid in (False, True)
            ))  # fmt: skip
            self.up.append(nn.ConvTranspose2d(width, widths[max(level - 1, 0)], 4, 2, 1))
        full, half = widths[0], widths[0] // 2
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(full + 6 + 2 * latent, full, 3, padding=1), nn.GroupNorm(groups, full), nn.ReLU(),
                nn.Conv2d(full, half, 3, padding=1), nn.GroupNorm(groups, half), nn.ReLU(),
                nn.Conv2d(half, outputs, 3, padding=1),
            ) for outputs in (1, 3)
        )  # fmt: skip
        for mask_or_residual in self.heads:
            # Training starts from the mean of the warps.
            nn.init.zeros_(mask_or_residual[-1].weight)
            nn.init.zeros_(mask_or_residual[-1].bias)

    def forward(
        self,
        latent: Float[Tensor, "b c h2 w2"],
        neighbours: Float[Tensor, "b 2 c h2 w2"],
        features: list[Tensor],
        warped: Float[Tensor, "b 2 3 h w"],
        motion: Float[Tensor, "b 2 h w"],
    ) -> Float[Tensor, "b 3 h w"]:
        """`neighbours`: both latents. `features`: theirs, level by level, each (b 2 c h w). `motion`: of `aligned`."""
        # Where a neighbour's latent, moved, is not the middle's, its picture is not right there either.
        wrong = (latent[:, None] - moved_by(neighbours, motion)).flatten(1, 2)
        x = self.stem(torch.cat([latent, wrong], 1))
        for feature, merge, attention, up in zip(features[::-1], self.merge, self.attention, self.up, strict=True):
            moved = moved_by(feature, motion)
            x = merge(torch.cat([x, moved.flatten(1, 2)], 1))
            for attend in attention:
                x = attend(x, moved)
            x = up(x)
        wrong = F.interpolate(wrong, size=x.shape[-2:], mode="bilinear")
        seen = torch.cat([x, warped.flatten(1, 2) - 0.5, wrong], 1)
        # In bfloat16 a picture would come in steps of 1/256.
        mask, residual = (head(seen).float().sigmoid() for head in self.heads)
        return warped[:, 0] * mask + warped[:, 1] * (1 - mask) + 2 * residual - 1
