"""`CogVideoXTransformer3DModel` as a denoiser: one attention over all tokens of text and video. arXiv 2408.06072."""

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, index, lengthened
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.paths import Path


class CogVideoX(Adapter):
    """Conditions: `text` `(b, n, d)`; `image` latents `(b, 1 or t, c, h, w)` behind the noisy ones where the host takes
    a picture (those that are missing are zero). One time for all frames.
    """

    def __init__(self, host: nn.Module, path: Path, kind: str = "v", frames: int | None = None) -> None:
        config = host.config
        frames = frames or (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        super().__init__(
            host, path, kind, Latent(config.out_channels, frames, config.sample_height, config.sample_width)
        )

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        host, video = self.host, x
        if (image := cond.get("image")) is not None:
            video = torch.cat([x, lengthened(image.to(x.dtype), x.shape[1], repeat=False)], 2)
        ofs = x.new_full((1,), 2.0) if host.config.ofs_embed_dim else None
        rotary = self._rotary(x) if host.config.use_rotary_positional_embeddings else None
        return host(video.to(host.dtype), cond["text"], index(t), ofs=ofs, image_rotary_emb=rotary, return_dict=False)[
            0
        ]

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all tokens' positions."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config, patch, patch_t = self.host.config, self.host.config.patch_size, self.host.config.patch_size_t
        size = (x.shape[3] // patch, x.shape[4] // patch)
        full = (config.sample_height // patch, config.sample_width // patch)
        if patch_t is None:  # positions as if the trained size had been resized and cropped
            return get_3d_rotary_pos_embed(
                config.attention_head_dim, get_resize_crop_region_for_grid(size, full[1], full[0]), size, x.shape[1],
                device=x.device)  # fmt: skip
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, None, size, (x.shape[1] + patch_t - 1) // patch_t, grid_type="slice",
            max_size=full, device=x.device)  # fmt: skip
