"""Codecs that fit a network to one video: what they share between the clip and the file.

The file's size is the number of parameters times what one costs, so `--size` chooses the network; the quantiser then
has as many levels as the size allows. `--quality` ends the fit when the frames of the file would be that good, grows
the network when its schedule ends before, and takes as few levels as the quality needs.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from frameloom.bitstream.container import Container, Header, parse, whole
from frameloom.bitstream.quantise import LEVELS, Quantised, quantise
from frameloom.errors import InputError
from frameloom.metrics import psnr as measure_psnr
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import SectionedCodec, describe, pack_times
from frameloom.tasks.compression.fit import LOSSES, Loss, State, fit
from frameloom.tasks.compression.framing import crop_to, fitted, listed, load_pictures, misfit, strides_for
from frameloom.tasks.compression.nerv import Config, Decoder, Learner, of_size
from frameloom.tasks.compression.weights import pack_tensors, unpack_tensors
from frameloom.video.clip import Clip

_log = logging.getLogger("frameloom.compression")

EMBEDDING_LEVELS = 64
# The size that the papers tune at.
PUBLISHED_SIZE = 1_500_000
# Below so many parameters, the least width and the time's share would be most of a published network.
SMALL, FEW = 300_000, (16, 8)
LARGE = 1 << 15  # pixels of a frame from which bfloat16 pays
FEWEST = 16  # levels of a weight: below, a fit that knows nothing of rounding falls apart
_CHECKS = 20  # times that a fit asks whether the quality is reached
_GROWTH, _ATTEMPTS = 1.6, 4


class Fitted(SectionedCodec, Decoder):
    """A decoder that was fitted to one video. A method says its family of configurations and how it fits."""

    method: ClassVar[str]
    # What a method can be built on, the default first: the switches of each.
    families: ClassVar[dict[str, dict[str, Any]]]
    bytes_per_parameter: ClassVar[float] = 0.96  # at the most levels, after range coding
    overhead: ClassVar[int] = 1000  # bytes of the header, the side numbers and the tables
    share: ClassVar[float] = 1.0  # of the minutes that the fit itself takes; the rest is for `finish`
    epochs: ClassVar[int] = 300
    batch: ClassVar[int] = 2
    learning_rate: ClassVar[float] = 1e-3  # of the published sizes; see `rate`
    optimiser: ClassVar[type[torch.optim.Optimizer] | None] = None
    loss: ClassVar[str | Loss] = "l2"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # Tensors that came quantised, and go into a file as they came.
        self.published: dict[str, Quantised] = {}

    @classmethod
    def encode(
        cls,
        clip: Clip,
        *,
        size: int | None = None,
        psnr: float | None = None,
        epochs: int | None = None,
        minutes: float | None = None,
        batch: int | None = None,
        learning_rate: float | int | None = None,
        loss: str | None = None,
        base: str | None = None,
        strides: Sequence[int] | None = None,
        fit: str | None = None,
        weights: str | Path | None = None,
        seed: int = 0,
        device: str = "cpu",
        state: State | None = None,
        progress: Progress = silent,
    ) -> bytes:
        """Fit a network to the clip and write it. Holds the whole clip in memory, 8 bit.

        Args:
            size: bytes that the file shall have at most; by default about one for 72 pixels, 40 thousand to 3 million.
            psnr: mean PSNR in dB that the decoded frames shall have; the fit ends there.
            epochs: passes over the clip; 300, or as many as `minutes` hold.
            batch: frames of a step; a shorter clip is one batch.
            learning_rate: of the fit; by the network's size if absent (see `rate`).
            base: which network, of those that the method has (`boost-nerv`: hnerv or nerv).
            minutes: the fit's time by the clock on the wall, which its schedule then runs by: on a busy machine it
                takes fewer steps.
            fit: frames that the strides do not divide are drawn larger and cut back ("pad"), or lose their edges
                ("crop").
            weights: a checkpoint of the authors', fitted to this clip already, which is written as it is.

        Raises InputError for what cannot be, and for a quality that was not reached (saying which was).
        """
        if batch is not None and not (isinstance(batch, int) and batch >= 1):
            raise InputError(f"--set batch={batch}: a step has 1 frame or more")
        if learning_rate is not None and not (isinstance(learning_rate, float | int) and 0 < learning_rate < math.inf):
            raise InputError(f"--set learning_rate={learning_rate}: a rate is above 0, such as 0.001")
        if weights is not None:
            asked = {"size": size, "quality": psnr, "epochs": epochs, "minutes": minutes, "batch": batch, "loss": loss,
                     "base": base, "strides": strides}  # fmt: skip
            for name in (name for name, value in asked.items() if value is not None):
                raise InputError(f"--{name}: the network in --weights is fitted already; only --fit goes with it")
            return cls.of_published(clip, weights, fit, progress)
        pictures = load_pictures(clip)
        count, _, height, width = pictures.shape
        wanted = None if size is None else cls._parameters(size)
        config = cls.plan(height, width, count, size=wanted, base=base, strides=strides, fit=fit)
        if fit == "crop":
            pictures = crop_to(pictures, config.height, config.width)
        header = replace(describe(clip, cls.method, {}), height=pictures.shape[-2], width=pictures.shape[-1])
        alone = size is not None or minutes is not None
        grown = 0 if state is None or "grown" not in state.more else int(state.more["grown"])
        while True:
            grand = of_size(config, round(config.parameters * _GROWTH**grown)) if grown else config
            network = cls.fitted_to(pictures, grand, psnr=psnr, target=size, epochs=epochs, minutes=minutes,
                                    batch=batch, learning_rate=learning_rate, loss=loss, seed=seed, device=device,
                                    state=state, progress=progress)  # fmt: skip
            data = network.smallest(header, pack_times(clip), pictures, size, psnr)
            if data is not None:
                return data
            reached, grown = network.measured(pictures), grown + 1
            if alone or grown == _ATTEMPTS:
                raise InputError(f"--quality {psnr:g}dB: {grand.parameters:,} parameters and this fit reach "
                                 f"{reached:.2f} dB; give it more --size, --epochs or --minutes")  # fmt: skip
            _log.warning("%.2f dB with %s parameters; a larger network is tried", reached, f"{grand.parameters:,}")
            if state is not None:
                state.restart(grown=torch.tensor(grown))

    @classmethod
    def of_published(cls, clip: Clip, path: str | Path, fit: str | None, progress: Progress) -> bytes:
        """The file of a network that its authors' code fitted to the clip; InputError where there is no such reader."""
        raise InputError(
            f"--weights {path}: {cls.method} has no reader of published networks; without it one is fitted"
        )

    @classmethod
    def _parameters(cls, size: int) -> int:
        """How many parameters come to a file of `size` bytes."""
        if size <= cls.overhead:
            raise InputError(f"--size {size}: the header and tables of {cls.method} take about {cls.overhead} bytes")
        return round((size - cls.overhead) / cls.bytes_per_parameter)

    @classmethod
    def plan(
        cls,
        height: int,
        width: int,
        frames: int,
        *,
        size: int | None = None,
        base: str | None = None,
        strides: Sequence[int] | None = None,
        fit: str | None = None,
    ) -> Config:
        """The network of about `size` parameters for a video of this shape."""
        base = base or next(iter(cls.families))
        if base not in cls.families:
            raise InputError(f"--base {base}: {cls.method} is built on {' or '.join(cls.families)}")
        if fit not in (None, "pad", "crop"):
            raise InputError(f"--fit {fit}: frames are fitted by pad or crop")
        size = size or max(40_000, min(3_000_000, frames * height * width // 72))
        best = strides_for(height, width, frames, Config.embedding, size)
        chosen = tuple(strides) if strides else best
        product = math.prod(chosen)
        if strides and fit is None and (height % product or width % product):
            raise InputError(misfit(height, width, chosen, best))
        tall, wide = (fitted(side, product, fit == "crop") for side in (height, width))
        if not tall or not wide:
            raise InputError(
                f"--strides {listed(chosen)}: their product {product} is larger than the frame of "
                f"{width}x{height}; use smaller strides or --fit pad"
            )
        family = cls.families[base] | ({"time": FEW} if size < SMALL and "time" in cls.families[base] else {})
        config = Config(height=tall, width=wide, frames=frames, strides=chosen, channels=1, **family)
        for lowest in (Config.lowest,) if size >= SMALL else (8, 6, 4):
            config = of_size(replace(config, lowest=lowest), size)
            if config.parameters <= 1.1 * size:
                break
        if config.parameters > 1.1 * size:
            raise InputError(
                f"the smallest network for {width}x{height} and strides {listed(chosen)} has "
                f"{config.parameters:,} parameters, not {size:,}; ask for a larger --size"
            )
        config.check("the clip")
        return config

    @classmethod
    def fitted_to(
        cls,
        pictures: UInt8[Tensor, "t 3 h w"],
        config: Config,
        *,
        epochs: int | None = None,
        minutes: float | None = None,
        batch: int | None = None,
        learning_rate: float | int | None = None,
        loss: str | Loss | None = None,
        psnr: float | None = None,
        target: int | None = None,
        seen: Float[Tensor, "t 1 h w"] | None = None,
        seed: int = 0,
        device: str = "cpu",
        state: State | None = None,
        progress: Progress = silent,
    ) -> "Fitted":
        """The network of `config` after its fit to the pictures, on the CPU, its embeddings in place.

        `psnr` in dB may end the fit early; `target` is the file's size in bytes, for methods that fit with the
        rate in mind; where `seen` is 0, a pixel does not count.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = Learner(cls(config)).to(device, memory_format=torch.channels_last)
        learner.network.begin_at(pictures)
        if epochs is None and minutes is None:
            epochs = cls.epochs
        batch = min(batch or cls.batch, len(pictures))
        steps = max(1, (epochs or cls.epochs) // _CHECKS) * (len(pictures) // batch)

        def reached(done: int) -> bool:
            if done % steps:
                return False
            learner.freeze(pictures)
            good = learner.network.measured(pictures) >= psnr
            learner.train()
            return good

        loss = loss or cls.loss
        mixed = half_pays(device, config)
        fit(learner, pictures, epochs=epochs, minutes=minutes and cls.share * minutes, batch=batch,
            learning_rate=learning_rate or cls.rate(config), optimiser=cls.optimiser, slow=learner.encoder, loss=loss,
            seen=seen, seed=seed, mixed=mixed, reached=None if psnr is None else reached, state=state,
            progress=progress, label=f"fitting {cls.method}")  # fmt: skip
        cls.finish(learner, pictures, target=target, epochs=epochs, minutes=minutes and (1 - cls.share) * minutes,
                   batch=batch, learning_rate=learning_rate, measure=LOSSES[loss] if isinstance(loss, str) else loss,
                   seen=seen, mixed=mixed, seed=seed, state=state, progress=progress)  # fmt: skip
        learner.freeze(pictures)
        return learner.network.cpu().to(memory_format=torch.contiguous_format)

    @classmethod
    def rate(cls, config: Config) -> float:
        """The learning rate of a network: the published one from 1.5 million parameters on, higher for smaller ones.

        At 40 thousand it is seven times as high, where the measured optimum is (300 epochs on a flight of 32 frames:
        two decibels over the published rate, for hnerv and nerv); between lies a power law. So fast an encoder does not
        settle, so it always learns at a tenth of the rate.
        """
        return cls.learning_rate * max(1.0, (PUBLISHED_SIZE / config.parameters) ** 0.55)

    @classmethod
    def finish(cls, learner: Learner, pictures: UInt8[Tensor, "t 3 h w"], **settings: Any) -> None:
        """What a method does between the fit and the file; nothing here."""

    @torch.inference_mode()
    def measured(self, pictures: UInt8[Tensor, "t 3 h w"], levels: int = LEVELS) -> float:
        """PSNR in dB of what a file of so many levels would show."""
        kept = {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(self.as_stored(levels))
        device = self.head.weight.device
        shown = [self(torch.tensor([number], device=device)).cpu() for number in range(len(pictures))]
        self.load_state_dict(kept)
        drawn = torch.cat(shown)[..., : pictures.shape[-2], : pictures.shape[-1]]
        return float(measure_psnr(drawn, pictures.float() / 255))

    def smallest(
        self,
        header: Header,
        more: dict[str, bytes],
        pictures: UInt8[Tensor, "t 3 h w"],
        size: int | None,
        psnr: float | None,
    ) -> bytes | None:
        """The file with the most levels within `size`, or the fewest that keep `psnr`; None if none does.

        Raises InputError when even the fewest levels take more than `size` bytes.
        """

        def file(levels: int) -> bytes:
            return self.to_bytes(header, more, levels)

        if size is not None:
            over = _first(lambda levels: len(file(levels)) > size)
            if over == FEWEST:
                raise InputError(f"--size {size}: this network takes at least {len(file(FEWEST))} bytes; its side "
                                 "numbers and tables are larger than that leaves room for")  # fmt: skip
            levels = LEVELS if over is None else over - 1
            return file(levels) if psnr is None or self.measured(pictures, levels) >= psnr else None
        levels = LEVELS if psnr is None else _first(lambda levels: self.measured(pictures, levels) >= psnr)
        return None if levels is None else file(levels)

    def to_bytes(self, header: Header, more: dict[str, bytes] | None = None, levels: int = LEVELS) -> bytes:
        """The file, with weights of so many levels."""
        header = replace(header, config={"network": self.config.to_header(), "levels": levels})
        if any(one.single for one in self.published.values()):
            header = replace(header, reader=2)
        return Container(header, self.pack(levels) | (more or {})).to_bytes()

    def pack(self, levels: int) -> dict[str, bytes]:
        """The sections of weights and embeddings, quantised between their least and greatest values."""
        tensors = {name: self.published.get(name, value) for name, value in self.state_dict().items()}
        embeddings = tensors.pop("embeddings", None)
        sections = pack_tensors("weights", list(tensors.values()), levels)
        if embeddings is not None:
            sections |= pack_tensors("embeddings", [embeddings], EMBEDDING_LEVELS)
        return sections

    def as_stored(self, levels: int) -> dict[str, Tensor]:
        """The state that `unpack` will give back after `pack`."""
        return {
            name: quantise(value, EMBEDDING_LEVELS if name == "embeddings" else levels).values().to(value.device)
            for name, value in self.state_dict().items()
        }

    def unpack(self, container: Container) -> dict[str, Tensor]:
        """The state that `pack` stored."""
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        embeddings = shapes.pop("embeddings", None)
        values = unpack_tensors(container, "weights", list(shapes.values()), container.header.config["levels"])
        state = dict(zip(shapes, values, strict=True))
        if embeddings is not None:
            (state["embeddings"],) = unpack_tensors(container, "embeddings", [embeddings], EMBEDDING_LEVELS)
        return state

    @classmethod
    def from_container(cls, container: Container) -> "Fitted":
        """The network in a file, with exactly the weights that the file holds."""
        header = container.header
        if header.method != cls.method:
            raise InputError(f"the file was made by {header.method}, not by {cls.method}")
        if set(header.config) != {"network", "levels"}:
            raise InputError("the header is damaged; the network is not described in full")
        whole(header.config["levels"], FEWEST, LEVELS, "levels", "the file")
        config = Config.from_header(header)
        if not any(_is(config, family) for family in cls.families.values()):
            raise InputError(f"the header is damaged; its network is not one of {cls.method}")
        with torch.device("meta"):
            network = cls(config)
        network.load_state_dict(network.unpack(container), assign=True)
        return network.requires_grad_(False).eval()

    @classmethod
    def decode(cls, data: bytes, frames: Sequence[int] | None = None) -> Iterator[Float[Tensor, "3 h w"]]:
        """The frames asked for, each in a forward pass of its own, so that none depends on the others."""
        container = parse(data)
        header = container.header
        wanted = cls.wanted(header, frames)
        network = cls.from_container(container)
        for number in wanted:
            with torch.inference_mode():
                picture = network(torch.tensor([number]))[0, :, : header.height, : header.width]
            yield picture.clone()


def half_pays(device: str, config: Config) -> bool:
    """Whether the fit's convolutions run in bfloat16: 1.5 to 1.8 times as fast where the processor has it and frames
    are large, no faster where they are small, and no worse by measure (see benchmarks/compression.py)."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported() if device.startswith("cuda") else False
    return config.height * config.width >= LARGE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is(config: Config, family: dict[str, Any]) -> bool:
    alike = all(getattr(config, name) == family.get(name, False) for name in ("indexed", "sine"))
    return alike and (config.time is None) == ("time" not in family)


def _first(true: Callable[[int], bool]) -> int | None:
    """The fewest levels of which `true` holds, if it goes on to hold above them; None if it never does."""
    if not true(LEVELS):
        return None
    low, high = FEWEST, LEVELS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle + 1, high)
    return low
