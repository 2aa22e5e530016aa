"""The live task: frames go in one by one and come out in other words. Its settings, its protocol, its public function.

A *model* (`frameloom.diffusion.generator.Generator`) is used as a picture model, a frame at a time: a frame is mixed
with noise to some time of the model's grid and brought back to the data in a few steps under the prompt. A *method*
says how those steps are carried out. Whatever it does, one frame comes out for every frame that goes in.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import card, chosen
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.generator import Generator, check_words, fitted, open_generator, seeded
from frameloom.diffusion.paths import VP, Path, spread
from frameloom.diffusion.step import Universal
from frameloom.errors import InputError
from frameloom.tasks.editing.workers import DROPPED, paced, through
from frameloom.training.pretrained import digest
from frameloom.video.clip import Clip, Frame, Source

log = logging.getLogger("frameloom")

GRID = 50
GUIDANCE = ("none", "self", "onetime", "full")
NOISE = ("fixed", "ddim", "none")

Picture = Float[Tensor, "3 h w"]


def indices(strength: float | int, count: int) -> tuple[int, ...]:
    """`count` indices of the grid for a strength in (0, 1]: 1 leaves nothing of the input, near 0 nearly all.

    The first is int(49 (1 - strength)), the others lie evenly between it and the end.
    """
    if not 0 < strength <= 1 or count < 1:
        raise InputError(f"--strength {strength:g} in {count} steps: a strength is more than 0 and at most 1")
    first = int((GRID - 1) * (1 - strength))
    if GRID - first < count:
        raise InputError(f"--strength {strength:g}: only {GRID - first} steps are left of {GRID}; {count} do not fit")
    return tuple(round(value) for value in torch.linspace(first, GRID - 1, count).tolist())


@dataclass(frozen=True)
class Settings:
    """How a frame is taken apart and put together again.

    Attributes:
        t_index: where in a grid of 50 times, the noisiest first, the network is asked: ascending; the first decides
            how much of the frame is left.
        guidance: `none`; `full`: classifier-free; `self` and `onetime`: residual (see `streamdiffusion`).
        w, delta: strength of the guidance, and of the residual noise in it.
        negative: what to be guided away from; nothing in particular when empty.
        noise: between two steps, the slot's `fixed` noise, the estimated one (`ddim`), or `none`.
        boundary: LCM's boundary scalings; None: for models that were distilled.
        similar: frames as alike as this (cosine) are likely to be skipped; None: no frame is.
        blend: share of the output before in the frame that goes in, against flicker.
        ramp: frames over which a change of the prompt is faded in.
        from_noise: frames begin as fresh noise, and the input only beats time: text to image.
    """

    t_index: tuple[int, ...] = (32, 45)
    guidance: str = "none"
    w: float = 1.2
    delta: float = 1.0
    negative: str = ""
    noise: str = "fixed"
    boundary: bool | None = None
    similar: float | None = None
    blend: float = 0.0
    ramp: int = 0
    from_noise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        t = self.t_index
        if not t or t[0] < 0 or t[-1] >= GRID or any(a >= b for a, b in pairwise(t)):
            raise InputError(f"--t-index must ascend and stay below {GRID}; got {','.join(map(str, t)) or 'nothing'}")
        for flag, value, known in (("guidance", self.guidance, GUIDANCE), ("noise", self.noise, NOISE)):
            if value not in known:
                raise InputError(f"--{flag} {value}: this must be one of {', '.join(known)}")
        if self.similar is not None and not 0 < self.similar < 1:
            raise InputError(f"--similar {self.similar:g}: a similarity is between 0 and 1, such as 0.98")
        if not 0 <= self.blend < 1:
            raise InputError(f"--temporal-blend {self.blend:g}: a share from 0 to below 1")
        if self.ramp < 0:
            raise InputError(f"--prompt-ramp {self.ramp}: a number of frames, 0 or more")
        if self.from_noise and self.guidance == "self":
            raise InputError("--guidance self needs an input to be guided by, and --from-noise has none; use onetime")
        if self.from_noise and (self.similar or self.blend):
            raise InputError("--from-noise: frames that begin as noise are neither --similar nor blended")


@dataclass
class Report:
    """Counted as frames pass: launches of the network, pictures evaluated in them, frames spared."""

    frames: int = 0
    launches: int = 0
    evaluations: int = 0
    skipped: int = 0
    dropped: int = 0
    live_fps: float = 0.0


class Prompts:
    """The condition at every frame, from sentences by the frame at which each begins."""

    def __init__(self, model: Generator, texts: Mapping[int, str], negative: str = "", ramp: int = 0) -> None:
        self.model, self.negative, self.ramp = model, negative, ramp
        self._conds: dict[int, Cond] = {}
        if 0 not in texts:
            raise InputError("--prompt: the first frame has none")
        for number, text in sorted(texts.items()):
            self.begin(number, text)

    def begin(self, number: int, text: str) -> None:
        """From frame `number` on, `text`. Its condition is computed here, once."""
        self._conds[number] = self._read(text)
        self._conds = dict(sorted(self._conds.items()))

    @torch.no_grad()
    def _read(self, text: str) -> Cond:
        for sentence in (text, self.negative):
            try:
                sentence.encode()
            except UnicodeEncodeError:
                raise InputError("--prompt: it holds bytes that are no text; prompts are UTF-8") from None
            check_words(self.model, sentence)
        cond = self.model.text([text])
        if not self.negative:
            return cond
        away = self.model.text([self.negative])
        return Cond(cond.values, {name: away[name] for name in cond.nulls})

    def at(self, number: int) -> Cond:
        """The condition of one frame; within `ramp` frames of a change, between the two."""
        begun = max(key for key in self._conds if key <= number)
        share = (number - begun + 1) / (self.ramp + 1)
        if begun == 0 or share >= 1:
            return self._conds[begun]
        return _between(self.at(begun - 1), self._conds[begun], share)


def _between(before: Cond, after: Cond, share: float) -> Cond:
    """Embeddings are mixed, masks joined; what cannot be mixed (a class, another length) changes half-way."""

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        if a.shape == b.shape and a.is_floating_point():
            return torch.lerp(a, b, share)
        if a.shape == b.shape and a.dtype == torch.bool:
            return a | b
        return b if share >= 0.5 else a

    if any(before[name].shape != value.shape for name, value in after.values.items()):
        return after if share >= 0.5 else before
    return Cond({name: mixed(before[name], value) for name, value in after.values.items()}, after.nulls)


def scalings(path: Path, t: Tensor, sigma_data: float = 0.5, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out at times of a path, with which an estimate of the data is `c_out x0 + c_skip x`.

    s = 10 i for training step i; c_skip = 0.25 / (s^2 + 0.25), c_out = s / sqrt(s^2 + 0.25). arXiv 2310.04378.
    """
    s = scale * ((t.double() - 1).clamp(min=0) if isinstance(path, VP) else 1000 * t.double())
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


