"""The RAFT core: encode, correlate, refine a flow again and again, upsample. Flow methods are policies over it.

Each iteration reads the correlations about where every cell is thought to go and adds what a recurrent cell says:

    flow_{k+1} = flow_k + head(cell(hidden, context, motion(correlations(x + flow_k), flow_k)))

The cell is RAFT's separable GRU or SKFlow's large-kernel block; GMA lets cells borrow motion from cells that look
alike. `TwoFrame` is the whole method without history, and the baseline of everything that has one.

Z. Teed, J. Deng, "RAFT", ECCV 2020, arXiv 2003.12039. S. Jiang et al., "Learning to Estimate Hidden Motions with
Global Motion Aggregation", ICCV 2021, arXiv 2104.02409. S. Sun et al., "SKFlow: Learning Optical Flow with Super
Kernels", NeurIPS 2022, arXiv 2205.14623.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from frameloom.motion.consistency import confidence
from frameloom.motion.correlation import CorrPyramid, LazyCorr, correlate
from frameloom.motion.dis import dis_flows
from frameloom.motion.twins import Twins

# Longer flows are not learnt from: in the published data sets they are mistakes as often as not.
LONGEST = 400.0


@dataclass(frozen=True, kw_only=True)
class RaftConfig:
    """Sizes of a core; the defaults are RAFT's.

    `stem`: widths of the encoder's stages (three for `basic`, two for `twins`), at `stride` pixels a cell. `motion`:
    widths of the motion encoder: correlations first and then, flow first and then, and what comes out. `radius`,
    `levels`: of the correlation lookup. `kernels`, `cell_kernels`: depthwise sizes of SK blocks. `iterations`: in
    training; `refinements`: in use. `mask_scale` softens the upsampling weights. `begins`: the flow before the first
    refinement; the papers begin at zero, but what `dis` finds needs no learning and is mended in minutes. `trust`: in
    use, what `dis` finds there and back within so many pixels is kept as it is (0: nothing is); a network of this size
    mends what is lost and blurs what is not. `stress`: how much more a pixel counts in training that the next frame
    hides; they are few, and methods differ in nothing else.
    """

    encoder: Literal["basic", "twins"] = "basic"
    cell: Literal["gru", "sk"] = "gru"
    attention: bool = False
    stride: Literal[4, 8] = 8
    stem: tuple[int, ...] = (64, 96, 128)
    heads: tuple[int, int] = (4, 8)
    context_norm: Literal["batch", "instance"] = "batch"
    features: int = 256
    hidden: int = 128
    context: int = 128
    motion: tuple[int, int, int, int, int] = (256, 192, 128, 64, 128)
    mask: int = 256
    radius: int = 4
    levels: int = 4
    kernels: tuple[int, ...] = (1, 15)
    cell_kernels: tuple[int, ...] = (1, 7)
    iterations: int = 12
    refinements: int = 12
    mask_scale: float = 0.25
    begins: Literal["zero", "dis"] = "zero"
    trust: float = 0.0
    stress: float = 0.0
    gamma: float = 0.8

    @property
    def lookups(self) -> int:
        """Channels that a correlation lookup gives."""
        return self.levels * (2 * self.radius + 1) ** 2

    @property
    def least(self) -> int:
        """The shortest side in pixels: the coarsest correlations must keep a cell."""
        return self.stride * 2 ** (self.levels - 1)


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

    def __init__(self, config: RaftConfig, outputs: int, stacked: bool) -> None:
        super().__init__()
        widths = (config.stem[0], config.stem[1])
        patches = (4, config.stride // 4)
        self.svt = Twins(widths, config.heads, patches, stacked=stacked)
        self.fit = nn.Identity() if widths[1] == outputs else nn.Conv2d(widths[1], outputs, 1)

    def forward(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        return self.fit(self.svt(video).flatten(0, 1)).unflatten(0, video.shape[:2])


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


def sequence_loss(
    estimates: Sequence[Float[Tensor, "b s 2 h w"]],
    truth: Float[Tensor, "b s 2 h w"],
    valid: Bool[Tensor, "b s h w"],
    hidden: Bool[Tensor, "b s h w"],
    config: RaftConfig,
) -> Float[Tensor, ""]:
    """sum_k gamma^(n - 1 - k) mean w |estimate_k - truth| over pixels that are valid and no longer than 400.

    w is 1, and 1 + stress where the other frame hides the pixel.
    """
    good = (valid & (torch.linalg.vector_norm(truth, dim=2) < LONGEST)).float()
    good = (good * (1 + config.stress * hidden))[:, :, None]
    truth = torch.nan_to_num(truth)
    total = truth.new_zeros(())
    for number, estimate in enumerate(estimates):
        error = (estimate.float() - truth).abs() * good
        total = total + config.gamma ** (len(estimates) - 1 - number) * error.mean()
    return total


class RaftCore(nn.Module):
    """Encoders and correlations, which every method shares; a method adds its update block and its policy.

    `multiple`: what the sides of a picture must be divisible by; `least`: the shortest side that it sees anything in.
    """

    multiple = 8

    def __init__(self, config: RaftConfig, stacked: bool = False) -> None:
        super().__init__()
        self.config = config
        both = config.hidden + config.context
        if config.encoder == "basic":
            self.fnet = BasicEncoder(config.stem, config.features, "instance", config.stride)
            self.cnet = BasicEncoder(config.stem, both, config.context_norm, config.stride)
        else:
            self.fnet = TwinsEncoder(config, config.features, stacked)
            self.cnet = TwinsEncoder(config, both, stacked)
        if config.attention:
            self.att = Affinity(config.context)

    @property
    def least(self) -> int:
        return self.config.least

    def features(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        """What is matched, of frames in [0, 1]."""
        return self.fnet(2 * video - 1).float()

    def begin(self, video: Float[Tensor, "b t 3 h w"]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Hidden state and context `(b * t, c, h, w)` of source frames in [0, 1], and their affinity if any."""
        hidden, context = self.cnet(2 * video - 1).flatten(0, 1).split([self.config.hidden, self.config.context], 1)
        context = F.relu(context)
        return torch.tanh(hidden), context, self.att(context) if self.config.attention else None

    def correlate(self, first: Tensor, second: Tensor) -> CorrPyramid | LazyCorr:
        """The correlations of two feature maps `(b, c, h, w)`."""
        return correlate(first, second, self.config.levels, self.config.radius)

    def guess(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> "Guess":
        """The flow before the first refinement."""
        stride, keep = self.config.stride, None
        if self.config.begins == "zero":
            fine = torch.zeros_like(first[:, :2])
        else:
            fine = dis_flows(first, second)
            if self.config.trust and not self.training:
                keep = confidence(fine, dis_flows(second, first), self.config.trust)
        return Guess(fine, F.avg_pool2d(fine, stride) / stride, keep)

    def upsample(self, flow: Tensor, mask: Tensor, guess: "Guess") -> Float[Tensor, "n 2 H W"]:
        """Flow in cells to flow in pixels: what was changed since the guess, by the weights of a mask head."""
        change = convex_upsample(flow - guess.coarse, self.config.mask_scale * mask, self.config.stride)
        return guess.fine + (change if guess.keep is None else (1 - guess.keep) * change)


class Guess(NamedTuple):
    """A first flow of every pixel, in pixels, and of every cell, in cells; how much of every pixel's is kept."""

    fine: Float[Tensor, "n 2 H W"]
    coarse: Float[Tensor, "n 2 h w"]
    keep: Float[Tensor, "n 1 H W"] | None


class TwoFrame(RaftCore):
    """RAFT, GMA or SKFlow, as the configuration says: the flow between two frames and nothing else."""

    def __init__(self, config: RaftConfig) -> None:
        super().__init__(config)
        self.update_block = UpdateBlock(config)

    def forward(
        self, first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"], iterations: int | None = None,
        last: bool = False,
    ) -> list[Float[Tensor, "b 2 h w"]]:  # fmt: skip
        """The flow in pixels after every iteration (with `last` only after the last one).

        Frames are in [0, 1], their sides multiples of the stride.
        """
        features = self.features(torch.stack([first, second], 1))
        corr = self.correlate(*features.unbind(1))
        hidden, context, affinity = self.begin(first[:, None])
        guess = self.guess(first, second)
        return refine(self, self.update_block, guess, hidden, context, affinity, corr, iterations, last)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Sequence loss over all neighbouring pairs of the clips, each on its own.

        `batch`: `video` (b, t, 3, h, w) in [0, 1], `flow` (b, t-1, 2, h, w), `valid` and `hidden` (b, t-1, h, w).
        """
        video = batch["video"]
        pairs = video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1)
        estimates = [flow.unflatten(0, (len(video), -1)) for flow in self(*pairs, self.config.iterations)]
        return sequence_loss(estimates, batch["flow"], batch["valid"], batch["hidden"], self.config)

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The flow `(2, h, w)` of each gap between frames, and the one back if wanted; two frames in memory."""
        before = None
        for frame in frames:
            if before is not None:
                there = self(before[None], frame[None], last=True)[0][0]
                yield there, self(frame[None], before[None], last=True)[0][0] if backward else None
            before = frame


def refine(
    core: RaftCore, block: UpdateBlock, guess: Guess, hidden: Tensor, context: Tensor,
    affinity: tuple[Tensor, Tensor] | None, corr: CorrPyramid | LazyCorr, iterations: int | None, last: bool,
) -> list[Tensor]:  # fmt: skip
    """RAFT's loop without any history."""
    start, flow, made = grid(hidden), guess.coarse, []
    count = iterations or core.config.refinements
    for number in range(count):
        flow = flow.detach()
        motions = block.motion(corr(start + flow), flow, affinity)
        hidden = step(block.gru, hidden, context, *motions)
        flow = flow + block.flow_head(hidden).float()
        if not last or number + 1 == count:
            made.append(core.upsample(flow, block.mask(hidden), guess))
    return made
