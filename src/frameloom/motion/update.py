"""The parts of one refinement of a flow: motion encoder, attention over cells, recurrent cell, heads, upsampling.

The cell is RAFT's separable GRU or SKFlow's large-kernel block; GMA's attention lets cells borrow motion from cells
that look alike. The references are in `frameloom.motion.raft`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.config import RaftConfig


class SKBlock(nn.Module):
    """SKFlow's block: pointwise FFN, depthwise convolutions of growing kernels, each added, and a pointwise FFN."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        inner = int(1.5 * inputs)
        self.conv_list = nn.ModuleList(nn.Conv2d(inputs, inputs, k, padding=k // 2, groups=inputs) for k in kernels)
        self.ffn1 = nn.Sequential(nn.Conv2d(inputs, inner, 1), nn.GELU(), nn.Conv2d(inner, inputs, 1))
        self.pw = nn.Conv2d(inputs, inputs, 1)
        self.ffn2 = nn.Sequential(nn.Conv2d(inputs, inner, 1), nn.GELU(), nn.Conv2d(inner, outputs, 1))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        x = F.gelu(x + self.ffn1(x))
        for conv in self.conv_list:
            x = F.gelu(x + conv(x))
        return self.ffn2(F.gelu(x + self.pw(x)))


class SepConvGRU(nn.Module):
    """A convolutional GRU that looks along rows, then along columns, five cells at a time."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        for number, kernel in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                pad = (kernel[0] // 2, kernel[1] // 2)
                setattr(self, f"conv{gate}{number}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=pad))

    def forward(self, hidden: Float[Tensor, "b c h w"], x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b c h w"]:
        for number in (1, 2):
            update, reset, propose = (getattr(self, f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([hidden, x], 1)
            share = torch.sigmoid(update(both))
            fresh = torch.tanh(propose(torch.cat([torch.sigmoid(reset(both)) * hidden, x], 1)))
            hidden = (1 - share) * hidden + share * fresh
        return hidden


class FlowHead(nn.Module):
    """A step of the flow from the hidden state, as in RAFT."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, 2, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
        return self.conv2(F.relu(self.conv1(x)))


class MotionEncoder(nn.Module):
    """Correlations and flow as one motion feature; its last two channels are the flow itself."""

    def __init__(self, config: RaftConfig) -> None:
        super().__init__()
        c1, c2, f1, f2, out = config.motion
        self.sk = config.cell == "sk"
        if self.sk:
            self.convc1 = SKBlock(config.lookups, c1, config.kernels)
            self.convc2 = SKBlock(c1, c2, config.kernels)
            self.convf1 = nn.Conv2d(2, f1, 1)
            self.convf2 = SKBlock(f1, f2, config.kernels)
            self.conv = SKBlock(c2 + f2, out - 2, config.kernels)
        else:
            self.convc1 = nn.Conv2d(config.lookups, c1, 1)
            self.convc2 = nn.Conv2d(c1, c2, 3, padding=1)
            self.convf1 = nn.Conv2d(2, f1, 7, padding=3)
            self.convf2 = nn.Conv2d(f1, f2, 3, padding=1)
            self.conv = nn.Conv2d(c2 + f2, out - 2, 3, padding=1)

    def forward(self, corr: Float[Tensor, "b k h w"], flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b m h w"]:
        if self.sk:
            both = torch.cat([self.convc2(F.gelu(self.convc1(corr))), self.convf2(self.convf1(flow))], 1)
            return torch.cat([self.conv(both), flow.to(both.dtype)], 1)
        seen = F.relu(self.convc2(F.relu(self.convc1(corr))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        both = F.relu(self.conv(torch.cat([seen, moved], 1)))
        return torch.cat([both, flow.to(both.dtype)], 1)


class Affinity(nn.Module):
    """GMA's attention of every cell to all cells of the same frame, from its context; computed once a frame."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_qk = nn.Conv2d(context, 2 * context, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """Queries and keys `(b, hw, c)`; the softmax is taken when they are used, a few rows at a time if need be."""
        q, k = self.to_qk(x).flatten(2).transpose(1, 2).chunk(2, -1)
        return q, k


class Aggregate(nn.Module):
    """Motion features plus, times a learned gain that starts at 0, the mean of those of cells that look alike."""

    def __init__(self, motion: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(motion, motion, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, affinity: tuple[Tensor, Tensor], motion: Float[Tensor, "b m h w"]) -> Float[Tensor, "b m h w"]:
        q, k = affinity
        v = self.to_v(motion).flatten(2).transpose(1, 2)
        # With heads and plain strides the kernel keeps no square of the cells: at 1080p that would be 76 GB.
        mixed = F.scaled_dot_product_attention(*(part.contiguous()[:, None] for part in (q, k, v.to(q.dtype))))[:, 0]
        return motion + self.gamma * mixed.transpose(1, 2).reshape(motion.shape)


class UpdateBlock(nn.Module):
    """One refinement: motion encoder, cell, flow head, and the weights of the upsampling.

    `extra` channels of a method's own enter the cell after context, motion and aggregated motion.
    """

    def __init__(self, config: RaftConfig, extra: int = 0) -> None:
        super().__init__()
        self.encoder = MotionEncoder(config)
        motion = config.motion[-1]
        inputs = config.context + motion + extra
        if config.attention:
            self.aggregator = Aggregate(motion)
            inputs += motion
        self.gru = cell(config, inputs)
        self.flow_head = flow_head(config)
        self.mask = mask_head(config)

    def motion(self, corr: Tensor, flow: Tensor, affinity: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """The motion feature, and the aggregated one where there is attention."""
        motion = self.encoder(corr, flow)
        return (motion,) if affinity is None else (motion, self.aggregator(affinity, motion))


def cell(config: RaftConfig, inputs: int) -> nn.Module:
    """The recurrent cell over the hidden state and `inputs` further channels; see `step`."""
    if config.cell == "gru":
        return SepConvGRU(config.hidden, inputs)
    return SKBlock(config.hidden + inputs, config.hidden, config.cell_kernels)


def step(cell: nn.Module, hidden: Float[Tensor, "b c h w"], *inputs: Float[Tensor, "b _ h w"]) -> Tensor:
    """The next hidden state."""
    if isinstance(cell, SepConvGRU):
        return cell(hidden, torch.cat(inputs, 1))
    return cell(torch.cat([hidden, *inputs], 1))


def flow_head(config: RaftConfig, copies: int = 1) -> nn.Module:
    """From `copies` hidden states side by side to as many steps of flow."""
    if config.cell == "gru":
        return FlowHead(config.hidden, 2 * config.hidden)
    return SKBlock(copies * config.hidden, copies * 2, config.kernels)


def mask_head(config: RaftConfig, copies: int = 1) -> nn.Sequential:
    """From the hidden state to the weights of the convex upsampling of `copies` flows."""
    outputs = copies * 9 * config.stride**2
    return nn.Sequential(
        nn.Conv2d(config.hidden, config.mask, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(config.mask, outputs, 1)
    )


def grid(like: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b 2 h w"]:
    """Where every cell is, x first."""
    batch, _, height, width = like.shape
    x = torch.arange(width, device=like.device, dtype=torch.float32).expand(height, width)
    y = torch.arange(height, device=like.device, dtype=torch.float32)[:, None].expand(height, width)
    return torch.stack([x, y]).expand(batch, 2, height, width)


def convex_upsample(
    flow: Float[Tensor, "b 2 h w"], mask: Float[Tensor, "b k h w"], stride: int
) -> Float[Tensor, "b 2 H W"]:
    """Flow in cells to flow in pixels: every pixel a weighted mean of the 3x3 cells about its own; zeros outside."""
    batch, _, height, width = flow.shape
    share = mask.float().view(batch, 1, 9, stride, stride, height, width).softmax(2)
    near = F.unfold(stride * flow.float(), 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    fine = (share * near).sum(2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, 2, stride * height, stride * width)
