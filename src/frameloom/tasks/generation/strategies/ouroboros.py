"""Ouroboros-Diffusion, on FIFO-Diffusion: video without end from a short-clip model, a frame out for a frame in.

For whom wants more frames than memory holds. A queue of frames stands on a diagonal of noise levels, the head clean and
the tail pure noise; a round of denoising lowers every level by one, the head leaves, a new tail enters
(`frameloom.diffusion.plans.diagonal`). Three things keep a queue to its subject, each of which can be switched off;
with all three off it is plain FIFO-Diffusion:

- tail: a new tail takes its low frequencies from the frame before it, noised to the end,
  tail = IFFT(L * FFT(z) + H * FFT(noise));
- attention: where a block looks at the subject's words, those tokens of all its frames are more keys and values for the
  decoder's self-attention (SACFA);
- guidance: noisy blocks are pulled towards a moving average of the subject's keys in the cleanest block, by the
  gradient of their squared distance, in the direction term of the step alone.

J. Chen, F. Long, J. An, Z. Qiu, T. Yao, J. Luo, T. Mei, "Ouroboros-Diffusion: Exploring Consistent Content Generation
in Tuning-free Long Video Diffusion", AAAI 2025, arXiv 2501.09019; J. Kim, J. Kang, J. Choi, B. Han, "FIFO-Diffusion:
Generating Infinite Videos from Text without Training", NeurIPS 2024, arXiv 2405.11473.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from frameloom.diffusion.attention_edits import SeenWords, SharedKeys
from frameloom.diffusion.context import Ctx, running
from frameloom.diffusion.generator import Generator, seeded
from frameloom.diffusion.guide import evaluate
from frameloom.diffusion.hooks import install
from frameloom.diffusion.noise import gaussian_filter, low_pass
from frameloom.diffusion.paths import spread
from frameloom.diffusion.plans import diagonal
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.run import sample
from frameloom.errors import InputError
from frameloom.language.words import split
from frameloom.progress import Progress
from frameloom.tasks.generation.base import Request

log = logging.getLogger("frameloom")

NOUNS = ("ball", "box", "capsule", "person")


class Ouroboros:
    """An endless queue of frames.

    Args:
        queue: noise levels, a multiple of the model's length; four lengths when None.
        tail, attention, guidance: the three parts above. variance: `"preserve"` or `"official"` weights of the tail's
            two frequency bands (the official ones lose variance).
        subject: the word to keep to; the nouns of the sentence when None.
        strength: of the guidance. momentum: of the moving average. guided: the share of blocks, the cleanest first, in
            which gradients are taken. eta: fresh noise in a step, 0 to 1.
    """

    def __init__(
        self, queue: int | None = None, tail: bool = True, attention: bool = True, guidance: bool = True,
        variance: str = "preserve", subject: str | None = None, strength: float = 1.0, momentum: float = 0.9,
        guided: float = 0.25, eta: float = 0.0,
    ) -> None:  # fmt: skip
        self.queue, self.tail, self.attention, self.guidance = queue, tail, attention, guidance
        self.variance, self.subject, self.strength = variance, subject, strength
        self.momentum, self.guided, self.eta = momentum, guided, eta

    def length(self, model: Generator) -> int:
        """Entries of the queue. Raises InputError that names the legal ones."""
        window = model.denoiser.latent.frames
        count = self.queue or 4 * window
        if count % window or count < window:
            near = max(window, round(count / window) * window)
            raise InputError(f"a queue of {count} levels does not hold whole windows of {window} frames; {near} would")
        return count

    def check(self, model: Generator, request: Request) -> None:
        window = model.denoiser.latent.frames
        if not model.denoiser.latent.per_frame_time:
            raise InputError("a queue needs a model with a noise level for every frame, and this one has one for the "
                             "whole clip; freenoise or windows may do")  # fmt: skip
        if window < 2 or window % 2:
            raise InputError(f"a queue needs a model with an even number of frames, not {window}")
        self.length(model)
        if self.variance not in ("preserve", "official"):
            raise InputError(f"variance is preserve or official, not {self.variance}")
        if (self.attention or self.guidance) and not self.words(model, request.prompt):
            log.warning("no subject was found in the sentence: its attention and guidance are off; name one (subject)")

    def words(self, model: Generator, text: str) -> list[int]:
        """Places of the subject's words in the sentence as the model reads it; none where it has no vocabulary."""
        if getattr(model, "words", None) is None:
            return []
        wanted = (self.subject,) if self.subject else NOUNS
        return [place for place, word in enumerate(word for word in split(text) if not model.words.unknown(word))
                if word in wanted]  # fmt: skip

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        run = _Run(self, model, request)
        for number, latent in enumerate(islice(run.latents(), request.frames)):
            progress("frames", number + 1, request.frames)
            yield model.decode(latent[:, None])[0, 0].clamp(0, 1)


