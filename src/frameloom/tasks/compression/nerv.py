"""The decoders of the NeRV family: one network with switches, and the encoder that is fitted with it.

A chain of blocks  convolution -> pixel shuffle -> activation  unfolds a code to a frame. The switches are what the
published methods differ in: what the code is (an embedding of the frame, or its encoded number), the plan of kernels
and channels, how many blocks a stage has, the activation, and whether each block is modulated by the time.

H. Chen et al., NeRV: Neural Representations for Videos, NeurIPS 2021, arXiv 2110.13903; H. Chen et al., HNeRV, CVPR
2023, arXiv 2304.02633; X. Zhang et al., Boosting Neural Representations for Videos with a Conditional Decoder, CVPR
2024, arXiv 2402.18152.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from frameloom.bitstream.container import Header, whole
from frameloom.errors import InputError
from frameloom.tasks.compression.framing import listed

FREQUENCIES, BASE = 80, 1.25
ENCODER_WIDTH = 64
MAX_PARAMETERS = 1 << 26
MAX_ACTIVATIONS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network of one video.

    `height` and `width` are what the network draws: the frame's own size, rounded up to a multiple of the
    product of `strides`. Stage i has kernel min(kernels[0] + 2i, kernels[1]) and 1 / `reduction` of the
    channels before it, at least `lowest`; the first layer has `channels`. `indexed` is NeRV: no embeddings.
    `doubled` stages, from that one on, have a second block of stride 1; `sine` is the activation of every block
    (GELU otherwise); `time` are the widths of the two layers that embed the time, which then modulates every block.
    `single` rounds the frequencies that encode a frame's number to float32, as the authors' code does: networks that it
    fitted have learned to see those, and the highest turns through 10^7 radians.
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
    doubled: int | None = None
    sine: bool = False
    time: tuple[int, int] | None = None
    single: bool = False

    def to_header(self) -> dict[str, Any]:
        """What a file's header says of the network. What it does not say is so in all files that do not say it."""
        return {name: value for name, value in asdict(self).items() if name != "single" or value}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the embedding."""
        product = math.prod(self.strides)
        return self.height // product, self.width // product

    @property
    def widths(self) -> list[int]:
        """Channels before the first stage and after each."""
        widths = [self.channels]
        for _ in self.strides:
            widths.append(max(round(widths[-1] / self.reduction), self.lowest))
        return widths

    @property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """Channels in and out, kernel and stride of every block."""
        widths = self.widths
        plan = []
        for stage, stride in enumerate(self.strides):
            kernel = min(self.kernels[0] + 2 * stage, self.kernels[1])
            plan.append((widths[stage], widths[stage + 1], kernel, stride))
            if self.doubled is not None and stage >= self.doubled:
                plan.append((widths[stage + 1], widths[stage + 1], kernel, 1))
        return plan

    @classmethod
    def from_header(cls, header: Header, origin: str = "the file") -> "Config":
        """The network in a file's header, which is checked as untrusted input."""
        values = header.config.get("network")
        values = dict(values) if isinstance(values, dict) else {}
        reduction, doubled = values.pop("reduction", None), values.pop("doubled", False)
        strides, kernels = values.pop("strides", None), values.pop("kernels", None)
        switches = {name: values.pop(name, None) for name in ("indexed", "sine")}
        switches["single"] = values.pop("single", False)
        time = values.pop("time", False)
        numbers = {"height", "width", "frames", "channels", "lowest", "embedding"}
        lists = isinstance(strides, list) and isinstance(kernels, list) and len(kernels) == 2
        flags = all(type(switch) is bool for switch in switches.values())
        if set(values) != numbers or not lists or not 1 <= len(strides) <= 8 or not flags:
            raise InputError(f"{origin}: the header is damaged; the network is not described in full")
        if type(reduction) is not float or not 1 <= reduction <= 16:
            raise InputError(f"{origin}: the header is damaged; reduction must be in 1..16")
        for name in ("channels", "lowest", "embedding"):
            whole(values[name], 1, 1 << 12, name, origin)
        for stride in strides:
            whole(stride, 1, 16, "a stride", origin)
        for kernel in kernels:
            whole(kernel, 1, 31, "a kernel", origin)
        if doubled is not None:
            whole(doubled, 0, 8, "doubled", origin)
        if time is not None:
            if not isinstance(time, list) or len(time) != 2:
                raise InputError(f"{origin}: the header is damaged; the network is not described in full")
            for width in time:
                whole(width, 1, 1 << 10, "a width of the time's embedding", origin)
        product = math.prod(strides)
        whole(values["frames"], header.frames, header.frames, "frames", origin)
        whole(values["height"], header.height, header.height + product, "height", origin)
        whole(values["width"], header.width, header.width + product, "width", origin)
        config = cls(**values, **switches, strides=tuple(strides), kernels=tuple(kernels), reduction=reduction,
                     doubled=doubled, time=time and tuple(time))  # fmt: skip
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
        total = 0 if self.indexed else self.frames * self.embedding * rows * columns
        stem = (2 * FREQUENCIES + 1) * rows * columns if self.indexed else self.embedding + 1
        total += stem * self.channels
        for inside, outside, kernel, stride in self.blocks:
            total += outside * stride**2 * (inside * kernel**2 + 1)
        if self.time is not None:
            first, hidden = self.time
            total += (2 * FREQUENCIES + 1) * first + (first + 1) * hidden
            for width in (self.channels, *(outside for _, outside, _, _ in self.blocks)):
                affine = 2 * ((hidden + 1) * hidden + (hidden + 1) * width)
                total += 2 * (affine + width * (9 * width + 1))
        return total + 3 * (self.widths[-1] * 9 + 1)


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
        config.reduction ** (-2 * stage - 1) * (stride * min(config.kernels[0] + 2 * stage, config.kernels[1])) ** 2
        for stage, stride in enumerate(config.strides)
    )
    linear = 2 * FREQUENCIES * rows * columns if config.indexed else config.embedding
    root = math.sqrt(linear**2 + 4 * quadratic * (size - embeddings))
    return int((root - linear) / (2 * quadratic))


