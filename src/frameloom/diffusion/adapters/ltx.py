"""`LTXVideoTransformer3DModel` as a denoiser: a rectified flow over a flat list of tokens. arXiv 2501.00103."""

from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.paths import Flow, Path


class LTX(Adapter):
    """Conditions: `text` `(b, n, d)` with `text_mask` `(b, n)`. Every frame may have a time of its own.

    Args:
        rope_scale: seconds per latent frame, and pixels per latent pixel in height and width.
    """

    def __init__(
        self, host: nn.Module, path: Path | None = None, kind: str = "velocity", frames: int = 21, height: int = 16,
        width: int = 22, rope_scale: tuple[float, float, float] = (8 / 25, 32, 32),
    ) -> None:  # fmt: skip
        config = host.config
        patch, patch_t = config.patch_size, config.patch_size_t
        latent = Latent(config.in_channels // (patch**2 * patch_t), frames, height, width, patch_t == 1)
        super().__init__(host, path or Flow(), kind, latent)
        self.patch, self.patch_t, self.rope_scale = patch, patch_t, rope_scale

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        b, frames, channels, height, width = x.shape
        sizes = (frames // self.patch_t, height // self.patch, width // self.patch)
        at = (t * 1000).float()
        if t.ndim == 2:  # one time for every token of a frame
            at = at.repeat_interleave(sizes[1] * sizes[2], 1)
        cut = x.reshape(b, sizes[0], self.patch_t, channels, sizes[1], self.patch, sizes[2], self.patch)
        tokens = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        mask = cond.get("text_mask")
        if mask is None:
            mask = cond["text"].new_ones(cond["text"].shape[:2])
        found = self.host(tokens.to(self.dtype), cond["text"], at, mask, *sizes, self.rope_scale, return_dict=False)[0]
        cut = found.reshape(b, *sizes, channels, self.patch_t, self.patch, self.patch)
        return cut.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(x.shape)
