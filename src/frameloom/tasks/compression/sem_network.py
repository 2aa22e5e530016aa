"""The networks of `sem`: an autoencoder of single frames whose rate is a number, and the models of its integers.

Each comes in two forms. Ours (`official=False`) is what the shipped weights are of. `official=True` has the layers of
the authors' own code one by one, for their weights and for the `paper` size: wider joins and hyper decoder, 5x5 kernels
in the decoder, a spatial prior that sees 22 positions in place of 12, Laplace densities.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from frameloom.bitstream.entropy import SCALES, FactorisedPrior, gaussian_bits, noisy
from frameloom.bitstream.laplace import LaplacePrior, laplace_bits

SLOPE, OFFICIAL_SLOPE = 0.01, 0.2
HYPER_STRIDE = 4  # positions of a latent a side of one of the hyper latent
REACH = 2  # positions that the spatial prior sees to each side
LEAST_SCALE = float(SCALES[0])
# The authors keep the roots of GDN's parameters, both raised by a little so that neither root has slope 0.
PEDESTAL, LEAST_BETA = 2.0**-36, 1e-6


class SameConv(nn.Conv2d):
    """A convolution of stride 2 that pads as TensorFlow's "SAME" does: an odd kernel gets more below and right."""

    def __init__(self, inside: int, outside: int, kernel: tuple[int, int]) -> None:
        super().__init__(inside, outside, kernel, 2)
        rows, columns = (side - 2 for side in kernel)
        self.edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return super().forward(F.pad(x, self.edges))


