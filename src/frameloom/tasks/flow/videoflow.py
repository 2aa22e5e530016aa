"""VideoFlow: motion both ways for every frame, each frame asking its neighbours what they know.

For the best flow of a clip. A *centre* has a frame before and a frame after it; one recurrent state refines its flows
to both. Between centres travels a motion state s, fetched at every iteration from where the flows point:

    s_f(p) = s_{i+1}(p + flow to i+1),  s_b(p) = s_{i-1}(p + flow to i-1)
    m, s <- encoder(correlations, flows, s_f, s_b, s)

so that after n iterations a centre has heard of n frames either side (MOF). `bof` is the three-frame network alone.

Xiaoyu Shi, Zhaoyang Huang, Weikang Bian, Dasong Li, Manyuan Zhang, Ka Chun Cheung, Simon See, Hongwei Qin, Jifeng Dai,
Hongsheng Li, "VideoFlow: Exploiting Temporal Cues for Multi-frame Optical Flow Estimation", ICCV 2023,
arXiv 2303.08340.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import RaftCore, sequence_loss
from frameloom.motion.update import Aggregate, SKBlock, cell, grid, mask_head, step
from frameloom.motion.warp import backward_warp
from frameloom.tasks.flow.learned import RECIPE_SK, SMALL_SK, Learned
from frameloom.tasks.flow.published import fill, plain
from frameloom.training.published import table

log = logging.getLogger("frameloom")


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """A core with SK blocks on Twins. `memory`: channels of the motion state that travels (0: `bof`).

    In use, `window` centres are estimated together and those within `overlap` of an end of it are not kept.
    The published `mof` weights want `mask_scale` 100; trained from scratch that saturates at once.
    """

    encoder: str = "twins"
    cell: str = "sk"
    attention: bool = True
    stem: tuple[int, ...] = (128, 256)
    motion: tuple[int, int, int, int, int] = (128, 192, 128, 64, 128)
    refinements: int = 32
    gamma: float = 0.85
    variant: Literal["bof", "mof"] = "mof"
    memory: int = 48
    frames: int = 5
    window: int = 8
    overlap: int = 2


_TINY = SMALL_SK | {"motion": (24, 40, 24, 16, 32), "gamma": 0.8}
PRESETS = {
    "tiny": Config(**_TINY, memory=16),
    "tiny-bof": Config(**_TINY, variant="bof", memory=0, frames=3),
    "paper": Config(mask_scale=100.0, centred=True),
    "paper-bof": Config(variant="bof", memory=0, frames=3, centred=True),
}


class CentreEncoder(nn.Module):
    """Correlations and flows to both neighbours, and the motion states about, as one motion feature."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c1, c2, f1, f2, out = config.motion
        self.memory, self.out = config.memory, out - 4
        self.convc1 = SKBlock(config.lookups, c1, config.kernels)
        self.convc2 = SKBlock(2 * c1, c2, config.kernels)
        self.convf1 = nn.Conv2d(4, f1, 1)
        self.convf2 = SKBlock(f1, f2, config.kernels)
        self.conv = SKBlock(c2 + f2 + 3 * config.memory, out - 4 + config.memory, config.kernels)

    def forward(self, corr: tuple[Tensor, Tensor], flows: Float[Tensor, "n 4 h w"], states: list[Tensor]):
        """The motion feature and the new state; `corr` and `flows` are forward first."""
        seen = self.convc2(F.gelu(torch.cat([self.convc1(one) for one in corr], 1)))
        moved = self.convf2(self.convf1(flows))
        motion, state = self.conv(torch.cat([seen, moved, *states], 1)).split([self.out, self.memory], 1)
        return torch.cat([motion, flows.to(motion.dtype)], 1), state


