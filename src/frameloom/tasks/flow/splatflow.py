"""SplatFlow: flow of a stream, one pair at a time, each remembering the motion of the pair before.

For cameras and long videos: constant memory, no look ahead. What pair k - 1 found, its last motion feature and flow,
is carried to frame k by splatting, and enters every iteration of pair k:

    m_t = sum_p b(x - p - flow(p)) m(p) / sum_p b(x - p - flow(p)),      b the bilinear kernel
    hidden <- GRU'(hidden; context, m, aggregated m, m_t)

Behind an occluder the motion of a moment ago is the best guess. The first pair, and any after a cut, is plain GMA.

Bo Wang, Yifan Zhang, Jian Li, Yang Yu, Zhenping Sun, Li Liu, Dewen Hu, "SplatFlow: Learning Multi-frame Optical Flow
via Splatting", IJCV 2024, arXiv 2306.08887.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import RaftCore, sequence_loss
from frameloom.motion.update import UpdateBlock, cell, flow_head, grid, mask_head, step
from frameloom.motion.warp import forward_splat
from frameloom.tasks.flow.learned import SMALL, Learned
from frameloom.tasks.flow.published import plain

log = logging.getLogger("frameloom")


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """GMA's sizes; training takes clips of `frames` frames (the paper: 3).

    `chained`: in use, what a pair leaves to the next one rests on what the pair before left to it. Without that, as the
    published code does it, every flow looks back one pair and no further, and a gap costs two passes.
    """

    attention: bool = True
    frames: int = 3
    chained: bool = True


PRESETS = {"tiny": Config(**SMALL, frames=4), "paper": Config(refinements=24, chained=False)}


class State(NamedTuple):
    """What one pair leaves to the next: motion feature and flow, in cells, and what is matched of its second frame,
    which is the next pair's first (None: read again).
    """

    motion: Float[Tensor, "b m h w"]
    flow: Float[Tensor, "b 2 h w"]
    features: Float[Tensor, "b c h w"] | None = None


class Update(UpdateBlock):
    """GMA's update block, and a second decoder for pairs with a history."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gru_sp = cell(config, config.context + 3 * config.motion[-1])
        self.flow_head_sp = flow_head(config)
        self.mask_sp = mask_head(config)

    def decoder(self, history: bool) -> tuple:
        """Cell, flow head and mask head."""
        return (self.gru_sp, self.flow_head_sp, self.mask_sp) if history else (self.gru, self.flow_head, self.mask)


def aligned(state: State) -> Float[Tensor, "b m h w"]:
    """The motion feature carried along its own flow to the frame where the next pair begins; 0 where nothing lands.

    In double precision: the same sums in any order of addition that a device may take.
    """
    moved, _ = forward_splat(state.motion.double(), state.flow.double(), "average")
    return moved.to(state.motion.dtype)


class SplatFlow(Learned, RaftCore):
    """GMA with a memory of one pair."""

    id, presets = "splatflow", PRESETS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.update = Update(config)

    def forward(
        self, first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"], state: State | None = None,
        iterations: int | None = None, last: bool = False,
    ) -> tuple[list[Float[Tensor, "b 2 h w"]], State]:  # fmt: skip
        """The flow of a pair in pixels after every iteration (or the last), and what it leaves to the next pair."""
        if state is None or state.features is None:
            before, after = self.features(torch.stack([first, second], 1)).unbind(1)
        else:
            before, after = state.features, self.features(second[:, None])[:, 0]
        corr = self.correlate(before, after)
        hidden, context, affinity = self.begin(first[:, None])
        gru, head, mask = self.update.decoder(state is not None)
        history = [] if state is None else [aligned(state)]
        guess = self.guess(first, second)
        start, flow, made = grid(hidden), guess.coarse, []
        count = iterations or self.config.refinements
        for number in range(count):
            flow = flow.detach()
            motions = self.update.motion(corr(start + flow), flow, affinity)
            hidden = step(gru, hidden, context, *motions, *history)
            flow = flow + head(hidden).float()
            if not last or number + 1 == count:
                made.append(self.upsample(flow, mask(hidden), guess))
        return made, State(motions[0].float(), flow, after)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Sequence loss over the pairs of clips, chained: the splat is differentiable, later pairs teach earlier ones.

        `batch`: `video` (b, t, 3, h, w) in [0, 1], `flow` (b, t-1, 2, h, w), `valid` and `hidden` (b, t-1, h, w).
        """
        frames, state, made = batch["video"].unbind(1), None, []
        for first, second in pairwise(frames):
            estimates, state = self(first, second, state, self.config.iterations)
            made.append(estimates)
        chained = [torch.stack(row, 1) for row in zip(*made, strict=True)]
        return sequence_loss(chained, batch["flow"], batch["valid"], batch["hidden"], self.config)

    @torch.inference_mode()
    def step(
        self, before: Float[Tensor, "b 3 h w"], frame: Float[Tensor, "b 3 h w"], state: State | None = None
    ) -> tuple[Float[Tensor, "b 2 h w"], State]:
        """One pair of a live stream: its flow, and the state for the next call. Sides are multiples of 8.

        A state of another resolution is dropped with a warning.
        """
        if state is not None:
            cells = tuple(side // self.config.stride for side in before.shape[-2:])
            if tuple(state.flow.shape[-2:]) != cells:
                log.warning("the resolution has changed: splatflow begins anew without a history")
                state = None
        flows, state = self(before, frame, state, last=True)
        return flows[0], state

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The flow of each gap; flows back, which have no history, are plain GMA's. Two frames in memory."""
        before, state = None, None
        for frame in frames:
            if before is not None:
                pair, history = (before[None], frame[None]), state
                flow, state = self.step(*pair, history)
                if history is not None and not self.config.chained:
                    _, state = self.step(*pair)
                yield flow[0], self.step(*reversed(pair))[0][0] if backward else None
            before = frame

    @staticmethod
    def renamed(key: str) -> str | None:
        """Older files call the second decoder `_tf`."""
        kept = plain(key.replace("update_block.", "update."))
        return None if kept is None else kept.replace("_tf.", "_sp.")
