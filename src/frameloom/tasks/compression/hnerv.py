"""HNeRV: a video as a small network and, for each frame, a tiny embedding that it unfolds to the frame.

For whoever wants any frame of a video in one forward pass, without the frames before it, from one file.

An encoder E maps a frame to an embedding, a decoder D maps it back; both are fitted to one video:
    minimise  mean_t | D(E(x_t)) - x_t |^2,      then keep  D and e_t = E(x_t),  quantised to 8 and 6 bits.
D is a chain of blocks  convolution -> pixel shuffle -> GELU  whose kernels grow and whose channels shrink
slowly (by 1.2 a block), which spreads the parameters evenly over the depth. The encoder is thrown away.

`NeRV` is the baseline: the same chain, fed with an encoding of the frame's number instead of an embedding.

H. Chen, M. Gwilliam, S.-N. Lim, A. Shrivastava, HNeRV: A Hybrid Neural Representation for Videos, CVPR 2023,
arXiv 2304.02633. H. Chen et al., NeRV: Neural Representations for Videos, NeurIPS 2021, arXiv 2110.13903.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from frameloom.bitstream.container import Container, Header, parse, whole
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import SectionedCodec, describe, pack_times
from frameloom.tasks.compression.fit import fit as fit_network
from frameloom.tasks.compression.framing import crop_to, fitted, listed, load_pictures, misfit, strides_for
from frameloom.tasks.compression.weights import pack_tensors, unpack_tensors
from frameloom.video.clip import Clip

WEIGHT_BITS, EMBEDDING_BITS = 8, 6
FREQUENCIES, BASE = 80, 1.25
ENCODER_WIDTH = 64
MAX_PARAMETERS = 1 << 26
MAX_ACTIVATIONS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network of one video.

    `height` and `width` are what the network draws: the frame's own size, rounded up to a multiple of the
    product of `strides`. Block i has kernel min(kernels[0] + 2i, kernels[1]) and 1 / `reduction` of the
    channels before it, at least `lowest`; the first layer has `channels`. `indexed` is NeRV: no embeddings.
    """

    height: int
    width: int
    frames: int
    strides: tuple[int, ...]
    channels: int
    kernels: tuple[int, int] = (1, 5)
    reduction: float = 1.2
    lowest: int = 12
    embedding: int = 16
    indexed: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the embedding."""
        product = math.prod(self.strides)
        return self.height // product, self.width // product

    @property
    def widths(self) -> list[int]:
        """Channels before the first block and after each."""
        widths = [self.channels]
        for _ in self.strides:
            widths.append(max(round(widths[-1] / self.reduction), self.lowest))
        return widths

    def kernel(self, block: int) -> int:
        return min(self.kernels[0] + 2 * block, self.kernels[1])

    @classmethod
    def from_header(cls, header: Header, origin: str = "the file") -> "Config":
        """The configuration in a file's header, which is checked as untrusted input."""
        values = dict(header.config)
        reduction = values.pop("reduction", None)
        strides, kernels = values.pop("strides", None), values.pop("kernels", None)
        indexed = values.pop("indexed", None)
        numbers = {"height", "width", "frames", "channels", "lowest", "embedding"}
        lists = isinstance(strides, list) and isinstance(kernels, list) and len(kernels) == 2
        if set(values) != numbers or not lists or not 1 <= len(strides) <= 8 or type(indexed) is not bool:
            raise InputError(f"{origin}: the header is damaged; the network is not described in full")
        if type(reduction) is not float or not 1 <= reduction <= 16:
            raise InputError(f"{origin}: the header is damaged; reduction must be in 1..16")
        for name in ("channels", "lowest", "embedding"):
            whole(values[name], 1, 1 << 12, name, origin)
        for stride in strides:
            whole(stride, 1, 16, "a stride", origin)
        for kernel in kernels:
            whole(kernel, 1, 31, "a kernel", origin)
        product = math.prod(strides)
        whole(values["frames"], header.frames, header.frames, "frames", origin)
        whole(values["height"], header.height, header.height + product, "height", origin)
        whole(values["width"], header.width, header.width + product, "width", origin)
        config = cls(**values, strides=tuple(strides), kernels=tuple(kernels), reduction=reduction, indexed=indexed)
        config.check(origin)
        return config

    def check(self, origin: str) -> None:
        """InputError unless the network is sound and of a size that can be meant."""
        product = math.prod(self.strides)
        if self.height % product or self.width % product or self.kernels[0] % 2 == 0 or self.kernels[1] % 2 == 0:
            raise InputError(f"{origin}: strides {self.strides} and kernels {self.kernels} do not fit the frame")
        rows, columns = self.grid
        peak = 0
        for stride, width in zip(self.strides, self.widths[1:], strict=True):
            rows, columns = rows * stride, columns * stride
            peak = max(peak, rows * columns * width)
        if peak > MAX_ACTIVATIONS or self.parameters > MAX_PARAMETERS:
            raise InputError(f"{origin}: a network of this size cannot be meant")

    @property
    def parameters(self) -> int:
        """Numbers that a file stores: weights, biases and embeddings."""
        rows, columns = self.grid
        widths = self.widths
        total = 0 if self.indexed else self.frames * self.embedding * rows * columns
        total += (2 * FREQUENCIES + 1) * widths[0] * rows * columns if self.indexed else (
            (self.embedding + 1) * widths[0])  # fmt: skip
        for block, stride in enumerate(self.strides):
            out = widths[block + 1] * stride**2
            total += out * (widths[block] * self.kernel(block) ** 2 + 1)
        return total + 3 * (widths[-1] * 9 + 1)


