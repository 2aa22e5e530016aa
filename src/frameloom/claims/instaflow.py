"""InstaFlow: straighten the paths of a teacher, then make them one step; against distilling the teacher at once."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frameloom.claims import plane
from frameloom.claims.base import Result
from frameloom.claims.handwriting import Judge
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.distill import Pairs, ode, reflow_loss, straightness, transport_cost
from frameloom.diffusion.generator import open_generator
from frameloom.diffusion.paths import Flow
from frameloom.diffusion.step import Grids, Universal
from frameloom.progress import Progress
from frameloom.tasks.distillation.base import Job
from frameloom.tasks.distillation.instaflow import InstaFlow
from frameloom.training.recipe import Recipe

POINTS = 3000


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Four students of an exact guided teacher in the plane; with `retrain`, of the shipped digits."""
    return digits(seed, progress) if retrain else mixture(seed, progress)


def students(job: Any, folder: Path) -> tuple[Any, Any, Any, Pairs]:
    """(A) one step at once, (B) reflow and one step, (C) the reflowed one with all updates, and the teacher's pairs.

    All have as many updates in all.
    """
    made = []
    for name, share in (("A", 0.0), ("B", 0.5), ("C", 1.0)):
        (folder / name).mkdir()
        if name != "A":  # the same frozen pairs for all
            (folder / name / "pairs").symlink_to(folder / "A" / "pairs")
        made.append(InstaFlow(reflow=share).run(job(folder / name)))
    return (*made, Pairs(folder / "A" / "pairs"))


def mixture(seed: int, progress: Progress) -> Result:
    teacher = plane.Exact("vp", seed)
    cond = teacher.text(teacher.classes)
    training = Recipe(steps=3000, batch_size=256, lr=2e-3, final_lr=1e-5, warmup=50, hold=0.3, ema=0.99)
    job = lambda folder: Job(teacher, cond, folder, 2.0, "euler", 50, 8000, training, seed, progress=progress)  # noqa: E731
    which = plane.classes(POINTS)
    told, guide = cond.rows(which), teacher.guided(2.0)
    truth = _drawn(teacher, 50, plane.unit(POINTS, seed + 101), told, guide)
    noise = plane.unit(POINTS, seed + 202)
    with tempfile.TemporaryDirectory() as folder:
        a, b, c, pairs = students(job, Path(folder))
    score = lambda model, steps, guide=None: plane.by_class(_drawn(model, steps, noise, told, guide), truth, which)  # noqa: E731
    # The teacher's own map of the same noises: what two finite samples of one distribution are apart.
    floor = score(teacher, 50, guide)
    before = transport_cost(pairs.noise[:POINTS], pairs.data[:POINTS])
    # The pairs take the classes in turn, so the first of them have the conditions of `told`.
    after = transport_cost(pairs.noise[:POINTS], _drawn(c, 100, pairs.noise[:POINTS], told))
    spread = float((after - before).std()) / POINTS**0.5
    checks = {
        "the transport cost does not grow": float((after - before).mean()) <= 2 * spread,
        "100 steps of the reflowed flow keep the distribution": abs(score(c, 100) - floor) <= 1e-3,
        "a straight coupling is exact in one step": straight_is_exact(seed),
    }
    setting = (f"9 spots on a circle in 3 classes, exact teacher, w=2, 50 DDIM steps, 8,000 pairs, {training.steps:,} "
               f"updates each, {POINTS} points judged by energy distance, seed {seed}")  # fmt: skip
    bends = [straightness(teacher.denoiser, noise, told, guide=guide), straightness(c.denoiser, noise, told)]
    return _result(setting, score, a, b, c, teacher, guide, bends, checks, f"{floor:.1e} between two samples of one")


