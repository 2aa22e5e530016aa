"""`UNet2DConditionModel` and `UNet2DModel` as denoisers of clips: frames are pictures of a larger batch."""

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, index, lengthened
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.paths import VP, Path


class UNet2D(Adapter):
    """Conditions, as the host has them: `text` `(b, n, d)`, `label` `(b,)` or `(b, t)`, `image` latents
    `(b, 1 or t, c, h, w)` behind the noisy ones (inpainting, image-to-image). Every frame may have a time of its own.

    Args:
        time_scale: what times of a path other than VP are multiplied with for the host.
    """

    def __init__(
        self, host: nn.Module, path: Path, kind: str = "noise", frames: int = 1, time_scale: float = 1000.0
    ) -> None:
        size = host.config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(host, path, kind, Latent(host.config.out_channels, frames, height, width, True))
        self.time_scale = None if isinstance(path, VP) else time_scale
        self.with_text = hasattr(host.config, "cross_attention_dim")

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        b, frames = x.shape[:2]
        at = index(t) if self.time_scale is None else (t * self.time_scale).float()
        per_frame = lambda value: value.repeat_interleave(frames, 0)  # noqa: E731
        if (image := cond.get("image")) is not None:
            x = torch.cat([x, lengthened(image.to(x.dtype), frames, repeat=True)], 2)
        at = at.flatten() if t.ndim == 2 else per_frame(at)
        given = {}
        if (label := cond.get("label")) is not None:
            given["class_labels"] = label.flatten() if label.ndim == 2 else per_frame(label)
        if self.with_text:
            given["encoder_hidden_states"] = per_frame(cond["text"])
        output = self.host(x.flatten(0, 1).to(self.dtype), at, return_dict=False, **given)[0]
        return output.unflatten(0, (b, frames))