@dataclass(frozen=True)
class Entry:
    """A frame on its way to the network: its latents `(1, s, c, h, w)`, its number, and whether its size is new."""

    latent: Tensor
    number: int
    resized: bool = False


class Live:
    """A method of this task: what all of them share. A leaf gives `steps`, and `drain` if it holds frames back.

    `push` takes frames one at a time. A stream in threads calls its three parts, `enter`, `advance` and `leave`, each
    from a thread of its own.

    Attributes:
        delay: so many frames go in before the first comes out.
        number: of the next frame that goes in; the prompt of a frame goes by it.
    """

    delay: int = 0

    def __init__(self, model: Generator, prompt: str | Mapping[int, str], settings: Settings | None = None) -> None:
        self.model, self.settings, self.report = model, settings or Settings(), Report()
        s = self.settings
        if model.needs_image:
            raise InputError(f"{model.name} makes video from a picture; live needs a model that follows words")
        if model.latent_frames(1) != 1:
            raise InputError(f"{model.name} stores several frames in one latent; live needs one that stores each")
        texts = {0: prompt} if isinstance(prompt, str) else prompt
        self.prompts = Prompts(model, texts, s.negative, s.ramp)
        first = self.prompts.at(0)
        grid = model.grid(GRID)
        if len(grid) <= s.t_index[-1] + 1:
            raise InputError(f"--t-index {','.join(map(str, s.t_index))}: {model.name} has {len(grid) - 1} times, "
                             f"so an index stays below {len(grid) - 1}")  # fmt: skip
        device = next(iter(first.values.values())).device if first.values else "cpu"
        # All that does not depend on a frame is there before the first one comes.
        self.path, self.times = model.denoiser.path, grid[list(s.t_index)].to(device)
        shape = model.denoiser.latent.shape(1, 1)
        self.noises = seeded((len(s.t_index), *shape[1:]), s.seed, device)
        distilled = isinstance(model.step, Universal) and model.step.r == 1
        self.boundary = distilled if s.boundary is None else s.boundary
        self._advise(distilled, first)
        self.last: Tensor | None = None
        self.number, self._at, self._owed = 0, 0, 0
        self._size: torch.Size | None = None
        self._shown: tuple[Tensor, Picture] | None = None
        self._ready: deque[Picture] = deque()
        self._begun = 0.0

    def _advise(self, distilled: bool, cond: Cond) -> None:
        s = self.settings
        if not distilled and len(s.t_index) < 20:
            log.warning("%s was not distilled; expect blur below 20 steps", self.model.name)
        if s.guidance in ("full", "onetime"):
            if not cond.nulls:
                raise InputError(f"--guidance {s.guidance}: {self.model.name} has no empty prompt to be guided by")
            if not s.negative:
                log.info("--guidance %s without --negative: guided away from an empty prompt", s.guidance)

    # --- what a leaf gives ------------------------------------------------------------------------------------------

    def steps(self, x: Tensor, reference: Tensor, cond: Cond) -> list[Tensor]:
        """Take in a noisy latent `(1, 1, c, h, w)` and its clean `reference`; the latents that are finished by that."""
        raise NotImplementedError

    def drain(self) -> Iterator[Tensor]:
        """Finish what was begun."""
        return iter(())

    def restart(self) -> None:
        """The next frame has nothing to do with those before it."""

    def skips(self, picture: Picture) -> bool:
        """Whether a frame is like the one before it, so that the output before will do."""
        return False

    # --- frame by frame ---------------------------------------------------------------------------------------------

    def push(self, frame: Picture) -> Float[Tensor, "3 h2 w2"] | None:
        """The next finished frame, if there is one, for the next frame that goes in (`(3, h, w)` in [0, 1])."""
        self._ready += [self.leave(latent) for latent in self.advance(self.enter(frame))]
        return self._ready.popleft() if self._ready else None

    def flush(self) -> list[Picture]:
        """The frames that are still inside."""
        self._ready += [self.leave(latent) for latent in self.finish()]
        rest = list(self._ready)
        self._ready.clear()
        return rest

    def say(self, prompt: str) -> None:
        """Another prompt from the next frame on; what is under way follows it too. State is kept."""
        self.prompts.begin(self.number, prompt)

    @torch.no_grad()
    def enter(self, frame: Picture | object) -> Entry | None:
        """A frame at the model's size, encoded; None for one that is skipped or was dropped."""
        self._begun = self._begun or time.perf_counter()
        number, self.number = self.number, self.number + 1
        self.report.frames += 1
        if frame is DROPPED:
            self.report.dropped += 1
            return None
        shape = frame.shape[-2:]
        resized = self._size is not None and shape != self._size
        if resized:
            log.warning(
                "frame %d is %dx%d after %dx%d: the stream begins anew", number, *shape[::-1], *self._size[::-1]
            )
        picture = fitted(frame, self.model.height, self.model.width, quiet=shape == self._size)
        self._size = shape
        if self.settings.from_noise:
            return Entry(seeded(self.noises[:1].shape, self.settings.seed + 1 + number, self.noises.device), number)
        if self.skips(picture):
            self.report.skipped += 1
            return None
        return Entry(self.model.encode(picture[None, None]).float(), number, resized)

    @torch.no_grad()
    def advance(self, entry: Entry | None) -> list[Tensor]:
        """The latents `(1, 1, c, h, w)` that are finished by one more frame, in order."""
        if entry is None:  # the output before serves again; before there is one, the first will
            self._at += 1
            self._owed += self.last is None
            return [] if self.last is None else [self.last]
        found = self._counted(self.drain()) if entry.resized else []
        self._at, clean = entry.number, entry.latent
        if self.settings.from_noise:
            x = spread(self.path.coef(self.times[:1])[2], clean) * clean
        else:
            mixed = clean if self.last is None else torch.lerp(clean, self.last, self.settings.blend)
            x = self.path.add_noise(mixed, self.times[:1], self.noises[:1])
        return found + self._counted(self.steps(x, clean, self.prompts.at(self._at)))

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        return self._counted(self.drain())

    def _counted(self, made: Iterator[Tensor] | list[Tensor]) -> list[Tensor]:
        found = list(made)
        if found:
            if not bool(torch.isfinite(found[-1]).all()):
                raise InputError(f"frame {self._at} left the numbers; try float32, or less guidance")
            found, self._owed = found[:1] * self._owed + found, 0
            self.last = found[-1]
        return found

    @torch.no_grad()
    def leave(self, latent: Tensor) -> Picture:
        """A finished latent as a picture."""
        if self._shown is None or self._shown[0] is not latent:
            self._shown = latent, self.model.decode(latent)[0, 0].clamp(0, 1).float().cpu()
        passed = time.perf_counter() - self._begun
        self.report.live_fps = round(self.report.frames / max(passed, 1e-9), 2)
        return self._shown[1]


