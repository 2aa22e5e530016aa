"""A mixture of Gaussians in the plane as a generator, and small networks on it: what the claims about distillation run.

A point is a video of one frame, two channels and one pixel, so that everything that works on videos works on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.analytic import ANY, GaussianMixture
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Denoiser, Latent, Plain, rebase
from frameloom.diffusion.generator import Defaults
from frameloom.diffusion.guide import CFG, Guide
from frameloom.diffusion.objective import mse
from frameloom.diffusion.paths import VP, Flow, Path
from frameloom.diffusion.predict import target
from frameloom.diffusion.step import Grids, Universal
from frameloom.layers.attention import sinusoid

CLASSES = 3
SHAPE = (1, 2, 1, 1)
PATHS: dict[str, Path] = {"vp": VP.of("linear", zero_snr=True), "flow": Flow()}


def ring(path: str, std: float = 0.15, radius: float = 2.0) -> GaussianMixture:
    """Nine spots on a circle, every third of the same class."""
    angle = 2 * math.pi * torch.arange(9) / 9
    means = radius * torch.stack([angle.cos(), angle.sin()], 1).view(-1, *SHAPE)
    return GaussianMixture(means, std, PATHS[path], classes=torch.arange(9) % CLASSES)


@dataclass(frozen=True)
class Config:
    """A network of `depth` layers of `width`, on a path with a prediction (see the generators' bases)."""

    width: int = 128
    depth: int = 3
    path: str = "flow"
    prediction: str = "velocity"
    rebase: str = ""
    distilled: int = 0


class _Generator(nn.Module):
    """What a point's generators share."""

    id = name = "plane"
    needs_image, words, step = False, None, Universal()
    classes = tuple("012")

    def text(self, prompts: Sequence[str]) -> Cond:
        return Cond({"label": torch.tensor([int(prompt) for prompt in prompts])}, {"label": torch.tensor([ANY])})

    def grid(self, steps: int) -> Tensor:
        path = self.denoiser.path
        return Grids.trailing(path, steps) if isinstance(path, VP) else Grids.linear(path, steps)

    def guided(self, w: float) -> Guide:
        return CFG(w)

    def decode(self, latents: Tensor) -> Tensor:
        """The plane's middle 8 x 8, in [0, 1]."""
        return latents / 8 + 0.5


class Exact(_Generator):
    """The mixture's own denoiser as a teacher. Its students start from nothing."""

    defaults = Defaults(steps=50, guidance=2.0)

    def __init__(self, path: str = "vp", seed: int = 0) -> None:
        super().__init__()
        self.denoiser, self.seed = ring(path), seed
        self.register_buffer("means", self.denoiser.means)

    def student(self, steps: int, exact: bool = False) -> "Net":
        torch.manual_seed(self.seed)
        return Net(Config(distilled=steps))


class Net(_Generator):
    """A perceptron that is told x, the time and the class; the class after the last stands for none."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.label = nn.Embedding(CLASSES + 1, config.width)
        self.first = nn.Linear(2 + 32, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.last = nn.Linear(config.width, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        path = PATHS[self.config.path]
        told = torch.cat([x.flatten(1), sinusoid((1000 * t / path.t_max).float(), 32)], 1)
        label = torch.where(cond["label"] == ANY, CLASSES, cond["label"])
        y = self.first(told) + self.label(label)
        for layer in self.hidden:
            y = y + layer(nn.functional.silu(y))
        return self.last(nn.functional.silu(y)).view_as(x)

    @property
    def defaults(self) -> Defaults:
        return Defaults(steps=self.config.distilled or 50, guidance=1.0)

    @property
    def denoiser(self) -> Denoiser:
        c = self.config
        own = Plain(self.forward, PATHS[c.path], c.prediction, Latent(2, 1, 1, 1))
        return rebase(own, PATHS[c.rebase]) if c.rebase else own

    def student(self, steps: int, exact: bool = False) -> "Net":
        config = replace(self.config, distilled=steps)
        if not isinstance(self.denoiser.path, Flow):
            flow = {"rebase": "flow"} if exact else {"path": "flow", "prediction": "velocity"}
            config = replace(config, **flow)
        made = Net(config)
        made.load_state_dict(self.state_dict())
        return made

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Plain denoising of true examples, a tenth of them without their class: how a teacher comes about."""
        x0, path = batch["data"], PATHS[self.config.path]
        gone = torch.rand(len(x0)) < 0.1
        cond = Cond({"label": torch.where(gone, ANY, batch["label"])})
        t = torch.rand(len(x0)) * (path.t_max - 1) + 1 if isinstance(path, VP) else torch.rand(len(x0))
        eps = torch.randn_like(x0)
        made = self(path.add_noise(x0, t, eps), t, cond)
        return mse(made, target(self.config.prediction, x0, eps, t, path)).mean()


class Points:
    """True examples of the mixture, as training data."""

    def __init__(self, seed: int) -> None:
        self.mixture, self.seed = ring("flow"), seed

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 7919 + indices[0])
        chosen = torch.randint(9, (len(indices),), generator=generator)
        means = self.mixture.means[chosen]
        return {"data": means + self.mixture.std * torch.randn(means.shape, generator=generator),
                "label": self.mixture.classes[chosen]}  # fmt: skip


def energy_distance(a: Float[Tensor, "n ..."], b: Float[Tensor, "m ..."]) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| without bias: 0 for equal distributions, on average."""
    a, b = a.flatten(1), b.flatten(1)
    within = lambda x: float(torch.cdist(x, x).sum()) / (len(x) * (len(x) - 1))  # noqa: E731
    return 2 * float(torch.cdist(a, b).mean()) - within(a) - within(b)


def by_class(a: Tensor, b: Tensor, which: Tensor) -> float:
    """The energy distance of two samples, each class for itself, as a mean."""
    found = [energy_distance(a[which == label], b[which == label]) for label in which.unique().tolist()]
    return sum(found) / len(found)


def unit(count: int, seed: int) -> Float[Tensor, "n 1 2 1 1"]:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def classes(count: int) -> Any:
    return torch.arange(count) % CLASSES
