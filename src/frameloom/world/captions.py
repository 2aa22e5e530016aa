"""Captioned clips to train text-to-video models on: rendered once, kept as bytes in the user's cache."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frameloom.atomic import aside
from frameloom.world.dataset import WorldDataset

_BLOCK = 128


def cache_folder() -> Path:
    """Where things that can be made again are kept: `$FRAMELOOM_CACHE`, or `frameloom` under the user's cache."""
    given = os.environ.get("FRAMELOOM_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(given) if given else base / "frameloom"


class CaptionedClips:
    """Clips of a world with their captions; item i is the same on every machine.

    The first reading renders a block of clips and keeps it on disk; later ones read it. Pictures are rounded to
    bytes, as a file would.

    Args:
        data: what to render; its captions are those of its worlds.
    """

    def __init__(self, data: WorldDataset) -> None:
        self.data = data
        key = repr((3, data.kind, data.frames, data.height, data.width, data.seed, data.fps, data.motion, data.count,
                    sorted(data.render.items())))  # fmt: skip
        self.folder = cache_folder() / "world" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Clips `(n, t, 3, h, w)` in [0, 1] and their captions."""
        clips, captions = [], []
        for index in indices:
            pictures, words = self._block(index // _BLOCK)
            clips.append(torch.from_numpy(pictures[index % _BLOCK].copy()))
            captions.append(str(words[index % _BLOCK]))
        return torch.stack(clips).float() / 255, captions

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        pictures, words = self.folder / f"{number}.npy", self.folder / f"{number}.words.npy"
        if not pictures.is_file():
            indices = range(number * _BLOCK, min((number + 1) * _BLOCK, len(self.data)))
            world = self.data.world(indices)
            made = world.render(self.data.height, self.data.width, **self.data.render)["rgb"]
            keep(words, np.array(world.captions()))
            keep(pictures, (made.clamp(0, 1) * 255).round().byte().cpu().numpy())
        return np.load(pictures, mmap_mode="r"), np.load(words)


def keep(path: Path, array: np.ndarray) -> None:
    """Write in one step, so that a reader beside never sees half a block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial, partial.open("wb") as file:
        np.save(file, array)
