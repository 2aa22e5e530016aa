"""The generation task: its strategies' protocol, its public functions, and what they check before anything is computed.

A *model* (`frameloom.diffusion.generator.Generator`) makes short clips; a *strategy* says how it is sampled: at once,
window by window, as an endless queue, in little memory. `generate` joins the two and gives a lazy clip.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom import memory
from frameloom.cards import card, chosen
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.generator import Generator, check_words, fitted, open_generator, seeded
from frameloom.diffusion.guide import Guide, Unguided
from frameloom.diffusion.step import Step, step
from frameloom.errors import InputError
from frameloom.memory import PeakMemory
from frameloom.progress import Progress, silent
from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import BT709, Colour
from frameloom.video.times import RegularTimes

log = logging.getLogger("frameloom")

Picture = Float[Tensor, "3 h w"]


@dataclass(frozen=True)
class Request:
    """What is to be made, settled: nothing in it is left to guess.

    `scenes` are sentences, each with its number of frames; `given` are pictures at the model's size that stand at
    those frames; `guidance` 1 or less means one evaluation a step.
    """

    scenes: tuple[tuple[str, int], ...]
    steps: int
    guidance: float
    seed: int
    solver: str | None = None
    given: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return sum(count for _, count in self.scenes)

    @property
    def prompt(self) -> str:
        return self.scenes[0][0]

    def guide(self, model: Generator) -> Guide:
        return model.guided(self.guidance) if self.guidance > 1 else Unguided()

    def step(self, model: Generator) -> Step:
        return step(self.solver) if self.solver else model.step


@runtime_checkable
class Strategy(Protocol):
    """How a model is sampled. `frames` yields pictures in their order, each as soon as it is known.

    `check` raises InputError, before anything is computed, where the model lacks what the strategy needs.
    """

    def check(self, model: Generator, request: Request) -> None: ...

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Picture]: ...


def generate(
    prompt: str | Sequence[tuple[str, int]] = "",
    *,
    frames: int | None = None,
    method: str = "auto",
    weights: str | None = None,
    image: Picture | None = None,
    given: Mapping[int, Picture] | None = None,
    steps: int | None = None,
    guidance: float | int | None = None,
    solver: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    strict: bool = False,
    stream: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Clip:
    """A video from words, a picture, or any frames; lazily: nothing is sampled until frames are asked for.

    Args:
        prompt: a sentence, or scenes as `[(sentence, frames), ...]` for methods that change their words midway.
        frames: how many; the model's own length when None.
        method: a model or a strategy of this task; `"auto"` is the shipped model as it is.
        weights: a shipped model's name, a folder of a run, a folder or hub id of a diffusers pipeline.
        image: the first frame. given: pictures at any frames.
        steps, guidance, solver: the model's own when None.
        strict: stop at words that the model does not know, rather than leave them out with a note.
        stream: keep only some blocks of the network in memory, such as `{"k": 4}` (see `open_streamed`).
        options: settings of the strategy.

    Raises:
        InputError: whatever in this cannot be done, before anything is computed.
    """
    made = card(chosen(method, "generate"), "generate")
    strategy = _strategy("direct" if made.makes_video else made.id, options)
    wanted = weights or made.base or (made.id if made.makes_video else None)
    streams: list[Any] = []
    if stream is None:
        model = open_generator(wanted, device)
    else:
        from frameloom.tasks.generation.streaming import open_streamed

        model, streams = open_streamed(wanted, device, stream, progress)
    request = settle(model, prompt, frames, image, given, steps, guidance, solver, seed, strict)
    strategy.check(model, request)
    source = GeneratedSource(model, strategy, request, f"{made.id} {model.name} {options}", progress)
    source.streams = streams
    return Clip(source)


def _strategy(name: str, options: dict[str, Any]) -> Strategy:
    kind = card(name, "generate").load_class()
    known = list(inspect.signature(kind).parameters)
    if extra := [key for key in options if key not in known]:
        raise InputError(f"{name} has no setting {', '.join(extra)}; it has {', '.join(known) or 'none'}")
    return kind(**options)


def settle(
    model: Generator,
    prompt: str | Sequence[tuple[str, int]],
    frames: int | None = None,
    image: Picture | None = None,
    given: Mapping[int, Picture] | None = None,
    steps: int | None = None,
    guidance: float | int | None = None,
    solver: str | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Request:
    """Fill in what was left open with the model's own values, and refuse what cannot be."""
    # Published models may keep several frames in one latent; they say their own length.
    length = getattr(model, "frames", model.denoiser.latent.frames)
    scenes = ((prompt, frames or length),) if isinstance(prompt, str) else tuple(prompt)
    if frames is not None and frames < 1:
        raise InputError(f"--frames {frames}: a video has 1 frame or more")
    if not scenes or any(count < 1 for _, count in scenes):
        raise InputError("--prompts: a scene is a sentence and 1 frame or more")
    steps = model.defaults.steps if steps is None else steps
    if steps < 1:
        raise InputError(f"--steps {steps}: sampling takes 1 step or more")
    if solver:
        step(solver)
    guidance = model.defaults.guidance if guidance is None else float(guidance)
    if 0 < guidance < 1:
        log.warning("guidance %g is below 1: the prompt counts for less than without guidance", guidance)
    for text, _ in scenes:
        check_words(model, text, strict)
    total = sum(count for _, count in scenes)
    pictures = dict(given or {})
    if image is not None:
        pictures[0] = image
    for number in pictures:
        if not 0 <= number < total:
            raise InputError(f"a picture was given for frame {number}, but the video has frames 0 to {total - 1}")
    if model.needs_image and 0 not in pictures:
        raise InputError(f"{model.name} makes video from a picture: give it one with --image")
    pictures = {number: fitted(picture, model.height, model.width) for number, picture in sorted(pictures.items())}
    return Request(scenes, steps, guidance, seed, solver, pictures)


