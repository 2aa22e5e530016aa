"""The RAFT core: encode, correlate, refine a flow again and again, upsample. Flow methods are policies over it.

Each iteration reads the correlations about where every cell is thought to go and adds what a recurrent cell says:

    flow_{k+1} = flow_k + head(cell(hidden, context, motion(correlations(x + flow_k), flow_k)))

The parts of an iteration are in `frameloom.motion.update`. `TwoFrame` is the whole method without history, and the
baseline of everything that has one.

Z. Teed, J. Deng, "RAFT", ECCV 2020, arXiv 2003.12039. S. Jiang et al., "Learning to Estimate Hidden Motions with
Global Motion Aggregation", ICCV 2021, arXiv 2104.02409. S. Sun et al., "SKFlow: Learning Optical Flow with Super
Kernels", NeurIPS 2022, arXiv 2205.14623.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from frameloom.motion.config import RaftConfig
from frameloom.motion.consistency import confidence
from frameloom.motion.correlation import CorrPyramid, LazyCorr, correlate
from frameloom.motion.dis import dis_flows
from frameloom.motion.encoders import BasicEncoder, TwinsEncoder
from frameloom.motion.mend import mended
from frameloom.motion.update import Affinity, UpdateBlock, convex_upsample, grid, step

# Longer flows are not learnt from: in the published data sets they are mistakes as often as not.
LONGEST = 400.0


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

    `multiple`: what the sides of a picture must be divisible by; `least`: the shortest side that it sees anything in;
    `centred`: whether edges are repeated on both sides to get there; `steps`: refinements in use.
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
            sizes = config.stem, config.heads
            self.fnet = TwinsEncoder(*sizes, config.features, config.stride, stacked)
            self.cnet = TwinsEncoder(*sizes, both, config.stride, stacked)
        if config.attention:
            self.att = Affinity(config.context)

    @property
    def least(self) -> int:
        return self.config.least

    @property
    def centred(self) -> bool:
        return self.config.centred

    @property
    def steps(self) -> int:
        return self.config.refinements

    @steps.setter
    def steps(self, count: int) -> None:
        self.config = replace(self.config, refinements=count)

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
        config, keep = self.config, None
        if config.begins == "zero":
            fine = torch.zeros_like(first[:, :2])
        else:
            fine = dis_flows(first, second)
            if not self.training:
                back = dis_flows(second, first)
                keep = confidence(fine, back, config.trust) if config.trust else None
                fine = mended(fine, back, first, second)
        return Guess(fine, F.avg_pool2d(fine, config.stride) / config.stride, keep)

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