def live(
    clip: Clip,
    prompt: str | Mapping[int, str],
    method: str = "auto",
    *,
    t_index: Sequence[int] | None = None,
    strength: float | int | None = None,
    steps: int = 2,
    weights: str | None = None,
    device: str = "cpu",
    drop: bool = False,
    queue: int = 4,
    **settings: Any,
) -> Clip:
    """The same video in other words, lazily and in time: an output frame for every input frame.

    Args:
        prompt: a sentence, or sentences by the frame at which each begins.
        t_index, strength, steps: where in the model's grid a frame enters and is stopped at: exactly, or by how much
            is to change (see `indices`).
        weights: a shipped model's name, a folder of a run, a folder or hub id of a diffusers pipeline.
        drop: keep the pace of the clip, as a camera has one: frames for which there is no time are dropped, and the
            output before stands in their place. Without it the clip waits.
        queue: frames that may wait before each worker.
        settings: the fields of `Settings`.

    Raises:
        InputError: whatever in this cannot be done, before anything is computed.
    """
    made = card(chosen(method, "live"), "live")
    if t_index is not None and strength is not None:
        raise InputError("--t-index and --strength: one of them says where a frame enters")
    if queue < 1:
        raise InputError(f"--queue {queue}: 1 frame or more may wait")
    if t_index is None and strength is not None:
        t_index = indices(strength, steps)
    try:
        chosen_settings = Settings(**settings, **({} if t_index is None else {"t_index": tuple(t_index)}))
    except TypeError:
        known = [name for name in Settings.__dataclass_fields__ if name != "t_index"]
        extra = [name for name in settings if name not in known]
        raise InputError(f"live has no setting {', '.join(extra)}; it has {', '.join(known)}") from None
    model = open_generator(weights or made.base or None, device)
    make = partial(made.load_class(), model, prompt, chosen_settings)
    label = f"live {made.id} {weights} {digest(model)} {prompt} {chosen_settings} {drop=}"
    return Clip(LiveSource(clip.source, make, label, drop, queue))


