"""The world as a map-style data set and as a lazy clip."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import BT709, Colour
from frameloom.video.times import RegularTimes
from frameloom.world.world import World


class WorldDataset(Dataset):
    """Rendered clips with labels. Item i depends on (seed, i) alone; its tensors have no batch dimension.

    Args:
        kind, frames, fps, device, count: as for `World`.
        height, width, outputs, supersample, blur, noise, views, arc: as for `World.render`.
        seed: of the whole set; different seeds share no scene.
        length: number of items.
        motion: pixels a frame at this height and width.

    `batch(indices)` renders several items at once and stacks them, faster than one after the other.
    `world(indices)` gives their `World`, for captions, sounds and trajectories.
    """

    def __init__(
        self,
        kind: str,
        frames: int,
        height: int,
        width: int,
        seed: int = 0,
        length: int = 1000,
        outputs: Sequence[str] = ("rgb",),
        fps: float | int = 8,
        motion: float | int | None = None,
        device: str | torch.device = "cpu",
        count: int | None = None,
        **render: Any,
    ) -> None:
        self.kind, self.frames, self.height, self.width = kind, frames, height, width
        self.seed, self.length, self.outputs, self.fps = seed, length, tuple(outputs), fps
        self.motion, self.device, self.count, self.render = motion, device, count, render

    def __len__(self) -> int:
        return self.length

    def world(self, indices: Sequence[int]) -> World:
        """The scenes of some items."""
        for i in indices:
            if not 0 <= i < self.length:
                raise IndexError(f"item {i} of a data set of {self.length}")
        seeds = [int(np.random.SeedSequence([self.seed, i]).generate_state(1, np.uint64)[0]) for i in indices]
        size = min(self.height, self.width)
        return World(self.kind, seeds, self.frames, self.fps, self.motion, size, self.device, count=self.count)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Several items stacked, each output with a leading dimension b."""
        return self.world(indices).render(self.height, self.width, self.outputs, **self.render)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch([index]).items()}


class WorldSource(Source):
    """Frames of one scene, rendered a few at a time when they are asked for."""

    def __init__(self, world: World, height: int, width: int, supersample: int, window: int) -> None:
        self.world, self.size, self.supersample, self.window = world, (height, width), supersample, window
        rate = Fraction(world.fps).limit_denominator(1_000_000)
        self.info = Info(width, height, rate, Colour(BT709, False), name=f"{world.kind} {world.seeds[0]}")

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, self.world.frames)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        start, stop, _ = slice(start, stop).indices(self.world.frames)
        for first in range(start, stop, self.window):
            last = min(first + self.window, stop)
            rgb = self.world.render(*self.size, supersample=self.supersample, start=first, stop=last)["rgb"][0].cpu()
            for k in range(first, last):
                yield Frame(Fraction(k) / self.info.rate, self.info.colour, rgb=rgb[k - first])

    def fingerprint(self) -> str:
        world = self.world
        return f"world {world.kind} {world.seeds[0]} {world.frames} {world.fps} {self.size} {self.supersample}"


def clip(
    seed: int = 0,
    kind: str = "flyover",
    frames: int = 48,
    height: int = 256,
    width: int = 384,
    fps: float | int = 24,
    supersample: int = 2,
    motion: float | int | None = None,
    device: str | torch.device = "cpu",
) -> Clip:
    """A synthetic scene as a lazy clip; `motion` is in pixels a frame at this height and width."""
    world = World(kind, [seed], frames, fps, motion, min(height, width), device)
    return Clip(WorldSource(world, height, width, supersample, window=4))
