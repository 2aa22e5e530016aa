"""What every adapter shares: from `(b, t, c, h, w)` and a time of the path to a host's own call, and back.

An adapter does five things and no more: layout, input scale, time as the host counts it, conditions as the host names
them, raw output to `Prediction`. A leaf gives `call` and `sites`.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Site
from frameloom.diffusion.paths import Path
from frameloom.diffusion.predict import Prediction, to_prediction


class Adapter:
    """A denoiser around a diffusers model.

    Attributes:
        host: the diffusers model, an `nn.Module`.
        path: the path it was trained on. kind: what it predicts (see `to_prediction`).
        latent: its latents.
    """

    def __init__(self, host: nn.Module, path: Path, kind: str, latent: Latent) -> None:
        self.host, self.path, self.kind, self.latent = host, path, kind, latent

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The host's raw output `(b, t, c, h, w)` for `x` at the path's times `t`, `(b,)` or `(b, t)`."""
        raise NotImplementedError

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return to_prediction(self.kind, self.call(x, t, cond), x, t, self.path)

    def sites(self, kind: str) -> Iterator[Site]:
        """The host's modules of that kind, in the order in which they run."""
        raise NotImplementedError
