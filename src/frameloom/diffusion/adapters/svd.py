"""`UNetSpatioTemporalConditionModel` (Stable Video Diffusion) as a denoiser. Blattmann et al., arXiv 2311.15127.

The path is EDM's: times are sigmas. The host sees x / sqrt(sigma^2 + 1) and ln(sigma) / 4, and predicts v.
"""

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, lengthened
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.paths import EDM, Path, spread

SMALLEST_SIGMA = 0.002  # the least noise of the training; held frames, of noise 0, are told as this


class SVD(Adapter):
    """Conditions: `image` latents `(b, 1 or t, c, h, w)`, `image_embeds` `(b, 1, d)` of CLIP, `time_ids` `(b, 3)`
    (frame rate less one, motion bucket, strength of the noise on the picture). Every frame may have a time of its own.

    Args:
        image_last: the picture's latents come behind the noisy ones, as in the published weights.
    """

    def __init__(
        self, host: nn.Module, path: Path | None = None, kind: str = "v", frames: int | None = None,
        image_last: bool = True,
    ) -> None:  # fmt: skip
        size = host.config.sample_size or 96
        height, width = (size, size) if isinstance(size, int) else size
        latent = Latent(host.config.out_channels, frames or host.config.num_frames, height, width, True)
        super().__init__(host, path or EDM(t_max=700.0), kind, latent)
        self.image_last = image_last

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        host, dtype = self.host, self.dtype
        scaled = (x / spread(torch.sqrt(t.double() ** 2 + 1), x)).to(dtype)
        image = lengthened(cond["image"].to(dtype), x.shape[1], repeat=True)
        both = torch.cat([scaled, image] if self.image_last else [image, scaled], 2)
        at = (0.25 * t.double().clamp(min=SMALLEST_SIGMA).log()).to(torch.float32)
        text, ids = cond["image_embeds"].to(dtype), cond["time_ids"].to(dtype)
        if t.ndim == 1:
            return host(both, at, text, ids, return_dict=False)[0]
        embedding = host.time_embedding(host.time_proj(at.flatten()).to(dtype))
        extra = host.add_embedding(host.add_time_proj(ids.flatten()).reshape(len(x), -1).to(dtype))
        with self._frame_embedding(embedding + extra.repeat_interleave(x.shape[1], 0)):
            return host(both, at[:, 0], text, ids, return_dict=False)[0]
