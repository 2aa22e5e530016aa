"""Small bases on the public hosts: what training-free methods are tried on, and what distillation starts from.

Each is a stock diffusers network with a text encoder of its own, trained on the synthetic world or on real digits:

    world-unet3d, world-motion, world-latte   text to video, 8 frames of 16x16 pixels (one data set, three hosts)
    tiny-svd-world                            a first picture to video, 16 frames of 32x32
    tiny-cogx-world                           text (and a first picture) to video, 16 frames of 32x32, full attention
    digits-16                                 class to picture, 16x16

A base is a denoiser adapter (`frameloom.diffusion.adapters`), an exactly invertible pixel codec and a loss: the target
of its parameterisation at random times, frames weighted alike.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.adapters.base import Adapter
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Denoiser, rebase
from frameloom.diffusion.generator import Defaults
from frameloom.diffusion.guide import CFG, Guide
from frameloom.diffusion.objective import LogitNormal, LogNormalSigma, mse, uniform
from frameloom.diffusion.paths import EDM, VP, Flow, Path
from frameloom.diffusion.predict import target
from frameloom.diffusion.step import STEPS as STEPPERS
from frameloom.diffusion.step import Grids, Step, Universal
from frameloom.errors import InputError
from frameloom.language.words import WordEncoder, Words
from frameloom.training.recipe import Recipe
from frameloom.world import VOCABULARY

log = logging.getLogger("frameloom")

WORDS = Words(VOCABULARY, length=16)
LABELS = 10

PATHS: dict[str, Path] = {
    "vp": VP.of("linear", zero_snr=True),
    "flow": Flow(),
    "edm": EDM(t_max=80.0),
}


@dataclass(frozen=True)
class Config:
    """A base: its `host` (a key of `HOSTS`), its clip, the patch that becomes channels, its path and prediction.

    `prediction` is what the host's raw output means (`frameloom.diffusion.predict`); a student of a distillation has
    its teacher's host on another path, or (`rebase`, the name of that path) the whole teacher seen from it. `distilled`
    is the number of steps that a student was made for, with the guidance baked in.
    """

    host: str
    frames: int
    side: int
    channels: int = 3
    patch: int = 1
    path: str = "vp"
    prediction: str = "v"
    width: int = 32
    image: bool = False
    rebase: str = ""
    distilled: int = 0


def build(config: Config) -> Adapter:
    """The diffusers network of a base, untrained, inside the adapter that drives it."""
    import diffusers

    from frameloom.diffusion.adapters import cogvideox, latte, motion, svd, unet2d, unet3d

    c, n = config, config.channels * config.patch**2
    path, size = PATHS[c.path], c.side // c.patch
    unet = {"sample_size": size, "in_channels": n, "out_channels": n, "block_out_channels": (32, 64),
            "layers_per_block": 1, "norm_num_groups": 8}  # fmt: skip
    cross = {"cross_attention_dim": c.width}
    if c.host == "unet3d":
        net = diffusers.UNet3DConditionModel(
            **unet, **cross, attention_head_dim=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )  # fmt: skip
        return unet3d.UNet3D(net, path, c.prediction, c.frames)
    if c.host == "motion":
        net = diffusers.UNetMotionModel(
            **unet, **cross, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=4,
            motion_num_attention_heads=4, motion_max_seq_length=32,
        )  # fmt: skip
        return motion.UNetMotion(net, path, c.prediction, c.frames)
    if c.host == "latte":
        net = diffusers.LatteTransformer3DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=n, out_channels=n, num_layers=4,
            sample_size=size, patch_size=2, caption_channels=c.width, video_length=c.frames, cross_attention_dim=64,
            attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
        )  # fmt: skip
        return latte.Latte(net, path, c.prediction)
    if c.host == "svd":
        net = diffusers.UNetSpatioTemporalConditionModel(
            sample_size=size, in_channels=2 * n, out_channels=n, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), **cross,
            num_attention_heads=(4, 4), num_frames=c.frames, addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
        )  # fmt: skip
        return svd.SVD(net, path, c.prediction, c.frames)
    if c.host == "cogvideox":
        net = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=2 * n if c.image else n, out_channels=n,
            num_layers=5, sample_width=size, sample_height=size, sample_frames=c.frames, patch_size=2,
            temporal_compression_ratio=1, text_embed_dim=c.width, max_text_seq_length=WORDS.length, time_embed_dim=64,
        )  # fmt: skip
        return cogvideox.CogVideoX(net, path, c.prediction, c.frames)
    if c.host == "unet2d":
        net = diffusers.UNet2DModel(
            sample_size=size, in_channels=n, out_channels=n, layers_per_block=1, block_out_channels=(32, 64),
            norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=LABELS + 1,
        )  # fmt: skip
        return unet2d.UNet2D(net, path, c.prediction, c.frames)
    raise InputError(f"config.json: host {c.host} is unknown")


HOSTS = {
    "world-unet3d": Config("unet3d", frames=8, side=16, patch=2, prediction="data"),
    "world-motion": Config("motion", frames=8, side=16, patch=2),
    "world-latte": Config("latte", frames=8, side=16, patch=2, prediction="data"),
    "tiny-svd-world": Config("svd", frames=16, side=32, patch=4, path="edm", prediction="v", image=True),
    "tiny-cogx-world": Config("cogvideox", frames=16, side=32, patch=4, image=True, width=64),
    "digits-16": Config("unet2d", frames=1, side=16, channels=1, patch=2),
}

# Steps and examples a step: ten to fifteen minutes of one core each.
STEPS = {
    "world-unet3d": (5000, 8),
    "world-motion": (1000, 8),
    "world-latte": (5000, 16),
    "tiny-svd-world": (800, 8),
    "tiny-cogx-world": (1500, 12),
    "digits-16": (3000, 32),
}


class Base(nn.Module):
    """A small generator around a stock host. Leaves differ in nothing but their configuration."""

    id: ClassVar[str] = ""
    fps = 8.0

    def __init__(self, config: Config) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        super().__init__()
        self.config = config
        self.adapter = build(config)
        self.host = self.adapter.host
        if hasattr(self.host, "set_attn_processor") and config.host != "cogvideox":
            # Three plain products: for short sequences on a processor faster than the fused kernel, and trainable in
            # bfloat16 at all.
            self.host.set_attn_processor(AttnProcessor())
        if self.has_text:
            self.encoder = WordEncoder(len(WORDS), config.width, length=WORDS.length)

    @property
    def has_text(self) -> bool:
        return self.config.host not in ("unet2d", "svd")

    # --- as a generator: see frameloom.diffusion.generator -----------------------------------------------------------

    knows = "one or two of small large red orange yellow green blue purple ball box capsule that rolls slides left " \
            "right, rises, sinks or stands still, behind or in front of the other"  # fmt: skip

    @property
    def name(self) -> str:
        return self.id

    @property
    def denoiser(self) -> Denoiser:
        return rebase(self.adapter, PATHS[self.config.rebase]) if self.config.rebase else self.adapter

    @property
    def step(self) -> Step:
        return STEPPERS["rfpp"] if self.config.rebase else Universal()

    @property
    def words(self) -> Words | None:
        return WORDS if self.has_text else None

    @property
    def needs_image(self) -> bool:
        return self.config.host == "svd"

    @property
    def defaults(self) -> Defaults:
        if self.config.distilled:
            return Defaults(steps=self.config.distilled, guidance=1.0)
        # A picture model of digits, and a model that follows a picture, have no words to be guided by.
        return Defaults(steps=25, guidance=2.0 if not self.has_text else 4.0)

    @property
    def height(self) -> int:
        return self.config.side

    width = height

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def text(self, prompts: Sequence[str]) -> Cond:
        if self.config.host == "unet2d":
            return self.labels([_digit(prompt) for prompt in prompts])
        if self.config.host == "svd":
            return Cond()
        with torch.no_grad():
            (text, known), (empty, none) = (
                self.encoder(WORDS.encode(words).to(self.device)) for words in (prompts, [""])
            )
        return self._imageless(Cond({"text": text, "text_mask": known}, {"text": empty, "text_mask": none}))

    def labels(self, digits: Sequence[int]) -> Cond:
        """Classes as a condition; the class after the last stands for none."""
        return Cond({"label": torch.tensor(digits, device=self.device)},
                    {"label": torch.tensor([LABELS], device=self.device)})  # fmt: skip

    def _imageless(self, cond: Cond) -> Cond:
        if not self.config.image:
            return cond
        size = self.config.side // self.config.patch
        shape = (len(cond["text"]), 1, self.config.channels * self.config.patch**2, size, size)
        return cond.replace(image=torch.zeros(shape, device=self.device))

    def image(self, picture: Float[Tensor, "b 3 h w"], cond: Cond) -> Cond:
        if not self.config.image:
            raise InputError(f"{self.id} makes video from words alone")
        latents = self.encode(picture[:, None])
        if self.config.host == "svd":
            return self._pictured(latents)
        return cond.replace(image=latents)

    def _pictured(self, latents: Tensor, dropped: Tensor | None = None) -> Cond:
        """SVD's conditions: the picture's latents, an empty embedding, and frame rate, motion and noise numbers."""
        b = len(latents)
        shown = latents if dropped is None else latents * (~dropped).float().view(b, 1, 1, 1, 1)
        values = {
            "image": shown,
            "image_embeds": latents.new_zeros(b, 1, self.config.width),
            "time_ids": latents.new_tensor([[self.fps - 1, 127.0, 0.0]]).repeat(b, 1),
        }
        return Cond(values, {"image": torch.zeros_like(latents)})

    def encode(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        p = self.config.patch
        video = video.to(self.device)[:, :, : self.config.channels]
        return rearrange(2 * video - 1, "b t c (h p) (w q) -> b t (c p q) h w", p=p, q=p)

    def decode(self, latents: Float[Tensor, "b t c h2 w2"]) -> Float[Tensor, "b t 3 h w"]:
        p = self.config.patch
        video = rearrange(latents / 2 + 0.5, "b t (c p q) h w -> b t c (h p) (w q)", p=p, q=p)
        return video.expand(-1, -1, 3, -1, -1)

    def grid(self, steps: int) -> Tensor:
        path = self.denoiser.path
        if isinstance(path, EDM):
            return Grids.karras(path, steps, high=path.t_max)
        return Grids.trailing(path, steps) if isinstance(path, VP) else Grids.linear(path, steps)

    def guided(self, w: float) -> Guide:
        if self.config.distilled:
            log.warning("this student has its teacher's guidance in its weights; more of it exaggerates")
        return CFG(w)

    def start(self, noise: Tensor, steps: int) -> Tensor:
        return noise * float(self.denoiser.path.coef(self.grid(steps)[0])[2])

    def latent_frames(self, frames: int) -> int:
        return frames

    # --- distillation: see frameloom.tasks.distillation ---------------------------------------------------------------

    @property
    def classes(self) -> list[str]:
        """The prompts of a model that knows only so many."""
        return [str(digit) for digit in range(LABELS)] if self.config.host == "unet2d" else []

    def student(self, steps: int, exact: bool = False) -> "Base":
        """A copy on the rectified flow, for so many steps: its output is read as a velocity, or (`exact`) the velocity
        is that of the copied model, read off its estimate of the data. A model on the flow stays as it is.
        """
        config = replace(self.config, distilled=steps)
        if not isinstance(self.denoiser.path, Flow):
            flow = {"rebase": "flow"} if exact else {"path": "flow", "prediction": "velocity"}
            config = replace(config, **flow)
        made = type(self)(config).to(self.device)
        made.load_state_dict(self.state_dict())
        return made

    # --- training ----------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, size: str) -> Config:
        if size != "tiny":
            raise InputError(f"--size {size}: {cls.id} comes in tiny alone; its paper sizes are public checkpoints")
        return HOSTS[cls.id]

    @classmethod
    def recipe(cls, size: str) -> Recipe:
        steps, batch = STEPS[cls.id]
        return Recipe(steps=steps, batch_size=batch, lr=2e-3, warmup=100, hold=0.3, ema=0.998, bf16=True)

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Any:
        from frameloom.tasks.generation.data import captioned, digits

        config = cls.preset(size)
        if config.host == "unet2d":
            return digits(source, config.side, seed)
        return captioned(source, config.frames, config.side, seed, WORDS)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of the host's output; a tenth of the captions (and pictures) is dropped.

        `batch` holds `video` `(b, t, 3, h, w)` in [0, 1], and `ids` or `label`.
        """
        x0 = self.encode(batch["video"])
        b, path = len(x0), self.adapter.path
        dropped = torch.rand(b, device=x0.device) < 0.1
        if "label" in batch:
            cond = Cond({"label": torch.where(dropped, LABELS, batch["label"])})
        elif self.config.host == "svd":
            cond = self._pictured(x0[:, :1], dropped)
        else:
            text, known = self.encoder(torch.where(dropped[:, None], WORDS.encode([""]).to(x0.device), batch["ids"]))
            cond = self._imageless(Cond({"text": text, "text_mask": known}))
            if self.config.image:  # half of the clips are told how they begin
                shown = (torch.rand(b, device=x0.device) < 0.5).float().view(b, 1, 1, 1, 1)
                cond = cond.replace(image=x0[:, :1] * shown)
        t = self._times(b).to(x0.device)
        eps = torch.randn_like(x0)
        made = self.adapter.call(path.add_noise(x0, t, eps), t, cond).float()
        return mse(made, target(self.adapter.kind, x0, eps, t, path)).mean()

    def _times(self, count: int) -> Tensor:
        path = self.adapter.path
        if isinstance(path, EDM):
            return LogNormalSigma(0.0, 1.6)(count).clamp(0.002, path.t_max)
        if isinstance(path, VP):  # whole indices, more of them noisy: there the layout of a clip is decided
            return (1 + LogitNormal(0.6, 1.2)(count) * (path.t_max - 1)).round()
        return uniform(count)


def _digit(prompt: str) -> int:
    """A class from its numeral or its name."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    word = prompt.strip().lower()
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < LABELS:
        return int(word)
    if not word:
        return LABELS
    raise InputError(f'digits-16 does not know "{prompt}"; it knows 0 to 9, as numerals or as words')


class WorldUNet3D(Base):
    """Text to video on `UNet3DConditionModel`: temporal convolutions and attention, no positions in time."""

    id = "world-unet3d"


class WorldMotion(Base):
    """Text to video on `UNetMotionModel`: a picture network with motion modules."""

    id = "world-motion"


class WorldLatte(Base):
    """Text to video on `LatteTransformer3DModel`: spatial and temporal blocks by turns."""

    id = "world-latte"


class TinySVD(Base):
    """A first picture to video on `UNetSpatioTemporalConditionModel`."""

    id = "tiny-svd-world"


class TinyCogVideoX(Base):
    """Text, and a first picture if there is one, to video on `CogVideoXTransformer3DModel`: one attention over all."""

    id = "tiny-cogx-world"


class Digits(Base):
    """A class to a picture of a digit on `UNet2DModel`."""

    id = "digits-16"
