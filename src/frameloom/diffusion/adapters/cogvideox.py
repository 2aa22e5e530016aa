"""`CogVideoXTransformer3DModel` as a denoiser: one attention over all tokens of text and video. arXiv 2408.06072."""

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, lengthened
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
        latent = Latent(config.out_channels, frames, config.sample_height, config.sample_width)
        super().__init__(host, path, kind, latent)
        self._positions: dict[tuple, tuple[Tensor, Tensor]] = {}

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        host, video = self.host, x
        if (image := cond.get("image")) is not None:
            video = torch.cat([x, lengthened(image.to(x.dtype), x.shape[1], repeat=False)], 2)
        ofs = x.new_full((1,), 2.0) if host.config.ofs_embed_dim else None
        rotary = self._rotary(x) if host.config.use_rotary_positional_embeddings else None
        told = {"ofs": ofs, "image_rotary_emb": rotary, "return_dict": False}
        return host(video.to(self.dtype), cond["text"], self.clock(t), **told)[0]

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all tokens' positions; kept, as a run asks for the same ones at every step."""
        at = (x.shape[1], x.shape[3], x.shape[4], x.device)
        if at not in self._positions:
            self._positions = {at: self._embed(*at)}
        return self._positions[at]

    def _embed(self, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config, patch, patch_t = self.host.config, self.host.config.patch_size, self.host.config.patch_size_t
        size = (height // patch, width // patch)
        full = (config.sample_height // patch, config.sample_width // patch)
        if patch_t is None:  # positions as if the trained size had been resized and cropped
            return get_3d_rotary_pos_embed(
                config.attention_head_dim, get_resize_crop_region_for_grid(size, full[1], full[0]), size, frames,
                device=device)  # fmt: skip
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, None, size, (frames + patch_t - 1) // patch_t, grid_type="slice",
            max_size=full, device=device)  # fmt: skip
