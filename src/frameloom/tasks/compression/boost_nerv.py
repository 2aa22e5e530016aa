"""Boosted NeRV: the decoders of HNeRV and NeRV conditioned on the time, and a file fitted with its rate in mind.

For whoever wants more dB from the same number of parameters, or the same dB from half the bits.

1. Every block is followed by a residual block whose features the time modulates: A(x) = x (1 + s(t)) + b(t).
2. Activations are sines, kernels at most 3, and the later stages have two blocks each (see `nerv.Config`).
3. The loss sees structure and spectrum:  60 (0.7 L1 + 0.3 (1 - MS-SSIM)) + mean |FFT(out) - FFT(target)|.
4. Adan descends it.
5. Then the rate counts, with the very quantiser and the very Gaussian that code the file:
       w_hat = s round(w / s),   R = -sum log2( F(w / s + u + 1/2) - F(w / s + u - 1/2) ),   loss + lambda R,
   where s is learned for every tensor and R is in the loss only while it exceeds the file's size.

X. Zhang, R. Yang, D. He, X. Ge, T. Xu, Y. Wang, H. Qin, J. Zhang, Boosting Neural Representations for Videos with a
Conditional Decoder, CVPR 2024, arXiv 2402.18152. X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, Adan, TPAMI 2024.
"""

import math
import struct
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from frameloom.bitstream.container import Container
from frameloom.bitstream.entropy import gaussian_bits, gaussian_table, noisy, rounded
from frameloom.bitstream.quantise import LEVELS
from frameloom.bitstream.rangecoder import Decoder, Encoder
from frameloom.errors import InputError
from frameloom.metrics.image import ms_ssim
from frameloom.progress import Progress
from frameloom.tasks.compression.fit import Loss, Shuffled, State, descend, falling
from frameloom.tasks.compression.fitted import FEW, Fitted
from frameloom.tasks.compression.nerv import Config, Learner

FULL = 720 * 1280  # pixels of the frames for which the weights of the loss were published
RATE_LEARNING = 5e-4
REACH = 5.0  # how far, in its logarithm, a scale can move in the rate stage: 4 bits are 2.8
FASTEST = 0.1  # and in one step of it, however few there are
RATE_WEIGHT = 0.05
BITS = 4.0  # of a parameter, unless a size says otherwise
SLACK = 0.97  # of the size, which the rate stage aims at: noise is not quite rounding
LEAST_SPREAD = 0.1  # of a Gaussian, in codes
MAX_CODE = 2000
LEAST_SCALE = 1e-6  # where float16 still keeps it to some digits
_FLOOR = 1e-5
_SCALE, _RUN = struct.Struct("<e"), struct.Struct("<eehh")