class CentreUpdate(nn.Module):
    """One refinement of both flows of every centre."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        motion = config.motion[-1]
        self.encoder = CentreEncoder(config)
        self.aggregator = Aggregate(motion)
        self.gru = cell(config, config.context + 2 * motion)
        self.flow_head = _both_ways(config)
        self.mask = mask_head(config, 2)
        if config.memory:
            self.init_hidden_state = nn.Parameter(torch.randn(1, 1, config.memory, 1, 1) * 0.1)


def _both_ways(config: Config) -> nn.Module:
    """A flow head of four channels: to the next frame, to the one before."""
    return SKBlock(config.hidden, 4, config.kernels)


class VideoFlow(Learned, RaftCore):
    """Flows of every inner frame of a clip to both of its neighbours."""

    id, presets, tiny_recipe = "videoflow", PRESETS, RECIPE_SK

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.update_block = CentreUpdate(config)

    def forward(
        self, video: Float[Tensor, "b t 3 h w"], iterations: int | None = None, last: bool = False
    ) -> list[tuple[Float[Tensor, "b s 2 h w"], Float[Tensor, "b s 2 h w"]]]:
        """After every iteration (or the last) the flows of frames 1 to t - 2 of clips in [0, 1]: forward, backward."""
        batch, centres = len(video), video.shape[1] - 2
        features = self.features(video)
        centre = features[:, 1:-1].flatten(0, 1)
        ahead = self.correlate(centre, features[:, 2:].flatten(0, 1))
        behind = self.correlate(centre, features[:, :-2].flatten(0, 1))
        hidden, context, affinity = self.begin(video[:, 1:-1])
        start, block = grid(hidden), self.update_block
        middle, after, before = (part.flatten(0, 1) for part in (video[:, 1:-1], video[:, 2:], video[:, :-2]))
        guesses = self.guess(middle, after), self.guess(middle, before)
        flows = torch.cat([guess.coarse for guess in guesses], 1)
        state = None
        if self.config.memory:
            state = block.init_hidden_state[0].expand(len(hidden), -1, *hidden.shape[-2:]).float()
        made, count = [], iterations or self.config.refinements
        for number in range(count):
            flows = flows.detach()
            corr = ahead(start + flows[:, :2]), behind(start + flows[:, 2:])
            states = [] if state is None else [*_fetch(state, flows, centres), state]
            motion, state = block.encoder(corr, flows, states)
            state = state.float() if self.config.memory else None
            hidden = step(block.gru, hidden, context, motion, block.aggregator(affinity, motion))
            flows = flows + block.flow_head(hidden).float()
            if last and number + 1 < count:
                continue
            masks = block.mask(hidden).chunk(2, 1)
            # The published halves are forward first in MOF and backward first in BOF.
            masks = masks if self.config.variant == "mof" else masks[::-1]
            parts = zip(flows.chunk(2, 1), masks, guesses, strict=True)
            fine = [self.upsample(flow, mask, guess) for flow, mask, guess in parts]
            made.append(tuple(flow.unflatten(0, (batch, centres)) for flow in fine))
        return made

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Sequence loss over the flows of all centres, both ways.

        `batch`: `video` (b, t, 3, h, w) in [0, 1]; `flow`, `backward` (b, t-1, 2, h, w); `valid`, `backward_valid`,
        `hidden`, `backward_hidden` (b, t-1, h, w).
        """
        estimates = [torch.cat(both, 1) for both in self(batch["video"], self.config.iterations)]
        truth = torch.cat([batch["flow"][:, 1:], batch["backward"][:, :-1]], 1)
        valid = torch.cat([batch["valid"][:, 1:], batch["backward_valid"][:, :-1]], 1)
        hidden = torch.cat([batch["hidden"][:, 1:], batch["backward_hidden"][:, :-1]], 1)
        return sequence_loss(estimates, truth, valid, hidden, self.config)

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The flow of each gap, and the one back. Every frame is made a centre: the first and the last stand twice, and
        their flows are less exact. Memory: one window of `config.window` centres.
        """
        window, overlap = self.config.window, self.config.overlap
        held: list[Tensor] = []  # extended clip from number `base` on
        base, done, previous = 0, 0, None
        for frame, final in _extended(frames):
            held.append(frame)
            full = len(held) == window + 2
            if not (full or final) or len(held) < 3:
                continue
            forward, back = self(torch.stack(held)[None], last=True)[0]
            # Centres base .. base + n - 1 of the clip itself; the first ones were kept from the window before.
            stop = base + len(held) - 2 - (0 if final else overlap)
            for centre in range(done, stop):
                if previous is not None:
                    yield previous, back[0, centre - base] if backward else None
                previous = forward[0, centre - base]
            done = stop
            if not final:
                drop = window - 2 * overlap
                held, base = held[drop:], base + drop

    @classmethod
    def load_official(cls, path: Path) -> "VideoFlow":
        """The network of a published checkpoint. Raises InputError for another method's or size's."""
        size = "paper" if any("init_hidden_state" in key for key in table(path)) else "paper-bof"
        return fill(lambda: cls(PRESETS[size]), cls.id, path, cls.renamed)

    @staticmethod
    def renamed(key: str) -> str | None:
        """The published motion encoder ends a name in `_` and keeps the first motion state to itself."""
        kept = plain(key.replace(".encoder.convf1_.", ".encoder.convf1."))
        return None if kept is None else kept.replace(".encoder.init_hidden_state", ".init_hidden_state")


def _fetch(state: Float[Tensor, "n s h w"], flows: Float[Tensor, "n 4 h w"], centres: int) -> tuple[Tensor, Tensor]:
    """The motion states of the centres after and before, read where the flows point; zeros beyond the ends."""
    by_clip = state.unflatten(0, (-1, centres))
    end = torch.zeros_like(by_clip[:, :1])
    after = torch.cat([by_clip[:, 1:], end], 1).flatten(0, 1)
    before = torch.cat([end, by_clip[:, :-1]], 1).flatten(0, 1)
    forward, back = flows.chunk(2, 1)
    return backward_warp(after, forward, padding="zeros")[0], backward_warp(before, back, padding="zeros")[0]


def _extended(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Frames 0, 0, 1, ..., t - 1, t - 1, and whether each is the last.

    A mirrored clip would turn back at its ends, which no training clip does: twice the error there.
    """
    number, last = -1, None
    for number, frame in enumerate(frames):
        if number == 0:
            yield frame, False
        yield frame, False
        last = frame
    if number == 1:
        log.warning("videoflow looks at three frames and there are two: both are repeated")
    if number >= 1:
        yield last, True
