"""From the integers of `sem` to bits and back: one code path finds the prices on both sides."""

import copy
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.bitstream.entropy import Gaussians, get_values, put_values
from frameloom.bitstream.laplace import Laplaces
from frameloom.bitstream.rangecoder import Decoder, Encoder
from frameloom.tasks.compression.sem_network import HYPER_STRIDE, REACH, EntropyModel, priced, wavefronts

PRIOR_REACH = 24  # hyper latents beyond it are escaped
_POSITIONS = 1 << 12  # priced at a time

# Means and scales of some positions, and which they are, to their values: the encoder's writes them, the decoder's
# reads them.
Exchange = Callable[[Float[Tensor, "n c"], Float[Tensor, "n c"], tuple[Tensor, Tensor]], Float[Tensor, "n c"]]


@cache
def _densities(official: bool) -> Gaussians:
    return Laplaces() if official else Gaussians()


@cache
def tables_digest(official: bool = False) -> int:
    """What both sides must agree on besides the weights."""
    return _densities(official).digest()


def checksum(latent: Float[Tensor, "1 c h w"]) -> bytes:
    """Two bytes that tell a latent from others."""
    return (zlib.crc32(latent.contiguous().numpy().astype("<i4").tobytes()) & 0xFFFF).to_bytes(2, "little")


class LatentCoder:
    """Codes latents one after the other, each with the one before it known, or None for the first of a group.

    The models run in double precision, so that what two machines round differently lies far below the sixteenth of a
    mean and the twelfth of a scale that tables tell apart.
    """

    def __init__(
        self, intra: EntropyModel, inter: EntropyModel, difference: bool, spatial: bool, temporal: bool
    ) -> None:
        self.models = {known: copy.deepcopy(model).cpu().double().eval() for known, model in
                       ((False, intra), (True, inter))}  # fmt: skip
        self.priors = {known: model.prior.tables(-PRIOR_REACH, PRIOR_REACH) for known, model in self.models.items()}
        self.difference, self.spatial, self.temporal = difference, spatial, temporal
        self.channels, self.above = intra.spatial.in_channels, intra.spatial.above
        self.densities = _densities(intra.official)

    @torch.inference_mode()
    def put(self, coder: Encoder, latent: Float[Tensor, "1 c h w"], before: Float[Tensor, "1 c h w"] | None) -> None:
        """Take a latent in."""
        latent, before = latent.double(), None if before is None else before.double()
        model, tables = self.models[before is not None], self.priors[before is not None]
        z = model.hyper(latent, before).round()
        put_values(coder, z.flatten().numpy().astype(np.int64), *self._prior(tables, z[0, 0].numel()))
        coded = priced(latent, before, self.difference)[0]

        def write(means: Tensor, scales: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
            values = coded[:, *at].T
            self.densities.put(coder, values.flatten().long(), means.flatten(), scales.flatten())
            return values

        self._walk(model, z, before, coded.shape[1:], write)

    @torch.inference_mode()
    def get(
        self, coder: Decoder, before: Float[Tensor, "1 c h w"] | None, rows: int, columns: int
    ) -> Float[Tensor, "1 c h w"]:
        """The latent that `put` took. Raises InputError for bytes that it cannot have made."""
        before = None if before is None else before.double()
        model, tables = self.models[before is not None], self.priors[before is not None]
        side = rows // HYPER_STRIDE, columns // HYPER_STRIDE
        z = get_values(coder, *self._prior(tables, side[0] * side[1]))
        z = torch.from_numpy(z).double().view(1, -1, *side)

        def read(means: Tensor, scales: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
            return self.densities.get(coder, means.flatten(), scales.flatten()).double().view(means.shape)

        coded = self._walk(model, z, before, (rows, columns), read)[None]
        return (coded + before if before is not None and self.difference else coded).float()

    @torch.inference_mode()
    def stands_alone(self, latent: Float[Tensor, "1 c h w"], before: Float[Tensor, "1 c h w"]) -> bool:
        """Whether a latent costs less without the one before it, by estimate."""
        latent, before = latent.double(), before.double()
        alone, after = (
            self.models[known is not None].bits(latent, known, self.difference, use_spatial=self.spatial,
                                                use_before=self.temporal)
            for known in (None, before)
        )  # fmt: skip
        return bool(alone < after)

    def _prior(self, tables: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """For every number of a hyper latent, channel by channel, its table and where that begins."""
        each = np.repeat(tables, positions, 0)
        return each, np.full(len(each), -PRIOR_REACH)

    def _walk(
        self, model: EntropyModel, z: Tensor, before: Tensor | None, size: tuple[int, int], exchange: Exchange
    ) -> Float[Tensor, "c h w"]:
        """All values of one latent, as `exchange` gives them for the prices of one group of positions after another.

        With the spatial prior a group is a wavefront, without it as many positions as are convenient.
        """
        rows, columns = size
        context = model.context(z, before, self.temporal)[0].permute(1, 2, 0)
        padded = torch.zeros(self.channels, rows + 2 * REACH, columns + 2 * REACH, dtype=torch.float64)
        values = padded[:, self.above : self.above + rows, REACH : REACH + columns]
        windows = padded.unfold(1, 2 * REACH + 1, 1).unfold(2, 2 * REACH + 1, 1)
        if self.spatial:
            groups = wavefronts(rows, columns)
        else:
            groups = [(at // columns, at % columns) for at in torch.arange(rows * columns).split(_POSITIONS)]
        blank = torch.zeros(1, 2 * self.channels, dtype=torch.float64)
        for at in groups:
            if self.spatial:
                features = model.spatial.at(windows[:, *at].transpose(0, 1))
            else:
                features = blank.expand(len(at[0]), -1)
            means, scales = model.densities(features, context[at])
            values[:, *at] = exchange(means, scales, at).T
        return values.clone()
