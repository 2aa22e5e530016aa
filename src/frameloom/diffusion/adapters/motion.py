"""`UNetMotionModel` (AnimateDiff) as a denoiser: a picture model with a motion module after every layer."""

from typing import Any

from torch import Tensor

from frameloom.diffusion.adapters.base import check_frames
from frameloom.diffusion.adapters.unet3d import UNet3D
from frameloom.diffusion.cond import Cond


class UNetMotion(UNet3D):
    """Conditions: `text` `(b, n, d)`, `image_embeds` for an IP-Adapter. Every frame may have a time of its own.

    Its motion modules know `motion_max_seq_length` positions; longer clips are refused.
    """

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        check_frames(x, self.host.config.motion_max_seq_length)
        return super().call(x, t, cond)

    def told(self, cond: Cond, frames: int) -> dict[str, Any]:
        told: dict[str, Any] = {"encoder_hidden_states": cond["text"].repeat_interleave(frames, 0)}
        if (embeds := cond.get("image_embeds")) is not None:
            told["added_cond_kwargs"] = {"image_embeds": [embeds]}
        return told
