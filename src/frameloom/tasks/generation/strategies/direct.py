"""Direct sampling: all frames at once, as the model was trained. The baseline of every strategy for long video."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Denoiser, Given
from frameloom.diffusion.generator import Generator, seeded
from frameloom.diffusion.hooks import HookSet
from frameloom.diffusion.run import HoldGiven, sample
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request, check_memory, condition, given_latents


class Direct:
    """Plain sampling of any number of frames in one piece."""

    def __init__(self) -> None:
        pass

    def check(self, model: Generator, request: Request) -> None:
        check_memory(model, request)

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        yield from whole(model, request, progress)


def whole(
    model: Generator,
    request: Request,
    progress: Progress,
    x: Tensor | None = None,
    hooks: HookSet = (),
    denoiser: Denoiser | None = None,
    apart: bool = False,
) -> Iterator[Float[Tensor, "3 h w"]]:
    """Sample a request in one run of the loop.

    Args:
        x: the noise to start from, `(1, t, c, h, w)`, of unit variance. denoiser: in the place of the model's own.
        apart: run the branches of guidance one after the other.
    """
    denoiser = denoiser or model.denoiser
    cond = condition(model, request)
    x = seeded(denoiser.latent.shape(1, model.latent_frames(request.frames)), request.seed) if x is None else x
    x = x.to(next(iter(cond.values.values())).device)
    edits = []
    if (found := given_latents(model, request)) is not None:
        given, clean = found
        denoiser = Given(denoiser)
        cond = Cond(cond.values | {"given": given, "clean": clean}, cond.nulls | {"given": given & False})
        edits = [HoldGiven(clean, given, x)]
    latents, _ = sample(
        denoiser, model.start(x, request.steps), model.grid(request.steps), cond, guide=request.guide(model),
        step=request.step(model), edits=edits, hooks=hooks, together=not apart,
        callback=lambda ctx, _: progress("sampling", ctx.i + 1, ctx.n),
    )  # fmt: skip
    for frame in model.decode(latents)[0]:
        yield frame.clamp(0, 1)