class SameUp(nn.ConvTranspose2d):
    """The transpose of `SameConv`: twice as many rows and columns, exactly."""

    def __init__(self, inside: int, outside: int, side: int) -> None:
        super().__init__(inside, outside, side, 2, (side - 2) // 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return super().forward(x)[..., : 2 * x.shape[-2], : 2 * x.shape[-1]]


class _AtLeast(torch.autograd.Function):
    """max(x, bound); below the bound the gradient passes where a step along it leads back."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


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

    def positive(self) -> tuple[Float[Tensor, "c"], Float[Tensor, "c c"]]:
        """beta, above 0, and gamma, not below 0."""
        return F.softplus(self.beta) + 1e-6, F.softplus(self.gamma)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        beta, gamma = self.positive()
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class OfficialGDN(GDN):
    """The same of parameters that are squared."""

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__(channels, inverse)
        self.beta = nn.Parameter(torch.full((channels,), 1.0 + PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + PEDESTAL).sqrt())

    def positive(self) -> tuple[Float[Tensor, "c"], Float[Tensor, "c c"]]:
        beta = _AtLeast.apply(self.beta, (LEAST_BETA + PEDESTAL) ** 0.5)
        gamma = _AtLeast.apply(self.gamma, PEDESTAL**0.5)
        return beta.square() - PEDESTAL, gamma.square() - PEDESTAL


class Gained(nn.Module):
    """A convolution of stride 2 (or its transpose), and a gain for every channel and point of rate.

    A rate between two points takes the gains between theirs: `rate` counts from 0.
    """

    def __init__(self, inside: int, outside: int, kernel: tuple[int, int], gains: Tensor, up: bool = False) -> None:
        super().__init__()
        self.build(inside, outside, kernel, up)
        self.log_gain = nn.Parameter(self.lowered(gains)[:, None].repeat(1, outside))

    def build(self, inside: int, outside: int, kernel: tuple[int, int], up: bool) -> None:
        padding = tuple((side - 1) // 2 for side in kernel)
        if up:
            more = tuple(side % 2 for side in kernel)
            self.conv: nn.Module = nn.ConvTranspose2d(inside, outside, kernel, 2, padding, more)
        else:
            self.conv = nn.Conv2d(inside, outside, kernel, 2, padding)

    @staticmethod
    def lowered(gains: Float[Tensor, "r"]) -> Float[Tensor, "r"]:
        """The parameters that stand for gains."""
        return gains.log()

    def between(self, rate: Float[Tensor, "b"]) -> tuple[Tensor, Tensor, Float[Tensor, "b 1"]]:
        """The parameters at the points below and above, and how far between them."""
        low = rate.floor().long().clamp(0, max(len(self.log_gain) - 2, 0))
        high = (low + 1).clamp(max=len(self.log_gain) - 1)
        return self.log_gain[low], self.log_gain[high], (rate - low)[:, None]

    def gain(self, rate: Float[Tensor, "b"]) -> Float[Tensor, "b c"]:
        """Always above 0."""
        low, high, share = self.between(rate)
        return torch.lerp(low.exp(), high.exp(), share)

    def forward(self, x: Float[Tensor, "b c h w"], rate: Float[Tensor, "b"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv(x) * self.gain(rate)[:, :, None, None]


class OfficialGained(Gained):
    """The same with gains that are softplus of a line between two points' parameters."""

    def build(self, inside: int, outside: int, kernel: tuple[int, int], up: bool) -> None:
        self.conv = SameUp(inside, outside, kernel[0]) if up else SameConv(inside, outside, kernel)

    @staticmethod
    def lowered(gains: Float[Tensor, "r"]) -> Float[Tensor, "r"]:
        return gains.expm1().log()

    def gain(self, rate: Float[Tensor, "b"]) -> Float[Tensor, "b c"]:
        return F.softplus(torch.lerp(*self.between(rate)))


class Autoencoder(nn.Module):
    """g_a and g_s: pictures to latents at 1/2^n of the size, and back.

    Kernels are 5x4 and 4x5 in turn, on the way back 5x5 for the authors' network.
    """

    def __init__(self, widths: Sequence[int], weights: Sequence[float], official: bool = False) -> None:
        super().__init__()
        norm, gained = (OfficialGDN, OfficialGained) if official else (GDN, Gained)
        self.centre = 0.0 if official else 0.5
        kernels = [((5, 4), (4, 5))[k % 2] for k in range(len(widths))]
        even = torch.ones(len(weights))
        # A squared error that weighs 4 times as much wants steps half as wide: so the gains of the latent begin.
        step = (torch.tensor(weights) / weights[0]).sqrt()
        last = len(widths) - 1
        self.down = nn.ModuleList(
            gained(before, width, kernel, step if k == last else even)
            for k, (before, width, kernel) in enumerate(zip((3, *widths), widths, kernels, strict=False))
        )
        self.norm = nn.ModuleList(norm(width) for width in widths[:-1])
        back = [*widths[-2::-1], 3]
        kernels = [(5, 5)] * len(widths) if official else kernels
        self.up = nn.ModuleList(
            gained(before, width, kernel, even if k else 1 / step, up=True)
            for k, (before, width, kernel) in enumerate(zip(widths[::-1], back, kernels, strict=True))
        )
        self.denorm = nn.ModuleList(norm(width, inverse=True) for width in back[:-1])

    def analyse(self, pictures: Float[Tensor, "b 3 h w"], rate: Float[Tensor, "b"]) -> Float[Tensor, "b c h2 w2"]:
        """The latent, before it is rounded."""
        x = pictures - self.centre
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
        return x + self.centre


class MaskedConv(nn.Conv2d):
    """A 5x5 convolution that sees what comes before the centre in raster order, and not the centre.

    The centre is `above` rows below the upper edge: in the middle, or for the authors' network in the last row.
    """

    def __init__(self, inside: int, outside: int, above: int = REACH) -> None:
        side = 2 * REACH + 1
        super().__init__(inside, outside, side, padding=(above, REACH))
        self.above = above
        mask = torch.zeros(side, side)
        mask[:above] = mask[above, :REACH] = 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)[..., : x.shape[-2], :]

    def at(self, crops: Float[Tensor, "n c 5 5"]) -> Float[Tensor, "n d"]:
        """What `forward` has at the centres of these crops."""
        return F.linear(crops.flatten(1), (self.weight * self.mask).flatten(1), self.bias)