def solve_width(size: int, config: Config) -> int:
    """The first layer's channels that bring the network to about `size` parameters, embeddings included.

    The larger root of a c^2 + b c = size - embeddings, rounded down; the paper's rule, which leaves out
    biases, rounding and the least width. Raises InputError when the embeddings alone are larger than `size`.
    """
    rows, columns = config.grid
    embeddings = 0 if config.indexed else config.frames * config.embedding * rows * columns
    if embeddings >= size:
        raise InputError(
            f"--size {size}: the embeddings alone need {embeddings:,} parameters; ask for more, or for "
            f"larger strides than {listed(config.strides)}"
        )
    quadratic = sum(
        config.reduction ** (-2 * block - 1) * (stride * config.kernel(block)) ** 2
        for block, stride in enumerate(config.strides)
    )
    linear = 2 * FREQUENCIES * rows * columns if config.indexed else config.embedding
    root = math.sqrt(linear**2 + 4 * quadratic * (size - embeddings))
    return int((root - linear) / (2 * quadratic))


def of_size(config: Config, size: int) -> Config:
    """`config` with the first width that brings its real number of parameters nearest to `size`."""
    about = max(solve_width(size, config), 1)
    widths = (replace(config, channels=channels) for channels in range(1, 2 * about + 2))
    return min(widths, key=lambda one: abs(one.parameters - size))


class Block(nn.Module):
    """Convolution, pixel shuffle, GELU: `stride` times the size."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside * stride**2, kernel, padding=kernel // 2)
        self.stride = stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d sh sw"]:
        return F.gelu(F.pixel_shuffle(self.conv(x), self.stride))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every pixel."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise 7x7 convolution and a pixelwise network four times as wide, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """A frame to its embedding, one stage a stride; needed while fitting only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = [3, *[ENCODER_WIDTH] * (len(config.strides) - 1), config.embedding]
        stages: list[nn.Module] = []
        for stage, stride in enumerate(config.strides):
            down = nn.Conv2d(widths[stage], widths[stage + 1], stride, stride)
            norm = ChannelNorm(widths[stage + (stage == 0)], eps=1e-6)
            stages += [*([down, norm] if stage == 0 else [norm, down]), ConvNeXt(widths[stage + 1])]
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        return self.stages(pictures)


