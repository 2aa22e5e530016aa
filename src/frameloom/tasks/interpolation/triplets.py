"""What methods that interpolate learn from: triplets of the synthetic world."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Motion that grows with training: the largest speed, in pixels between the two given frames.

    From `start` to `end` over the first `ramp` of the run, geometrically; equal ends make it uniform.
    """

    start: float = 4.0
    end: float = 16.0
    ramp: float = 0.6

    def motion(self, progress: float) -> float:
        """The largest speed at `progress` in [0, 1]."""
        return self.start * (self.end / self.start) ** min(1.0, progress / self.ramp)


class Triplets:
    """Endless triplets of the synthetic world: two frames and the true one halfway between."""

    def __init__(self, crop: int, seed: int, curriculum: Curriculum):
        self.crop, self.seed, self.curriculum = crop, seed, curriculum

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`pair` (b, 2, 3, h, w), `middle` (b, 3, h, w), `t` (b,)."""
        from frameloom.world import WorldDataset

        # Rendered at twice the size: an aliased middle frame is sharper than any warp of its neighbours.
        speed = self.curriculum.motion(progress) / 2
        world = WorldDataset("motion", 3, self.crop, self.crop, self.seed, length=2**48, motion=speed, supersample=2)
        rgb = world.batch(indices)["rgb"].clone()  # rendered under inference mode, which autograd refuses
        return {"pair": rgb[:, ::2], "middle": rgb[:, 1], "t": torch.full((len(rgb),), 0.5)}