class EntropyModel(nn.Module):
    """What a latent costs: a density for every integer, from a hyper latent z, from what was coded before it in the
    frame (the spatial prior), and with `temporal` from the latent of the frame before (the temporal prior).
    """

    def __init__(self, channels: int, hidden: int, temporal: bool, official: bool = False) -> None:
        super().__init__()
        c, m = channels, hidden
        self.official = official
        slope = OFFICIAL_SLOPE if official else SLOPE
        known = (4 + 2 * temporal) * c  # features that the join has of each position
        if official:
            halved, doubled, wider = SameConv, SameUp, round(1.5 * m)
            steps = (known, known * 5 // 6, known * 2 // 3, 2 * c)
        else:
            halved, doubled, wider = partial(nn.Conv2d, stride=2, padding=2), _doubled, m
            steps = (known, 4 * c, 3 * c, 2 * c)
        self.hyper_down = _chain(slope, nn.Conv2d((1 + temporal) * c, m, 3, 1, 1),
                                 *(halved(m, m, (5, 5)) for _ in range(2)))  # fmt: skip
        self.hyper_up = _chain(slope, doubled(m, m, 5), doubled(m, wider, 5), nn.Conv2d(wider, 2 * c, 3, 1, 1))
        self.prior = LaplacePrior(m) if official else FactorisedPrior(m)
        self.spatial = MaskedConv(c, 2 * c, 2 * REACH if official else REACH)
        widths = (c, 4 * c // 3, 5 * c // 3, 2 * c)
        self.temporal = _chain(
            slope, *(nn.Conv2d(a, b, 5, 1, 2) for a, b in pairwise(widths))
        ) if temporal else None  # fmt: skip
        self.join = _chain(slope, *(nn.Linear(a, b) for a, b in pairwise(steps)))

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

    def densities(
        self, spatial: Float[Tensor, "*n d"], context: Float[Tensor, "*n e"]
    ) -> tuple[Float[Tensor, "*n c"], Float[Tensor, "*n c"]]:
        """Means and scales at some positions, from both kinds of features there; channels come last."""
        mean, scale = self.join(torch.cat([spatial, context], -1)).chunk(2, -1)
        return mean, scale.exp().clamp(1e-10, 1e30) if self.official else LEAST_SCALE + F.softplus(scale)

    def forward(
        self, coded: Float[Tensor, "b c h w"], context: Float[Tensor, "b d h w"], use_spatial: Tensor | bool = True
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Means and scales of all of `coded` at once."""
        features = _chosen(self.spatial(coded), use_spatial)
        found = self.densities(features.movedim(1, -1), context.movedim(1, -1))
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
        return side + (laplace_bits if self.official else gaussian_bits)(coded, means, scales).flatten(1).sum(1)


def priced(
    latent: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"] | None, difference: bool
) -> Float[Tensor, "b c h w"]:
    """The integers whose probability is taken: a latent, or its change."""
    return latent - before if before is not None and difference else latent


def wavefronts(rows: int, columns: int) -> list[tuple[Int[Tensor, "n"], Int[Tensor, "n"]]]:
    """Positions of a grid in groups: what the spatial prior sees of each lies in groups before its own.

    Raster order would go one position at a time; but position (i, j) sees up to (i - 1, j + 2), so that all with the
    same j + 3 i may go together: columns + 3 (rows - 1) steps in place of rows times columns. What lies further up, as
    (i - 4, j + 2), comes earlier still.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    step = (column + (REACH + 1) * row).flatten()
    order = torch.argsort(step, stable=True)
    groups = order.split(torch.bincount(step).tolist())
    return [(group // columns, group % columns) for group in groups if len(group)]


def _doubled(inside: int, outside: int, side: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inside, outside, side, 2, 2, 1)


def _chain(slope: float, *layers: nn.Module) -> nn.Sequential:
    """Layers with a leaky ReLU between."""
    between = [part for layer in layers for part in (layer, nn.LeakyReLU(slope))]
    return nn.Sequential(*between[:-1])


def _chosen(features: Tensor, use: Tensor | bool) -> Tensor:
    return features * (use[:, None, None, None] if isinstance(use, Tensor) else float(use))