class LiveSource(Source):
    """Another source, restyled. Three workers: reading and encoding, the network, decoding."""

    def __init__(self, base: Source, make: Callable[[], Live], label: str, drop: bool = False, queue: int = 4) -> None:
        self.base, self.make, self.label, self.drop, self.queue = base, make, label, drop, queue
        self.live: Live = make()  # what is wrong with the request is said now
        self.info = replace(base.info, width=self.live.model.width, height=self.live.model.height)
        self.passthrough = base.passthrough

    @property
    def report(self) -> Report:
        return self.live.report

    def times(self) -> Sequence:
        return self.base.times()

    def end(self) -> Fraction:
        return self.base.end()

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        times = self.base.times()
        start, stop, _ = slice(start, stop).indices(len(times))
        s = self.live.settings
        # A frame's result is its own alone, unless an earlier one may stand in for it or is blended into it.
        begin = 0 if s.similar or s.blend or self.drop else start
        live = self.make() if self.live.report.frames else self.live
        self.live = live
        live.number = begin
        shown = self.base.frames(begin, min(stop + live.delay, len(times)))
        pictures = (frame.rgb for frame in (paced(shown) if self.drop else shown))

        def network(entries: Iterator[Entry | None]) -> Iterator[Tensor]:
            for entry in entries:
                yield from live.advance(entry)
            yield from live.finish()

        stages = (partial(map, live.enter), network, partial(map, live.leave))
        for number, picture in enumerate(through(pictures, *stages, size=self.queue, drop=self.drop), begin):
            if number >= stop:
                return
            if number >= start:
                yield Frame(times[number], self.info.colour, rgb=picture)

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} | {self.label}"
