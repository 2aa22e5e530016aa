"""`UNetMotionModel` (AnimateDiff) as a denoiser: a picture model with a motion module after every layer."""

from typing import Any

from frameloom.diffusion.adapters.unet3d import UNet3D
from frameloom.diffusion.cond import Cond


class UNetMotion(UNet3D):
    """Conditions: `text` `(b, n, d)`, `image_embeds` for an IP-Adapter. Every frame may have a time of its own.

    Its motion modules know `motion_max_seq_length` positions: longer clips are refused by the host.
    """

    def told(self, cond: Cond, frames: int) -> dict[str, Any]:
        told: dict[str, Any] = {"encoder_hidden_states": cond["text"].repeat_interleave(frames, 0)}
        if (embeds := cond.get("image_embeds")) is not None:
            told["added_cond_kwargs"] = {"image_embeds": [embeds]}
        return told
