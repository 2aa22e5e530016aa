"""Video around frames that are known: what comes next, and what lies between. For models with frame replacement."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import card
from frameloom.diffusion.generator import Generator, fitted, open_generator
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.tasks.generation.base import GeneratedSource, Request, generate, settle
from frameloom.tasks.generation.strategies.direct import whole
from frameloom.video.clip import Clip

log = logging.getLogger("frameloom")

KNOWN = 4


class Continued:
    """A strategy: from `known` first frames on, round after round, each from the last frames of the one before."""

    def __init__(self, known: int) -> None:
        self.known = known

    def check(self, model: Generator, request: Request) -> None:
        length = model.denoiser.latent.frames
        if self.known >= length:
            raise InputError(f"{model.name} makes {length} frames, and {self.known} are known already")
        if request.frames > length:
            log.info("more than %d frames: each round goes on from the last %d of the one before", length, self.known)

    def frames(self, model: Generator, request: Request, progress: Progress) -> Iterator[Float[Tensor, "3 h w"]]:
        length, done, number = model.denoiser.latent.frames, 0, 0
        given = dict(request.given)
        while done < request.frames:
            part = replace(request, scenes=((request.prompt, length),), given=given, seed=request.seed + number)
            made = list(whole(model, part, progress))
            # What was known is shown as it was given, and once.
            fresh = [given[k] for k in given] + made[len(given) :] if not number else made[self.known :]
            yield from fresh[: request.frames - done]
            done, number = done + len(fresh), number + 1
            given = dict(enumerate(made[-self.known :]))


def predict(
    clip: Clip,
    frames: int = 8,
    method: str = "auto",
    *,
    prompt: str = "",
    weights: str | None = None,
    steps: int | None = None,
    guidance: float | int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Clip:
    """The last frames of a clip (up to four) and `frames` that might follow, lazily, at the model's size.

    Raises:
        InputError: fewer than 1 frame asked for, or a method that does not take given frames.
    """
    if frames < 1:
        raise InputError(f"--frames {frames}: 1 or more")
    name = "stiv" if method == "auto" else method
    found = card(name, "predict")
    model = open_generator(weights or found.base or found.id, device)
    known = min(KNOWN, len(clip))
    last = [fitted(frame.rgb, model.height, model.width) for frame in clip.frames(len(clip) - known)]
    request = settle(
        model, prompt, known + frames, given=dict(enumerate(last)), steps=steps, guidance=guidance, seed=seed
    )
    strategy = Continued(known)
    strategy.check(model, request)
    return Clip(GeneratedSource(model, strategy, request, f"predict {name} {model.name}", progress))


def inbetween(
    first: Float[Tensor, "3 h w"],
    last: Float[Tensor, "3 h w"],
    method: str = "stiv",
    *,
    frames: int | None = None,
    prompt: str = "",
    weights: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Clip:
    """A clip that begins with one picture and ends with another, lazily, at the model's size and length.

    Raises InputError for a method that does not take given frames, or fewer than 3 frames.
    """
    found = card(method, "interpolate")
    if not found.makes_video:
        raise InputError(f"{method} changes the rate of a video; between two pictures there is stiv")
    model = open_generator(weights or found.base or found.id, device)
    count = frames or model.denoiser.latent.frames
    if count < 3:
        raise InputError(f"--frames {count}: between two pictures there is at least one, so 3 or more")
    given = {0: torch.as_tensor(first), count - 1: torch.as_tensor(last)}
    return generate(prompt, frames=count, method=method, weights=weights, steps=steps, given=given, seed=seed,
                    device=device, progress=progress)  # fmt: skip
