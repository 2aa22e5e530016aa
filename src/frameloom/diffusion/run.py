"""`sample`: the one loop from noise to data. Everything that a method adds is an argument of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import Ctx, Report, running
from frameloom.diffusion.denoiser import Denoiser
from frameloom.diffusion.guide import Guide, Unguided, evaluate
from frameloom.diffusion.hooks import HookSet, install
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.step import Fresh, Step, Universal
from frameloom.errors import InputError


class Edit:
    """Changes an estimate before the step, or the sample after it. Both do nothing unless a leaf says so."""

    def on_x0(self, p: Prediction, x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        return p

    def after_step(self, x: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        return x


class HoldGiven(Edit):
    """Keeps known frames on the straight way from their noise to themselves, so that they end bit-equal.

    The branch that is not told of them sees them at the noise level of the others.
    """

    def __init__(self, clean: Tensor, given: Tensor, noise: Tensor) -> None:
        self.clean, self.given, self.noise = clean, given, noise

    def after_step(self, x: Tensor, s: Tensor, ctx: Ctx) -> Tensor:
        # At the end a = 1 and c = 0 exactly: what comes out is the frame that went in.
        kept = ctx.path.add_noise(self.clean, s, self.noise)
        return torch.where(self.given[..., None, None, None], kept.to(x.dtype), x)


def sample(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    cond: Cond,
    *,
    guide: Guide | None = None,
    step: Step | None = None,
    noise: Callable[[Tensor, Ctx], Tensor] | None = None,
    y: Tensor | None = None,
    edits: Sequence[Edit] = (),
    hooks: HookSet = (),
    together: bool = True,
    callback: Callable[[Ctx, Tensor], None] | None = None,
) -> tuple[Tensor, Report]:
    """From noise to data along a grid of times.

    Args:
        x: `(b, t, c, h, w)` at the first time of the grid.
        grid: `(n + 1,)` falling times, or `(n + 1, t)` with a column for every frame (a plan).
        guide: no guidance when None. step: DDIM when None. noise: what stochastic steps draw.
        y: the known end of a bridge.
        edits: applied in their order, to every estimate and after every step.
        hooks: installed on the denoiser for the length of the run.
        together: run the branches of a guide as one batch.
        callback: told of every finished step.

    Raises:
        InputError: times per frame on a host that has one time for all, or a sample that is no number (the step is
            named).
    """
    if grid.ndim == 2 and not denoiser.latent.per_frame_time:
        raise InputError("this model has one noise level for a whole clip; the plan asks for one per frame")
    guide, step = guide or Unguided(), step or Universal()
    ctx = Ctx(denoiser.path, len(grid) - 1, y=y, noise=noise or Fresh(0))
    grid = grid.to(x.device)

    def estimate(x: Tensor, t: Tensor) -> Prediction:
        p = guide.combine(evaluate(denoiser, guide.branches(cond, ctx), x, t, ctx, together), x, t, ctx)
        for edit in edits:
            p = edit.on_x0(p, x, t, ctx)
        return p

    ctx.evaluate = estimate
    with running(ctx), install(denoiser, hooks), torch.no_grad():
        for i in range(ctx.n):
            t, s = (row.expand(len(x), *row.shape) for row in (grid[i], grid[i + 1]))
            ctx.i, ctx.t, ctx.s = i, t, s
            x = step(x, estimate(x, t), t, s, ctx)
            for edit in edits:
                x = edit.after_step(x, s, ctx)
            if not bool(torch.isfinite(x).all()):
                raise InputError(f"sampling left the numbers at step {i + 1} of {ctx.n}; "
                                 "try float32, or less guidance")  # fmt: skip
            if callback is not None:
                callback(ctx, x)
    return x, ctx.report