class HNeRV(SectionedCodec, nn.Module):
    """What a file holds: the decoder's weights and the embeddings, `(t, d, rows, columns)`."""

    method: ClassVar[str] = "hnerv"
    family: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        if config.indexed:
            self.stem = nn.Conv2d(2 * FREQUENCIES, config.channels * rows * columns, 1)
        else:
            self.stem = nn.Conv2d(config.embedding, config.channels, 1)
            empty = torch.zeros(config.frames, config.embedding, rows, columns)
            self.embeddings = nn.Parameter(empty, requires_grad=False)
        widths = config.widths
        self.blocks = nn.Sequential(
            *(Block(widths[k], widths[k + 1], config.kernel(k), stride) for k, stride in enumerate(config.strides))
        )
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: 32 frames of 64x128, 40 thousand parameters. `paper`: 132 of 640x1280, 1.5 million."""
        if size == "tiny":
            return Config(height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=19, lowest=8)
        return Config(height=640, width=1280, frames=132, strides=(5, 4, 4, 2, 2), channels=68)

    def draw(self, code: Float[Tensor, "b d _ _"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] from embeddings, or from encoded frame numbers."""
        x = self.stem(code)
        if self.config.indexed:
            x = x.reshape(-1, self.config.channels, *self.config.grid)
        x = self.blocks(F.gelu(x))
        with torch.autocast(x.device.type, enabled=False):
            return 0.5 * torch.tanh(self.head(x.float())) + 0.5

    def code(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b d _ _"]:
        """What `draw` takes for the frames `index`."""
        if not self.config.indexed:
            return self.embeddings[index]
        # In double precision: the highest frequency turns through 10^7 radians.
        time = index.double() / self.config.frames
        angle = time[:, None] * math.pi * BASE ** torch.arange(FREQUENCIES, dtype=torch.float64, device=index.device)
        return torch.cat([angle.sin(), angle.cos()], 1).float()[:, :, None, None]

    def forward(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        """The frames `index`, as large as the network draws them."""
        return self.draw(self.code(index))

    @classmethod
    def encode(
        cls,
        clip: Clip,
        *,
        size: int | None = None,
        epochs: int = 300,
        batch: int = 2,
        loss: str = "l2",
        strides: Sequence[int] | None = None,
        fit: str | None = None,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> bytes:
        """Fit a network to the clip and write it.

        `size` is the number of stored parameters, which take about a byte each in the file; by default one
        for 72 pixels, within 40 thousand and 3 million. Frames that the strides do not divide are drawn
        larger and cut back (`fit="pad"`), or lose their edges (`fit="crop"`). Holds the whole clip in memory,
        8 bit.
        """
        pictures = load_pictures(clip)
        config = cls.plan(*pictures.shape[-2:], len(pictures), size=size, strides=strides, fit=fit)
        if fit == "crop":
            pictures = crop_to(pictures, config.height, config.width)
        network = cls.fit(pictures, config, epochs=epochs, batch=batch, loss=loss, seed=seed, device=device,
                          progress=progress)  # fmt: skip
        header = replace(
            describe(clip, cls.method, asdict(config)), height=pictures.shape[-2], width=pictures.shape[-1]
        )
        return network.to_bytes(header, pack_times(clip))

    @classmethod
    def plan(
        cls,
        height: int,
        width: int,
        frames: int,
        *,
        size: int | None = None,
        strides: Sequence[int] | None = None,
        fit: str | None = None,
    ) -> Config:
        """The network for a video of this shape."""
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
        config = Config(height=tall, width=wide, frames=frames, strides=chosen, channels=1,
                        lowest=8 if size < 300_000 else 12, **cls.family)  # fmt: skip
        config = of_size(config, size)
        if config.parameters > 1.1 * size:
            raise InputError(
                f"--size {size}: the smallest network for {width}x{height} and strides {listed(chosen)} "
                f"has {config.parameters:,} parameters"
            )
        config.check("the clip")
        return config

    @classmethod
    def fit(
        cls,
        pictures: UInt8[Tensor, "t 3 h w"],
        config: Config,
        *,
        epochs: int,
        batch: int = 2,
        loss: str = "l2",
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> "HNeRV":
        """The network of `config` after `epochs` over the pictures, on the CPU, its embeddings in place."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = Learner(cls(config)).to(device, memory_format=torch.channels_last)
        fit_network(learner, pictures, epochs=epochs, batch=batch, loss=loss, seed=seed,
                    progress=progress, label=f"fitting {cls.method}")  # fmt: skip
        learner.freeze(pictures)
        return learner.network.cpu().to(memory_format=torch.contiguous_format)

    def to_bytes(self, header: Header, more: dict[str, bytes] | None = None) -> bytes:
        """The file: every weight as 8-bit symbols, the embeddings as 6-bit ones, all of them range-coded."""
        sections = pack_tensors("weights", [value for _, value in self._weights()], WEIGHT_BITS)
        if not self.config.indexed:
            sections |= pack_tensors("embeddings", [self.embeddings], EMBEDDING_BITS)
        return Container(header, sections | (more or {})).to_bytes()

    @classmethod
    def from_container(cls, container: Container) -> "HNeRV":
        """The network in a file, with exactly the weights that the file holds."""
        config = Config.from_header(container.header)
        if config.indexed != cls.family.get("indexed", False) or container.header.method != cls.method:
            raise InputError(f"the file was made by {container.header.method}, not by {cls.method}")
        with torch.device("meta"):
            network = cls(config)
        names, like = zip(*network._weights(), strict=True)
        values = unpack_tensors(container, "weights", [tensor.shape for tensor in like], WEIGHT_BITS)
        state = dict(zip(names, values, strict=True))
        if not config.indexed:
            shapes = [network.embeddings.shape]
            (state["embeddings"],) = unpack_tensors(container, "embeddings", shapes, EMBEDDING_BITS)
        network.load_state_dict(state, assign=True)
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

    @classmethod
    def load_official(cls, path: str | Path) -> "HNeRV":
        """The network in a `quant_vid.pth` of the authors: 132 frames of 640x1280, 1.5 million parameters.

        Raises InputError that names the first key or shape that is not as published.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch.load raises whatever the damage provokes
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: not a checkpoint that can be read safely ({reason})") from None
        if not (isinstance(stored, dict) and isinstance(stored.get("model"), dict)):
            raise InputError(f"{path}: key 'model' is missing; the official file has 'embed' and 'model'")
        with torch.device("meta"):
            network = cls(cls.preset("paper"))
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        state = {"embeddings": _official(stored.get("embed"), "embed", shapes["embeddings"], path)}
        names = {"stem": "decoder.0.conv.downconv", "head": "head_layer"} | {
            f"blocks.{k}.conv": f"decoder.{k + 1}.conv.upconv.0" for k in range(len(network.blocks))
        }
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                key = f"{theirs}.{kind}"
                state[f"{ours}.{kind}"] = _official(stored["model"].get(key), key, shapes[f"{ours}.{kind}"], path)
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False).eval()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.named_parameters() if name != "embeddings")


class NeRV(HNeRV):
    """The baseline: the frame's number, encoded by sines and cosines, in place of the embedding."""

    method: ClassVar[str] = "nerv"
    family: ClassVar[dict[str, Any]] = {"indexed": True, "kernels": (3, 3), "reduction": 2.0}

    @classmethod
    def preset(cls, size: str) -> Config:
        """The sizes of `HNeRV.preset`, by NeRV's own plan of channels and kernels."""
        if size == "tiny":
            return Config(height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=14, lowest=8, **cls.family)
        return Config(height=640, width=1280, frames=132, strides=(5, 4, 2, 2), channels=54, **cls.family)


class Learner(nn.Module):
    """A network and, if it has embeddings, the encoder that is fitted with it."""

    def __init__(self, network: HNeRV) -> None:
        super().__init__()
        self.network = network
        self.encoder = None if network.config.indexed else Encoder(network.config)

    def forward(self, index: Int[Tensor, "b"], pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        code = self.network.code(index) if self.encoder is None else self.encoder(self._padded(pictures))
        return self.network.draw(code)[..., : pictures.shape[-2], : pictures.shape[-1]]

    @torch.inference_mode()
    def freeze(self, pictures: UInt8[Tensor, "t 3 h w"]) -> None:
        """Keep the embedding of every original frame, in the order of the frames."""
        if self.encoder is None:
            return
        for number, picture in enumerate(pictures):
            whole_frame = self._padded(picture[None].to(self.network.embeddings.device).float() / 255)
            self.network.embeddings[number] = self.encoder(whole_frame)[0]

    def _padded(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 tall wide"]:
        config = self.network.config
        missing = (0, config.width - pictures.shape[-1], 0, config.height - pictures.shape[-2])
        return F.pad(pictures, missing, mode="replicate") if any(missing) else pictures


def _official(entry: Any, key: str, shape: torch.Size, path: str | Path) -> Tensor:
    """One tensor of the authors' file: low + scale * symbols."""
    parts = [entry.get(part) for part in ("min", "scale", "quant")] if isinstance(entry, dict) else [None]
    if not all(isinstance(part, Tensor) for part in parts):
        raise InputError(f"{path}: key '{key}' is missing or is not a quantised tensor")
    low, scale, symbols = parts
    try:
        value = low.float() + scale.float() * symbols.float()
    except RuntimeError:
        raise InputError(f"{path}: key '{key}' has side numbers that do not fit its symbols") from None
    if value.shape != shape:
        raise InputError(f"{path}: key '{key}' has shape {tuple(value.shape)}; it must be {tuple(shape)}")
    return value
