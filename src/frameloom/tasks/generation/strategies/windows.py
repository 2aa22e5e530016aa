"""Co-denoising in windows: every step denoises overlapping windows on their own and averages what they say.

The baseline of FreeNoise that works on any host (GenL-Video; MultiDiffusion along time): each frame is computed in all
the windows that it is in, F. Wang et al., arXiv 2305.18264.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.attention_edits import fused
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import current
from frameloom.diffusion.denoiser import Denoiser, Site
from frameloom.diffusion.generator import Generator
from frameloom.diffusion.predict import Prediction
from frameloom.errors import InputError
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request
from frameloom.tasks.generation.strategies.direct import whole

PER_FRAME = ("given", "clean")


class Windowed:
    """A denoiser that sees `size` frames at a time, `stride` apart, and averages by triangle weights."""

    def __init__(self, base: Denoiser, size: int, stride: int) -> None:
        self.base, self.path, self.latent, self.size, self.stride = base, base.path, base.latent, size, stride

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        seen = 0

        def part(start: int, stop: int) -> Tensor:
            nonlocal seen
            seen += len(x) * (stop - start)
            times = t[:, start:stop] if t.ndim == 2 else t
            own = cond.replace(**{name: cond[name][:, start:stop] for name in PER_FRAME if name in cond})
            return self.base(x[:, start:stop], times, own).x0

        x0 = fused(x.shape[1], self.size, self.stride, part, dim=1)
        if (ctx := current()) is not None:  # the loop has counted every frame once
            ctx.report.frames += seen - len(x) * x.shape[1]
        return Prediction.from_x0(self.path, x, t, x0)

    def sites(self, kind: str) -> Iterator[Site]:
        return self.base.sites(kind)


class Windows:
    """Long clips by averaging windows. `stride` is a quarter of the model's length when None."""

    def __init__(self, window: int | None = None, stride: int | None = None) -> None:
        self.window, self.stride = window, stride

    def check(self, model: Generator, request: Request) -> None:
        if len(request.scenes) > 1:
            raise InputError("windows: one sentence for the whole clip; freenoise and ouroboros take several")

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        window = self.window or model.denoiser.latent.frames
        denoiser = Windowed(model.denoiser, window, self.stride or max(1, window // 4))
        yield from whole(model, request, progress, denoiser=denoiser)
