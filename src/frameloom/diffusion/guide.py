"""Guidance: which branches of conditions to evaluate, and how to combine what they say.

A combination whose weights sum to 1 is the same in data, noise and velocity, all of them affine in each other at fixed
x_t; so combinations are made of the data. Rescaling by norms or deviations is not, and says its space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from frameloom.diffusion.cond import Cond, cat
from frameloom.diffusion.context import Ctx
from frameloom.diffusion.denoiser import Denoiser
from frameloom.diffusion.hooks import HookSet, install
from frameloom.diffusion.paths import spread
from frameloom.diffusion.predict import Prediction, target, to_prediction

# A strength: a number, one per frame `(b, t)`, or a function of the share of the run that is done.
Weight = float | Tensor | Callable[[float], float]


@dataclass(frozen=True)
class Branch:
    """One evaluation: its name, its condition, and hooks that hold in it alone."""

    name: str
    cond: Cond
    hooks: HookSet = ()


@runtime_checkable
class Guide(Protocol):
    def branches(self, cond: Cond, ctx: Ctx) -> Sequence[Branch]: ...

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction: ...


def evaluate(
    denoiser: Denoiser, branches: Sequence[Branch], x: Tensor, t: Tensor, ctx: Ctx, together: bool = True
) -> dict[str, Prediction]:
    """What the denoiser says in every branch: as one batch, or one after the other (less memory; hooks need it)."""
    report = ctx.report
    for branch in branches:
        report.evaluations[branch.name] = report.evaluations.get(branch.name, 0) + 1
    frames = x.shape[0] * x.shape[1]
    report.frames += frames * len(branches)
    if together and len(branches) > 1 and not any(branch.hooks for branch in branches):
        count = len(branches)
        report.launches += 1
        with ctx.within("+".join(branch.name for branch in branches)):
            found = denoiser(x.repeat(count, 1, 1, 1, 1), t.repeat(count, *[1] * (t.ndim - 1)),
                             cat([branch.cond for branch in branches]))  # fmt: skip
        parts = zip(branches, found.x0.chunk(count), found.eps.chunk(count), strict=True)
        return {branch.name: Prediction(x0, eps) for branch, x0, eps in parts}
    made = {}
    for branch in branches:
        report.launches += 1
        with ctx.within(branch.name), install(denoiser, branch.hooks):
            made[branch.name] = denoiser(x, t, branch.cond)
    return made


def strength(weight: Weight, ctx: Ctx, like: Tensor) -> Tensor | float:
    """A weight at this step, shaped to multiply `(b, t, c, h, w)`."""
    value = weight(ctx.fraction) if callable(weight) else weight
    return spread(value.to(like.device), like) if isinstance(value, Tensor) else value


def mix(start: Prediction, end: Prediction, w: Tensor | float) -> Prediction:
    """`start + w (end - start)` of data and noise."""
    return Prediction(start.x0 + w * (end.x0 - start.x0), start.eps + w * (end.eps - start.eps))


@dataclass(frozen=True)
class Unguided:
    """The condition as it is: one evaluation. Also for guidance-distilled networks."""

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        return [Branch("cond", cond)]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        return found["cond"]


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance, `u + w (c - u)`. Ho and Salimans, arXiv 2207.12598.

    Args:
        w: strength; a tensor `(b, t)` gives one to every frame (SVD's ramp).
        drop: the names to null; all that have a null when empty.
        interval: shares of the run between which it is on; outside one evaluation is made.
        rescale: phi of Lin et al. (arXiv 2305.08891): pulls the deviation of the output towards the conditional one's.
        space: the output in which `rescale` is done: "noise", "v" or "velocity".
    """

    w: Weight = 7.5
    drop: tuple[str, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    space: str = "noise"

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        if not self.interval[0] <= ctx.fraction < self.interval[1]:
            return [Branch("cond", cond)]
        return [Branch("cond", cond), Branch("null", cond.null(*self.drop))]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        if "null" not in found:
            return found["cond"]
        made = mix(found["null"], found["cond"], strength(self.w, ctx, x))
        if not self.rescale:
            return made
        of = lambda p: target(self.space, p.x0, p.eps, t, ctx.path)  # noqa: E731
        plain, guided = of(found["cond"]), of(made)
        ratio = plain.flatten(1).std(1) / guided.flatten(1).std(1)
        guided = guided * spread(self.rescale * ratio + 1 - self.rescale, x)
        return to_prediction(self.space, guided, x, t, ctx.path, ctx.y)


@dataclass(frozen=True)
class Joint:
    """STIV's joint guidance: text and picture are taken away together, and the length of the velocity is kept.

    v = v_null + w (v_cond - v_null), then v <- v ||v_cond|| / ||v||, norms over a whole sample. arXiv 2412.07730.
    """

    w: Weight = 7.5
    renorm: bool = True

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        return [Branch("cond", cond), Branch("null", cond.null())]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        made = mix(found["null"], found["cond"], strength(self.w, ctx, x))
        return renormed(made, found["cond"], x, t, ctx) if self.renorm else made


@dataclass(frozen=True)
class Separate:
    """Picture, then text: `u + w_image (i - u) + w_text (it - i)`, three evaluations. arXiv 2211.09800."""

    image: Weight = 1.5
    text: Weight = 7.5
    text_names: tuple[str, ...] = ("text", "text_mask")
    renorm: bool = False

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        names = [name for name in self.text_names if name in cond.nulls]
        return [Branch("both", cond), Branch("image", cond.null(*names)), Branch("null", cond.null())]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        first = mix(found["null"], found["image"], strength(self.image, ctx, x))
        w = strength(self.text, ctx, x)
        both, image = found["both"], found["image"]
        made = Prediction(first.x0 + w * (both.x0 - image.x0), first.eps + w * (both.eps - image.eps))
        return renormed(made, both, x, t, ctx) if self.renorm else made


def renormed(made: Prediction, like: Prediction, x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
    """`made` with its velocity scaled to the length of that of `like`, sample by sample."""
    v, goal = (target("velocity", p.x0, p.eps, t, ctx.path) for p in (made, like))
    ratio = goal.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1).clamp(min=1e-12)
    return to_prediction("velocity", v * spread(ratio, v), x, t, ctx.path)


@dataclass(frozen=True)
class CFGpp:
    """CFG++: the data of `u + w (c - u)` with w in [0, 1], the noise of u alone. Chung et al., arXiv 2406.08070."""

    w: Weight = 0.6

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        return [Branch("cond", cond), Branch("null", cond.null())]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        made = mix(found["null"], found["cond"], strength(self.w, ctx, x))
        return Prediction(made.x0, found["null"].eps)


@dataclass(frozen=True)
class Weak:
    """Away from a weaker version of the same network, made by hooks: `c + w (c - weak)` (PAG, skipped layers).

    Ahn et al., arXiv 2403.17377; Karras et al., arXiv 2406.02507.
    """

    hooks: HookSet
    w: Weight = 1.0

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        return [Branch("cond", cond), Branch("weak", cond, self.hooks)]

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        return mix(found["cond"], found["weak"], -1 * strength(self.w, ctx, x))


@dataclass(frozen=True)
class RCFG:
    """Residual guidance: the unconditional branch is a reference, not a call. StreamDiffusion, arXiv 2312.12491.

    eps = delta r + w (eps_c - delta r) with the residual r = (x_t - a x_ref) / c. `"self"` takes the clean input as the
    reference (no extra evaluation), `"onetime"` the unconditional estimate of the first step (one extra).

    Args:
        reference: x_ref `(b, t, c, h, w)`, for `"self"`.
    """

    w: Weight = 1.2
    delta: float = 1.0
    mode: str = "onetime"
    reference: Tensor | None = field(default=None, compare=False)

    def branches(self, cond: Cond, ctx: Ctx) -> list[Branch]:
        first = self.mode == "onetime" and ctx.i == 0
        return [Branch("cond", cond)] + ([Branch("null", cond.null())] if first else [])

    def combine(self, found: dict[str, Prediction], x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        memory = ctx.state.setdefault((id(self), "reference"), {})
        if "null" in found:
            memory["x0"] = found["null"].x0
        reference = memory["x0"] if self.mode == "onetime" else self.reference
        return residual(found["cond"], reference, x, t, ctx, strength(self.w, ctx, x), self.delta)


def residual(
    cond: Prediction, reference: Tensor, x: Tensor, t: Tensor, ctx: Ctx, w: Tensor | float, delta: float = 1.0
) -> Prediction:
    """`cond` guided away from a reference latent, by the equation of `RCFG`."""
    if delta == 1:  # the same in data space, without a division
        return Prediction.from_x0(ctx.path, x, t, reference + w * (cond.x0 - reference))
    away = delta * Prediction.from_x0(ctx.path, x, t, torch.broadcast_to(reference, x.shape)).eps
    return Prediction.from_eps(ctx.path, x, t, away + w * (cond.eps - away))
