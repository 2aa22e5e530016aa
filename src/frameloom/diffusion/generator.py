"""A model that makes video, as every strategy sees it; and how to open one: shipped, trained here, or published.

A strategy (long video, streaming, less memory) samples from any `Generator`; a task opens one by name, by folder or by
hub id and need not know which of them it got.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import cards
from frameloom.device import check_device
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Denoiser
from frameloom.diffusion.guide import Guide
from frameloom.diffusion.step import Step
from frameloom.errors import InputError
from frameloom.training.pretrained import load

log = logging.getLogger("frameloom")

# The model that `generate` takes when nothing is said.
DEFAULT = "loom"


@dataclass(frozen=True)
class Defaults:
    """How a model likes to be sampled: in how many steps, and how strongly guided (1 or less: not at all)."""

    steps: int = 50
    guidance: float = 7.5


@runtime_checkable
class Generator(Protocol):
    """What a strategy needs of a model. Videos are `(b, t, 3, h, w)` in [0, 1]; `denoiser.latent` is its own size."""

    name: str
    denoiser: Denoiser
    height: int
    width: int
    fps: float
    defaults: Defaults
    step: Step
    needs_image: bool

    def text(self, prompts: Sequence[str]) -> Cond:
        """The condition of some sentences, with what an empty one would be as its null."""
        ...

    def image(self, picture: Float[Tensor, "b 3 h w"], cond: Cond) -> Cond:
        """The condition with a first picture; raises InputError where the model takes none."""
        ...

    def encode(self, video: Float[Tensor, "b t 3 h w"]) -> Tensor: ...

    def decode(self, latents: Tensor) -> Float[Tensor, "b t 3 h w"]: ...

    def guided(self, w: float) -> Guide:
        """The model's own form of guidance, at a strength above 1."""
        ...

    def grid(self, steps: int) -> Tensor: ...

    def start(self, noise: Tensor, steps: int) -> Tensor:
        """Where a run begins: unit noise, as the path has it at the first time of the grid."""
        ...

    def latent_frames(self, frames: int) -> int:
        """How many latent frames a video of `frames` has."""
        ...


def shipped_models() -> dict[str, str]:
    """Names of the models that come with the package, and what each is."""
    return {card.base or card.id: card.summary for card in cards().values() if card.makes_video and card.weights}


def open_generator(weights: str | None = None, device: str = "cpu") -> Generator:
    """A model by its shipped name, a folder of a run, a folder or hub id of a diffusers pipeline.

    Raises:
        InputError: no such model or device, or a folder that is neither (what was looked for is named).
    """
    check_device(device)
    weights = weights or DEFAULT
    for card in cards().values():
        if card.makes_video and card.weights and weights in (card.base, card.id):
            return load(card.id, device=device)
    folder = Path(weights)
    if (folder / "model_index.json").is_file():
        return _pipeline(weights, device)
    if (folder / "config.json").is_file():
        try:
            method = json.loads((folder / "config.json").read_text())["method"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"--weights {weights}: neither a frameloom run nor a diffusers pipeline "
                             "(config.json names no method)") from None  # fmt: skip
        return load(method, folder, device=device)
    if folder.exists():
        raise InputError(f"--weights {weights}: not a model: it holds neither config.json of a frameloom run nor "
                         "model_index.json of a diffusers pipeline")  # fmt: skip
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise InputError(f"--weights {weights}: no such folder and no shipped model; "
                         f"there are {', '.join(shipped_models())}")  # fmt: skip
    return _pipeline(weights, device)


def _pipeline(weights: str, device: str) -> Generator:
    from frameloom.diffusion.pipeline import load_pipeline

    return load_pipeline(weights, device)


def fitted(picture: Float[Tensor, "3 h w"], height: int, width: int, quiet: bool = False) -> Float[Tensor, "3 h2 w2"]:
    """A picture at a model's size: the middle of it that has the right shape, scaled; says what was cut off."""
    _, h, w = picture.shape
    scale = max(height / h, width / w)
    if abs(height / h - width / w) * min(h, w) > 1 and not quiet:
        log.warning("the picture is %dx%d and the model makes %dx%d: its middle is used", w, h, width, height)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size != (h, w):
        picture = F.interpolate(picture[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width].clamp(0, 1)


def check_words(model: Generator, text: str, strict: bool = False) -> None:
    """Say which words a model with a closed vocabulary does not know, or stop there."""
    words = getattr(model, "words", None)
    if words is None:
        return
    unknown = words.unknown(text)
    if not unknown:
        return
    known = model.knows
    told = ", ".join(f"{word} ({near}?)" if (near := words.nearest(word)) else word for word in unknown)
    line = f"{model.name} does not know {told}; it knows {known}"
    if strict:
        raise InputError(f"--strict: {line}")
    log.warning("%s; the other words are used", line)


def seeded(shape: Sequence[int], seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Gaussian noise that depends on the seed and the shape, not on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
