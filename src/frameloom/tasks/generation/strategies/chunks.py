"""Clips one after the other, each from noise of its own: the naive way to a long video, with a seam at every border."""

from collections.abc import Iterator
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.generator import Generator
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request
from frameloom.tasks.generation.strategies.direct import whole


class Chunks:
    """Independent clips of the model's own length; every scene begins a new one."""

    def __init__(self) -> None:
        pass

    def check(self, model: Generator, request: Request) -> None:
        """Nothing: any model can do it."""

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        length, number, start = model.denoiser.latent.frames, 0, 0
        for text, count in request.scenes:
            for first in range(0, count, length):
                size = min(length, count - first)
                given = {k - start: picture for k, picture in request.given.items() if start <= k < start + size}
                part = replace(request, scenes=((text, length),), seed=request.seed + number, given=given)
                for frame, _ in zip(whole(model, part, progress), range(size), strict=False):
                    yield frame
                number, start = number + 1, start + size
