"""StreamFlow: the flows of a group of frames at once, at the cost of one network pass a gap.

For whole videos, better behind occluders. T frames enter together; their T - 1 flows are refined side by side, and
what the gaps know of each other travels three ways:

    encoder   the frames stacked into one tall picture, so that attention looks across them (no new parameters)
    motion    m_t = transformer over the T - 1 motion features at the same place
    head      one flow head over the hidden states of all gaps side by side

Groups share one frame: a clip of k (T - 1) + 1 frames takes k groups, each gap estimated once.

Shangkun Sun, Jiaming Liu, Thomas H. Li, Huaxia Li, Guoqing Liu, Wei Gao, "StreamFlow: Streamlined Multi-Frame Optical
Flow Estimation for Video Sequences", NeurIPS 2024, arXiv 2311.17099.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import RaftCore, sequence_loss
from frameloom.motion.twins import Mlp
from frameloom.motion.update import Aggregate, MotionEncoder, cell, flow_head, grid, mask_head, step
from frameloom.tasks.flow.learned import PAPER_RECIPE, RECIPE_SK, SMALL_SK, Learned
from frameloom.tasks.flow.published import fill
from frameloom.training.published import table

log = logging.getLogger("frameloom")


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """A core with SK blocks on Twins, over groups of `frames`.

    `stacked`: whether the encoders see the group as one picture. `temporal`: whether the gaps' motion features meet.
    `start`: the last layers of the temporal block begin at zero (`branches`), or all of it does (`released`; such a
    block cannot learn from scratch, but for two biases).
    """

    encoder: str = "twins"
    cell: str = "sk"
    attention: bool = True
    stem: tuple[int, ...] = (128, 256)
    refinements: int = 15
    gamma: float = 0.85
    frames: int = 4
    stacked: bool = True
    temporal: bool = True
    start: Literal["branches", "released"] = "branches"


PRESETS = {"tiny": Config(**SMALL_SK, gamma=0.8), "paper": Config(centred=True)}


class TimeAttention(nn.Module):
    """Self-attention of one head over a short sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1).to(v.dtype) @ v)


class TimeBlock(nn.Module):
    """A transformer block over the motion features of all gaps at the same place."""

    def __init__(self, width: int, start: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = TimeAttention(width), Mlp(width, 2 * width)
        # At first an identity, from which every weight can still learn.
        branches = [self.attn.proj, self.mlp.fc2]
        for parameter in self.parameters() if start == "released" else (p for b in branches for p in b.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimeBlocks(nn.Module):
    """Holds the block under the name that the published checkpoints give it; maps to sequences and back."""

    def __init__(self, width: int, start: str) -> None:
        super().__init__()
        self.transformer_block = TimeBlock(width, start)

    def forward(self, motion: Float[Tensor, "n m h w"], gaps: int) -> Float[Tensor, "n m h w"]:
        x = motion.unflatten(0, (-1, gaps)).permute(0, 3, 4, 1, 2)
        y = self.transformer_block(x.flatten(0, 2)).view(x.shape)
        return y.permute(0, 3, 4, 1, 2).flatten(0, 1)


class GroupUpdate(nn.Module):
    """One refinement of all gaps of a group."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gaps = config.frames - 1
        motion = config.motion[-1]
        self.encoder = MotionEncoder(config)
        self.aggregator = Aggregate(motion)
        self.gru = cell(config, config.context + 2 * motion + config.temporal * motion)
        self.flow_head = flow_head(config, self.gaps)
        self.mask = mask_head(config)
        if config.temporal:
            self.transformer_block = TimeBlocks(motion, config.start)

    def forward(self, hidden: Tensor, context: Tensor, affinity: tuple[Tensor, Tensor], corr: Tensor, flow: Tensor):
        """The next hidden state `(b * gaps, c, h, w)` and the step of the flow."""
        motion = self.encoder(corr, flow)
        seen = [motion, self.aggregator(affinity, motion)]
        if hasattr(self, "transformer_block"):
            seen.append(self.transformer_block(motion, self.gaps))
        hidden = step(self.gru, hidden, context, *seen)
        side_by_side = hidden.unflatten(0, (-1, self.gaps)).flatten(1, 2)
        moved = self.flow_head(side_by_side).unflatten(1, (self.gaps, 2)).flatten(0, 1)
        return hidden, moved.float()


class StreamFlow(Learned, RaftCore):
    """All flows of a group of frames, refined together."""

    id, presets, tiny_recipe = "streamflow", PRESETS, RECIPE_SK
    paper_recipe = replace(PAPER_RECIPE, steps=300_000, batch_size=16, lr=6e-4)

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.stacked)
        self.update_block = GroupUpdate(config)

    def forward(
        self, video: Float[Tensor, "b t 3 h w"], iterations: int | None = None, last: bool = False
    ) -> list[Float[Tensor, "b s 2 h w"]]:
        """The t - 1 flows of groups of `config.frames` frames in [0, 1] after every iteration (or the last one)."""
        gaps = video.shape[1] - 1
        features = self.features(video)
        corr = self.correlate(features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1))
        hidden, context, affinity = self.begin(video[:, :-1])
        guess = self.guess(video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1))
        start, flow, made = grid(hidden), guess.coarse, []
        count = iterations or self.config.refinements
        for number in range(count):
            flow = flow.detach()
            hidden, moved = self.update_block(hidden, context, affinity, corr(start + flow), flow)
            flow = flow + moved
            if not last or number + 1 == count:
                made.append(self.upsample(flow, self.update_block.mask(hidden), guess).unflatten(0, (-1, gaps)))
        return made

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Sequence loss over all gaps of the groups.

        `batch`: `video` (b, t, 3, h, w) in [0, 1], `flow` (b, t-1, 2, h, w), `valid` and `hidden` (b, t-1, h, w).
        """
        estimates = self(batch["video"], self.config.iterations)
        return sequence_loss(estimates, batch["flow"], batch["valid"], batch["hidden"], self.config)

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The flow of each gap, group by group. The last group is the last T frames; a shorter scene is filled up
        with its last frame. Memory: one group.
        """
        size, held, done, count = self.config.frames, [], 0, 0
        for frame in frames:
            held.append(frame)
            count += 1
            if count >= size and (count - 1) % (size - 1) == 0:
                yield from self._group(held[-size:], 0, backward)
                done = count - 1
            held = held[-size:]
        if count < 2 or done == count - 1:
            return
        if count < size:
            log.warning("a scene of %d frames is filled up to the %d of a group", count, size)
        fresh = count - 1 - done
        group = held + [held[-1]] * (size - len(held))
        first = 0 if count < size else size - 1 - fresh
        for number, made in enumerate(self._group(group, first, backward)):
            if number < fresh:
                yield made

    def _group(self, frames: list[Tensor], first: int, backward: bool) -> list[tuple[Tensor, Tensor | None]]:
        video = torch.stack(frames)[None]
        there = self(video, last=True)[0][0]
        back = self(video.flip(1), last=True)[0][0].flip(0) if backward else [None] * len(there)
        return list(zip(there, back, strict=True))[first:]

    @classmethod
    def load_official(cls, path: Path) -> "StreamFlow":
        """The network of a published checkpoint, for as many frames as it was trained with.

        Raises InputError for another method's or size's.
        """
        head = table(path).get("update_block.flow_head.ffn2.2.weight")
        if head is None or len(head) % 2:
            raise InputError(f"{path}: not a checkpoint of streamflow: it has no update_block.flow_head")
        config = replace(PRESETS["paper"], frames=len(head) // 2 + 1)
        return fill(lambda: cls(config), "streamflow", path)
