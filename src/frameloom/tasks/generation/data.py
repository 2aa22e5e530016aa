"""What the generators learn from: captioned clips in stages, pictures first."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frameloom.errors import InputError
from frameloom.language.words import Words
from frameloom.world import WorldDataset
from frameloom.world.captions import CaptionedClips

POOL = 12_288


def captioned(source: str, config: Any, seed: int, words: Words) -> "Stages":
    """Batches for a model with `frames`, `side` and `codec`. Raises InputError for anything but `"world"`."""
    if source != "world":
        raise InputError(f"--data {source}: the small generators learn from world; there is no loader for others yet")
    side = config.side * (config.codec or 1)
    make = lambda count, number: CaptionedClips(WorldDataset("toys", config.frames, side, side, 10 * seed + number,
                                                             POOL, count=count, supersample=2))  # fmt: skip
    return Stages(make(1, 1), make(2, 2), config.frames, words)


@dataclass(frozen=True)
class Stages:
    """Pictures, then clips from words, then clips of which some frames are given: the paper's order of learning.

    One shape in the first half of the run, one or two after it. Batch `indices` at `progress` depends on nothing else.
    """

    one: CaptionedClips
    two: CaptionedClips
    frames: int
    words: Words
    pictures: float = 0.2
    clips: float = 0.6
    pairs: float = 0.5
    seed: int = 0

    def sample(self) -> Tensor:
        """Clips to take statistics from."""
        return torch.cat([self.one.read(range(256))[0], self.two.read(range(256))[0]])

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, indices[0]])
        chosen: list[tuple[CaptionedClips, int]] = []
        for index in indices:
            pool = self.two if progress >= self.pairs and rng.random() < 0.5 else self.one
            chosen.append((pool, int(rng.integers(len(pool))) if index >= len(pool) else index % len(pool)))
        read = [pool.read([number]) for pool, number in chosen]
        video, texts = torch.cat([clip for clip, _ in read]), [caption for _, (caption,) in read]
        if progress < self.pictures:  # four pictures of every clip, each a clip of one frame
            at = torch.from_numpy(np.stack([rng.permutation(self.frames)[:4] for _ in texts]))
            video = video[torch.arange(len(video))[:, None], at].flatten(0, 1)[:, None]
            texts = [text for text in texts for _ in range(4)]
        given = torch.zeros(video.shape[:2], dtype=torch.bool)
        if progress >= self.clips:
            for row in given:
                kind = rng.random()
                if kind < 0.4:
                    row[0] = True
                elif kind < 0.5:
                    row[:4] = True
                elif kind < 0.6:
                    row[[0, -1]] = True
        return {"video": video, "ids": self.words.encode(texts), "given": given}
