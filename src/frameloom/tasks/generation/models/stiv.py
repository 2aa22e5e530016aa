"""STIV: one transformer that makes video from text, from a first picture and text, or from any frames that are given.

For whom has a sentence, a picture, or a few frames, and wants the rest. A flow-matching diffusion transformer with
factorised attention: spatial within a frame, temporal across frames, then to the text. Whatever frames are known are
put in place of their noisy selves before the blocks (frame replacement), and only the others are learned:

    x_t = (1 - t) x0 + t eps,   u = eps - x0,   loss = mean over frames not given of (u_theta - u)^2

The paper counts time from noise to data; here, as everywhere in the toolkit, 0 is the data. Guidance takes text and
picture away together (see `frameloom.diffusion.guide.Joint`). The tiny size predicts the data instead of the velocity
and weights its error by 1 / max(t, 0.3)^2, which is the same loss but for the smallest t.

Z. Lin, W. Liu, C. Chen, J. Lu, W. Hu, T.-J. Fu, J. Allardice, Z. Lai, L. Song, B. Zhang, C. Chen, Y. Fei, Y. Jiang,
L. Li, Y. Sun, K.-W. Chang, Y. Yang, "STIV: Scalable Text and Image Conditioned Video Generation", ICCV 2025,
arXiv 2412.07730.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.generator import Defaults
from frameloom.diffusion.guide import Guide, Joint
from frameloom.diffusion.objective import LogitNormal, masked_mean
from frameloom.diffusion.paths import Flow, spread
from frameloom.diffusion.step import DPMpp2M, Grids
from frameloom.errors import InputError
from frameloom.language.words import PAD, WordEncoder, Words
from frameloom.layers.attention import Attention, rotary, sinusoid
from frameloom.layers.patches import PatchPCA
from frameloom.scale.moe import MoE, auxiliary
from frameloom.scale.partition import Part
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized
from frameloom.world import VOCABULARY

log = logging.getLogger("frameloom")

WORDS = Words(VOCABULARY)


@dataclass(frozen=True)
class Config:
    """Sizes of a STIV model.

    `channels` and `patch` are those of the latents; `codec` the patch size of the frozen pixel codec (0: latents
    come from outside). `words` is the size of the vocabulary of a text encoder that is learned along (0: text vectors
    `text_width` wide come from outside). `restore` blocks at the end see all tokens after `mask_ratio` of the spatial
    tokens were left out of the blocks before, in training. `micro` numbers describe a clip: height, width, crop top,
    crop left, frames between two frames (stride), frames. `distilled` is the number of steps that a student of a
    distillation was made for, with the guidance baked in. `numbered` adds a learned vector for every frame to its
    tokens: rotary positions say how far apart two frames are, and a small model does not find out from them alone
    which end of the clip it is at, so that things move along the right line in either direction.

    With `experts` the feed-forward network of every other block becomes a mixture of so many (`frameloom.scale.moe`),
    of which a token meets `top_k`; `capacity` is the factor of places in training (sampling drops no token), and the
    auxiliary loss that spreads the load is weighed by `balance`.
    """

    width: int
    depth: int
    heads: int
    channels: int
    patch: int = 1
    frames: int = 16
    side: int = 4
    text_width: int = 160
    words: int = 0
    codec: int = 0
    prediction: str = "velocity"
    mask_ratio: float = 0.0
    restore: int = 2
    micro: int = 6
    numbered: bool = False
    drop_text: float = 0.1
    drop_image: float = 0.08
    distilled: int = 0
    experts: int = 0
    top_k: int = 1
    capacity: float = 1.25
    balance: float = 0.01


TINY = Config(width=192, depth=6, heads=6, channels=128, frames=16, side=2, text_width=128, words=len(WORDS), codec=16,
              prediction="data", numbered=True)  # fmt: skip
# The 8.7 billion of the paper: 46 blocks, 3072 wide, on the latents of a separate autoencoder.
PAPER = Config(width=3072, depth=46, heads=48, channels=8, patch=2, frames=20, side=64, text_width=1280,
               mask_ratio=0.5)  # fmt: skip
PRESETS = {"tiny": TINY, "paper": PAPER}
RECIPES = {
    "tiny": Recipe(steps=8000, batch_size=24, lr=2e-3, muon=0.02, warmup=200, hold=0.5, ema=0.998, bf16=True,
                   weight_decay=0.0),
    # The paper's; AdaFactor's place is taken by AdamW.
    "paper": Recipe(steps=400_000, batch_size=1024, lr=2e-4, final_lr=2e-4, warmup=1000, ema=0.9999, bf16=True),
}  # fmt: skip


def _norm(x: Tensor) -> Tensor:
    """Layer normalisation without learned gain or offset."""
    return F.layer_norm(x, x.shape[-1:])


def _places(keep: Int[Tensor, "b t k"], tokens: Float[Tensor, "b t s d"]) -> Int[Tensor, "b t k d"]:
    """The numbers of kept tokens, as an index for `gather` and `scatter`."""
    return keep[..., None].expand(-1, -1, -1, tokens.shape[-1])


class Block(nn.Module):
    """Sandwich-normed spatial attention, temporal attention, attention to the text, and a feed-forward network.

    x + gate * norm(f(scale * norm(x) + shift)): the spatial attention and the feed-forward network take scale, shift
    and gate from the one modulation of the whole model plus an offset of the block's own.
    """

    def __init__(self, width: int, heads: int, mixture: MoE | None = None) -> None:
        super().__init__()
        self.spatial, self.temporal = Attention(width, heads), Attention(width, heads)
        self.text = Attention(width, heads)
        self.mixture = mixture
        if mixture is None:
            self.forward1, self.forward2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.offset = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "b t s d"],
        modulation: Float[Tensor, "b 6 d"],
        text: Float[Tensor, "b n d"],
        known: Bool[Tensor, "b n"] | None,
        space: tuple[Tensor, Tensor],
        time: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "b t s d"]:
        _, t, s, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.offset)[:, :, None, None].unbind(1)
        y = rearrange(_norm(x) * (1 + scale1) + shift1, "b t s d -> (b t) s d")
        x = x + gate1 * _norm(rearrange(self.spatial(y, positions=space), "(b t) s d -> b t s d", t=t))
        y = rearrange(_norm(x), "b t s d -> (b s) t d")
        x = x + _norm(rearrange(self.temporal(y, positions=time), "(b s) t d -> b t s d", s=s))
        y = rearrange(_norm(x), "b t s d -> b (t s) d")
        mask = None if known is None else known[:, None, None]
        x = x + _norm(self.text(y, text, mask=mask)).view_as(x)
        y = _norm(x) * (1 + scale2) + shift2
        return x + gate2 * _norm(self._forward(y))

    def _forward(self, y: Float[Tensor, "b t s d"]) -> Float[Tensor, "b t s d"]:
        if self.mixture is None:
            return self.forward2(F.gelu(self.forward1(y), approximate="tanh"))
        # Who else is in the batch may cost a token its expert while learning, but never change a sample.
        return self.mixture(y, capacity=None if self.training else 0.0)


class Singleton(nn.Module):
    """Time, the sentence as a whole and the micro-conditions: each embedded, normalised and summed."""

    def __init__(self, width: int, text_width: int, micro: int) -> None:
        super().__init__()

        def mlp(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

        self.time, self.sentence = mlp(256), mlp(text_width)
        self.micro = nn.ModuleList(mlp(256) for _ in range(micro))

    def forward(self, t: Tensor, sentence: Tensor, micro: Tensor) -> Float[Tensor, "b d"]:
        kind = self.time[0].weight.dtype
        parts = [self.time(sinusoid(1000 * t, 256).to(kind)), self.sentence(sentence)]
        parts += [mlp(sinusoid(value, 256).to(kind)) for mlp, value in zip(self.micro, micro.unbind(1), strict=True)]
        return sum(_norm(part) for part in parts)


class STIV(Sized, nn.Module):
    """Text, picture or frames to video, through latents `(b, t, c, h, w)`."""

    id, presets, recipes = "stiv", PRESETS, RECIPES
    path = Flow()

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.codec:
            self.codec = PatchPCA(config.codec, config.channels)
        if config.words:
            self.encoder = WordEncoder(config.words, config.text_width)
        self.singleton = Singleton(width, config.text_width, config.micro)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text_in = nn.Linear(config.text_width, width)
        self.patch_in = nn.Linear(config.channels * config.patch**2, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        if config.numbered:
            self.numbers = nn.Parameter(sinusoid(torch.arange(config.frames), width, period=100.0))
        self.blocks = nn.ModuleList(Block(width, config.heads, self._mixture(number)) for number in range(config.depth))
        self.final = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.channels * config.patch**2)
        for layer in (self.final, self.patch_out, self.modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _mixture(self, number: int) -> MoE | None:
        c = self.config
        if not c.experts or number % 2 == 0:
            return None
        return MoE(c.width, 4 * c.width, c.experts, top_k=c.top_k, capacity=c.capacity,
                   activation=partial(F.gelu, approximate="tanh"))  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "b t c h w"],
        t: Float[Tensor, "b"],
        text: Float[Tensor, "b n e"],
        known: Bool[Tensor, "b n"],
        stride: Float[Tensor, "b"] | None = None,
        keep: Int[Tensor, "b t k"] | None = None,
    ) -> Float[Tensor, "b t c h w"]:
        """The network's raw output (see `Config.prediction`) for noisy latents.

        Args:
            t: times in [0, 1], 1 is noise.
            text, known: a vector for every word, and which of them are words; the last one stands for the sentence.
            stride: frames of the world between two frames of the clip, 1 when None.
            keep: numbers of the spatial tokens that the main blocks see, for training on a part of them.
        """
        size = x.shape[-2] // self.config.patch, x.shape[-1] // self.config.patch
        carry = self._enter(x, t=t, vectors=text, known=known, stride=stride, keep=keep)
        for number in range(self.config.depth):
            carry = self._block(number, size, *carry, known=known, keep=keep)
        return self._leave(size, carry[0], carry[3])

    # The network as a row of steps, so that it can be cut anywhere between them (see `pipeline_blocks`). What goes from
    # one to the next is (tokens, modulation, text, whole); `given` is what everyone has.

    def _enter(self, x: Tensor, *, t: Tensor, known: Tensor, vectors: Tensor | None = None,
               stride: Tensor | None = None, keep: Tensor | None = None,
               **given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        c = self.config
        b, frames, _, height, width = x.shape
        text = self.encoder(given["ids"])[0] if vectors is None else vectors
        tokens = self.patch_in(rearrange(x, "b t c (h p) (w q) -> b t (h w) (c p q)", p=c.patch, q=c.patch))
        micro = torch.tensor([height, width, 0, 0, 1, frames], dtype=torch.float32, device=x.device)
        micro = micro[: c.micro].repeat(b, 1)
        if stride is not None:
            micro[:, 4] = stride
        last = known.long().cumsum(1).argmax(1)
        sentence = text[torch.arange(b, device=x.device), last]
        whole = self.singleton(t, sentence, micro).to(tokens.dtype)
        modulation = rearrange(self.modulation(whole), "b (k d) -> b k d", k=6)
        if c.numbered:
            tokens = tokens + self._numbers(frames)[:, None].to(tokens.dtype)
        if keep is not None:
            tokens = tokens.gather(2, _places(keep, tokens))
        return tokens, modulation, self.text_in(text), whole

    def _block(self, number: int, size: tuple[int, int], tokens: Tensor, modulation: Tensor, text: Tensor,
               whole: Tensor, *, known: Tensor, keep: Tensor | None = None,
               **_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        c = self.config
        if keep is not None and number == c.depth - c.restore:
            b, frames, _, width = tokens.shape
            blank = self.mask_token.to(tokens.dtype).expand(b, frames, size[0] * size[1], width)
            tokens = blank.scatter(2, _places(keep, tokens), tokens)
        space, time = self._positions(*size, tokens.shape[1], tokens.device)
        if tokens.shape[2] != size[0] * size[1]:
            # All frames of a clip keep the same places, so that time still runs through each of them.
            space = tuple(part[keep[0, 0]] for part in space)
        return self.blocks[number](tokens, modulation, text, known, space, time), modulation, text, whole

    def _leave(self, size: tuple[int, int], tokens: Tensor, whole: Tensor) -> Float[Tensor, "b t c h w"]:
        shift, scale = self.final(F.silu(whole))[:, None, None].chunk(2, -1)
        out = self.patch_out(_norm(tokens) * (1 + scale) + shift)
        p = self.config.patch
        return rearrange(out, "b t (h w) (c p q) -> b t c (h p) (w q)", h=size[0], p=p, q=p)

    def _numbers(self, frames: int) -> Float[Tensor, "t d"]:
        """The vectors of the frames; of a longer clip drawn together, of a shorter one the first."""
        if frames <= self.config.frames:
            return self.numbers[:frames]
        return F.interpolate(self.numbers.T[None], size=frames, mode="linear", align_corners=True)[0].T

    def _positions(self, rows: int, columns: int, frames: int, device) -> tuple:
        """Rotary tables of space and time; beyond the trained size positions are drawn together, not continued."""
        c = self.config
        head = c.width // c.heads
        shrink = [min(1.0, limit / size) for limit, size in
                  ((c.side / c.patch, rows), (c.side / c.patch, columns), (c.frames, frames))]  # fmt: skip
        axes = [torch.arange(float(size), device=device) * factor for size, factor in
                zip((rows, columns, frames), shrink, strict=True)]  # fmt: skip
        grid = torch.cartesian_prod(axes[0], axes[1])
        return rotary(grid, head), rotary(axes[2][:, None], head)

    # --- as a generator: see frameloom.diffusion.generator -----------------------------------------------------------

    name = "stiv"
    fps = 8.0
    needs_image = False
    step = DPMpp2M()
    knows = "one or two of small large red orange yellow green blue purple ball box capsule that rolls slides left " \
            "right, rises, sinks or stands still, behind or in front of the other"  # fmt: skip

    @property
    def defaults(self) -> Defaults:
        distilled = self.config.distilled
        return Defaults(steps=distilled, guidance=1.0) if distilled else Defaults(steps=24, guidance=4.0)

    @property
    def words(self) -> Words | None:
        return WORDS if self.config.words else None

    @property
    def height(self) -> int:
        return self.config.side * max(self.config.codec, 1)

    width = height

    @property
    def denoiser(self) -> Plain:
        c = self.config
        return Plain(self._network, self.path, c.prediction, Latent(c.channels, c.frames, c.side, c.side))

    def _network(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if x.shape[1] > self.config.frames:
            log.info("%d frames where %d were trained: positions are drawn together by %.3g", x.shape[1],
                     self.config.frames, x.shape[1] / self.config.frames)  # fmt: skip
        return self(x, t.float(), cond["text"], cond["text_mask"])

    def text(self, prompts: Sequence[str]) -> Cond:
        device = self.patch_in.weight.device
        with torch.no_grad():
            text, known = self.encoder(WORDS.encode(prompts).to(device))
            empty, none = self.encoder(WORDS.encode([""]).to(device))
        return Cond({"text": text, "text_mask": known}, {"text": empty, "text_mask": none})

    def image(self, picture: Float[Tensor, "b 3 h w"], cond: Cond) -> Cond:
        raise InputError("this model takes pictures as given frames, not as a condition")

    def encode(self, video: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t c h2 w2"]:
        return self.codec.encode(video.to(self.codec.mean.device))

    def decode(self, latents: Float[Tensor, "b t c h2 w2"]) -> Float[Tensor, "b t 3 h w"]:
        return self.codec.decode(latents)

    def guided(self, w: float) -> Guide:
        if self.config.distilled:
            log.warning("this student has its teacher's guidance in its weights; more of it exaggerates")
        return Joint(w)

    def grid(self, steps: int) -> Tensor:
        return Grids.linear(self.path, steps)

    def start(self, noise: Tensor, steps: int) -> Tensor:
        return noise

    def latent_frames(self, frames: int) -> int:
        return frames

    def student(self, steps: int, exact: bool = False) -> "STIV":
        """A copy for so many steps (see `frameloom.tasks.distillation`): the model moves on the flow as it is."""
        made = STIV(replace(self.config, distilled=steps)).to(self.patch_in.weight.device)
        made.load_state_dict(self.state_dict())
        return made

    # --- training --------------------------------------------------------------------------------------------------

    @classmethod
    def dataset(cls, source: str, size: str, seed: int):
        from frameloom.tasks.generation.data import captioned

        config = cls.preset(size)
        # The paper's order: pictures, then clips from words, then clips of which some frames are given.
        return captioned(
            source, config.frames, config.side * max(config.codec, 1), seed, WORDS, pictures=0.15, clips=0.5
        )

    def prepare(self, batches) -> None:
        """Fit the pixel codec to the data, before the first step."""
        if self.config.codec:
            self.codec.fit(batches.sample())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Flow matching on the frames that are not given.

        `batch` holds `video` `(b, t, 3, h, w)` (or `latents`), `ids` (or `text` and `known`), and `given` `(b, t)`,
        the frames that stand clean in the input.
        """
        carry, given = self.pipeline_batch(batch)
        for block in self.pipeline_blocks():
            carry = block(*carry, **given)
        return carry[0]

    # --- across devices: see frameloom.scale.partition and frameloom.scale.megatron -----------------------------------

    def pipeline_batch(self, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        c = self.config
        x0 = self.codec.encode(batch["video"]) if c.codec else batch["latents"]
        clean = batch["given"] & (torch.rand(len(x0), 1, device=x0.device) >= c.drop_image)
        if c.words:
            dropped = torch.rand(len(x0), 1, device=x0.device) < c.drop_text
            ids = torch.where(dropped, WORDS.encode([""]).to(x0.device), batch["ids"])
            given = {"ids": ids, "known": ids != PAD}
        else:
            given = {"vectors": batch["text"], "known": batch["known"]}
        # Mostly noisy: there it is decided what the clip shows and which way things go.
        t = LogitNormal(1.0, 1.2)(len(x0), x0.device)
        eps = torch.randn_like(x0)
        x = torch.where(spread(clean, x0).bool(), x0, self.path.add_noise(x0, t, eps))
        given |= {"t": t, "clean": clean, "aim": x0 if c.prediction == "data" else eps - x0}
        if "stride" in batch:
            given["stride"] = batch["stride"]
        if (keep := self._keep(x0)) is not None:
            given["keep"] = keep
        return (x,), given

    def pipeline_example(self, count: int) -> dict[str, Tensor]:
        c = self.config
        side = c.side * max(c.codec, 1)
        picture = torch.empty(count, c.frames, 3 if c.codec else c.channels, side, side)
        batch = {"given": torch.zeros(count, c.frames, dtype=torch.bool)}
        batch["video" if c.codec else "latents"] = picture
        if c.words:
            return batch | {"ids": torch.zeros(count, WORDS.length, dtype=torch.long)}
        return batch | {"text": torch.empty(count, 256, c.text_width), "known": torch.ones(count, 256).bool()}

    def pipeline_blocks(self) -> list[nn.Module]:
        c = self.config
        size = (c.side // c.patch,) * 2
        first = [self.singleton, self.modulation, self.text_in, self.patch_in]
        first += [self.encoder] if c.words else []
        parts = [Part(self._enter, first, [self.numbers] if c.numbered else [])]
        for number, block in enumerate(self.blocks):
            extra = [self.mask_token] if c.mask_ratio and number == c.depth - c.restore else []
            parts.append(Part(partial(self._block, number, size), [block], extra))
        return parts + [Part(partial(self._error, size), [self.final, self.patch_out])]

    def _error(self, size: tuple[int, int], tokens: Tensor, modulation: Tensor, text: Tensor, whole: Tensor, *,
               t: Tensor, clean: Tensor, aim: Tensor, **_: Tensor) -> tuple[Tensor]:  # fmt: skip
        error = (self._leave(size, tokens, whole).float() - aim).square()
        if self.config.prediction == "data":
            error = error / spread(t.clamp(min=0.3) ** 2, aim)
        loss = masked_mean(error, ~clean)
        if self.config.experts:
            loss = loss + self.config.balance * auxiliary(self)
        return (loss[None],)

    def tensor_plan(self) -> dict[str, str]:
        """Which matrices a group of ranks splits, by rows of their output (`column`) or of their input (`row`)."""
        plan = {}
        for number in range(self.config.depth):
            for name in ("spatial", "temporal", "text"):
                plan[f"blocks.{number}.{name}"] = "entry"
                plan |= {f"blocks.{number}.{name}.to_{part}": "column" for part in "qkv"}
                plan[f"blocks.{number}.{name}.out"] = "row"
                # Gains within a head: every rank uses them on its own heads alone.
                plan |= {f"blocks.{number}.{name}.norm_{part}": "shared" for part in "qk"}
            if self.blocks[number].mixture is None:
                plan |= {f"blocks.{number}.forward1": "column", f"blocks.{number}.forward2": "row"}
        return plan

    def _keep(self, x: Tensor) -> Tensor | None:
        """Random spatial tokens for the main blocks, the same in every frame; None when all are kept."""
        c = self.config
        if not c.mask_ratio or not self.training:
            return None
        count = x.shape[-1] * x.shape[-2] // c.patch**2
        chosen = torch.randperm(count, device=x.device)[: round(count * (1 - c.mask_ratio))].sort().values
        return repeat(chosen, "k -> b t k", b=x.shape[0], t=x.shape[1])