def boosted_loss(out: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Pixels, structure and spectrum. A plain Fourier transform grows with the root of the pixels, so the others do."""
    spectrum = torch.view_as_real(torch.fft.fft2(out) - torch.fft.fft2(target)).abs().mean()
    pixels = 0.7 * F.l1_loss(out, target) + 0.3 * (1 - ms_ssim(out, target))
    return 60 * math.sqrt(out.shape[-2] * out.shape[-1] / FULL) * pixels + spectrum


class Adan(torch.optim.Optimizer):
    """Nesterov momentum from the difference of successive gradients; betas as in the paper's own notation."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float, float] = (0.98, 0.92, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            first, second, third = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, slots = weight.grad, self.state[weight]
                if not slots:
                    slots["step"] = torch.zeros(())
                    slots |= {name: torch.zeros_like(weight) for name in ("mean", "change", "square")}
                    slots["last"] = gradient.clone()
                slots["step"] += 1
                count = int(slots["step"])
                change = gradient - slots["last"]
                slots["last"].copy_(gradient)
                slots["mean"].lerp_(gradient, 1 - first)
                slots["change"].lerp_(change, 1 - second)
                ahead = gradient + second * change
                slots["square"].mul_(third).addcmul_(ahead, ahead, value=1 - third)
                spread = (slots["square"] / (1 - third**count)).sqrt_().add_(group["eps"])
                move = slots["mean"] / (1 - first**count) + second * slots["change"] / (1 - second**count)
                weight.addcdiv_(move, spread, value=-group["lr"])


class Rated(nn.Module):
    """A learner whose weights and embeddings are what the file will hold, and what they cost.

    Each tensor has a learned scale s: its codes are round(w / s), and s times those are what is used. Embeddings have
    an offset too. Scales begin at 1 / 255 of their tensor's range, so the stage begins at 8 bits.
    """

    def __init__(self, learner: Learner, pictures: UInt8[Tensor, "t 3 h w"]) -> None:
        super().__init__()
        self.learner = learner
        learner.freeze(pictures)
        state = learner.network.state_dict()
        self.names = list(state)
        spans = torch.stack([_span(value) for value in state.values()])
        # Their logarithms, so that scales stay above zero and move in proportion to themselves.
        self.logarithms = nn.Parameter((spans / 255).log())
        self.offset = nn.Parameter(state["embeddings"].mean() if "embeddings" in state else torch.zeros(()))

    def scale(self, name: str) -> Float[Tensor, ""]:
        """The scale of a tensor, as float16 keeps it."""
        scale = self.logarithms[self.names.index(name)].exp()
        return scale + (scale.half().float() - scale).detach()

    def forward(
        self, index: Int[Tensor, "b"], pictures: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b 3 tall wide"], Float[Tensor, ""]]:
        """Frames drawn from what the file will hold, and the bits of the whole file."""
        network = self.learner.network
        weights = {name: value for name, value in network.named_parameters() if name != "embeddings"}
        codes = {name: value / self.scale(name) for name, value in weights.items()}
        bits = sum(_bits(code) for code in codes.values())
        used = {name: rounded(code) * self.scale(name) for name, code in codes.items()}
        shown = None
        if self.learner.encoder is not None:
            scale = self.scale("embeddings")
            code = (self.learner.encoded(pictures) - self.offset) / scale
            bits = bits + torch.stack([_bits(one) for one in code]).mean() * network.config.frames
            shown = rounded(code) * scale + self.offset
        return functional_call(network, used, (index, shown)), bits


class BoostNeRV(Fitted):
    """A boosted decoder; `scales` are what the rate stage found, by tensor, and `offset` that of the embeddings."""

    method: ClassVar[str] = "boost-nerv"
    families: ClassVar[dict[str, dict[str, Any]]] = {
        "hnerv": {"kernels": (1, 3), "doubled": 2, "sine": True, "time": (64, 32)},
        "nerv": {"indexed": True, "kernels": (3, 3), "reduction": 2.0, "sine": True, "time": (64, 32)},
    }
    bytes_per_parameter: ClassVar[float] = BITS / 8
    overhead: ClassVar[int] = 2000
    batch: ClassVar[int] = 1
    learning_rate: ClassVar[float] = 3e-3
    optimiser: ClassVar[type[torch.optim.Optimizer] | None] = Adan
    loss: ClassVar[str | Loss] = staticmethod(boosted_loss)
    share: ClassVar[float] = 0.75

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scales: dict[str, float] = {}
        self.offset = 0.0

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: 32 frames of 64x128, 40 thousand parameters. `paper`: 132 of 720x1280, 1.5 million."""
        if size == "tiny":
            own = cls.families["hnerv"] | {"time": FEW}
            return Config(
                height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=15, lowest=8, embedding=8, **own
            )
        return Config(height=720, width=1280, frames=132, strides=(5, 2, 2, 2, 2), channels=86, **cls.families["hnerv"])

    @classmethod
    def finish(
        cls,
        learner: Learner,
        pictures: UInt8[Tensor, "t 3 h w"],
        *,
        target: int | None,
        epochs: int | None,
        minutes: float | None,
        batch: int,
        learning_rate: float | int | None = None,
        measure: Loss,
        seen: Float[Tensor, "t 1 h w"] | None,
        mixed: bool,
        seed: int,
        state: State | None,
        progress: Progress,
    ) -> None:
        """The rate stage: a third of the fit's epochs (or of its minutes), until the file is at most `target` bytes."""
        network = learner.network
        device = network.head.weight.device
        bits = 8 * (target - cls.overhead) if target else BITS * network.config.parameters
        rated = Rated(learner, pictures).to(device)
        batches = Shuffled(pictures, batch, seed, device)
        pixels = pictures.shape[-2] * pictures.shape[-1]

        def loss_at(step: int) -> Tensor:
            index, target_pictures = batches(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                out, cost = rated(index, target_pictures)
            out = out.float()[..., : pictures.shape[-2], : pictures.shape[-1]]
            if seen is not None:
                counts = seen[index.cpu()].to(device)
                out, target_pictures = out * counts, target_pictures * counts
            error = measure(out, target_pictures)
            return error + RATE_WEIGHT * cost / pixels if cost.item() > SLACK * bits else error

        steps = None if epochs is None else max(1, round(epochs / 3)) * batches.steps
        scales = {"params": [rated.logarithms, rated.offset], "lr": min(FASTEST, 2 * REACH / (steps or 1000))}
        rate = min(RATE_LEARNING, learning_rate or RATE_LEARNING)
        optimiser = Adan([{"params": list(learner.parameters())}, scales], rate)
        descend(rated, [optimiser], loss_at, steps=steps, minutes=minutes, schedule=falling, stage=1,
                state=state, seed=seed, progress=progress, label="fitting the rate")  # fmt: skip
        with torch.no_grad():
            network.scales = {name: rated.scale(name).item() for name in rated.names}
        network.offset = rated.offset.item()

    def pack(self, levels: int) -> dict[str, bytes]:
        """Every tensor as Gaussian-coded integers; fewer `levels` than 256 coarsen all scales by as much."""
        coder, sides = Encoder(), []
        for name, value in self.state_dict().items():
            scale, runs = self.codes(name, value, levels)
            sides.append(_SCALE.pack(scale))
            for run in runs:
                codes = run.flatten().cpu().numpy().astype(np.int64)
                mean, spread = (float(np.float16(x)) for x in (codes.mean(), max(codes.std(), LEAST_SPREAD)))
                low, high = int(codes.min()), int(codes.max())
                sides.append(_RUN.pack(mean, spread, low, high))
                coder.put(codes - low, gaussian_table(mean, spread, low, high))
        more = {} if self.config.indexed else {"offset": np.float32(self.offset).tobytes()}
        return {"weights": coder.to_bytes(), "weights_sides": b"".join(sides)} | more

    def as_stored(self, levels: int) -> dict[str, Tensor]:
        """The state that `unpack` will give back after `pack`."""
        found = {}
        for name, value in self.state_dict().items():
            scale, runs = self.codes(name, value, levels)
            found[name] = self._value(name, torch.stack(runs) if name == "embeddings" else runs[0], scale, self.offset)
        return found

    def unpack(self, container: Container) -> dict[str, Tensor]:
        """The state that `pack` stored."""
        coder, sides, start = Decoder(container.section("weights")), container.section("weights_sides"), 0

        def read(form: struct.Struct) -> tuple[Any, ...]:
            nonlocal start
            start += form.size
            if start > len(sides):
                raise InputError("section 'weights_sides' is cut short")
            return form.unpack_from(sides, start - form.size)

        offset = 0.0
        if not self.config.indexed:
            (offset,) = np.frombuffer(container.section("offset")[:4].ljust(4, b"\0"), "<f4").tolist()
        state = {}
        for name, value in self.state_dict().items():
            (scale,) = read(_SCALE)
            shape = value.shape if name != "embeddings" else value.shape[1:]
            runs = []
            for _ in range(1 if name != "embeddings" else len(value)):
                mean, spread, low, high = read(_RUN)
                sound = math.isfinite(mean) and LEAST_SPREAD / 2 < spread < math.inf and low <= high
                if not (sound and math.isfinite(scale) and max(-low, high) <= MAX_CODE):
                    raise InputError("section 'weights_sides' is damaged")
                codes = coder.get(shape.numel(), gaussian_table(mean, spread, low, high)).astype(np.int64)
                runs.append(torch.from_numpy(np.minimum(codes, high - low) + low).reshape(shape))
            state[name] = self._value(name, torch.stack(runs) if name == "embeddings" else runs[0], scale, offset)
        if start != len(sides) or not math.isfinite(offset):
            raise InputError("section 'weights_sides' is damaged")
        return state

    def codes(self, name: str, value: Tensor, levels: int) -> tuple[float, list[Tensor]]:
        """The scale of a tensor as the file keeps it, and its codes, in runs that have a Gaussian of their own.

        A scale that the fit left too fine for its tensor is made as coarse as the coder's range of codes needs, with a
        tenth to spare, which float16 may round away.
        """
        if name == "embeddings":
            value = value - np.float32(self.offset)
        scale = (self.scales.get(name) or float(_span(value)) / 255) * LEVELS / levels
        scale = float(np.float16(max(scale, float(value.abs().max()) / (0.9 * MAX_CODE), LEAST_SCALE)))
        codes = (value / scale).round()
        return scale, list(codes) if name == "embeddings" else [codes]

    @staticmethod
    def _value(name: str, codes: Tensor, scale: float, offset: float) -> Tensor:
        value = codes.float() * scale
        return value + np.float32(offset) if name == "embeddings" else value


def _span(value: Tensor) -> Float[Tensor, ""]:
    """What 255 steps shall cover: from the least number to the greatest, zero among them."""
    return (value.max().clamp(min=0) - value.min().clamp(max=0)).clamp(min=1e-3)


def _bits(codes: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """What codes cost under the Gaussian of their own mean and deviation, with noise in place of rounding."""
    spread = codes.std(correction=0).clamp(min=LEAST_SPREAD)
    return gaussian_bits(noisy(codes), codes.mean(), spread, _FLOOR).sum()
