"""Published weights: a folder that diffusers saved (or a hub id) as a denoiser, with what turns words into conditions
and latents into video. diffusers reads the parts; the sampling is ours.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path as File
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from frameloom.device import check_device
from frameloom.diffusion.adapters.base import Adapter
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.generator import Defaults
from frameloom.diffusion.guide import CFG, Guide
from frameloom.diffusion.interop import grid_of, path_of, prediction_of, start_of, step_of
from frameloom.diffusion.step import Step
from frameloom.errors import InputError


@dataclass(frozen=True)
class Family:
    """What pipelines of a class have in common: their adapter, and sizes and guidance where nothing else says them."""

    adapter: str
    part: str
    w: float
    frames: int
    fps: int
    height: int | None = None
    width: int | None = None
    video_vae: bool = False
    needs_image: bool = False


FAMILIES = {
    "TextToVideoSDPipeline": Family("unet3d.UNet3D", "unet", 9.0, 16, 8),
    "AnimateDiffPipeline": Family("motion.UNetMotion", "unet", 7.5, 16, 8),
    "StableDiffusionPipeline": Family("unet2d.UNet2D", "unet", 7.5, 1, 8),
    "LattePipeline": Family("latte.Latte", "transformer", 7.5, 16, 8),
    "StableVideoDiffusionPipeline": Family("svd.SVD", "unet", 3.0, 14, 7, needs_image=True),
    "CogVideoXPipeline": Family("cogvideox.CogVideoX", "transformer", 6.0, 49, 8, video_vae=True),
    "CogVideoXImageToVideoPipeline": Family(
        "cogvideox.CogVideoX", "transformer", 6.0, 49, 8, video_vae=True, needs_image=True
    ),
    "WanPipeline": Family("wan.Wan", "transformer", 5.0, 81, 16, 480, 832, video_vae=True),
    "LTXPipeline": Family("ltx.LTX", "transformer", 3.0, 161, 25, 512, 704, video_vae=True),
}


def load_pipeline(
    where: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    hosts: Mapping[str, torch.nn.Module] | None = None,
) -> "Pipeline":
    """Published weights, ready to sample.

    Args:
        where: a folder that diffusers' `save_pretrained` made, or a hub id; safetensors only.
        frames, height, width: of the videos to make; what the model was trained on when not said.
        hosts: networks to take instead of loading them, by their names in the pipeline.

    Raises:
        InputError: no pipeline, one of a class that has no adapter, or one that lacks a part.
    """
    check_device(device)
    import diffusers

    index = _index(where)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise InputError(f"--weights {where}: {name} cannot be driven; this must be one of {', '.join(FAMILIES)}")
    given: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if "safety_checker" in index:
        given |= {"safety_checker": None, "requires_safety_checker": False}
    given |= hosts or {}
    try:
        pipe = getattr(diffusers, name).from_pretrained(where, local_files_only=File(where).is_dir(), **given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--weights {where}: {str(error).strip().splitlines()[0]}") from error
    return Pipeline(pipe.to(device), name, frames, height, width)


def _index(where: str) -> dict[str, Any]:
    """A pipeline's table of contents, checked against what is there."""
    folder = File(where)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(f"--weights {where}: not a diffusers pipeline (no model_index.json)")
        try:
            index = json.loads((folder / "model_index.json").read_text())
        except ValueError:
            raise InputError(f"--weights {where}: model_index.json is not valid JSON") from None
        for part, kind in index.items():
            wanted = isinstance(kind, list) and len(kind) == 2 and kind[0] is not None and part != "safety_checker"
            if wanted and not (folder / part).is_dir():
                raise InputError(f"--weights {where}: its {part} ({kind[1]}) is missing")
        return index
    if where.count("/") != 1 or folder.is_absolute() or where.startswith("."):
        raise InputError(f"--weights {where}: no such folder")
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(where))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--weights {where}: no such folder, nor a pipeline on the hub ({reason})") from error


