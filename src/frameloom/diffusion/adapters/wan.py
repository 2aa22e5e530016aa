"""`WanTransformer3DModel` (Wan 2.1 and 2.2) as a denoiser: a rectified flow, text by cross-attention."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, swap_channels
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Site
from frameloom.diffusion.paths import Flow, Path, spread


class Wan(Adapter):
    """Conditions: `text` `(b, n, d)`; `image` latents (with their mask) that stand behind the noisy ones and
    `image_embeds`, for hosts that take a picture. Every frame may have a time of its own.
    """

    def __init__(
        self, host: nn.Module, path: Path | None = None, kind: str = "velocity",
        frames: int = 21, height: int = 60, width: int = 104,
    ) -> None:  # fmt: skip
        latent = Latent(host.config.out_channels, frames, height, width, host.config.patch_size[0] == 1)
        super().__init__(host, path or Flow(), kind, latent)

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        _, high, wide = self.host.config.patch_size
        at = (t * 1000).float()
        if t.ndim == 2:  # one time for every token of a frame
            at = at.repeat_interleave((x.shape[3] // high) * (x.shape[4] // wide), 1)
        if (image := cond.get("image")) is not None:
            x = torch.cat([x, image.to(x.dtype)], 2)
        found = self.host(swap_channels(x).to(self.dtype), at, cond["text"], cond.get("image_embeds"),
                          return_dict=False)[0]  # fmt: skip
        return swap_channels(found)


class TwoWan(Wan):
    """Wan 2.2: `host` for times from `boundary` up, a second transformer, `low`, for the rest of the way."""

    def __init__(self, host: nn.Module, low: nn.Module, boundary: float, kind: str = "velocity") -> None:
        super().__init__(host, kind=kind)
        self.low, self.boundary = Wan(low, kind=kind), boundary

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        noisy = t >= self.boundary
        if bool(noisy.all()):
            return super().call(x, t, cond)
        with self.low._cache():
            found = self.low.call(x, t, cond)
        if not bool(noisy.any()):
            return found
        return torch.where(spread(noisy, x).bool(), super().call(x, t, cond), found)

    def sites(self, kind: str) -> Iterator[Site]:
        yield from super().sites(kind)
        for site in self.low.sites(kind):
            yield replace(site, name=f"low.{site.name}")