def digits(seed: int, progress: Progress) -> Result:
    teacher = open_generator("digits-16")
    cond, judge = teacher.text(teacher.classes), Judge.trained(seed)
    training = Recipe(steps=800, batch_size=32, lr=1e-3, final_lr=1e-5, warmup=30, hold=0.3, ema=0.98)
    job = lambda folder: Job(teacher, cond, folder, 2.0, "dpmpp2m", 20, 2048, training, seed, progress=progress)  # noqa: E731
    count = 1000
    told, guide = cond.rows(torch.arange(count) % 10), teacher.guided(2.0)
    generator = torch.Generator().manual_seed(seed + 101)
    shape = teacher.denoiser.latent.shape(count)
    first, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    truth = teacher.decode(_drawn(teacher, 50, first, told, guide))
    with tempfile.TemporaryDirectory() as folder:
        a, b, c, _ = students(job, Path(folder))
    score = lambda model, steps, guide=None: judge.distance(  # noqa: E731
        teacher.decode(_drawn(model, steps, noise, told, guide)), truth)  # fmt: skip
    few = (noise[:128], told.rows(slice(0, 128)), 25)
    bends = [straightness(teacher.denoiser, *few, guide), straightness(c.denoiser, *few)]
    setting = (f"digits-16, w=2, 20 steps of dpmpp2m, 2,048 pairs, {training.steps} updates each, {count} pictures "
               f"judged by Frechet distance in the features of a classifier of real digits, seed {seed}")  # fmt: skip
    floor = score(teacher, 50, guide)
    checks = {"a straight coupling is exact in one step": straight_is_exact(seed)}
    return _result(setting, score, a, b, c, teacher, guide, bends, checks, f"{floor:.2f} between two samples of one")


def _result(setting, score, a, b, c, teacher, guide, bends, checks, floor) -> Result:
    steps = (1, 2, 4, 8, 25)
    show = lambda value: f"{value:.4g}"  # noqa: E731
    found = {"C": {n: score(c, n) for n in steps}, "D": {n: score(teacher, n, guide) for n in (1, 2, 4, 8)}}
    at_once, after = score(a, 1), score(b, 1)
    rows = [
        {"name": "A one step at once", "1": show(at_once)},
        {"name": "B reflow, then one step", "1": show(after)},
        {"name": "C reflow"} | {str(n): show(value) for n, value in found["C"].items()},
        {"name": "D teacher"} | {str(n): show(value) for n, value in found["D"].items()},
    ]
    gain, fall = at_once / max(after, 1e-9), bends[0] / bends[1]
    few = found["C"][4] < found["D"][8]
    return Result(
        "instaflow",
        paper="FID 23.3 at one step on COCO2017-5k against 37.2 of progressive distillation; distilling without reflow "
              "fails",
        setting=setting,
        rows=rows,
        checks=checks,
        holds=gain >= 1.5 and fall >= 5 and few,
        summary=f"B is {gain:.2f}x nearer than A (needs >= 1.5); S falls {bends[0]:.3g} to {bends[1]:.3g}, "
                f"{fall:.1f}x (needs >= 5); C at 4 steps {'beats' if few else 'does not beat'} D at 8",
        notes=[f"distances at so many evaluations of a student; {floor}"],
    )  # fmt: skip


def _drawn(model: Any, steps: int, noise: Tensor, cond: Cond, guide: Any = None) -> Tensor:
    return ode(model.denoiser, model.grid(steps), Universal(), guide)(noise, cond)


def straight_is_exact(seed: int) -> bool:
    """Noise and the same noise moved, tied one by one: the straight velocity has no loss, and one Euler step is the
    map."""
    move, noise = torch.tensor([1.5, -0.5]).view(1, *plane.SHAPE), plane.unit(64, seed + 303)
    flow = Plain(lambda x, t, cond: torch.zeros_like(x) - move, Flow(), "velocity", Latent(2, 1, 1, 1))
    loss = reflow_loss(flow, noise, noise + move, Cond(), torch.linspace(0.01, 1, 64))
    made = ode(flow, Grids.linear(Flow(), 1), Universal())(noise, Cond())
    return float(loss.max()) < 1e-9 and bool(torch.allclose(made, noise + move, atol=1e-6))
