"""FreeNoise: longer video from a short-clip model, and words that change midway, without training.

For whom a model of 16 frames is not enough. Two things make a long clip hang together: its noise repeats the first
window's in shuffled blocks, so that every window starts from the same frames in another order,

    noise[i : i + S] = a permutation of noise[i - W : i - W + S],

and temporal attention sees windows of W frames, S apart, whose overlapping outputs are averaged by triangle weights.
Everything else (space, temporal convolutions) sees the whole clip, so a step costs its F frames once. Words may change:
every frame has a text of its own, interpolated between the sentences, in the decoder throughout and elsewhere only in
the steps that form motion.

H. Qiu, M. Xia, Y. Zhang, Y. He, X. Wang, Y. Shan, Z. Liu, "FreeNoise: Tuning-Free Longer Video Diffusion via Noise
Rescheduling", ICLR 2024, arXiv 2310.15169.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.attention_edits import TextPerFrame, WindowedAttention, WindowedBlock, fused
from frameloom.diffusion.context import current
from frameloom.diffusion.denoiser import Site
from frameloom.diffusion.generator import Generator, seeded
from frameloom.diffusion.hooks import HookSet
from frameloom.diffusion.noise import shuffled_windows
from frameloom.errors import InputError
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request, check_memory
from frameloom.tasks.generation.strategies.direct import whole

log = logging.getLogger("frameloom")

NEEDS = "freenoise needs separate temporal attention, and this model has none; use direct, or windows"


class FreeNoise:
    """Long clips from windows.

    Args:
        window: frames that attention sees at once; the model's own length when None. stride: between windows, a
            quarter of a window when None.
        fuse: `"attention"` averages the outputs of attention, `"block"` those of whole temporal blocks; None takes
            blocks for hosts that number frames, so that numbers start anew in every window.
        shuffle: repeat the noise in another order (off: in the same order, and the motion repeats with it).
        inject: the shares of the run between which the encoder, too, has a text for every frame.
    """

    def __init__(
        self, window: int | None = None, stride: int | None = None, fuse: str | None = None, shuffle: bool = True,
        inject: tuple[float, float] = (0.1, 0.3),
    ) -> None:  # fmt: skip
        self.window, self.stride, self.fuse, self.shuffle, self.inject = window, stride, fuse, shuffle, inject

    def sizes(self, model: Generator) -> tuple[int, int]:
        """Window and stride in frames. Raises InputError where windows would leave frames out."""
        window = self.window or model.denoiser.latent.frames
        stride = self.stride or max(1, window // 4)
        if not 1 <= stride <= window:
            raise InputError(f"freenoise: a stride of {stride} leaves gaps between windows of {window} frames")
        return window, stride

    def check(self, model: Generator, request: Request) -> None:
        window, stride = self.sizes(model)
        if not any(True for _ in model.denoiser.sites("temporal_self")):
            raise InputError(NEEDS)
        if request.frames <= window:
            log.warning("%d frames fit the model's window of %d: nothing is left for freenoise to do", request.frames,
                        window)  # fmt: skip
        elif (request.frames - window) % stride:
            log.info("%d frames are not reached in strides of %d: one more window ends at the last", request.frames,
                     stride)  # fmt: skip
        check_memory(model, request)
        if len(request.scenes) > 1 and not any(True for _ in model.denoiser.sites("spatial_cross")):
            raise InputError("freenoise: this model has no cross-attention in which every frame could have its words")

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        x = self.noise(model, request)
        with positions(model, *self.sizes(model), request.frames):
            yield from whole(model, request, progress, x, self.hooks(model, request), apart=len(request.scenes) > 1)

    def noise(self, model: Generator, request: Request) -> Float[Tensor, "1 t c h w"]:
        """The noise that the clip starts from."""
        window, stride = self.sizes(model)
        noise = seeded(model.denoiser.latent.shape(1, request.frames), request.seed)
        if self.shuffle:
            return shuffled_windows(noise, window, stride, request.seed)
        return noise[:, torch.arange(request.frames) % window]

    def hooks(self, model: Generator, request: Request) -> HookSet:
        """Windows at the temporal sites, and texts at the spatial ones if the words change."""
        window, stride = self.sizes(model)
        table = _table(model)
        fuse = self.fuse or ("block" if table is not None or _numbered(model) else "attention")
        hooks: list = []
        if fuse == "block":
            lift = None
            if table is not None:
                mean = averaged(table, window, stride, request.frames)

                def lift(start: int, stop: int) -> Tensor:
                    return table[: stop - start] - mean[start:stop]

            hooks.append(("temporal_block", WindowedBlock(window, stride, lift)))
        else:
            hooks.append(("temporal_self", WindowedAttention(window, stride)))
        if len(request.scenes) > 1:
            words = model.denoiser.text_at_sites
            own = words(texts(model, request))
            last = words(model.text([request.scenes[-1][0]])["text"]).expand(request.frames, -1, -1)
            begin, end = self.inject

            def chosen(site: Site) -> Tensor:
                ctx = current()
                moving = ctx is not None and begin <= ctx.fraction <= end
                return own if site.stage == "up" or moving else last

            hooks.append(("spatial_cross", TextPerFrame(chosen)))
        return hooks


def texts(model: Generator, request: Request) -> Float[Tensor, "t n d"]:
    """A text for every frame: a sentence for a quarter of a pair's frames, a line to the next, the next for a quarter.

    With more than two sentences every neighbouring pair shares out its frames like that (own extension).
    """
    vectors = model.text([text for text, _ in request.scenes])["text"]
    pairs = list(pairwise(range(len(vectors))))
    edges = torch.linspace(0, request.frames, len(pairs) + 1).round().long().tolist()
    out = []
    for (first, second), (start, stop) in zip(pairs, pairwise(edges), strict=True):
        count = stop - start
        still = count // 4
        share = torch.cat([torch.zeros(still), torch.linspace(0, 1, count - 2 * still), torch.ones(still)])
        out.append(torch.lerp(vectors[first], vectors[second], share.to(vectors)[:, None, None]))
    return torch.cat(out)


def _table(model: Generator) -> Float[Tensor, "t d"] | None:
    """The positions that a host adds to its frames outside of its temporal blocks (Latte's)."""
    table = getattr(getattr(model.denoiser, "host", None), "temp_pos_embed", None)
    return None if table is None else table[0]


def _numbered(model: Generator) -> bool:
    """Whether the temporal blocks number their frames themselves."""
    return any(getattr(site.module, "pos_embed", None) is not None for site in model.denoiser.sites("temporal_block"))


def averaged(table: Float[Tensor, "w d"], window: int, stride: int, frames: int) -> Float[Tensor, "t d"]:
    """The mean position of every frame over the windows that it is in."""
    return fused(frames, window, stride, lambda start, stop: table[: stop - start], dim=0)


@contextmanager
def positions(model: Generator, window: int, stride: int, frames: int) -> Iterator[None]:
    """Within it a host with a table of positions is as long as the clip; outside it is as it was."""
    table = _table(model)
    if table is None or frames == len(table):
        yield
        return
    host: nn.Module = model.denoiser.host
    host.temp_pos_embed = averaged(table, min(window, len(table)), stride, frames)[None]
    try:
        yield
    finally:
        host.temp_pos_embed = table[None]