@dataclass
class _Subject:
    """What a run remembers of its subject: a mean key and how much of it has been seen, per site."""

    keys: dict[str, Tensor] = field(default_factory=dict)

    def update(self, record: list[tuple[str, Tensor, Tensor]], momentum: float) -> None:
        for name, k, inside in record:
            mean = _masked_mean(k.detach(), inside)
            self.keys[name] = mean if name not in self.keys else torch.lerp(mean, self.keys[name], momentum)

    def distance(self, record: list[tuple[str, Tensor, Tensor]]) -> Tensor | None:
        """Mean squared distance of the block's mean keys from those remembered; None where there is nothing yet."""
        parts = [(_masked_mean(k, inside) - self.keys[name]).square().sum() for name, k, inside in record
                 if name in self.keys]  # fmt: skip
        return torch.stack(parts).mean() if parts else None


def _masked_mean(k: Float[Tensor, "t h n d"], inside: Bool[Tensor, "t n"]) -> Float[Tensor, "h d"]:
    weight = inside[:, None, :, None].to(k)
    return (k * weight).sum((0, 2)) / weight.sum((0, 2)).clamp(min=1)


class _Run:
    """One endless run: the queue, its conditions and its memory of the subject."""

    def __init__(self, method: Ouroboros, model: Generator, request: Request) -> None:
        self.method, self.model, self.request = method, model, request
        self.denoiser, self.path = model.denoiser, model.denoiser.path
        self.window, self.count = self.denoiser.latent.frames, method.length(model)
        grid = model.grid(self.count)
        self.times = grid[:-1].flip(0)  # ascending: the head first
        self.ctx = Ctx(self.path, self.count)
        self.guide, self.subject = request.guide(model), _Subject()
        self.generator = torch.Generator().manual_seed(request.seed + 1)
        self.edges: list[tuple[int, str]] = []
        total = 0
        for text, frames in request.scenes:
            self.edges.append((total, text))
            total += frames
        self.conds = {text: model.text([text]) for _, text in self.edges}
        self.places = {text: method.words(model, text) for _, text in self.edges}
        self.round = 0
        # Hosts without an up path decode in the later half of their blocks.
        sites = list(self.denoiser.sites("spatial_self"))
        decoding = [site for site in sites if site.stage == "up"] or sites[len(sites) // 2 :]
        self.decoder = {site.name for site in decoding}

    def latents(self) -> Iterator[Float[Tensor, "1 c h w"]]:
        """Clean latents, one after the other, for ever."""
        warm = self.count - self.window
        queue = self._first()
        rounds = diagonal(self.path, self.times, self.window, queue, self._estimate, self._tail, self.method.eta,
                          self._noise)  # fmt: skip
        for latent in rounds:
            self.round += 1
            if self.round > warm:
                yield latent

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)

    def _first(self) -> Float[Tensor, "1 q c h w"]:
        """The queue at the start: an ordinary clip, its frames noised to their levels, the first of them repeated."""
        steps = self.request.steps
        start = self.model.start(seeded(self.denoiser.latent.shape(), self.request.seed), steps)
        clip, _ = sample(self.denoiser, start, self.model.grid(steps), self.conds[self._text()], guide=self.guide)
        frames = (torch.arange(self.count) - (self.count - self.window)).clamp(min=0)
        entries = clip[:, frames]
        noisy = self.path.add_noise(entries, self.times[None].expand(len(clip), -1), self._noise(entries))
        return torch.cat([clip[:, :1].expand(-1, self.window // 2, -1, -1, -1), noisy], 1)

    def _text(self) -> str:
        """The sentence of the frame that enters: scenes change when the frame that leaves reaches them."""
        leaving = self.round - (self.count - self.window)
        return [text for start, text in self.edges if start <= max(0, leaving)][-1]

    def _estimate(self, x: Tensor, t: Tensor, block: int) -> Prediction:
        method, text = self.method, self._text()
        cond, places = self.conds[text], self.places[text]
        blocks = 2 * self.count // self.window
        pulling = method.guidance and method.strength != 0 and bool(places)
        guided = pulling and 0 < block < max(2, blocks * method.guided)
        remembered = pulling and block == 0
        keys = method.attention and places
        self.ctx.i, self.ctx.t = block, t
        with running(self.ctx):
            if not (keys or guided or remembered):
                return self._plain(x, t, cond, ())
            mask = self._mask(x, t, cond, places)
            shared = SharedKeys(mask, bool(keys), [] if guided or remembered else None)
            hooks = [(("spatial_self", lambda site: site.name in self.decoder), shared)]
            found = self._pulled(x, t, cond, hooks, shared) if guided else self._plain(x, t, cond, hooks)
            if remembered:
                self.subject.update(shared.record, method.momentum)
            return found

    def _plain(self, x: Tensor, t: Tensor, cond, hooks) -> Prediction:
        with torch.no_grad(), install(self.denoiser, hooks):
            return self.guide.combine(
                evaluate(self.denoiser, self.guide.branches(cond, self.ctx), x, t, self.ctx, together=not hooks),
                x, t, self.ctx,
            )  # fmt: skip

    def _pulled(self, x: Tensor, t: Tensor, cond, hooks, shared: SharedKeys) -> Prediction:
        """The estimate with its noise moved down the distance of the subject's keys from those remembered.

        The noise enters the step in the direction term alone; moved by -s c g there, where the usual +s c g would be
        right if the corrected noise made the data too.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            with install(self.denoiser, hooks), self.ctx.within("cond"):
                self.denoiser(leaf, t, cond)
            loss = self.subject.distance(shared.record)
            gradient = None if loss is None else torch.autograd.grad(loss, leaf, allow_unused=True)[0]
        found = self._plain(x, t, cond, [(where, replace(hook, record=None)) for where, hook in hooks])
        if gradient is None:
            return found
        _, _, c = self.path.coef(t)
        return Prediction(found.x0, found.eps - self.method.strength * spread(c, x) * gradient)

    def _mask(self, x: Tensor, t: Tensor, cond, places: list[int]) -> Bool[Tensor, "t h w"] | None:
        """Where the encoder and the middle look at the subject: their maps, averaged and cut in two by Otsu's rule."""
        seen = SeenWords(places)
        where = ("spatial_cross", lambda site: site.stage != "up")
        if not any(where[1](site) for site in self.denoiser.sites("spatial_cross")):
            return None
        with torch.no_grad(), install(self.denoiser, [(where, seen)]), self.ctx.within("cond"):
            self.denoiser(x, t, cond)
        size = x.shape[-2:]
        maps = torch.stack([F.interpolate(part[None], size=size, mode="bilinear")[0] for part in seen.maps]).mean(0)
        return maps > otsu(maps)

    def _tail(self, queue: Tensor) -> Float[Tensor, "1 1 c h w"]:
        """The entry that comes in, at the noisiest level."""
        _, _, c = self.path.coef(self.times[-1])
        noise = self._noise(queue[:, -1:])
        if not self.method.tail:
            return noise * float(c)
        # The last entry has just gone down one level; noised up again it is at the end of the path.
        below = self.times[-2]
        (a_s, _, c_s), (a_t, _, c_t) = self.path.coef(below), self.path.coef(self.times[-1])
        ratio = float(a_t / a_s)
        fresh = (float(c_t) ** 2 - (ratio * float(c_s)) ** 2) ** 0.5
        z = ratio * queue[:, -1:] + fresh * self._noise(noise)
        preserve = self.method.variance == "preserve"
        weight = gaussian_filter(1, *queue.shape[-2:], with_time=not preserve).to(queue)
        return float(c) * low_pass(z / float(c), noise, weight, preserve)


def otsu(values: Tensor, bins: int = 64) -> Tensor:
    """The threshold that parts values into two groups of least variance. N. Otsu, IEEE SMC 1979."""
    low, high = values.min(), values.max()
    if float(high - low) < 1e-9:
        return high
    counts = torch.histc(values.float(), bins, float(low), float(high))
    centres = low + (high - low) * (torch.arange(bins, device=values.device) + 0.5) / bins
    below = counts.cumsum(0)
    above = counts.sum() - below
    mean_below = (counts * centres).cumsum(0) / below.clamp(min=1)
    mean_above = ((counts * centres).sum() - (counts * centres).cumsum(0)) / above.clamp(min=1)
    return centres[torch.argmax(below * above * (mean_below - mean_above) ** 2)]
