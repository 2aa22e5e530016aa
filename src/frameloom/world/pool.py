"""Clips of the world with their flows, rendered once and kept: what several tasks learn from."""

import numpy as np
import torch
from torch import Tensor

from frameloom.world.captions import cache_folder, keep
from frameloom.world.dataset import WorldDataset

_BLOCK = 32
# Kinds of block, in turn: kind of world, largest motion in pixels a frame, instants of the shutter.
MIXTURE = (("motion", 4.0, 1), ("motion", 10.0, 1), ("motion", 18.0, 1), ("motion", 10.0, 4), ("flyover", 3.0, 1))
_FRAMES, _HEIGHT, _WIDTH = 5, 112, 160


class Pool:
    """Clips of the world with flows both ways, rendered at the first reading and kept in the user's cache.

    Slow, quick and very quick scenes, blurred ones and flights of a camera come in equal parts. Pictures are bytes
    and flows half precision (finer than 0.01 pixels here).
    """

    def __init__(self, seed: int, length: int = 960) -> None:
        self.seed, self.length = seed, length
        self.folder = cache_folder() / "world" / f"flow-2-{seed}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pictures, flows = self._block(index // _BLOCK)
        forward, backward = torch.from_numpy(flows[index % _BLOCK].astype(np.float32))
        valid = torch.ones(len(forward), *forward.shape[2:], dtype=torch.bool)
        video = torch.from_numpy(pictures[index % _BLOCK].astype(np.float32)) / 255
        return {"video": video, "flow": forward, "backward": backward, "valid": valid, "backward_valid": valid}

    def video(self, index: int) -> np.ndarray:
        """The pictures alone, as bytes: `(t, 3, h, w)`."""
        return self._block(index // _BLOCK)[0][index % _BLOCK]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        pictures, flows = self.folder / f"{number}.npy", self.folder / f"{number}.flow.npy"
        if not pictures.is_file():
            kind, motion, blur = MIXTURE[number % len(MIXTURE)]
            data = WorldDataset(kind, _FRAMES, _HEIGHT, _WIDTH, self.seed, length=2**31, motion=motion, blur=blur,
                                supersample=1 if blur > 1 else 2, outputs=("rgb", "flow", "backward_flow"))  # fmt: skip
            made = data.batch(range(number * _BLOCK, (number + 1) * _BLOCK))
            both = torch.stack([made["flow"], made["backward_flow"]], 1)
            keep(flows, both.half().cpu().numpy())
            keep(pictures, (made["rgb"].clamp(0, 1) * 255).round().byte().cpu().numpy())
        return np.load(pictures, mmap_mode="r"), np.load(flows, mmap_mode="r")
