"""SEM: one autoencoder for every frame, and a model of what its integers cost once the frame before is known.

For whoever wants a learned codec for any video with one set of weights and nothing that can drift: no motion search, no
warping, no residual of pictures. A frame x_t becomes integers, which are coded without loss:

    y_t = round(g_a(x_t)),    frame = g_s(y_t),    bits = -log2 P(y_t - y_{t-1} | z_t, y_{t-1}, what came before in y_t)

P is a Gaussian for each integer, its mean and scale found by four parts: a hyper latent z_t = round(h_a(y_t, y_{t-1}))
that is sent first, a spatial prior (a masked convolution over what was coded already), a temporal prior (a network of
y_{t-1}), and a join of the three. So how good a frame looks hangs on that frame alone; the models only move its price.
The first frame of a group has a model without the frame before it. Gains for every channel turn one set of weights into
a range of rates.

Z. Sun, Z. Tan, X. Sun, F. Zhang, D. Li, Y. Qian, H. Li, Spatiotemporal Entropy Model is All You Need for Learned Video
Compression, arXiv 2104.06083, 2021.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.bitstream.entropy import gaussian_bits, noisy, rounded
from frameloom.tasks.compression.base import SectionedCodec
from frameloom.tasks.compression.pairs import Pairs, pairs
from frameloom.tasks.compression.sem_network import Autoencoder, EntropyModel
from frameloom.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Config:
    """The networks. `widths`: channels after each halving of the picture, the latent's last. `hidden`: of a hyper
    latent. `weights`: what the squared error weighs against bits a pixel, for each point of rate. `difference`: the
    latent's change is priced; otherwise the latent itself, its spatial prior seeing it as it is. `learned`: the share
    of a training run after which the autoencoder and the model of first frames stand still and the other model begins.
    """

    widths: tuple[int, ...]
    hidden: int
    weights: tuple[float, ...]
    difference: bool = True
    learned: float = 0.55


PRESETS = {
    "tiny": Config(widths=(48, 64, 48), hidden=48, weights=(60.0, 150.0, 400.0, 1000.0, 2500.0, 6000.0)),
    "paper": Config(widths=(256, 256, 256, 320), hidden=256,
                    weights=(50.0, 160.0, 300.0, 480.0, 710.0, 1000.0, 1350.0, 1780.0, 2302.0, 2915.0)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stages(Recipe):
    """A schedule that runs twice: to the share `learned` of the run, and again from there to the end."""

    learned: float = 0.55

    def lr_at(self, step: int) -> float:
        switch = round(self.learned * self.steps)
        begin, end = (0, switch) if step < switch else (switch, self.steps)
        own = {name: getattr(self, name) for name in ("batch_size", "lr", "final_lr", "warmup", "hold")}
        return Recipe(steps=end - begin, **own).lr_at(step - begin)


RECIPES = {
    "tiny": Stages(steps=13_000, batch_size=16, lr=1e-3, final_lr=2e-5, weight_decay=0.0),
    # 1.9 million steps of the second stage are published; of the first none.
    "paper": Stages(steps=3_800_000, batch_size=16, lr=1e-4, final_lr=1e-6, weight_decay=0.0, clip_norm=5.0,
                    learned=0.5),
}  # fmt: skip
CROPS = {"tiny": 64, "paper": 256}


class SEM(SectionedCodec, nn.Module):
    """An autoencoder, and the models of its integers: `intra` for first frames, `inter` for the others."""

    method: ClassVar[str] = "sem"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pictures = Autoencoder(config.widths, config.weights)
        self.intra = EntropyModel(config.widths[-1], config.hidden, temporal=False)
        self.inter = EntropyModel(config.widths[-1], config.hidden, temporal=True)

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: stride 8, 6 points of rate. `paper`: stride 16, 10 points."""
        return PRESETS[size]

    @classmethod
    def recipe(cls, size: str) -> Stages:
        """How a size is trained."""
        return RECIPES[size]

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Pairs:
        """What a size learns from; `source` is `world`."""
        return pairs(source, CROPS[size], seed)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Stage 1: bits a pixel of a frame alone + weight * squared error. Stage 2: bits a pixel of a second frame.

        Every example has its own point of rate; all points count alike. Half of the examples do without the spatial
        prior, and in stage 2 a quarter without the temporal one, so that one model serves with and without them.
        """
        first, second = batch["pair"].unbind(1)
        count = len(second)
        weights = torch.tensor(self.config.weights, device=second.device)
        point = torch.randint(len(weights), (count,), device=second.device)
        use_spatial, use_before = (torch.rand(count, device=second.device) < share for share in (0.5, 0.75))
        weight = weights[point]
        even = (weights[0] / weight).sqrt()
        if float(batch["progress"].flatten()[0]) < self.config.learned:
            latent = rounded(self.pictures.analyse(second, point.float()))
            made = self.pictures.synthesise(latent, point.float())
            error = (made - second).square().mean((1, 2, 3))
            bits = self.bits(latent, None, use_spatial=use_spatial)
            return (even * (weight * error + bits / second[0, 0].numel())).mean()
        with torch.no_grad():
            latents = self.pictures.analyse(torch.cat([first, second]), point.float().repeat(2)).round()
        before, latent = latents.chunk(2)
        bits = self.bits(latent, before, use_spatial=use_spatial, use_before=use_before)
        return (even * bits / second[0, 0].numel()).mean()

    def bits(
        self,
        latent: Float[Tensor, "b c h w"],
        before: Float[Tensor, "b c h w"] | None,
        *,
        use_spatial: Tensor | bool = True,
        use_before: Tensor | bool = True,
    ) -> Float[Tensor, "b"]:
        """What latents are estimated to cost; differentiable while training, when noise stands in for rounding z."""
        model = self.intra if before is None else self.inter
        z = model.hyper(latent, before)
        z = noisy(z) if self.training else z.round()
        coded = latent - before if before is not None and self.config.difference else latent
        means, scales = model(coded, model.context(z, before, use_before), use_spatial)
        side = model.prior.bits(z.movedim(1, -1).flatten(0, -2)).view(len(z), -1).sum(1)
        return side + gaussian_bits(coded, means, scales).flatten(1).sum(1)
