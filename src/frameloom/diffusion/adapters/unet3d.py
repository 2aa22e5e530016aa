"""`UNet3DConditionModel` (ModelScope, Zeroscope) as a denoiser: U-Net with temporal convolutions and attention."""

from typing import Any

from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, swap_channels
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.paths import Path


class UNet3D(Adapter):
    """Condition: `text` `(b, n, d)`. Every frame may have a time of its own."""

    def __init__(self, host: nn.Module, path: Path, kind: str = "noise", frames: int = 16) -> None:
        size = host.config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(host, path, kind, Latent(host.config.out_channels, frames, height, width, True))

    def told(self, cond: Cond, frames: int) -> dict[str, Any]:
        """What the host is told besides picture and time."""
        return {"encoder_hidden_states": cond["text"]}

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        host, at = self.host, self.clock(t)
        video, told = swap_channels(x).to(self.dtype), self.told(cond, x.shape[1])
        if t.ndim == 1:
            return swap_channels(host(video, at, return_dict=False, **told)[0])
        # The host embeds one time per clip and repeats it over the frames; its resnets take one per frame as well.
        embedding = host.time_embedding(host.time_proj(at.flatten()).to(self.dtype))
        with self._frame_embedding(embedding):
            return swap_channels(host(video, at[:, 0], return_dict=False, **told)[0])
