"""Attention as the generators use it: scaled dot products, optional QK-norm, optional rotary positions."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def rotary(
    positions: Float[Tensor, "n axes"], width: int, base: float = 100.0
) -> tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]:
    """Cosines and sines of rotary positions over `width` channels, shared evenly by the axes.

    Su et al., RoFormer, arXiv 2104.09864. Positions may be fractions: a larger grid is met by interpolation.
    """
    axes = positions.shape[1]
    count = width // (2 * axes)
    frequencies = base ** (-torch.arange(count, dtype=torch.float32, device=positions.device) / max(count, 1))
    angles = (positions.float()[:, :, None] * frequencies).flatten(1)
    angles = F.pad(angles, (0, width // 2 - angles.shape[1]))
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*b n d"], table: tuple[Tensor, Tensor]) -> Float[Tensor, "*b n d"]:
    """Turn channel pairs (i, i + d/2) by the angles of their positions."""
    cos, sin = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class RMSNorm(nn.Module):
    """x / rms(x), times a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


def attend(
    q: Float[Tensor, "*b n d"], k: Float[Tensor, "*b m d"], v: Float[Tensor, "*b m d"], mask: Tensor | None = None
) -> Float[Tensor, "*b n d"]:
    """softmax(q k^T / sqrt(d)) v; `mask` is true where a key may be seen.

    The fused kernel, but for short sequences on a processor: there its backward pass in bfloat16 takes eight times
    as long as three plain products.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] * k.shape[-2] > 2**14:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention over `(b, n, d)`, to itself or to a context `(b, m, e)`; RMS-normed queries and keys."""

    def __init__(self, width: int, heads: int, context: int | None = None, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context or width, width)
        self.to_v = nn.Linear(context or width, width)
        self.out = nn.Linear(width, width)
        self.norm_q = RMSNorm(self.head) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m e"] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`positions` are `rotary` tables for queries and keys; `mask` is true where a key may be seen."""
        source = x if context is None else context
        # By the width of a head, not by their number: tensor parallelism leaves a rank some of the heads.
        q, k, v = (rearrange(layer(part), "b n (h d) -> b h n d", d=self.head)
                   for layer, part in ((self.to_q, x), (self.to_k, source), (self.to_v, source)))  # fmt: skip
        q, k = self.norm_q(q), self.norm_k(k)
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        mixed = attend(q, k, v, mask)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


def sinusoid(value: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """`(...,)` numbers as `(..., width)` cosines and sines of falling frequency. Vaswani et al., arXiv 1706.03762."""
    half = width // 2
    frequencies = period ** (-torch.arange(half, dtype=torch.float32, device=value.device) / half)
    angles = value.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