class Pipeline:
    """A published model and what surrounds it.

    Attributes:
        denoiser: the network, for `sample`.
        frames, height, width: of the videos it makes, in pixels. fps: at which they play.
        needs_image: whether it starts from a picture (see `image`).
        guide, step: those of the published pipeline.
    """

    def __init__(self, pipe: Any, name: str, frames: int | None, height: int | None, width: int | None) -> None:
        self.pipe, self.name, self.family = pipe, name, FAMILIES[name]
        family, host = self.family, getattr(pipe, self.family.part)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self._fp16_vae_overflows = pipe.vae.dtype == torch.float16 and bool(pipe.vae.config.get("force_upcast"))
        if self._fp16_vae_overflows:
            pipe.vae.float()
        self.needs_image, self.fps, self.scheduler = family.needs_image, family.fps, pipe.scheduler
        self.denoiser = self._adapter(host)
        spatial, temporal = self._ratios()
        latent = self.denoiser.latent
        self.height = height or family.height or (576 if self._published_svd(host) else latent.height * spatial)
        self.width = width or family.width or (1024 if self._published_svd(host) else latent.width * spatial)
        default = host.config.get("sample_frames") or host.config.get("video_length") or host.config.get("num_frames")
        self.frames = frames or default or family.frames
        patch = host.config.get("patch_size") or 1
        self._check(spatial * (patch if isinstance(patch, int) else patch[-1]), temporal)
        count = (self.frames - 1) // temporal + 1
        # Transformers that take frames by twos get as many more in front as they need; `decode` drops them.
        self._extra = -count % (host.config.get("patch_size_t") or 1)
        self.denoiser.latent = replace(
            latent, frames=count + self._extra, height=self.height // spatial, width=self.width // spatial
        )
        ramp = name == "StableVideoDiffusionPipeline"
        self.defaults = Defaults(guidance=family.w)
        self._ramp = ramp
        self.guide: Guide = self.guided(family.w)
        self.step: Step = step_of(self.scheduler)
        self._made: dict[tuple, Any] = {}

    def _adapter(self, host: Any) -> Adapter:
        module, kind = self.family.adapter.split(".")
        make = getattr(import_module(f"frameloom.diffusion.adapters.{module}"), kind)
        if (low := getattr(self.pipe, "transformer_2", None)) is not None:
            from frameloom.diffusion.adapters.wan import TwoWan

            return TwoWan(host, low, self.pipe.config.boundary_ratio, prediction_of(self.scheduler))
        made = make(host, path_of(self.scheduler), prediction_of(self.scheduler))
        if module == "ltx":
            spatial, temporal = self._ratios()
            made.rope_scale = (temporal / self.fps, spatial, spatial)
        return made

    def _published_svd(self, host: Any) -> bool:
        """The published configuration says 96 x 96 latents, but was trained on 576 x 1024 pixels."""
        return self.name == "StableVideoDiffusionPipeline" and host.config.sample_size == 96

    def _ratios(self) -> tuple[int, int]:
        """Pixels per latent in space and in time."""
        pipe = self.pipe
        for names in (("vae_scale_factor_spatial", "vae_scale_factor_temporal"),
                      ("vae_spatial_compression_ratio", "vae_temporal_compression_ratio")):  # fmt: skip
            if hasattr(pipe, names[0]):
                return getattr(pipe, names[0]), getattr(pipe, names[1])
        return pipe.vae_scale_factor, 1

    def _check(self, unit: int, temporal: int) -> None:
        if self.height % unit or self.width % unit:
            raise InputError(f"--size {self.width}x{self.height}: both must be multiples of {unit} for {self.name}")
        if (self.frames - 1) % temporal:
            raise InputError(f"--frames {self.frames}: must be one more than a multiple of {temporal} for {self.name}")

    def guided(self, w: float) -> Guide:
        """Guidance as the published pipeline has it: for Stable Video Diffusion it grows over the frames."""
        return CFG(torch.linspace(1.0, w, self.frames)[None] if self._ramp else w)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video; raises InputError for a number that the autoencoder cannot make."""
        temporal = self._ratios()[1]
        if (frames - 1) % temporal:
            raise InputError(f"--frames {frames}: must be one more than a multiple of {temporal} for {self.name}")
        count = (frames - 1) // temporal + 1
        return count + -count % (self.denoiser.host.config.get("patch_size_t") or 1)

    @property
    def device(self) -> torch.device:
        return self.denoiser.host.device

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Cond:
        """The condition that these words are, with that of no words as its null; empty for models that take none."""
        pipe = self.pipe
        if not hasattr(pipe, "encode_prompt"):
            return Cond()
        known = inspect.signature(pipe.encode_prompt).parameters
        given = {"prompt": list(prompts), "device": self.device, "num_images_per_prompt": 1,
                 "do_classifier_free_guidance": True}  # fmt: skip
        # A pipeline's own length of text, which its text encoding does not know.
        if (length := inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")) is not None:
            given["max_sequence_length"] = length.default
        found = pipe.encode_prompt(**{key: value for key, value in given.items() if key in known})
        names = ("text", "text_mask") if len(found) == 4 else ("text",)
        dtype = self.denoiser.dtype
        values = [value.to(dtype) if value.is_floating_point() else value for value in found]
        return Cond(dict(zip(names, values, strict=False)), dict(zip(names, values[len(names) :], strict=True)))

    @torch.no_grad()
    def image(self, picture: Float[Tensor, "b 3 h w"], cond: Cond, *, seed: int = 0, noise: float = 0.02,
              motion: int = 127) -> Cond:  # fmt: skip
        """`cond` with a first picture, in [0, 1]; it is resized to the size of the video.

        Args:
            seed: of the noise in the picture and its latents.
            noise, motion: strength of noise on the picture and amount of motion, for Stable Video Diffusion.
        """
        if not self.needs_image:
            raise InputError(f"{self.name} starts from words alone; it takes no picture")
        picture = picture.to(self.device)
        generator = torch.Generator().manual_seed(seed)
        if picture.shape[-2:] != (self.height, self.width):
            wanted = (self.height, self.width)
            picture = functional.interpolate(picture, wanted, mode="bilinear", antialias=True).clamp(0, 1)
        seen = picture * 2 - 1
        if self.name == "StableVideoDiffusionPipeline":
            fresh = torch.randn(seen.shape, generator=generator).to(seen)
            latents = self.pipe.vae.encode((seen + noise * fresh).to(self.pipe.vae.dtype)).latent_dist.mode()[:, None]
            embeds, ids = self._clip(picture), torch.tensor([[self.fps - 1, motion, noise]], device=self.device)
            values = {
                "image": latents.to(embeds),
                "image_embeds": embeds,
                "time_ids": ids.expand(len(seen), -1).to(embeds),
            }
            nulls = {name: torch.zeros_like(values[name]) for name in ("image", "image_embeds")}
            return Cond(cond.values | values, cond.nulls | nulls)
        vae = self.pipe.vae
        parts = [vae.encode(one[None, :, None].to(vae.dtype)).latent_dist.sample(generator) for one in seen]
        scale = self.pipe.vae_scaling_factor_image
        latents = torch.cat(parts).transpose(1, 2) * (1 / scale if vae.config.invert_scale_latents else scale)
        return cond.replace(image=latents.to(self.denoiser.dtype))

    def _clip(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 d"]:
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
            _resize_with_antialiasing,
        )

        side = self.pipe.image_encoder.config.image_size
        small = (_resize_with_antialiasing(picture * 2 - 1, (side, side)) + 1) / 2
        return self.pipe._encode_image(small.cpu(), self.device, 1, False)

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "b t 3 h w"], chunk: int = 8) -> Float[Tensor, "b s c y x"]:
        """The latents of a video in [0, 1], `chunk` frames at a time."""
        vae = self.pipe.vae
        seen = (video.to(self.device) * 2 - 1).to(vae.dtype)
        if self.family.video_vae:
            latents = vae.encode(seen.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
        else:
            parts = [vae.encode(part).latent_dist.mode() for part in seen.flatten(0, 1).split(chunk)]
            latents = torch.cat(parts).unflatten(0, seen.shape[:2])
        mean, scale = self._normal(latents)
        return ((latents - mean) * scale).to(self.denoiser.dtype)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b s c y x"], chunk: int = 8) -> Float[Tensor, "b t 3 h w"]:
        """The video in [0, 1] of latents, `chunk` frames at a time where the decoder makes frames one by one."""
        vae = self.pipe.vae
        mean, scale = self._normal(latents)
        latents = (latents[:, self._extra :] / scale + mean).to(vae.dtype)
        if self.family.video_vae:
            told = ()
            if vae.config.get("timestep_conditioning"):  # a decoder that denoises as well is told of no noise
                told = (torch.zeros(len(latents), dtype=vae.dtype, device=latents.device),)
            video = vae.decode(latents.transpose(1, 2), *told).sample.transpose(1, 2)
        else:
            counted = "num_frames" in inspect.signature(vae.decode).parameters  # decoders that mix frames
            video = torch.stack([
                torch.cat([vae.decode(part, **({"num_frames": len(part)} if counted else {})).sample
                           for part in clip.split(chunk)]) for clip in latents])  # fmt: skip
        return (video.float() / 2 + 0.5).clamp(0, 1)

    def _normal(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and scale by which the network's latents differ from the VAE's."""
        vae = self.pipe.vae
        scale = vae.config.get("scaling_factor") or 1.0
        buffers = dict(vae.named_buffers(recurse=False))
        mean, deviation = (buffers.get(name, vae.config.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return vae.config.get("shift_factor") or 0.0, scale
        mean, deviation = (torch.as_tensor(value).to(like)[:, None, None] for value in (mean, deviation))
        return mean, scale / deviation

    def grid(self, n: int) -> Tensor:
        """The `(n + 1,)` times at which the published pipeline stops in `n` steps."""
        return self._once("grid", n, self._grid).clone()

    def _once(self, what: str, n: int, make: Callable[[int], Any]) -> Any:
        """What depends on the latents' size and the number of steps alone: a new scheduler each time would cost as much
        as a step of a small network."""
        key = what, n, self.denoiser.latent
        if key not in self._made:
            self._made[key] = make(n)
        return self._made[key]

    def _grid(self, n: int) -> Tensor:
        if self.name != "LTXPipeline":
            return grid_of(self.scheduler, n)
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        latent, config = self.denoiser.latent, self.scheduler.config
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        known = [config.get(name, value) for name, value in defaults.items()]
        mu = calculate_shift(latent.frames * latent.height * latent.width, *known)
        sigmas = torch.linspace(1, 1 / n, n, dtype=torch.float64).tolist()
        return grid_of(self.scheduler, n, sigmas=sigmas, mu=mu)

    def start(self, noise: Float[Tensor, "b s c y x"], n: int) -> Float[Tensor, "b s c y x"]:
        """Where a run of `n` steps starts: unit noise, scaled as the path has it at the first time."""
        return noise * self._once("start", n, lambda n: start_of(self.scheduler, n))
