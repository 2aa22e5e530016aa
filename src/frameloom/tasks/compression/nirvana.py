"""NIRVANA: a video as a chain of small networks, one for a few frames, each stored as what it changed of the last.

For whoever has long or large clips: encoding holds a few frames at a time, and what hardly moves costs hardly a byte.

Frames go in groups of g, and each is cut into patches of P x P. The network f_k of group k draws a patch of all g
frames from where its centre lies, so that its size does not depend on the frame's:
    f_k : (x, y) in [-1, 1]^2  ->  sine layers  ->  C features of P/2 x P/2, and for frame j plus pe[:, j]
                               ->  3x3 convolution, pixel shuffle, GELU, 3x3 convolution, each frame on its own.
f_k starts from f_{k-1}. Its weights are integers, W = round(L) * scale / div with div = max |round(L)|, and the file
keeps round(L_k) - round(L_{k-1}). With q the learned density of what is kept,
    minimise  mean | f_k - frames |^2  +  rate weight * mean of -log2 q( L_k - round(L_{k-1}) + u ),   u in +-1/2.

Ours, not the paper's: the difference is priced while fitting, not L alone; biases and convolutions are integers too, of
a fixed unit, and priced (at small sizes they weigh as much as the rest); the rate of learning falls along half a cosine
where the paper keeps the best state of a constant one; and every so many groups one may be stored whole, a key group.

S. R. Maiya, S. Girish, M. Ehrlich, H. Wang, K. S. Lee, P. Poirson, P. Wu, C. Wang, A. Shrivastava, NIRVANA: Neural
Implicit Representations of Videos with Adaptive Networks and Autoregressive Patch-wise Modeling, CVPR 2023,
arXiv 2212.14593. V. Sitzmann et al., Implicit Neural Representations with Periodic Activation Functions, NeurIPS 2020.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.bitstream.container import Container, Header, parse, whole
from frameloom.bitstream.latent import UNIT, Latent
from frameloom.bitstream.nearby import pack_nearby, unpack_nearby
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import SectionedCodec, describe, pack_times
from frameloom.tasks.compression.fit import State, descend, falling
from frameloom.tasks.compression.framing import grouped
from frameloom.video.clip import Clip

FREQUENCY = 30.0  # of every sine layer
FRAME_BASE = 100.0
LATENTS = (200.0, 3.0)  # how far latents of the first and of other layers reach at the start
PRIOR_RATE = 1e-2
# What Adam steps in is a latent's own unit: learning rates of latents, of scales, of tensors with a fixed unit.
PACE_LATENT, PACE_SCALE, PACE_FIXED = 100, 10, 4 / UNIT
LATER = 0.25  # the learning rate of a group that starts from the one before
STEPS = 12  # bytes: a float32 for each layer of the stem
LARGEST_STEP = 1e3
EVERY = 10  # steps between two looks at div, and at the quality
BATCH = 16  # patches drawn at once: always the same ones together, so that any part of a frame is the whole's
MAX_PARAMETERS = 1 << 24
MAX_ACTIVATIONS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network of a group: `group` frames, patches of `patch` pixels, `hidden` sines, `channels` features."""

    patch: int = 16
    group: int = 3
    hidden: int = 96
    channels: int = 8

    @property
    def parameters(self) -> int:
        """Numbers that a group stores."""
        features = self.channels * (self.patch // 2) ** 2
        stem = 3 * self.hidden + (self.hidden + 1) * (self.hidden + features)
        return stem + self.group * (self.patch * (9 * self.channels + 1) + 3 * (9 * self.patch // 4 + 1))

    @classmethod
    def from_header(cls, header: Header, origin: str = "the file") -> "Config":
        """The configuration in a file's header, which is checked as untrusted input."""
        values = dict(header.config)
        whole(values.pop("groups", None), 1, header.frames, "groups", origin)
        if set(values) != {"patch", "group", "hidden", "channels"}:
            raise InputError(f"{origin}: the header is damaged; the network is not described in full")
        for name, value in values.items():
            whole(value, 1, 1 << 12, name, origin)
        config = cls(**values)
        if problem := config.problem(header.height, header.width):
            raise InputError(f"{origin}: the header is damaged; {problem}")
        return config

    def problem(self, height: int, width: int) -> str | None:
        """What is wrong with this network for such frames, if anything is."""
        if self.patch % 4 or not 4 <= self.patch <= 256:
            return f"patch {self.patch}: the head needs a multiple of 4 from 4 to 256"
        if not 1 <= self.group <= 64:
            return f"group {self.group}: a group has 1 to 64 frames"
        if self.hidden < 1 or self.channels < 1:
            return f"hidden {self.hidden} and channels {self.channels}: a network has 1 or more"
        side = self.patch**2 * max(self.patch, self.channels)
        if self.parameters > MAX_PARAMETERS or self.group * max(3 * height * width, BATCH * side) > MAX_ACTIVATIONS:
            return "a network of this size cannot be meant"
        return None


class Linear(nn.Module):
    """A layer of a sine network; `first` layers read coordinates."""

    def __init__(self, inside: int, outside: int, first: bool = False) -> None:
        super().__init__()
        bound = 1 / inside if first else math.sqrt(6 / inside) / FREQUENCY
        self.weight = Latent((outside, inside), bound, LATENTS[0 if first else 1])
        self.bias = Latent((outside,), bound)

    def forward(self, x: Float[Tensor, "n inside"]) -> Float[Tensor, "n outside"]:
        return F.linear(x, self.weight(), self.bias())


class FrameConv(nn.Module):
    """A 3x3 convolution for each frame of a group; channels are ordered frame by frame."""

    def __init__(self, inside: int, outside: int, frames: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(9 * inside)
        self.frames = frames
        self.weight = Latent((frames * outside, inside, 3, 3), bound)
        self.bias = Latent((frames * outside,), bound)

    def forward(self, x: Float[Tensor, "n gi h w"]) -> Float[Tensor, "n go h w"]:
        return F.conv2d(x, self.weight(), self.bias(), padding=1, groups=self.frames)


class Group(NamedTuple):
    """Where a group lies in the file and in the clip."""

    start: int
    size: int
    key: bool
    first: int
    frames: int


class Nirvana(SectionedCodec, nn.Module):
    """The network of one group of frames."""

    method: ClassVar[str] = "nirvana"
    points: ClassVar[list[dict[str, Any]]] = [{"hidden": hidden} for hidden in (32, 64, 128)]  # for curves

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        features = config.channels * (config.patch // 2) ** 2
        self.stem = nn.ModuleList([
            Linear(2, config.hidden, first=True),
            Linear(config.hidden, config.hidden),
            Linear(config.hidden, features),
        ])  # fmt: skip
        self.widen = FrameConv(config.channels, config.patch, config.group)
        self.head = FrameConv(config.patch // 4, 3, config.group)

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: patches of 16, 96 sines, for pictures of 128 pixels. `paper`: patches of 32, 512 sines."""
        return Config() if size == "tiny" else Config(patch=32, hidden=512, channels=16)

    def features(self, centres: Float[Tensor, "n 2"]) -> Float[Tensor, "n c h w"]:
        """What all frames of a group share."""
        for layer in self.stem[:-1]:
            centres = torch.sin(FREQUENCY * layer(centres))
        side = self.config.patch // 2
        return self.stem[-1](centres).reshape(-1, self.config.channels, side, side)

    def frame_codes(self) -> Float[Tensor, "g c"]:
        """What tells frame j: sines and cosines of j / 100^(c // 2)."""
        channel = torch.arange(self.config.channels, dtype=torch.float64)
        frame = torch.arange(self.config.group, dtype=torch.float64)[:, None]
        return torch.sin(frame * FRAME_BASE ** -(channel // 2) + channel % 2 * math.pi / 2).float()

    def draw(self, features: Float[Tensor, "n c h w"], codes: Float[Tensor, "g c"]) -> Float[Tensor, "n g 3 p p"]:
        """Patches of every frame; frame j depends on the features and on row j of `codes`."""
        # Frame-major, as the convolutions' groups are: the released code orders by channel, which mixes the frames.
        x = features[:, None] + codes.to(features)[:, :, None, None]
        x = F.gelu(F.pixel_shuffle(self.widen(x.flatten(1, 2)), 2))
        return self.head(x).unflatten(1, (self.config.group, 3))

    def forward(self, centres: Float[Tensor, "n 2"]) -> Float[Tensor, "n g 3 p p"]:
        return self.draw(self.features(centres), self.frame_codes())

    def coded(self) -> list[tuple[str, Latent]]:
        """All that a file keeps, in its order."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Latent)]

    def pictures(self, height: int, width: int) -> Float[Tensor, "g 3 h w"]:
        """The group's frames, as drawn in one batch while fitting; not clamped."""
        rows, columns = grid(height, width, self.config.patch)
        device = self.stem[0].weight.latent.device
        patches = self(centres(rows, columns).to(device))
        return rearrange(patches, "(r k) g c p q -> g c (r p) (k q)", r=rows)[..., :height, :width]

    def fit(
        self,
        target: Float[Tensor, "g 3 h w"],
        *,
        steps: int,
        minutes: float | None = None,
        rate_weight: float = 2e-3,
        learning_rate: float = 2e-3,
        psnr: float | None = None,
        stage: int = 0,
        state: State | None = None,
        seed: int = 0,
        progress: Progress = silent,
        label: str = "fitting",
    ) -> int:
        """Fit to one group of frames, from the weights as they are; the steps it took."""
        coded = self.coded()
        total = sum(one.latent.numel() for _, one in coded)
        groups = [{"params": [one.scale for _, one in coded if one.learned], "lr": PACE_SCALE * learning_rate}]
        for _, one in coded:
            groups.append({"params": [one.latent], "lr": learning_rate * (PACE_LATENT if one.learned else PACE_FIXED)})
        priors = [value for _, one in coded for value in one.prior.parameters()]
        optimisers = [torch.optim.Adam(groups), torch.optim.Adam(priors, PRIOR_RATE)]
        size = target.shape[-2:]

        def loss_at(step: int) -> Tensor:
            if step % EVERY == 0:
                for _, one in coded:
                    one.renew()
            bits = sum(one.bits() for _, one in coded)
            loss = F.mse_loss(self.pictures(*size), target) + rate_weight / total * bits
            if not math.isfinite(loss.item()):
                bad = [name for name, one in coded if not one.latent.isfinite().all()]
                where = f" (layer {bad[0]})" if bad else ""
                raise InputError(f"the fit is not finite at step {step + 1}{where}; use a lower --set learning_rate")
            return loss

        def reached(done: int) -> bool:
            return psnr is not None and done % EVERY == 0 and self.quality(target) >= psnr

        return descend(
            self, optimisers, loss_at, steps=steps, minutes=minutes, schedule=falling, reached=reached, stage=stage,
            state=state, seed=seed, progress=progress, label=label,
        )  # fmt: skip

    @torch.no_grad()
    def quality(self, target: Float[Tensor, "g 3 h w"]) -> float:
        """PSNR of the group as it would be stored now, in dB."""
        error = (self.pictures(*target.shape[-2:]).clamp(0, 1) - target).square().mean()
        return -10 * math.log10(error.item() + 1e-9)

    def integers(self) -> list[np.ndarray]:
        return [one.integers().detach().cpu().numpy().astype(np.int64).ravel() for _, one in self.coded()]

    def relate_to(self, integers: Sequence[np.ndarray] | None, anew: bool) -> None:
        """Price what comes by its distance from these integers, or from 0; `anew` by a density that knows nothing."""
        for which, (_, one) in enumerate(self.coded()):
            one.relate_to(None if integers is None else integers[which], anew)

    def to_payload(self, before: Sequence[np.ndarray] | None) -> bytes:
        """The group's bytes: the learned steps of its integers, then those, near the integers `before`."""
        steps = [(one.scale / one.div).detach().cpu().numpy() for _, one in self.coded() if one.learned]
        return np.array(steps, "<f4").tobytes() + pack_nearby(self.integers(), before)

    def read(self, payload: bytes, before: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """The integers in a payload; InputError for a damaged one."""
        steps = np.frombuffer(payload[:STEPS].ljust(STEPS, b"\xff"), "<f4")
        if not (np.abs(steps) <= LARGEST_STEP).all():  # true of what is not a number, too
            raise InputError("section 'groups' is damaged; a group's scales are no scales")
        return unpack_nearby(payload[STEPS:], [one.latent.numel() for _, one in self.coded()], before)

    @torch.no_grad()
    def load(self, payload: bytes, integers: Sequence[np.ndarray]) -> None:
        """Become the network of a group."""
        steps = iter(np.frombuffer(payload[:STEPS], "<f4").tolist())
        for (_, one), run in zip(self.coded(), integers, strict=True):
            one.latent.copy_(torch.from_numpy(run).reshape(one.latent.shape))
            one.div.fill_(1)
            one.scale.fill_(next(steps) if one.learned else UNIT)

    @classmethod
    def encode(
        cls,
        clip: Clip,
        *,
        size: int | None = None,
        group: int = 3,
        patch: int = 16,
        hidden: int = 96,
        channels: int = 8,
        key: int = 0,
        iterations: int = 400,
        later: int = 80,
        minutes: float | None = None,
        rate_weight: float = 2e-3,
        psnr: float | None = None,
        learning_rate: float = 2e-3,
        split_on_cuts: bool = False,
        state: State | None = None,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> bytes:
        """Fit a network to each group of frames in turn, and write what each changed of the one before.

        Args:
            size: not taken; what a file takes follows from the video and from the settings below.
            key: every so many groups, one is stored whole, so that decoding may begin there; 0 for the first alone.
            iterations: steps on the first group; every other takes `later`.
            minutes: for the whole clip, by the clock on the wall; a group that has used its share ends early.
            rate_weight: what a bit costs against the mean squared error; more makes smaller files.
            psnr: of what is stored, in dB, at which a group ends.
            split_on_cuts: a group ends at a cut; the next is a key group and takes `iterations`.

        Holds one group of frames in memory. Raises InputError for settings that make no network.
        """
        if size is not None:
            raise InputError(f"--size {size}: nirvana's file follows from the video; use --quality 28dB, --set "
                             "rate_weight=0.01 (more is smaller) or --set hidden=48, or --method hnerv, which meets "
                             "a size")  # fmt: skip
        config = Config(patch=patch, group=group, hidden=hidden, channels=channels)
        if problem := config.problem(clip.info.height, clip.info.width):
            raise InputError(f"--set {problem}")
        check_settings(key=key, iterations=iterations, later=later, minutes=minutes, rate_weight=rate_weight,
                       psnr=psnr, learning_rate=learning_rate)  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls(config).to(device)
        count = -(-len(clip) // group)
        shares = iterations + later * (count - 1)
        kept = {} if state is None else dict(state.more)
        payloads: list[bytes] = []
        index: list[int] = []
        before: list[np.ndarray] | None = None
        was_key = False
        for stage, (pictures, cut) in enumerate(grouped(clip, group, split_on_cuts)):
            fresh = stage == 0 or cut
            is_key = fresh or (key > 0 and stage % key == 0)
            before = None if is_key else before
            if (done := kept.get(f"group.{stage}")) is not None:
                payload = done.numpy().tobytes()
                before = network.read(payload, before)
            else:
                steps = iterations if fresh else later
                network.relate_to(before, anew=is_key or was_key)
                target = torch.stack(pictures + pictures[-1:] * (group - len(pictures))).to(device)
                network.fit(target, steps=steps, minutes=None if minutes is None else minutes * steps / shares,
                            rate_weight=rate_weight, learning_rate=learning_rate * (1 if fresh else LATER),
                            psnr=psnr, stage=stage, state=state, seed=seed + stage, progress=progress,
                            label=f"group {stage + 1} of {max(count, stage + 1)}")  # fmt: skip
                payload, before = network.to_payload(before), network.integers()
                if state is not None:
                    state.more[f"group.{stage}"] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            was_key = is_key
            payloads.append(payload)
            index += [2 * len(payload) + is_key, len(pictures)]
        header = describe(clip, cls.method, asdict(config) | {"groups": len(payloads)})
        sections = {"groups": b"".join(payloads), "index": pack_numbers(index)}
        return Container(header, sections | pack_times(clip)).to_bytes()

    @classmethod
    def decode(
        cls,
        data: bytes,
        frames: Sequence[int] | None = None,
        region: tuple[int, int, int, int] | None = None,
    ) -> Iterator[Float[Tensor, "3 h w"]]:
        """The frames asked for, from the last key group on; of a `region` (x, y, w, h) only the patches it touches."""
        container = parse(data)
        header = container.header
        if header.method != cls.method:
            raise InputError(f"the file was made by {header.method}, not by {cls.method}")
        config = Config.from_header(header)
        groups, stored = read_index(container), container.section("groups")
        x, y, w, h = region or (0, 0, header.width, header.height)
        if not (0 <= x < x + w <= header.width and 0 <= y < y + h <= header.height):
            raise InputError(f"--region {x},{y},{w},{h}: the frame is {header.width}x{header.height}")
        with torch.device("meta"):
            network = cls(config)
        network = network.to_empty(device="cpu").requires_grad_(False).eval()
        held, integers, drawn = -1, None, None
        firsts = np.array([group.first for group in groups])
        for number in cls.wanted(header, frames):
            which = int(np.searchsorted(firsts, number, side="right")) - 1
            if which != held:
                key = max(k for k in range(which + 1) if groups[k].key)
                for step in range(held + 1 if key <= held < which else key, which + 1):
                    payload = stored[groups[step].start : groups[step].start + groups[step].size]
                    integers = network.read(payload, None if groups[step].key else integers)
                    held = step
                network.load(payload, integers)
                drawn = network.render(header.height, header.width, (x, y, w, h))
            yield drawn[number - groups[which].first].clone()

    @torch.inference_mode()
    def render(self, height: int, width: int, region: tuple[int, int, int, int]) -> Float[Tensor, "g 3 h w"]:
        """A region of every frame of the group, in [0, 1], patches in the batches that they always come in."""
        x, y, w, h = region
        side = self.config.patch
        rows, columns = grid(height, width, side)
        top, left, bottom, right = y // side, x // side, (y + h - 1) // side + 1, (x + w - 1) // side + 1
        canvas = torch.empty(self.config.group, 3, (bottom - top) * side, (right - left) * side)
        every = centres(rows, columns)
        for start in range(0, rows * columns, BATCH):
            places = [divmod(k, columns) for k in range(start, min(start + BATCH, rows * columns))]
            inside = [(k, r - top, c - left) for k, (r, c) in enumerate(places)
                      if top <= r < bottom and left <= c < right]  # fmt: skip
            if not inside:
                continue
            patches = self(every[start : start + BATCH])
            for k, r, c in inside:
                canvas[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side] = patches[k]
        return canvas[..., y - top * side :, x - left * side :][..., :h, :w].clamp(0, 1)

    @classmethod
    def inspect(cls, data: bytes) -> dict[str, Any]:
        """Also every group's first frame, bytes, and whether decoding may begin there."""
        groups = [{"first": one.first, "bytes": one.size, "key": one.key} for one in read_index(parse(data))]
        return super().inspect(data) | {"groups": groups}


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches; the last ones may stand over the edge."""
    return -(-height // patch), -(-width // patch)


def centres(rows: int, columns: int) -> Float[Tensor, "n 2"]:
    """(x, y) of every patch's centre, the frame's patches being [-1, 1] wide and high."""
    y, x = ((2 * torch.arange(count) + 1) / count - 1 for count in (rows, columns))
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], 1)


def read_index(container: Container) -> list[Group]:
    """Where each group lies; checked as untrusted input."""
    count, index = container.header.config.get("groups"), container.section("index")
    whole(count, 1, container.header.frames, "groups", "the file")
    numbers, end = unpack_numbers(index, 2 * count)
    sizes, frames = [number // 2 for number in numbers[0::2]], numbers[1::2]
    keys = [bool(number % 2) for number in numbers[0::2]]
    fits = (
        end == len(index) and sum(sizes) == len(container.section("groups")) and sum(frames) == container.header.frames
    )
    most = container.header.config.get("group")
    if not (fits and keys[0] and all(type(most) is int and 1 <= one <= most for one in frames)):
        raise InputError("section 'index' is damaged")
    return list(map(Group, accumulate(sizes, initial=0), sizes, keys, accumulate(frames, initial=0), frames))


def check_settings(**values: float | int | None) -> None:
    """InputError for the first of the settings that cannot be meant."""
    # `minutes` and `psnr` have flags of their own.
    least = {"key": 0, "iterations": 1, "later": 0, "rate_weight": 0}
    for name, value in values.items():
        flag = f"--{name} {value}" if name in ("minutes", "psnr") else f"--set {name}={value}"
        if value is None:
            continue
        if not math.isfinite(value):
            raise InputError(f"{flag}: a finite number is needed")
        if name in least and value < least[name]:
            raise InputError(f"{flag}: it is {least[name]} or more")
        if name not in least and value <= 0:
            raise InputError(f"{flag}: it is above 0")