def condition(model: Generator, request: Request, text: str | None = None) -> Cond:
    """The condition of a request on its model: the words, and the first picture where the model takes it as one.

    Pictures at other frames, and on models with frame replacement, stand in the latents instead (`given` and `clean`).
    """
    cond = model.text([request.prompt if text is None else text])
    if model.needs_image:
        return model.image(request.given[0][None], cond)
    return cond


def given_latents(model: Generator, request: Request) -> tuple[Tensor, Tensor] | None:
    """`given` `(1, t)` and `clean` `(1, t, c, h, w)` for frame replacement; None where no frame is given."""
    if not request.given or model.needs_image:
        return None
    numbers = list(request.given)
    pictures = torch.stack([request.given[number] for number in numbers])[None]
    if model.latent_frames(request.frames) != request.frames:
        raise InputError(f"{model.name} stores several frames in one latent; a single frame cannot be given to it")
    latents = model.encode(pictures)
    shape = model.denoiser.latent.shape(1, request.frames)
    clean = latents.new_zeros(shape)
    clean[:, numbers] = latents
    given = torch.zeros(1, request.frames, dtype=torch.bool, device=latents.device)
    given[:, numbers] = True
    return given, clean


def activations(model: Generator, request: Request, frames: int) -> int:
    """Peak bytes of one guided evaluation of so many frames, by making one."""
    cond = condition(model, request)
    x = seeded(model.denoiser.latent.shape(2, model.latent_frames(frames)), 0)
    t = model.grid(request.steps)[:1].expand(2)
    with torch.no_grad(), PeakMemory() as meter:
        model.denoiser(x, t, cond.repeat(2))
    return meter.most + x.numel() * x.element_size()


def check_memory(model: Generator, request: Request) -> None:
    """Raises InputError, before the sampling, where a long clip does not fit in memory; says how many frames would.

    The need is measured at the model's own length and grows with the frames (faster where all frames attend to all:
    then this is the least).
    """
    length = model.denoiser.latent.frames
    if request.frames <= 4 * length:
        return
    took, free = activations(model, request, length), memory.available()
    if took * request.frames / length > free:
        most = max(length, int(free / took * length))
        raise InputError(f"--frames {request.frames}: takes about {took * request.frames / length / 1e9:.3g} GB in one "
                         f"piece and {free / 1e9:.3g} GB are free; {most} frames fit, and --method ouroboros or fifo "
                         "takes the same memory for any number")  # fmt: skip


class GeneratedSource(Source):
    """Frames of a strategy, made in order when they are asked for; those of a whole short clip are kept."""

    KEEP = 64

    def __init__(
        self, model: Generator, strategy: Strategy, request: Request, label: str, progress: Progress = silent
    ) -> None:
        self.model, self.strategy, self.request, self.label, self.progress = model, strategy, request, label, progress
        rate = Fraction(model.fps).limit_denominator(1001)
        name = request.prompt or "generated"
        self.info = Info(model.width, model.height, rate, Colour(BT709, False), name=name)
        self.streams: list[Any] = []  # what streams the model's networks, if anything does
        self._kept: list[Picture] | None = None

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, self.request.frames)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        start, stop, _ = slice(start, stop).indices(self.request.frames)
        keep = self.request.frames <= self.KEEP
        if keep and self._kept is None:
            self._kept = list(self.strategy.frames(self.model, self.request, self.progress))
        pictures = self._kept if keep else self.strategy.frames(self.model, self.request, self.progress)
        for number, picture in enumerate(pictures):
            if number >= stop:
                return
            if number >= start:
                yield Frame(Fraction(number) / self.info.rate, self.info.colour, rgb=picture.float().cpu())

    def fingerprint(self) -> str:
        request = self.request
        given = [(number, float(picture.double().sum())) for number, picture in request.given.items()]
        return f"{self.label} {request.scenes} {request.steps} {request.guidance} {request.seed} {given}"
