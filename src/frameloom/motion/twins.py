"""The first two stages of Twins-SVT: local attention in windows, global attention to a thinned map, in turns.

Frames that belong together may be *stacked*: laid out below each other as one tall picture, so that the same
attention, without a single new parameter, also looks from frame to frame (StreamFlow's in-batch encoding).
Parameters are named as in timm, whose `twins_svt_large` loads after its last two stages are dropped.

X. Chu et al., "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", NeurIPS 2021,
arXiv 2104.13840.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WINDOW = 7


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over `(*, n, d)`."""
    return F.scaled_dot_product_attention(q, k, v)


class LocalAttention(nn.Module):
    """Self-attention inside windows of 7 by 7 cells; the map is padded with zeros to whole windows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        batch, _, width = x.shape
        height, length = size
        below, beside = -height % WINDOW, -length % WINDOW
        grid = F.pad(x.view(batch, height, length, width), (0, 0, 0, beside, 0, below))
        rows, columns = grid.shape[1] // WINDOW, grid.shape[2] // WINDOW
        grid = grid.view(batch, rows, WINDOW, columns, WINDOW, width).transpose(2, 3)
        tokens = grid.reshape(batch * rows * columns, WINDOW**2, width)
        q, k, v = self.qkv(tokens).view(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v).transpose(1, 2).reshape(batch, rows, columns, WINDOW, WINDOW, width)
        mixed = mixed.transpose(2, 3).reshape(batch, rows * WINDOW, columns * WINDOW, width)
        return self.proj(mixed[:, :height, :length].reshape(batch, height * length, width))


class GlobalAttention(nn.Module):
    """Attention of every cell to the map thinned by `ratio`, each thinned cell a learned mean of ratio^2."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, ratio, ratio)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        batch, count, width = x.shape
        q = self.q(x).view(batch, count, self.heads, -1).transpose(1, 2)
        thin = self.sr(x.transpose(1, 2).view(batch, width, *size)).flatten(2).transpose(1, 2)
        k, v = self.kv(self.norm(thin)).view(batch, thin.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(_attend(q, k, v).transpose(1, 2).reshape(batch, count, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention (`ratio` None: local), then an MLP, each added to what came in."""

    def __init__(self, width: int, heads: int, ratio: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = LocalAttention(width, heads) if ratio is None else GlobalAttention(width, heads, ratio)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Squares of `patch` pixels as tokens."""

    def __init__(self, inputs: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b i h w"]) -> tuple[Float[Tensor, "b n c"], tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class PositionConv(nn.Module):
    """A depthwise 3x3 convolution added to the map: what tells the attention where things are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        grid = x.transpose(1, 2).reshape(*x.shape[::2], *size)
        return x + self.proj(grid).flatten(2).transpose(1, 2)


class Twins(nn.Module):
    """Two stages of Twins-SVT: `(b, t, 3, h, w)` to `(b, t, widths[1], h / s, w / s)`, s the product of `patches`.

    Args:
        ratios: how far the global attention of each stage thins its map.
        stacked: whether the t frames are seen as one tall picture, or each alone.
    """

    def __init__(
        self,
        widths: tuple[int, int] = (128, 256),
        heads: tuple[int, int] = (4, 8),
        patches: tuple[int, int] = (4, 2),
        ratios: tuple[int, int] = (8, 4),
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.stacked = stacked
        inputs = (3, widths[0])
        self.patch_embeds = nn.ModuleList(PatchEmbed(inputs[i], widths[i], patches[i]) for i in range(2))
        self.blocks = nn.ModuleList(
            nn.ModuleList([Block(widths[i], heads[i], None), Block(widths[i], heads[i], ratios[i])]) for i in range(2)
        )
        self.pos_block = nn.ModuleList(PositionConv(width) for width in widths)

    def forward(self, video: Float[Tensor, "b t i h w"]) -> Float[Tensor, "b t c h2 w2"]:
        frames = video.shape[1]
        x = video.flatten(0, 1)
        stack = frames if self.stacked else 1
        for embed, blocks, position in zip(self.patch_embeds, self.blocks, self.pos_block, strict=True):
            x, (height, width) = embed(x)
            size = (stack * height, width)
            x = x.reshape(-1, stack * height * width, x.shape[-1])
            for number, block in enumerate(blocks):
                x = block(x, size)
                if number == 0:
                    x = position(x, size)
            x = x.reshape(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
        return x.unflatten(0, (-1, frames))
