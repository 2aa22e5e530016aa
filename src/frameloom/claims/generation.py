"""What the claims about generators share: held-out captions, many clips at once, and their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from frameloom.diffusion.generator import Generator, seeded
from frameloom.diffusion.run import sample
from frameloom.progress import Progress, silent
from frameloom.tasks.generation.base import Strategy, settle
from frameloom.world import WorldDataset

# Seeds that no training draws from.
HELD_OUT = 900_000


def captions(count: int, seed: int, objects: int = 1) -> list[str]:
    """Sentences about held-out scenes of the world's toys."""
    data = WorldDataset("toys", 16, 32, 32, HELD_OUT + seed, count, count=objects)
    return data.world(range(count)).captions()


def true_clips(count: int, seed: int, frames: int, side: int, objects: int = 1) -> Tensor:
    """Held-out clips `(n, t, 3, h, w)` of other scenes than `captions` of the same seed."""
    data = WorldDataset("toys", frames, side, side, 2 * HELD_OUT + seed, count, count=objects, supersample=2)
    return torch.cat([data.batch(range(i, min(i + 32, count)))["rgb"] for i in range(0, count, 32)])


def clips(model: Generator, texts: Sequence[str], seed: int, steps: int | None = None) -> Tensor:
    """A clip for each sentence, `(n, t, 3, h, w)`, as `generate` makes it, sixteen at a time."""
    made = []
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        n = steps or model.defaults.steps
        noise = seeded(model.denoiser.latent.shape(len(part)), seed + start)
        latents, _ = sample(model.denoiser, model.start(noise, n), model.grid(n), model.text(part),
                            guide=model.guided(model.defaults.guidance), step=model.step)  # fmt: skip
        made.append(model.decode(latents).clamp(0, 1))
    return torch.cat(made)


def through(
    strategy: Strategy,
    model: Generator,
    texts: Sequence[str],
    seed: int,
    progress: Progress = silent,
    **settings: object,
) -> Tensor:
    """A clip for each sentence, made by a strategy, `(n, t, 3, h, w)`."""
    made = []
    for number, text in enumerate(texts):
        request = settle(model, text, seed=seed + number, **settings)
        strategy.check(model, request)
        with torch.no_grad():
            made.append(torch.stack(list(strategy.frames(model, request, silent))))
        progress(type(strategy).__name__.lower(), number + 1, len(texts))
    return torch.stack(made)


def shown(scores: dict[str, float], names: Sequence[str]) -> dict[str, str]:
    """Some scores, to print."""
    return {name.replace("_", " "): f"{scores[name]:.3f}" for name in names}
