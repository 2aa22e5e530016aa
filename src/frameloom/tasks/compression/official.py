"""Checkpoints of HNeRV as its authors' code writes them: what network is in one, and that network as a file.

There are two kinds. `quant_vid.pth` holds a video: the decoder's tensors and the embeddings, each as whole numbers with
their range. Training states (`state_dict`) hold the encoder and the decoder as floats; the embeddings are then what the
encoder makes of the video, which has to be there. Either may be of any size; which is read off the tensors' shapes. The
same code trains its NeRV, which has no embeddings, and whose checkpoints say neither size nor length.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frameloom.bitstream.container import Header
from frameloom.bitstream.quantise import LEVELS, Quantised, side_shape
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import describe
from frameloom.tasks.compression.framing import fitted
from frameloom.tasks.compression.nerv import FREQUENCIES, Config, Learner
from frameloom.training.published import Placeholder, read, shown
from frameloom.video.clip import Clip
from frameloom.video.colour import Colour

if TYPE_CHECKING:
    from frameloom.tasks.compression.fitted import Fitted

RATE = Fraction(24)  # frames a second of a checkpoint, which knows of none; its authors' video has 24
_EMBEDDING_LEVELS = 64
# Names of the encoder's parts, theirs and ours: of a stage, and of the block in it.
_DOWN = ("downsample_layers.{}.0", "downsample_layers.{}.1")
_BLOCK = {"dwconv": "depthwise", "norm": "norm", "pwconv1": "wide", "pwconv2": "narrow"}


class Official:
    """A checkpoint of the authors', as the network of `method` that is in it."""

    def __init__(self, method: "type[Fitted]", path: str | Path) -> None:
        self.method, self.path = method, path
        stored = read(path)
        self.tables, embed = self._tables(stored)
        self.quantised: dict[str, Quantised] = {}
        self.embeddings = None if embed is None else self._tensor(embed, "embed", "embeddings")
        self.indexed = method.method == "nerv"
        self.config = self._config()
        self.state = self._state()

    def alone(self) -> "Fitted":
        """The network of a checkpoint that holds its video."""
        if self.embeddings is None:
            what = "the size and length of its video" if self.indexed else "embeddings, which are made of its video"
            raise InputError(f"{self.path}: holds no {what}; give that too: frameloom compress VIDEO OUT.flm --method "
                             f"{self.method.method} --weights {self.path}")  # fmt: skip
        return self._network(self.config)

    def as_file(self) -> bytes:
        """A checkpoint that holds its video as a file of 24 frames a second, the same numbers in it."""
        config, network = self.config, self.alone()
        header = Header(method=self.method.method, config={}, width=config.width, height=config.height,
                        frames=config.frames, rate=RATE, colour=Colour())  # fmt: skip
        return network.to_bytes(header)

    def with_clip(self, clip: Clip, fit: str | None = None, progress: Progress = silent) -> "tuple[Fitted, Header]":
        """The network, whose embeddings are made of the clip if they are not there, and what the clip says of itself.

        `fit` is "crop" where the network draws the middle of the frames.
        Raises InputError for a clip of another size or length.
        """
        if fit not in (None, "pad", "crop"):
            raise InputError(f"--fit {fit}: frames are fitted by pad or crop")
        wide, tall, frames = clip.info.width, clip.info.height, len(clip)
        product, config = math.prod(self.config.strides), self.config
        if config.height:
            width, height = config.width, config.height
        else:
            width, height = (fitted(side, product, fit == "crop") for side in (wide, tall))
        if config.frames not in (0, frames):
            raise InputError(
                f"--weights {self.path}: of a video of {config.frames} frames; {clip.info.name} has {frames}"
            )
        cropped = fit == "crop" and wide >= width > 0 and tall >= height > 0
        if not (cropped or (width - product < wide <= width and height - product < tall <= height)):
            hint = "; --fit crop takes the middle" if wide >= width and tall >= height else ""
            raise InputError(f"--weights {self.path}: draws {width}x{height}; {clip.info.name} is {wide}x{tall}{hint}")
        config = replace(config, width=width, height=height, frames=frames)
        if self.indexed and math.prod(config.grid) != self._grid:
            raise InputError(f"--weights {self.path}: of another size than {wide}x{tall}; its first layer draws "
                             f"{self._grid} pixels and would have to draw {math.prod(config.grid)}")  # fmt: skip
        config.check(str(self.path))
        network = self._network(config)
        if not self.indexed and self.embeddings is None:
            self._embed(network, clip, progress)
        header = describe(clip, self.method.method, {})
        return network, replace(header, width=min(wide, width), height=min(tall, height))

    def describe(self) -> dict[str, Any]:
        """What is in a checkpoint that does not hold its video."""
        config, size = self.config, Path(self.path).stat().st_size
        return {"method": self.method.method, "strides": list(config.strides), "channels": config.widths,
                "parameters": sum(value.numel() for value in self.state.values()), "bytes": size,
                "needs": "the video that it was fitted to"}  # fmt: skip

    def _tables(self, stored: Any) -> tuple[dict[str, Any], Any]:
        """The tensors by the authors' names, and the embeddings."""
        found = None
        if isinstance(stored, dict):
            found = next((stored[key] for key in ("model", "state_dict") if isinstance(stored.get(key), dict)), None)
            if found is None and any(isinstance(value, Tensor) for value in stored.values()):
                found = stored
        if found is None:
            raise InputError(f"{self.path}: key 'model' is missing; an official file has 'embed' and 'model', or "
                             "'state_dict'")  # fmt: skip
        embed = stored.get("embed")
        if "model" in stored and embed is None:
            raise InputError(f"{self.path}: key 'embed' is missing; an official file has 'embed' and 'model', or "
                             "'state_dict'")  # fmt: skip
        return {str(key).removeprefix("module."): value for key, value in found.items()}, embed

    def _tensor(self, entry: Any, key: str, ours: str) -> Tensor:
        """A tensor as floats; if it is quantised, how is kept."""
        if isinstance(entry, Tensor):
            return entry.float()
        parts = [entry.get(part) for part in ("min", "scale", "quant")] if isinstance(entry, dict) else [None]
        if not all(isinstance(part, Tensor) for part in parts):
            raise InputError(f"{self.path}: key '{key}' is missing or is not a quantised tensor")
        low, scale, symbols = parts
        try:
            value = low.float() + scale.float() * symbols.float()
        except RuntimeError:
            value = None
        if value is None or value.shape != symbols.shape:
            raise InputError(f"{self.path}: key '{key}' has side numbers that do not fit its symbols")
        if not (value.isfinite().all() and low.dtype == scale.dtype):
            raise InputError(f"{self.path}: key '{key}' has side numbers that are not finite, or of two kinds")
        levels = _EMBEDDING_LEVELS if ours == "embeddings" else LEVELS
        for axis in (None, *range(symbols.ndim)):
            side = side_shape(symbols.shape, axis)
            same = low.shape == scale.shape == side or (axis is None and low.numel() == scale.numel() == 1)
            # Whole ranges are float32 there, ranges along an axis float16, and so they are in a file.
            fits = low.dtype == torch.float16 or (axis is None and low.dtype == torch.float32)
            if same and fits and symbols.dtype == torch.uint8 and int(symbols.max()) < levels:
                self.quantised[ours] = Quantised(symbols, low.reshape(side), scale.reshape(side), axis)
                break
        return value

    def _weights(self, number: int) -> Tensor:
        """The kernels of a layer: 0 is the first, then the blocks."""
        key = f"decoder.{number}.conv.{'upconv.0' if number else 'downconv'}.weight"
        return self._four(self._tensor(self.tables.get(key), key, "-"), key)

    def _four(self, value: Tensor, key: str) -> Tensor:
        if value.ndim != 4 or not value.numel():
            raise InputError(f"{self.path}: key '{key}' has shape {tuple(value.shape)}; a layer's is of four numbers")
        return value

    def _config(self) -> Config:
        """The network by the shapes of its tensors; sizes and lengths that a checkpoint does not say are 0."""
        count = 0
        while f"decoder.{count + 1}.conv.upconv.0.weight" in self.tables:
            count += 1
        if not 1 <= count <= 8:
            raise InputError(f"{self.path}: key 'decoder.1.conv.upconv.0.weight' is missing, or there are more than 8")
        stem, *blocks = (self._weights(number) for number in range(count + 1))
        head = self._four(
            self._tensor(self.tables.get("head_layer.weight"), "head_layer.weight", "-"), "head_layer.weight"
        )
        widths = [*(block.shape[1] for block in blocks), head.shape[1]]
        strides = [math.isqrt(block.shape[0] // after) for block, after in zip(blocks, widths[1:], strict=True)]
        kernels = [block.shape[2] for block in blocks]
        self._grid = stem.shape[0] // widths[0]
        config = Config(height=0, width=0, frames=0, strides=tuple(strides), channels=widths[0],
                        kernels=(kernels[0], max(kernels)), embedding=stem.shape[1])  # fmt: skip
        if self.indexed:
            config = replace(config, indexed=True, single=True, embedding=Config.embedding)
        if min(strides) < 1 or stem.shape[1] != (2 * FREQUENCIES if self.indexed else config.embedding):
            raise InputError(
                f"{self.path}: not a checkpoint of {self.method.method}: its layers do not follow each other"
            )
        if not self.indexed and self._grid != 1:
            raise InputError(
                f"{self.path}: not a checkpoint of {self.method.method}; of nerv, or with a wider first layer"
            )
        plans = (replace(config, reduction=reduction, lowest=lowest) for reduction in _reductions()
                 for lowest in (12, min(widths[1:])))  # fmt: skip
        plan = next((plan for plan in plans if plan.widths == widths), None)
        if plan is None:
            raise InputError(f"{self.path}: channels {widths} are not of one ratio, which a file would have to say")
        if self.embeddings is None or self.indexed:
            return plan
        value = self.embeddings
        if value.ndim != 4 or value.shape[1] != plan.embedding:
            raise InputError(f"{self.path}: key 'embed' has shape {tuple(value.shape)}; it must be (frames, "
                             f"{plan.embedding}, rows, columns)")  # fmt: skip
        product = math.prod(strides)
        plan = replace(plan, frames=len(value), height=value.shape[2] * product, width=value.shape[3] * product)
        plan.check(str(self.path))
        return plan

    def _state(self) -> dict[str, Tensor]:
        """The decoder's tensors, by our names."""
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in self.method(self._sketch()).state_dict().items()}
        names = {"stem": "decoder.0.conv.downconv", "head": "head_layer"} | {
            f"blocks.{k}.conv": f"decoder.{k + 1}.conv.upconv.0" for k in range(len(self.config.strides))
        }
        state = {}
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                key, name = f"{theirs}.{kind}", f"{ours}.{kind}"
                value = self._tensor(self.tables.get(key), key, name)
                if value.shape != shapes[name]:
                    raise InputError(f"{self.path}: key '{key}' has shape {tuple(value.shape)}; it must be "
                                     f"{tuple(shapes[name])}")  # fmt: skip
                state[name] = value
        known = {f"{theirs}.{kind}" for theirs in names.values() for kind in ("weight", "bias")}
        strange = [key for key, value in self.tables.items() if key not in known
                   and not key.startswith("encoder.") and not isinstance(value, Placeholder)]  # fmt: skip
        if strange:
            raise InputError(f"{self.path}: not a checkpoint of {self.method.method}: it has an unknown "
                             f"{shown(min(strange))}")  # fmt: skip
        return state if self.embeddings is None or self.indexed else state | {"embeddings": self.embeddings}

    def _sketch(self) -> Config:
        """The configuration with a size, if need be one that only the first layer minds."""
        if self.config.height:
            return self.config
        product = math.prod(self.config.strides)
        return replace(self.config, height=product, width=self._grid * product, frames=1)

    def _network(self, config: Config) -> "Fitted":
        network = self.method(config)
        network.load_state_dict(self.state, strict=False)
        network.published = self.quantised
        return network.requires_grad_(False).eval()

    @torch.inference_mode()
    def _embed(self, network: "Fitted", clip: Clip, progress: Progress) -> None:
        """Make the embedding of every frame, by the authors' encoder."""
        learner = Learner(network)
        state = dict(self._encoder(len(self.config.strides)))
        try:
            learner.encoder.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{self.path}: its encoder is not as published ({reason})") from None
        height, width = network.config.height, network.config.width
        for number, frame in enumerate(clip):
            top, left = (max(0, frame.rgb.shape[-2] - height) // 2, max(0, frame.rgb.shape[-1] - width) // 2)
            picture = frame.rgb[None, :, top : top + height, left : left + width]
            network.embeddings[number] = learner.encoded((picture * 255).round() / 255)[0]
            progress("embedding frames", number + 1, len(clip))

    def _encoder(self, stages: int) -> Iterator[tuple[str, Tensor]]:
        """The encoder's tensors, by our names."""

        def both(theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
            for kind in ("weight", "bias"):
                yield f"{ours}.{kind}", self._tensor(self.tables.get(key := f"encoder.{theirs}.{kind}"), key, "-")

        for stage in range(stages):
            for part, theirs in enumerate(_DOWN):
                yield from both(theirs.format(stage), f"stages.{3 * stage + part}")
            for theirs, ours in _BLOCK.items():
                yield from both(f"stages.{stage}.0.{theirs}", f"stages.{3 * stage + 2}.{ours}")
            key = f"encoder.stages.{stage}.0.gamma"
            yield f"stages.{3 * stage + 2}.scale", self._tensor(self.tables.get(key), key, "-")


def _reductions() -> Iterator[float]:
    """Ratios of channels from stage to stage: the published ones, then all of two digits."""
    yield from (1.2, 2.0)
    yield from (hundredths / 100 for hundredths in range(100, 401))
