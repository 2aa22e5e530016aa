"""Exact denoisers, without a network: what samplers, guides and distillation are tested on.

For data from a mixture of Gaussians with means m_k, one deviation s for all and weights w_k, at x = a x0 + c eps,

    E[x0 | x] = sum_k p_k (m_k + a s^2 / (a^2 s^2 + c^2) (x - a m_k)),
    p_k  proportional to  w_k exp(-|x - a m_k|^2 / (2 (a^2 s^2 + c^2)))

with a class for every component, so that guidance has something to guide by. With whole clips as means it is a film
whose every continuation is known.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Site
from frameloom.diffusion.paths import Path, spread
from frameloom.diffusion.predict import Prediction

ANY = -1


class GaussianMixture:
    """The denoiser of a mixture, on any path without a known end.

    Args:
        means: `(k, t, c, h, w)`. std: of every component. weights: `(k,)`, even when None.
        classes: `(k,)` whole numbers; the condition `label` `(b,)` keeps the components of its class, -1 keeps all.
    """

    def __init__(
        self,
        means: Float[Tensor, "k t c h w"],
        std: float,
        path: Path,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        self.means, self.std, self.path = means, std, path
        self.weights = torch.ones(len(means)) / len(means) if weights is None else weights / weights.sum()
        self.classes = torch.arange(len(means)) if classes is None else classes
        _, t, c, h, w = means.shape
        self.latent = Latent(c, t, h, w, per_frame_time=True)

    def labels(self, labels: Tensor) -> Cond:
        """The condition of some classes, with none at all as its null."""
        return Cond({"label": labels}, {"label": torch.tensor([ANY])})

    def draw(self, count: int, generator: torch.Generator, label: int = ANY) -> Tensor:
        """True examples `(count, t, c, h, w)`."""
        weights = self.weights if label == ANY else self.weights * (self.classes == label)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        means = self.means[chosen]
        return means + self.std * torch.randn(means.shape, generator=generator, dtype=means.dtype)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        a, _, c = (spread(value, x)[:, None] for value in self.path.coef(t.to(x.dtype)))
        means, rest = self.means.to(x)[None], x[:, None] - a * self.means.to(x)[None]
        variance = a**2 * self.std**2 + c**2
        logits = self.weights.to(x).log() - (rest**2 / (2 * variance)).flatten(2).sum(2)
        if (label := cond.get("label")) is not None:
            wrong = (label[:, None] != ANY) & (self.classes[None] != label[:, None])
            logits = logits.masked_fill(wrong, float("-inf"))
        share = torch.softmax(logits, 1)[:, :, None, None, None, None]
        x0 = (share * (means + a * self.std**2 / variance * rest)).sum(1)
        return Prediction.from_x0(self.path, x, t, x0)

    def sites(self, kind: str) -> Iterator[Site]:
        return iter(())
