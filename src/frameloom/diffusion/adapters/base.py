"""What every adapter shares: from `(b, t, c, h, w)` and a time of the path to a host's own call, and back.

An adapter does five things and no more: layout, input scale, time as the host counts it, conditions as the host names
them, raw output to `Prediction`. A leaf gives `call`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.adapters.places import places
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import current
from frameloom.diffusion.denoiser import Latent, Site
from frameloom.diffusion.paths import VP, Path
from frameloom.diffusion.predict import Prediction, to_prediction
from frameloom.errors import InputError


class Adapter:
    """A denoiser around a diffusers model.

    Attributes:
        host: the diffusers model, an `nn.Module`.
        path: the path it was trained on. kind: what it predicts (see `to_prediction`).
        latent: its latents.
    """

    def __init__(self, host: nn.Module, path: Path, kind: str, latent: Latent) -> None:
        self.host, self.path, self.kind, self.latent = host, path, kind, latent

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The host's raw output `(b, t, c, h, w)` for `x` at the path's times `t`, `(b,)` or `(b, t)`."""
        raise NotImplementedError

    def clock(self, t: Tensor) -> Tensor:
        """A time of the path as a host of a thousand training steps counts it: 1000 t on a flow, as InstaFlow does."""
        return index(t) if isinstance(self.path, VP) else (1000 * t).float()

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        with self._cache():
            output = self.call(x, t, cond)
        return to_prediction(self.kind, output, x, t, self.path)

    def _cache(self) -> AbstractContextManager:
        """Where a cache of diffusers' own is switched on, what it wants to know: the branch, and when a run begins."""
        ctx = current()
        if not getattr(self.host, "is_cache_enabled", False):
            return nullcontext()
        if ctx is None:
            return self.host.cache_context("cond")
        if not ctx.state.setdefault((id(self), "cache"), False):
            self.host._reset_stateful_cache()
            ctx.state[id(self), "cache"] = True
        return self.host.cache_context(ctx.branch, step_index=ctx.i, num_inference_steps=ctx.n)

    def text_at_sites(self, text: Tensor) -> Tensor:
        """Text `(b, n, d)` of a condition as the host's cross-attention gets it."""
        return text

    def sites(self, kind: str) -> Iterator[Site]:
        """The host's modules of that kind, in the order in which they run."""
        return (site for site in self._places if site.kind == kind)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the host computes in. Asked once: diffusers looks through every parameter to say it."""
        return self.host.dtype

    @cached_property
    def _places(self) -> list[Site]:
        return list(places(self.host))

    @contextmanager
    def _frame_embedding(self, embedding: Float[Tensor, "bt d"]) -> Iterator[None]:
        """Every resnet is told the time of its own frame, whatever the host has embedded."""

        def swap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "temb" in kwargs:
                return args, kwargs | {"temb": embedding}
            return (args[0], embedding, *args[2:]), kwargs

        handles = [site.module.register_forward_pre_hook(swap, with_kwargs=True) for site in self.sites("resnet")]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_frames(x: Float[Tensor, "b t c h w"], most: int) -> None:
    """Raises InputError for clips longer than a host's positions in time."""
    frames = x.shape[1]
    if frames > most:
        raise InputError(f"--frames: this model makes at most {most} latent frames at a time; {frames} were asked for")


def index(t: Tensor) -> Tensor:
    """The training step of a VP time, as hosts count it; the data itself (t = 0) is told as the first."""
    return (t - 1).clamp(min=0).float()


def swap_channels(x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b c t h w"]:
    """Frames behind channels, as most hosts want them; the same again brings them back."""
    return x.transpose(1, 2)


def lengthened(image: Float[Tensor, "b s c h w"], frames: int, repeat: bool) -> Float[Tensor, "b t c h w"]:
    """Latents of a first picture made as long as the clip: repeated, or followed by zeros."""
    if image.shape[1] == frames:
        return image
    if repeat:
        return image.expand(-1, frames, -1, -1, -1)
    return torch.cat([image, image.new_zeros(image.shape[0], frames - image.shape[1], *image.shape[2:])], 1)
