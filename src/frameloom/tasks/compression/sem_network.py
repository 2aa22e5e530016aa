"""The networks of `sem`: an autoencoder of single frames whose rate is a number, and the models of its integers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from frameloom.bitstream.entropy import SCALES, FactorisedPrior, gaussian_bits, noisy

SLOPE = 0.01
HYPER_STRIDE = 4  # positions of a latent a side of one of the hyper latent
REACH = 2  # positions that the spatial prior sees to each side
LEAST_SCALE = float(SCALES[0])


class GDN(nn.Module):
    """x / sqrt(beta + gamma x^2), gamma a matrix over channels; times the root for the inverse.

    J. Ballé, V. Laparra, E. Simoncelli, Density modeling of images using a generalized normalization transformation,
    ICLR 2016, arXiv 1511.06281. Both parameters pass a softplus, so no step of an optimiser makes them negative.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        # softplus(0.54) = 1; softplus(-2.25) = 0.1; softplus(-6) = 0.0025
        self.beta = nn.Parameter(torch.full((channels,), 0.54))
        self.gamma = nn.Parameter(torch.full((channels, channels), -6.0) + 3.75 * torch.eye(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        gamma = F.softplus(self.gamma)[:, :, None, None]
        norm = F.conv2d(x.square(), gamma, F.softplus(self.beta) + 1e-6)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class Gained(nn.Module):
    """A convolution of stride 2 (or its transpose), and a gain for every channel and point of rate.

    A rate between two points takes the gains between theirs: `rate` counts from 0.
    """

    def __init__(self, inside: int, outside: int, kernel: tuple[int, int], gains: Tensor, up: bool = False) -> None:
        super().__init__()
        padding = tuple((side - 1) // 2 for side in kernel)
        if up:
            more = tuple(side % 2 for side in kernel)
            self.conv: nn.Module = nn.ConvTranspose2d(inside, outside, kernel, 2, padding, more)
        else:
            self.conv = nn.Conv2d(inside, outside, kernel, 2, padding)
        self.log_gain = nn.Parameter(gains.log()[:, None].repeat(1, outside))

    def gain(self, rate: Float[Tensor, "b"]) -> Float[Tensor, "b c"]:
        """Always above 0."""
        low = rate.floor().long().clamp(0, max(len(self.log_gain) - 2, 0))
        high = (low + 1).clamp(max=len(self.log_gain) - 1)
        return torch.lerp(self.log_gain[low].exp(), self.log_gain[high].exp(), (rate - low)[:, None])

    def forward(self, x: Float[Tensor, "b c h w"], rate: Float[Tensor, "b"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv(x) * self.gain(rate)[:, :, None, None]


class Autoencoder(nn.Module):
    """g_a and g_s: pictures to latents at 1/2^n of the size, and back. Kernels are 5x4 and 4x5 in turn."""

    def __init__(self, widths: Sequence[int], weights: Sequence[float]) -> None:
        super().__init__()
        kernels = [((5, 4), (4, 5))[k % 2] for k in range(len(widths))]
        even = torch.ones(len(weights))
        # A squared error that weighs 4 times as much wants steps half as wide: so the gains of the latent begin.
        step = (torch.tensor(weights) / weights[0]).sqrt()
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Gained(before, width, kernel, step if k == last else even)
            for k, (before, width, kernel) in enumerate(zip((3, *widths), widths, kernels, strict=False))
        )
        self.norm = nn.ModuleList(GDN(width) for width in widths[:-1])
        back = [*widths[-2::-1], 3]
        self.up = nn.ModuleList(
            Gained(before, width, kernel, even if k else 1 / step, up=True)
            for k, (before, width, kernel) in enumerate(zip(widths[::-1], back, kernels, strict=True))
        )
        self.denorm = nn.ModuleList(GDN(width, inverse=True) for width in back[:-1])

    def analyse(self, pictures: Float[Tensor, "b 3 h w"], rate: Float[Tensor, "b"]) -> Float[Tensor, "b c h2 w2"]:
        """The latent, before it is rounded."""
        x = pictures - 0.5
        for k, conv in enumerate(self.down):
            x = conv(x, rate)
            x = self.norm[k](x) if k < len(self.norm) else x
        return x

    def synthesise(self, latent: Float[Tensor, "b c h2 w2"], rate: Float[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        """The picture, not yet held to [0, 1]."""
        x = latent
        for k, conv in enumerate(self.up):
            x = conv(x, rate)
            x = self.denorm[k](x) if k < len(self.denorm) else x
        return x + 0.5


class MaskedConv(nn.Conv2d):
    """A 5x5 convolution that sees what comes before the centre in raster order, and not the centre."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 2 * REACH + 1, padding=REACH)
        mask = torch.zeros(2 * REACH + 1, 2 * REACH + 1)
        mask[:REACH] = mask[REACH, :REACH] = 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)

    def at(self, crops: Float[Tensor, "n c 5 5"]) -> Float[Tensor, "n d"]:
        """What `forward` has at the centres of these crops."""
        return F.linear(crops.flatten(1), (self.weight * self.mask).flatten(1), self.bias)


class EntropyModel(nn.Module):
    """What a latent costs: a Gaussian for every integer, from a hyper latent z, from what was coded before it in the
    frame (the spatial prior), and with `temporal` from the latent of the frame before (the temporal prior).
    """

    def __init__(self, channels: int, hidden: int, temporal: bool) -> None:
        super().__init__()
        c = channels
        self.hyper_down = _chain(nn.Conv2d((1 + temporal) * c, hidden, 3, 1, 1),
                                 *(nn.Conv2d(hidden, hidden, 5, 2, 2) for _ in range(2)))  # fmt: skip
        self.hyper_up = _chain(*(nn.ConvTranspose2d(hidden, hidden, 5, 2, 2, 1) for _ in range(2)),
                               nn.Conv2d(hidden, 2 * c, 3, 1, 1))  # fmt: skip
        self.prior = FactorisedPrior(hidden)
        self.spatial = MaskedConv(c, 2 * c)
        steps = (c, 4 * c // 3, 5 * c // 3, 2 * c)
        self.temporal = _chain(
            *(nn.Conv2d(a, b, 5, 1, 2) for a, b in pairwise(steps))
        ) if temporal else None  # fmt: skip
        steps = ((4 + 2 * temporal) * c, 4 * c, 3 * c, 2 * c)
        self.join = _chain(*(nn.Linear(a, b) for a, b in pairwise(steps)))

    def hyper(
        self, latent: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b m h4 w4"]:
        """z, before it is rounded."""
        return self.hyper_down(latent if before is None else torch.cat([latent, before], 1))

    def context(
        self, z: Float[Tensor, "b m h4 w4"], before: Float[Tensor, "b c h w"] | None, use_before: Tensor | bool = True
    ) -> Float[Tensor, "b d h w"]:
        """What is known of a frame before its latent: features of z and of the latent before.

        `use_before`, a truth or one for each example, leaves the temporal prior out where it is false.
        """
        known = self.hyper_up(z)
        if self.temporal is None:
            return known
        return torch.cat([_chosen(self.temporal(before), use_before), known], 1)

    def gaussians(
        self, spatial: Float[Tensor, "*n d"], context: Float[Tensor, "*n e"]
    ) -> tuple[Float[Tensor, "*n c"], Float[Tensor, "*n c"]]:
        """Means and scales at some positions, from both kinds of features there; channels come last."""
        mean, scale = self.join(torch.cat([spatial, context], -1)).chunk(2, -1)
        return mean, LEAST_SCALE + F.softplus(scale)

    def forward(
        self, coded: Float[Tensor, "b c h w"], context: Float[Tensor, "b d h w"], use_spatial: Tensor | bool = True
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Means and scales of all of `coded` at once."""
        features = _chosen(self.spatial(coded), use_spatial)
        found = self.gaussians(features.movedim(1, -1), context.movedim(1, -1))
        return tuple(x.movedim(-1, 1) for x in found)

    def bits(
        self, latent: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"] | None, difference: bool, *,
        use_spatial: Tensor | bool = True, use_before: Tensor | bool = True,
    ) -> Float[Tensor, "b"]:  # fmt: skip
        """What latents are estimated to cost; differentiable while training, when noise stands in for rounding z."""
        z = self.hyper(latent, before)
        z = noisy(z) if self.training else z.round()
        coded = priced(latent, before, difference)
        means, scales = self(coded, self.context(z, before, use_before), use_spatial)
        side = self.prior.bits(z.movedim(1, -1).flatten(0, -2)).reshape(len(z), -1).sum(1)
        return side + gaussian_bits(coded, means, scales).flatten(1).sum(1)


def priced(
    latent: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"] | None, difference: bool
) -> Float[Tensor, "b c h w"]:
    """The integers whose probability is taken: a latent, or its change."""
    return latent - before if before is not None and difference else latent


def wavefronts(rows: int, columns: int) -> list[tuple[Int[Tensor, "n"], Int[Tensor, "n"]]]:
    """Positions of a grid in groups: what the spatial prior sees of each lies in groups before its own.

    Raster order would go one position at a time; but position (i, j) sees up to (i - 1, j + 2), so that all with the
    same j + 3 i may go together: columns + 3 (rows - 1) steps in place of rows times columns.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    step = (column + (REACH + 1) * row).flatten()
    order = torch.argsort(step, stable=True)
    groups = order.split(torch.bincount(step).tolist())
    return [(group // columns, group % columns) for group in groups if len(group)]


def _chain(*layers: nn.Module) -> nn.Sequential:
    """Layers with a leaky ReLU between."""
    between = [part for layer in layers for part in (layer, nn.LeakyReLU(SLOPE))]
    return nn.Sequential(*between[:-1])


def _chosen(features: Tensor, use: Tensor | bool) -> Tensor:
    return features * (use[:, None, None, None] if isinstance(use, Tensor) else float(use))
