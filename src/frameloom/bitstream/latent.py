"""Weights that are integers while they are fitted: rounded with a straight-through gradient, priced by their density.

S. Girish, K. Gupta, S. Singh, A. Shrivastava, LilNetX: Lightweight Networks with EXtreme Model Compression and
Structured Sparsification, ICLR 2023, arXiv 2204.02965; as used by NIRVANA, arXiv 2212.14593.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from frameloom.bitstream.entropy import FactorisedPrior, noisy, rounded
from frameloom.bitstream.nearby import LIMIT

UNIT = 2.0**-8  # of tensors without a scale of their own
PRIOR_STEPS = 1
WIDE, NARROW = 0.0, 4.0  # the density's first parameter for whole integers and for differences


class Latent(nn.Module):
    """A tensor that a file keeps as integers: round(latent) * scale / div.

    `reference` holds the integers that the file has already; what is priced is the distance from there. A learned
    scale goes with a div that follows the largest integer; a fixed one is the unit itself.
    """

    def __init__(self, shape: Sequence[int], bound: float, reach: float | None = None) -> None:
        super().__init__()
        self.learned = reach is not None
        reach = bound / UNIT if reach is None else reach
        self.latent = nn.Parameter(torch.empty(tuple(shape)).uniform_(-reach, reach))
        scale = torch.full((), bound if self.learned else UNIT)
        if self.learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("div", torch.ones(()))
        self.register_buffer("reference", torch.zeros(tuple(shape)))
        self.prior = FactorisedPrior(1, PRIOR_STEPS)
        self.renew()

    def integers(self) -> Float[Tensor, "..."]:
        return rounded(self.latent.clamp(-LIMIT, LIMIT))

    def forward(self) -> Float[Tensor, "..."]:
        return self.integers() * (self.scale / self.div)

    def bits(self) -> Float[Tensor, ""]:
        return self.prior.bits((noisy(self.latent) - self.reference).reshape(-1, 1)).clamp(0, 50).sum()

    @torch.no_grad()
    def relate_to(self, integers: Integer[np.ndarray, "n"] | None, anew: bool) -> None:
        """Price what comes by its distance from these integers, or from 0; `anew` by a density that knows nothing."""
        if integers is None:
            self.reference.zero_()
        else:
            self.reference.copy_(torch.from_numpy(integers).reshape(self.reference.shape))
        if anew:
            self.prior.stretch.fill_(WIDE if integers is None else NARROW)
            self.prior.shift.zero_()

    @torch.no_grad()
    def renew(self) -> None:
        """Let div follow the integers."""
        if self.learned:
            self.div.copy_(self.integers().abs().max().clamp(min=1))
