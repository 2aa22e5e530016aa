"""SEM: one autoencoder for every frame, and a model of what its integers cost once the frame before is known.

For whoever wants a learned codec for any video with one set of weights and nothing that can drift: no motion search, no
warping, no residual of pictures. A frame x_t becomes integers, which are coded without loss:

    y_t = round(g_a(x_t)),    frame = g_s(y_t),    bits = -log2 P(y_t - y_{t-1} | z_t, y_{t-1}, what came before in y_t)

P is a Gaussian for each integer, its mean and scale found by four parts: a hyper latent z_t = round(h_a(y_t, y_{t-1}))
that is sent first, a spatial prior (a masked convolution over what was coded already), a temporal prior (a network of
y_{t-1}), and a join of the three. So how good a frame looks hangs on that frame alone; the models only move its price.
The first frame of a group has a model without the frame before it. Gains for every channel turn one set of weights into
a range of rates.

Z. Sun, Z. Tan, X. Sun, F. Zhang, D. Li, Y. Qian, H. Li, Spatiotemporal Entropy Model is All You Need for Learned Video
Compression, arXiv 2104.06083, 2021.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.bitstream.container import Container, parse, whole
from frameloom.bitstream.entropy import rounded
from frameloom.bitstream.rangecoder import Decoder, Encoder
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError, Interrupted
from frameloom.metrics import psnr as measure_psnr
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import SectionedCodec, describe, pack_times
from frameloom.tasks.compression.fit import KEEP_EVERY, State, stopped
from frameloom.tasks.compression.pairs import Pairs, Recorded, pairs
from frameloom.tasks.compression.sem_coder import LatentCoder, checksum, tables_digest
from frameloom.tasks.compression.sem_network import HYPER_STRIDE, Autoencoder, EntropyModel
from frameloom.tasks.compression.sem_official import published
from frameloom.training.pretrained import digest, load
from frameloom.training.published import fill
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized
from frameloom.video.clip import Clip

GOP, MAX_GOP = 12, 1 << 10
DEFAULT_RATE = 4.0
# A search for a size ends within this share below it, or after so many encodes.
CLOSE_ENOUGH, ENCODES = 0.97, 8
RATE_STEPS = 32  # of a point of rate, to which a quality is found


@dataclass(frozen=True, kw_only=True)
class Config:
    """The networks. `widths`: channels after each halving of the picture, the latent's last. `hidden`: of a hyper
    latent. `weights`: what the squared error weighs against bits a pixel, for each point of rate. `difference`: the
    latent's change is priced; otherwise the latent itself, its spatial prior seeing it as it is. `learned`: the share
    of a training run after which the autoencoder and the model of first frames stand still and the other model begins.
    `official`: the layers and the Laplace densities of the authors' code; otherwise our own, with Gaussians.
    """

    widths: tuple[int, ...]
    hidden: int
    weights: tuple[float, ...]
    difference: bool = True
    learned: float = 0.55
    official: bool = False


PRESETS = {
    "tiny": Config(widths=(48, 64, 48), hidden=48, weights=(60.0, 150.0, 400.0, 1000.0, 2500.0, 6000.0)),
    "paper": Config(widths=(256, 256, 256, 320), hidden=256, learned=24 / 43, official=True,
                    weights=(50.0, 160.0, 300.0, 480.0, 710.0, 1000.0, 1350.0, 1780.0, 2302.0, 2915.0)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stages(Recipe):
    """A schedule that runs twice: to the share `learned` of the run, and again from there to the end."""

    learned: float = 0.55

    def lr_at(self, step: int) -> float:
        switch = round(self.learned * self.steps)
        begin, end = (0, switch) if step < switch else (switch, self.steps)
        own = {name: getattr(self, name) for name in ("batch_size", "lr", "final_lr", "warmup", "hold")}
        return Recipe(steps=end - begin, **own).lr_at(step - begin)


RECIPES = {
    "tiny": Stages(steps=10_000, batch_size=16, lr=1e-3, final_lr=2e-5, weight_decay=0.0, bf16=True),
    # Published: the last fall of the rate at 2.4 million steps of the first stage and at 1.9 million of the second.
    "paper": Stages(steps=4_300_000, batch_size=16, lr=1e-4, final_lr=1e-6, weight_decay=0.0, clip_norm=5.0,
                    learned=24 / 43),
}  # fmt: skip
CROPS = {"tiny": 64, "paper": 256}


class SEM(Sized, SectionedCodec, nn.Module):
    """An autoencoder, and the models of its integers: `intra` for first frames, `inter` for the others."""

    id = method = "sem"
    presets, recipes = PRESETS, RECIPES

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.pictures = Autoencoder(config.widths, config.weights, config.official)
        self.intra = EntropyModel(config.widths[-1], config.hidden, temporal=False, official=config.official)
        self.inter = EntropyModel(config.widths[-1], config.hidden, temporal=True, official=config.official)

    @classmethod
    def load_official(cls, path: str | Path) -> "SEM":
        """The networks of a published checkpoint: `P_model/STPM_PSNR/model-NUMBER.index` with its data beside it.

        The authors train the model of first frames apart. Where the file lacks it, it is taken from the folder that
        their download puts it into, `I_model/CM_PSNR` (`CM_SSIM`) beside `P_model`. The filter after the decoder is
        left away.

        Raises InputError for a file that is not such a checkpoint, naming what does not fit.
        """
        state = published(path)
        try:
            layers = [state[f"pictures.down.{k}.conv.weight"] for k in range(4)]
            config = replace(PRESETS["paper"], widths=tuple(len(layer) for layer in layers),
                             hidden=len(state["intra.prior.mean"]))  # fmt: skip
        except KeyError as error:
            raise InputError(f"{path}: not a checkpoint of {cls.method}: it has no {error}") from None
        return fill(lambda: cls(config), cls.method, path, state)

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Pairs | Recorded:
        """What a size learns from; `source` is `world` or a folder of clips."""
        cls.preset(size)
        return pairs(source, CROPS[size], seed)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Stage 1: bits a pixel of a frame alone + weight * squared error. Stage 2: bits a pixel of a second frame.

        Every example has its own point of rate; all points count alike. Half of the examples do without the spatial
        prior, and in stage 2 a quarter without the temporal one, so that one model serves with and without them.
        """
        first, second = batch["pair"].unbind(1)
        count = len(second)
        weights = torch.tensor(self.config.weights, device=second.device)
        point = torch.randint(len(weights), (count,), device=second.device)
        use_spatial, use_before = (torch.rand(count, device=second.device) < share for share in (0.5, 0.75))
        weight = weights[point]
        even = (weights[0] / weight).sqrt()
        if float(batch["progress"].flatten()[0]) < self.config.learned:
            latent = rounded(self.pictures.analyse(second, point.float()))
            made = self.pictures.synthesise(latent, point.float())
            error = (made - second).square().mean((1, 2, 3))
            bits = self.bits(latent, None, use_spatial=use_spatial)
            return (even * (weight * error + bits / second[0, 0].numel())).mean()
        with torch.no_grad():
            latents = self.pictures.analyse(torch.cat([first, second]), point.float().repeat(2)).round()
        before, latent = latents.chunk(2)
        bits = self.bits(latent, before, use_spatial=use_spatial, use_before=use_before)
        return (even * bits / second[0, 0].numel()).mean()

    def bits(
        self, latent: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"] | None, **priors: Tensor | bool
    ) -> Float[Tensor, "b"]:
        """What latents are estimated to cost; `priors` are those of `EntropyModel.bits`."""
        model = self.intra if before is None else self.inter
        # A density's tail is lost in half precision.
        with torch.autocast(latent.device.type, enabled=False):
            before = before if before is None else before.float()
            return model.bits(latent.float(), before, self.config.difference, **priors)

    @torch.inference_mode()
    def integers(self, picture: Float[Tensor, "3 h w"], rate: float) -> Float[Tensor, "1 c h2 w2"]:
        """The latent that stands for a picture at a rate counted from 1, the picture padded by its edges."""
        product = self.stride * HYPER_STRIDE
        missing = (0, -picture.shape[-1] % product, 0, -picture.shape[-2] % product)
        padded = F.pad(picture[None].to(self.device), missing, mode="replicate")
        return self.pictures.analyse(padded, self._rate(rate)).round().cpu()

    @torch.inference_mode()
    def draw(self, latent: Float[Tensor, "1 c h2 w2"], rate: float, height: int, width: int) -> Float[Tensor, "3 h w"]:
        """The picture that a latent stands for."""
        made = self.pictures.synthesise(latent.float().to(self.device), self._rate(rate))
        return made[0, :, :height, :width].clamp(0, 1).cpu()

    @property
    def stride(self) -> int:
        """Pixels a side of one position of a latent."""
        return 2 ** len(self.config.widths)

    @property
    def device(self) -> torch.device:
        return self.pictures.down[0].log_gain.device

    def _rate(self, rate: float) -> Float[Tensor, "1"]:
        return torch.tensor([rate - 1.0], device=self.device)

    @classmethod
    def encode(
        cls,
        clip: Clip,
        *,
        size: int | None = None,
        rate: float | int | None = None,
        psnr: float | None = None,
        gop: int = GOP,
        spatial: bool = True,
        temporal: bool = True,
        weights: str | Path | None = None,
        state: State | None = None,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> bytes:
        """The clip at `rate`, from 1 (small) to the number of points that the weights have; fractions lie between.

        `size`: instead, the largest file of at most so many bytes (up to 8 encodes). `psnr`: instead, the lowest rate
        whose frames have so many dB on average (found by drawing the clip some 7 times; it is coded once). A frame is
        coded without the one before it every `gop` frames, and where that is cheaper, as after a cut. `spatial` and
        `temporal` switch those priors; without the spatial one, which goes through a frame in many small steps, coding
        is about twice as fast. Holds one frame and two latents, and the file. `device` runs the autoencoder; what
        decides the integers' prices runs on the CPU, as it will where the file is read. `seed` is what every codec
        takes; there is no chance here.
        With a `state`, whole groups are kept there every 15 s or so, and what it holds of a stopped call is not made
        again.

        Raises:
            InputError: settings out of range, frames of several sizes, a `size` or `psnr` that cannot be reached.
            Interrupted: Ctrl-C; with a `state`, the groups that were whole are kept.
        """
        network = load(cls.method, weights, device=device)
        points = len(network.config.weights)
        wishes = {"--rate": rate, "--size": size, "--quality": psnr}
        if len(given := [flag for flag, wish in wishes.items() if wish is not None]) > 1:
            raise InputError(f"{' and '.join(given)}: give one of them")
        check_settings(points, rate, gop, spatial=spatial, temporal=temporal)
        kept = Kept(state, digest(network))

        def make(rate: float) -> bytes:
            return kept.once(
                f"file {rate!r}", lambda: network._file(clip, rate, gop, spatial, temporal, kept, progress)
            )

        try:
            if size is not None:
                return _largest(make, size, float(points))
            if psnr is not None:
                found = kept.once("rate", lambda: repr(network._rate_of(clip, psnr, progress)).encode())
                return make(float(found))
            return make(float(min(DEFAULT_RATE, points) if rate is None else rate))
        except KeyboardInterrupt:
            kept.write()
            raise Interrupted(stopped(state)) from None

    def _rate_of(self, clip: Clip, wanted: float, progress: Progress) -> float:
        """The lowest rate, to 1/32 of a point, whose frames have `wanted` dB on average."""

        def reached(steps: int) -> float:
            rate, found = 1 + steps / RATE_STEPS, []
            for count, frame in enumerate(clip, start=1):
                picture = frame.rgb
                drawn = self.draw(self.integers(picture, rate), rate, *picture.shape[1:])
                found.append(float(measure_psnr(drawn[None], picture[None])))
                progress(f"measuring rate {rate:g}", count, len(clip))
            return fmean(found)

        low, high = 0, RATE_STEPS * (len(self.config.weights) - 1)
        over, under = reached(high) - wanted, reached(low) - wanted
        if over < 0:
            raise InputError(f"--quality {wanted:g}dB: {self.method} reaches {wanted + over:.2f} dB on this clip at "
                             "most, with these weights; ask for less, or take --method x264")  # fmt: skip
        if under >= 0:
            return 1.0
        # False position: quality is nearly linear in the rate. An end that stays counts half (Illinois), so that
        # both close in.
        while high - low > 1:
            middle = min(max(round(low + under / (under - over) * (high - low)), low + 1), high - 1)
            if (found := reached(middle) - wanted) >= 0:
                high, over, under = middle, found, under / 2
            else:
                low, under, over = middle, found, over / 2
        return 1 + high / RATE_STEPS

    def _file(
        self, clip: Clip, rate: float, gop: int, spatial: bool, temporal: bool, kept: "Kept", progress: Progress
    ) -> bytes:
        tables = tables_digest(self.config.official)
        config = {"weights": digest(self), "tables": tables, "rate": rate, "spatial": spatial, "temporal": temporal}
        header = describe(clip, self.method, config)
        coder = LatentCoder(self.intra, self.inter, self.config.difference, spatial, temporal)
        stream, checks, groups = kept.groups(rate)
        out, before, done = Encoder(), None, sum(frames for frames, _ in groups)
        count = done

        def close() -> None:
            data = out.to_bytes()
            stream.extend(data)
            groups[-1].append(len(data))

        for count, frame in enumerate(clip.frames(done), start=done + 1):
            picture = frame.rgb
            if tuple(picture.shape[1:]) != (header.height, header.width):
                found = f"{picture.shape[2]}x{picture.shape[1]}"
                raise InputError(f"{clip.info.name}: frame {count - 1} is {found}, not {header.width}x{header.height}; "
                                 "all frames of a clip must have one size")  # fmt: skip
            latent = self.integers(picture, rate)
            if before is None or groups[-1][0] == gop or coder.stands_alone(latent, before):
                if before is not None:
                    close()
                    kept.keep(rate, stream, checks, groups)
                groups.append([0])
                out, before = Encoder(), None
            coder.put(out, latent, before)
            checks.extend(checksum(latent))
            groups[-1][0] += 1
            before = latent
            progress(f"encoding {self.method}", count, header.frames)
        if not count:
            raise InputError(f"{clip.info.name}: no frames")
        if count != header.frames:
            raise InputError(f"{clip.info.name}: announced {header.frames} frames and has {count}")
        close()
        index = pack_numbers(number for group in groups for number in group)
        sections = {"stream": bytes(stream), "index": index, "checks": bytes(checks)}
        return Container(header, sections | pack_times(clip)).to_bytes()

    @classmethod
    def decode(
        cls, data: bytes, frames: Sequence[int] | None = None, weights: str | Path | None = None
    ) -> Iterator[Float[Tensor, "3 h w"]]:
        """The frames asked for; each group is entered at its first frame, and only frames asked for are drawn.

        `weights` are those that the file was made with, the shipped ones for None.
        Raises InputError for a damaged file, for other weights, and where integers do not come out as they went in.
        """
        container = parse(data)
        network, rate = cls._network(container, weights)
        header = container.header
        for latent in network._play(container, cls.wanted(header, frames)):
            yield network.draw(latent, rate, header.height, header.width)

    @classmethod
    def latents(
        cls, data: bytes, frames: Sequence[int] | None = None, weights: str | Path | None = None
    ) -> Iterator[Float[Tensor, "1 c h2 w2"]]:
        """The integers in a file, which `integers` made of the frames asked for."""
        container = parse(data)
        network, _ = cls._network(container, weights)
        yield from network._play(container, cls.wanted(container.header, frames))

    @classmethod
    def _network(cls, container: Container, weights: str | Path | None) -> tuple["SEM", float]:
        """The networks that a file was made with, and its rate; the header is checked as untrusted input."""
        header, config = container.header, container.header.config
        if header.method != cls.method:
            raise InputError(f"the file was made by {header.method}, not by {cls.method}")
        kinds = {"weights": str, "tables": int, "rate": float, "spatial": bool, "temporal": bool}
        if set(config) != set(kinds) or any(type(config[name]) is not kind for name, kind in kinds.items()):
            raise InputError("the header is damaged; the settings are not there in full")
        network = load(cls.method, weights)
        if config["weights"] != digest(network):
            given = "the shipped ones" if weights is None else str(weights)
            raise InputError(f"the file was made with other weights ({config['weights'][:16]}) than {given} "
                             f"({digest(network)}); give --weights those that it was made with")  # fmt: skip
        if config["tables"] != tables_digest(network.config.official):
            raise InputError("the file was made where the tables of the entropy coder are others; "
                             "it decodes with the version of frameloom and of scipy that made it")  # fmt: skip
        if not 1 <= config["rate"] <= len(network.config.weights):
            raise InputError("the header is damaged; the rate is not one that the weights have")
        return network, config["rate"]

    def _play(self, container: Container, wanted: Sequence[int]) -> Iterator[Float[Tensor, "1 c h2 w2"]]:
        header = container.header
        stream, checks = container.section("stream"), container.section("checks")
        groups = _read_index(container)
        starts = [first for first, *_ in groups]
        whole(len(checks), 2 * header.frames, 2 * header.frames, "the length of section 'checks'", "the file")
        product = self.stride * HYPER_STRIDE
        rows, columns = (-(-side // product) * HYPER_STRIDE for side in (header.height, header.width))
        settings = header.config["spatial"], header.config["temporal"]
        coder = LatentCoder(self.intra, self.inter, self.config.difference, *settings)
        # The frame that comes next from `source`; none at first.
        position, end, source, latent = 0, 0, Decoder(b""), None
        for number in wanted:
            first, last, begin, size = groups[bisect_right(starts, number) - 1]
            if not (position <= number < end) or latent is None:
                position, end, source, latent = first, last, Decoder(stream[begin : begin + size]), None
            while position <= number:
                latent = coder.get(source, latent, rows, columns)
                if checksum(latent) != checks[2 * position : 2 * position + 2]:
                    raise InputError(f"frame {position} does not come out as it went in: the file is damaged, or this "
                                     "machine's arithmetic differs from that of the one that made it")  # fmt: skip
                position += 1
            yield latent


class Kept:
    """What is done of an encode, beside the file to be: whole files at some rates, whole groups of the one under way.

    It holds for one set of weights; what others left is let go.
    """

    def __init__(self, state: State | None, weights: str) -> None:
        self.state, self.written = state, time.monotonic()
        if state is not None and self._get("weights") != weights.encode():
            state.more.clear()
            self._put("weights", weights.encode())

    def once(self, name: str, make: Callable[[], bytes]) -> bytes:
        """What `make` makes, or made before the call was stopped."""
        found = self._get(name)
        if found is None:
            found = make()
            self._put(name, found)
        return found

    def groups(self, rate: float) -> tuple[bytearray, bytearray, list[list[int]]]:
        """The stream, the checksums and the numbers of frames and bytes of the groups that are whole."""
        if self._get("under way") != repr(rate).encode():
            return bytearray(), bytearray(), []
        stream, checks, numbers = (self._get(name) for name in ("stream", "checks", "index"))
        index = np.frombuffer(numbers, "<i8").reshape(-1, 2)
        return bytearray(stream), bytearray(checks), index.tolist()

    def keep(self, rate: float, stream: bytearray, checks: bytearray, groups: list[list[int]]) -> None:
        """Remember whole groups; they are written now and then."""
        index = np.array(groups, "<i8").tobytes()
        for name, data in {
            "under way": repr(rate).encode(),
            "stream": stream,
            "checks": checks,
            "index": index,
        }.items():
            self._put(name, data)
        if time.monotonic() - self.written > KEEP_EVERY:
            self.write()

    def write(self) -> None:
        if self.state is not None:
            self.state.keep(0, 0, 0.0, nn.Module(), [])
            self.written = time.monotonic()

    def _get(self, name: str) -> bytes | None:
        found = None if self.state is None else self.state.more.get(name)
        return None if found is None else found.numpy().tobytes()

    def _put(self, name: str, data: bytes | bytearray) -> None:
        if self.state is not None:
            self.state.more[name] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def check_settings(points: int, rate: Any, gop: Any, **switches: Any) -> None:
    """InputError unless these can be meant; a command line may bring values of any kind."""
    if rate is not None and not (isinstance(rate, float | int) and 1 <= rate <= points):
        raise InputError(f"--rate {rate}: these weights take 1 (fewest bytes) to {points}")
    if not (isinstance(gop, int) and 1 <= gop <= MAX_GOP):
        raise InputError(f"--gop {gop}: a group has 1 to {MAX_GOP} frames")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise InputError(f"--{name} {value}: true or false")


def _largest(make: Callable[[float], bytes], size: int, best_rate: float) -> bytes:
    """The largest file within `size`; log(bytes) is nearly linear in the rate, so secants land fast."""
    low, fits = 1.0, make(1.0)
    if len(fits) > size:
        raise InputError(f"--size {size}: sem takes at least {len(fits)} bytes for this clip with these settings")
    high, above = best_rate, make(best_rate)
    if len(above) <= size:
        return above
    for _ in range(ENCODES - 2):
        if len(fits) >= CLOSE_ENOUGH * size:
            break
        share = math.log(0.99 * size / len(fits)) / math.log(len(above) / len(fits))
        rate = low + min(max(share, 0.05), 0.95) * (high - low)
        data = make(rate)
        if len(data) <= size:
            low, fits = rate, data
        else:
            high, above = rate, data
    return fits


def _read_index(container: Container) -> list[tuple[int, int, int, int]]:
    """Of every group its first frame, the frame after its last, and where its bytes begin and how many there are."""
    header, index = container.header, container.section("index")
    length = len(container.section("stream"))
    numbers: list[int] = []
    end = 0
    while end < len(index) and len(numbers) < 2 * header.frames:
        (number,), end = unpack_numbers(index, 1, end)
        numbers.append(number)
    counts, sizes = numbers[0::2], numbers[1::2]
    sound = end == len(index) and len(counts) == len(sizes) and all(1 <= count <= MAX_GOP for count in counts)
    if not sound or sum(counts) != header.frames or sum(sizes) != length:
        raise InputError("section 'index' is damaged")
    firsts, begins = (list(accumulate(x, initial=0)) for x in (counts, sizes))
    return list(zip(firsts[:-1], firsts[1:], begins[:-1], sizes, strict=True))
