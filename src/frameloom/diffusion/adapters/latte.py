"""`LatteTransformer3DModel` as a denoiser: spatial and temporal transformer blocks by turns. arXiv 2401.03048."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter, swap_channels
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent
from frameloom.diffusion.hooks import patched
from frameloom.diffusion.paths import Path


class Latte(Adapter):
    """Conditions: `text` `(b, n, d)` with `text_mask` `(b, n)`. Every frame may have a time of its own where the blocks
    are modulated by time (`norm_type="ada_norm_single"`, as in the published weights).
    """

    def __init__(self, host: nn.Module, path: Path, kind: str = "noise") -> None:
        config = host.config
        size = config.sample_size
        channels = config.in_channels if config.out_channels is None else config.out_channels
        # Published hosts say the variance as well; it stands behind what is predicted.
        channels = channels // 2 if channels == 2 * config.in_channels else channels
        per_frame = config.norm_type == "ada_norm_single"
        super().__init__(host, path, kind, Latent(channels, config.video_length, size, size, per_frame))

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        video, at = swap_channels(x).to(self.dtype), self.clock(t)
        given = {"encoder_hidden_states": cond["text"]}
        if (mask := cond.get("text_mask")) is not None:  # as the bias that the host's attention adds, one per frame
            bias = (1 - mask.to(video.dtype))[:, None] * -10000.0
            given["encoder_attention_mask"] = bias.repeat_interleave(x.shape[1], 0)
        with self._as_long_as(x.shape[1]):
            if t.ndim == 1:
                found = self.host(video, at, **given, return_dict=False)[0]
            else:
                with self._frame_modulation(at, video.dtype):
                    found = self.host(video, at[:, 0], **given, return_dict=False)[0]
        return swap_channels(found[:, : self.latent.channels])

    def text_at_sites(self, text: Tensor) -> Tensor:
        return self.host.caption_projection(text)

    @contextmanager
    def _as_long_as(self, frames: int) -> Iterator[None]:
        """The host's table of frame positions cut, or continued by its own formula, to another number of frames."""
        table = self.host.temp_pos_embed
        if table.shape[1] == frames:
            yield
            return
        from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

        grid = torch.arange(frames, device=table.device)
        made = get_1d_sincos_pos_embed_from_grid(table.shape[2], grid, output_type="pt")
        self.host.temp_pos_embed = made.to(table)[None]
        try:
            yield
        finally:
            self.host.temp_pos_embed = table

    @contextmanager
    def _frame_modulation(self, at: Tensor, dtype: object) -> Iterator[None]:
        """Blocks and output modulated by times `(b, t)`.

        A spatial block takes a modulation per frame as it is. A temporal block takes one per pixel, so its frames are
        folded into the batch, and unfolded for its attention, all else in it being pointwise.
        """
        host, frames = self.host, at.shape[1]
        resolution = {"resolution": None, "aspect_ratio": None}
        six, one = host.adaln_single(at.flatten(), resolution, batch_size=at.numel(), hidden_dtype=dtype)

        def spatial(forward: Callable, *args: object) -> Tensor:
            return forward(*args[:4], six, *args[5:])

        def temporal(forward: Callable, x: Tensor, *args: object) -> Tensor:
            pixels = x.shape[0] // at.shape[0]
            each = six.unflatten(0, at.shape).repeat_interleave(pixels, 0).flatten(0, 1)
            return forward(x.flatten(0, 1)[:, None], *args[:3], each, *args[4:]).squeeze(1).unflatten(0, (-1, frames))

        def attention(forward: Callable, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return forward(x.unflatten(0, (-1, frames)).squeeze(2), *args, **kwargs).flatten(0, 1)[:, None]

        def normed(forward: Callable, x: Tensor) -> Tensor:
            # The host goes on with (1 + scale) and shift of its one time; taken away here, so that ours stand.
            memory["normed"] = forward(x)
            return memory["normed"]

        def projected(forward: Callable, x: Tensor) -> Tensor:
            shift, scale = (host.scale_shift_table[None] + one[:, None]).chunk(2, 1)
            return forward(memory.pop("normed") * (1 + scale) + shift)

        memory: dict[str, Tensor] = {}
        stands_in = [(block, spatial) for block in host.transformer_blocks]
        stands_in += [(block, temporal) for block in host.temporal_transformer_blocks]
        stands_in += [(block.attn1, attention) for block in host.temporal_transformer_blocks]
        stands_in += [(host.norm_out, normed), (host.proj_out, projected)]
        with ExitStack() as stack:
            for module, wrapper in stands_in:
                stack.enter_context(patched(module, partial(wrapper, module.forward)))
            yield
