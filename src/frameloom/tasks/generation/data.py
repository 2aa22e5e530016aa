"""What the generators learn from: captioned clips in stages, pictures first."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.errors import InputError
from frameloom.language.words import Words
from frameloom.world import WorldDataset
from frameloom.world.captions import CaptionedClips

POOL = 12_288


def captioned(source: str, frames: int, side: int, seed: int, words: Words, **stages: float) -> "Stages":
    """Batches of clips of `side` pixels. Raises InputError for anything but `"world"`."""
    if source != "world":
        raise InputError(f"--data {source}: the small generators learn from world; there is no loader for others yet")
    one, two = (
        CaptionedClips(WorldDataset("toys", frames, side, side, 10 * seed + count, POOL, count=count, supersample=2))
        for count in (1, 2)
    )
    return Stages(one, two, frames, words, seed=seed, **stages)


@dataclass(frozen=True)
class Stages:
    """Pictures, then clips from words, then clips of which some frames are given: the paper's order of learning.

    `pictures` and `clips` are the shares of the run at which the first and the second stage end, `pairs` the share of
    examples with two shapes. Batch `indices` at `progress` depends on nothing else.
    """

    one: CaptionedClips
    two: CaptionedClips
    frames: int
    words: Words
    pictures: float = 0.0
    clips: float = 1.0
    pairs: float = 0.35
    seed: int = 0

    def sample(self) -> Tensor:
        """Clips to take statistics from."""
        return torch.cat([self.one.read(range(256))[0], self.two.read(range(256))[0]])

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, indices[0]])
        chosen: list[tuple[CaptionedClips, int]] = []
        for index in indices:
            pool = self.two if rng.random() < self.pairs else self.one
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


def digits(source: str, side: int, seed: int) -> "Digits":
    """Handwritten digits: `"world"` or `"digits"` for the 1,797 that ship with scikit-learn, or `mnist:DIR`."""
    if source.startswith("mnist:"):
        pictures, labels = _mnist(Path(source[len("mnist:") :]))
    elif source in ("world", "digits"):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise InputError("--data digits: needs scikit-learn, which holds them (pip install scikit-learn)") from None
        found = load_digits()
        pictures, labels = torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target)
    else:
        raise InputError(f"--data {source}: digits are learned from digits or mnist:DIR")
    pictures = F.interpolate(pictures[:, None], size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return Digits(pictures.clamp(0, 1), labels.long(), seed)


def _mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Every pair of IDX files of a folder: pictures `(n, 28, 28)` in [0, 1] and labels `(n,)`."""
    pictures, labels = [], []
    for path in sorted(folder.glob("*images-idx3-ubyte.gz")):
        beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        try:
            first, second = gzip.decompress(path.read_bytes()), gzip.decompress(beside.read_bytes())
            magic, count, height, width = struct.unpack(">4I", first[:16])
            if magic != 2051 or len(first) != 16 + count * height * width or len(second) != 8 + count:
                raise ValueError("not the size that its header says")
        except (OSError, EOFError, ValueError, struct.error) as error:
            raise InputError(f"--data mnist:{folder}: {path.name} is not an IDX file ({error})") from None
        pictures.append(
            torch.from_numpy(np.frombuffer(first, np.uint8, offset=16).reshape(count, height, width).copy())
        )
        labels.append(torch.from_numpy(np.frombuffer(second, np.uint8, offset=8).copy()))
    if not pictures:
        raise InputError(f"--data mnist:{folder}: holds no *images-idx3-ubyte.gz")
    return torch.cat(pictures).float() / 255, torch.cat(labels)


@dataclass(frozen=True)
class Digits:
    """Pictures of one frame, in random order, and their classes."""

    pictures: Tensor
    labels: Tensor
    seed: int = 0

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        chosen = np.random.default_rng([self.seed, indices[0]]).integers(len(self.labels), size=len(indices))
        return {"video": self.pictures[chosen][:, None].expand(-1, -1, 3, -1, -1), "label": self.labels[chosen]}