def of_size(config: Config, size: int) -> Config:
    """`config` with the first width that brings its real number of parameters nearest to `size`."""
    about = max(solve_width(size, config), 1)
    widths = (replace(config, channels=channels) for channels in range(1, 2 * about + 2))
    return min(widths, key=lambda one: abs(one.parameters - size))


def encoded(index: Int[Tensor, "b"], frames: int, single: bool = False) -> Float[Tensor, "b f 1 1"]:
    """Sines, then cosines, of t pi 1.25^j for the time t = index / frames; `single` rounds pi 1.25^j to float32."""
    # In double precision: the highest frequency turns through 10^7 radians.
    time = index.double()[:, None] / frames
    step = torch.arange(FREQUENCIES, dtype=torch.float32 if single else torch.float64, device=index.device)
    angle = time * (BASE**step * math.pi) if single else time * math.pi * BASE**step
    return torch.cat([angle.sin(), angle.cos()], 1).float()[:, :, None, None]


class Affine(nn.Module):
    """x (1 + s) + b, with s and b of each channel drawn from the time's `hidden` numbers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1))
        self.shift = nn.Sequential(nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d 1 1"]) -> Float[Tensor, "b c h w"]:
        return x * (1 + self.scale(time)) + self.shift(time)


class Conditional(nn.Module):
    """A residual block that the time modulates before each of its two convolutions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.before, self.between = Affine(width, hidden), Affine(width, hidden)
        self.conv0, self.conv1 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d 1 1"]) -> Float[Tensor, "b c h w"]:
        y = F.gelu(self.conv0(self.before(x, time)))
        return x + self.conv1(self.between(y, time))


class Block(nn.Module):
    """Convolution, pixel shuffle, activation: `stride` times the size."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, sine: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside * stride**2, kernel, padding=kernel // 2)
        self.stride, self.sine = stride, sine

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d sh sw"]:
        x = F.pixel_shuffle(self.conv(x), self.stride)
        return torch.sin(x) if self.sine else F.gelu(x)


class Decoder(nn.Module):
    """What a file holds: the weights, and the embeddings `(t, d, rows, columns)` where there are some."""

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
        self.blocks = nn.ModuleList(Block(*plan, sine=config.sine) for plan in config.blocks)
        if config.time is not None:
            first, second = config.time
            self.time = nn.ModuleList([nn.Conv2d(2 * FREQUENCIES, first, 1), nn.Conv2d(first, second, 1)])
            modulated = [config.channels, *(outside for _, outside, _, _ in config.blocks)]
            self.conditions = nn.ModuleList(Conditional(width, second) for width in modulated)
        self.head = nn.Conv2d(config.widths[-1], 3, 3, padding=1)

    @torch.no_grad()
    def begin_at(self, pictures: UInt8[Tensor, "t 3 h w"]) -> None:
        """Let the head draw about the clip's mean colour. From grey, a dark clip drives tanh so deep into black that
        nothing comes back from there.
        """
        mean = pictures.float().mean((0, 2, 3)) / 255
        self.head.bias.copy_(torch.atanh((2 * mean - 1).clamp(-0.98, 0.98)))

    def code(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b d _ _"]:
        """What `draw` takes for the frames `index`."""
        return self.encoded(index) if self.config.indexed else self.embeddings[index]

    def encoded(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b f 1 1"]:
        """The numbers of frames, as the network is told them."""
        return encoded(index, self.config.frames, self.config.single)

    def draw(self, code: Float[Tensor, "b d _ _"], index: Int[Tensor, "b"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] from codes, and the numbers of the frames where the time counts."""
        time = None
        if self.config.time is not None:
            time = self.encoded(index)
            for layer in self.time:
                time = torch.sin(layer(time))
        x = self.stem(code)
        if self.config.indexed:
            x = x.reshape(-1, self.config.channels, *self.config.grid)
        x = torch.sin(x) if self.config.sine else F.gelu(x)
        if time is not None:
            x = self.conditions[0](x, time)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if time is not None:
                x = self.conditions[number + 1](x, time)
        with torch.autocast(x.device.type, enabled=False):
            return 0.5 * torch.tanh(self.head(x.float())) + 0.5

    def forward(
        self, index: Int[Tensor, "b"], code: Float[Tensor, "b d _ _"] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """The frames `index`, as large as the network draws them; from `code`, or from their own."""
        return self.draw(self.code(index) if code is None else code, index)


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


class Learner(nn.Module):
    """A decoder and, if it has embeddings, the encoder that is fitted with it."""

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        self.network = network
        self.encoder = None if network.config.indexed else Encoder(network.config)

    def forward(self, index: Int[Tensor, "b"], pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        code = None if self.encoder is None else self.encoded(pictures)
        return self.network(index, code)[..., : pictures.shape[-2], : pictures.shape[-1]]

    def encoded(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        """The embeddings of pictures, which are padded by their edges where the network draws more."""
        config = self.network.config
        missing = (0, config.width - pictures.shape[-1], 0, config.height - pictures.shape[-2])
        return self.encoder(F.pad(pictures, missing, mode="replicate") if any(missing) else pictures)

    @torch.inference_mode()
    def freeze(self, pictures: UInt8[Tensor, "t 3 h w"]) -> None:
        """Keep the embedding of every original frame, in the order of the frames."""
        if self.encoder is None:
            return
        for number, picture in enumerate(pictures):
            device = self.network.embeddings.device
            self.network.embeddings[number] = self.encoded(picture[None].to(device).float() / 255)[0]
