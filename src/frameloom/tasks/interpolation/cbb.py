"""CBB: the frame between two frames by a Brownian bridge between latents, for pictures that do not change by the seed.

For who wants what diffusion adds where warping fails, and the same answer tomorrow. A diffusion from pure noise draws
some frame; interpolation wants the one. Here the three latents y (frame before), x (the middle) and z (frame after)
stand on one axis of time with half a bridge on either side of x, so that sampling starts from a recorded frame and
little noise is added on the way (2 in all, where DDPM adds 11):

    x_t = (1 - m) x + m e + sqrt(2 m (1 - m)) eps,   e = z or y,   m from 0.001 to 0.999 in T steps

A U-Net that sees x_t, y and z predicts d = x_t - x; its time is T + t on the side of z and T - t on that of y. A step
from t to u, with v = 2 m (1 - m), is the ancestral step of the bridge:

    s^2 = (v_t - v_u (1 - m_t)^2 / (1 - m_u)^2) v_u / v_t
    x_u = (1 - m_u) x0 + m_u z + sqrt((v_u - s^2) / v_t) (x_t - (1 - m_t) x0 - m_t z) + eta s eps

The latent is decoded with both neighbours at hand, moved to the middle by their motion: w0, w1. Where these are right
the decoder chooses between them by a mask m, and adds what neither has:

    frame = w0 m + w1 (1 - m) + residual

Motion is that of `frameloom.motion.dis`, in the place of the pretrained flow networks of the paper.

Zonglin Lyu, Ming Li, Jianbo Jiao, Chen Chen, "Frame Interpolation with Consecutive Brownian Bridge Diffusion", ACM MM
2024, arXiv 2405.05953.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.diffusion.cond import Cond
from frameloom.diffusion.context import Ctx
from frameloom.diffusion.denoiser import Latent, Plain
from frameloom.diffusion.paths import VP, Path, SteppedBridge
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.run import Edit, sample
from frameloom.diffusion.step import Fresh, Grids, Universal
from frameloom.errors import InputError
from frameloom.motion.dis import flows_both_ways, warped_pair
from frameloom.tasks.interpolation.cbb_autoencoder import BOUND, Codebook, Decoder, Encoder, moved_by
from frameloom.tasks.interpolation.triplets import Curriculum, Triplets
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized

LEAST = 64
STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a CBB. Level i of the autoencoder has `widths[i]` channels and halves the picture at its end.

    `latent`: channels of a latent. `codes`: of the codebook. `window`: side of the attention windows, and `head` the
    channels of a head. `unet` and `blocks`: channels of the U-Net's levels and its residual blocks a level; levels from
    `attend` on have attention. `groups`: of the group norms. `objective`: `bridge`, or `ddpm`, the conditional
    diffusion from noise that the paper compares with. `draws`: noisy latents a training example. `learned`: the share
    of a training run after which the encoder stands still and the U-Net begins. `moved`: bridges run between the
    neighbours' latents as their motion moves them to the middle, which leaves a young U-Net the small motions that it
    is best at; otherwise between the latents as they are.
    """

    widths: tuple[int, ...]
    unet: tuple[int, ...]
    blocks: int
    window: int
    head: int
    codes: int
    latent: int = 3
    attend: int = 1
    groups: int = 32
    times: int = 1000
    objective: Literal["bridge", "ddpm"] = "bridge"
    draws: int = 1
    learned: float = 0.5
    moved: bool = False

    @property
    def stride(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** len(self.widths)

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be divisible by."""
        return self.stride * math.lcm(self.window, 2 ** (len(self.unet) - 1))


PRESETS = {
    "tiny": Config(widths=(16, 24, 48), unet=(32, 48, 64), blocks=1, window=4, head=12, codes=2048, attend=2, groups=8,
                   draws=8, learned=0.35, moved=True),
    "paper": Config(widths=(64, 128, 128, 128, 256), unet=(128, 256, 512), blocks=2, window=8, head=32, codes=16384),
}  # fmt: skip
RECIPES = {
    "tiny": Recipe(steps=2200, batch_size=4, lr=1e-3, final_lr=2e-5, weight_decay=1e-4, ema=0.998, bf16=True,
                   channels_last=True),
    # The published rate; as many steps as 100 passes over the 51,312 triplets of Vimeo-90K.
    "paper": Recipe(steps=80_000, batch_size=64, lr=1e-4, final_lr=5e-7, warmup=1000, ema=0.995, bf16=True),
}  # fmt: skip
CROPS = {"tiny": 96, "paper": 256}


def aligned(
    frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]
) -> tuple[Float[Tensor, "2 3 h w"], Float[Tensor, "2 h w"], Float[Tensor, "1 h w"]]:
    """Both pictures moved to the middle of their motion, from there the way to frame 1 in pixels, and what moves.

    The way to frame 0 is the negative. The third is 0 where the motion is too short to be trusted, and there the
    pictures stay as they are; it rises to 1.
    """
    flows = flows_both_ways(frame0, frame1)
    pictures = [np.ascontiguousarray(x.cpu().permute(1, 2, 0).numpy()) for x in (frame0, frame1)]
    *warped, trust = warped_pair(*pictures, flows, 0.5)
    moved = np.stack([still + trust * (warp - still) for still, warp in zip(pictures, warped, strict=True)])
    half = sum(forward - backward for forward, backward in flows) / (4 * len(flows))
    warps = torch.from_numpy(moved).permute(0, 3, 1, 2).clamp(0, 1)
    return warps, torch.from_numpy(half).permute(2, 0, 1), torch.from_numpy(trust).permute(2, 0, 1)


class AlignedTriplets(Triplets):
    """Triplets of the world, in either order of time, with the neighbours moved to the middle."""

    def batch(self, indices: list[int], progress: float) -> dict[str, Tensor]:
        """`pair`, `warped` (b, 2, 3, h, w), `middle` (b, 3, h, w), `motion` (b, 2, h, w), `progress` (b,)."""
        made = super().batch(indices, progress)
        turned = torch.tensor([hash((self.seed, index)) % 2 == 1 for index in indices])[:, None, None, None, None]
        pair = torch.where(turned, made["pair"].flip(1), made["pair"])
        warped, motion, _ = zip(*(aligned(*frames) for frames in pair), strict=True)
        return {"pair": pair, "warped": torch.stack(warped), "middle": made["middle"], "motion": torch.stack(motion),
                "progress": torch.full((len(pair),), progress)}  # fmt: skip


class _Bounded(Edit):
    """Keeps estimates of the data where data can be: from nearly pure noise they would go far astray."""

    def on_x0(self, p: Prediction, x: Tensor, t: Tensor, ctx: Ctx) -> Prediction:
        return Prediction.from_x0(ctx.path, x, t, p.x0.clamp(-BOUND, BOUND))


class CBB(Sized, nn.Module):
    """The whole method. `steps`, `seed` and `eta` say how `between` samples: `eta` 1 as published, 0 without noise."""

    id, presets, recipes = "cbb", PRESETS, RECIPES
    fixed_t = True
    tile = None

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.steps, self.seed, self.eta = config, STEPS, 0, 1.0
        sizes = config.widths, config.latent, config.window, config.head, config.groups
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.codebook = Codebook(config.codes, config.latent)
        attends = [level >= config.attend for level in range(len(config.unet))]
        self.unet = UNet2DModel(
            in_channels=3 * config.latent, out_channels=config.latent, layers_per_block=config.blocks,
            block_out_channels=config.unet, norm_num_groups=config.groups, attention_head_dim=config.unet[0] // 4,
            down_block_types=["AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends],
            up_block_types=["AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in attends[::-1]],
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        )  # fmt: skip

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> AlignedTriplets:
        """Triplets of `source` (`world`) at the crop of `size`, with motion that grows over the run."""
        cls.preset(size)
        cls.needs_world(source)
        return AlignedTriplets(CROPS[size], seed, Curriculum(start=CROPS[size] / 12, end=CROPS[size] / 3))

    def sampling(self, steps: int | None = None, seed: int = 0) -> None:
        """How `between` samples from here on. Raises InputError below 3 steps."""
        self.grid(STEPS if steps is None else steps)
        self.steps, self.seed = STEPS if steps is None else steps, seed

    @property
    def path(self) -> Path:
        """From the middle's latent to the neighbour's; for the objective `ddpm` from latent to noise."""
        times = self.config.times
        return SteppedBridge(steps=times) if self.config.objective == "bridge" else VP.of("linear", times)

    def encode(self, pair: Float[Tensor, "b 2 3 h w"]) -> tuple[Float[Tensor, "b 2 c h2 w2"], list[Tensor]]:
        """Latents of both neighbours, before the codebook, and their features level by level, each (b 2 c h w)."""
        latents, features = self.encoder(pair.flatten(0, 1))
        return latents.unflatten(0, pair.shape[:2]), [level.unflatten(0, pair.shape[:2]) for level in features]

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """That of the autoencoder; after the share `learned` of the run the encoder stands still and the U-Net learns.

        The decoder meets latents that lean towards the neighbours and are noisy, as a sampled one may be.
        """
        settled = bool(batch["progress"][0] >= self.config.learned)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settled):
            neighbours, features = self.encode(batch["pair"])
            middle, _ = self.encoder(batch["middle"])
        lean, noise = torch.rand(2, len(middle), 1, 1, 1, device=middle.device)
        doubtful = middle.lerp(neighbours.mean(1), 0.5 * lean.square()) + 0.1 * noise * torch.randn_like(middle)
        code, distance = self.codebook(doubtful)
        made = self.decoder(code, neighbours, features, batch["warped"], batch["motion"])
        error = (made - batch["middle"]).square().mean((1, 2, 3))
        # Decibels: most of a frame is right from the start, and in an L1 what is not would hardly count.
        loss = 0.1 * (error + 1e-5).log().mean() + 0.1 * distance
        return loss + self.latent_loss(middle, *neighbours.unbind(1)) if settled else loss

    def latent_loss(
        self, middle: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"], after: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, ""]:
        """L1 of the predicted x_t - x, weighted by min(1 / sigma_t, 5), on a side of the bridge drawn for each example.

        For `ddpm` the mean square of the predicted noise.
        """
        middle, before, after = (x.repeat(self.config.draws, 1, 1, 1) for x in (middle, before, after))
        time = torch.randint(1, self.config.times + 1, (len(middle),), device=middle.device)
        noise = torch.randn_like(middle)
        if self.config.objective == "ddpm":
            noisy = self.path.add_noise(middle, time, noise)
            return F.mse_loss(self.predict(noisy, before, after, time).float(), noise)
        side = torch.where(torch.rand(len(middle), device=middle.device) < 0.5, 1, -1)
        end = torch.where((side > 0)[:, None, None, None], after, before)
        noisy = self.path.add_noise(middle, time, noise, end)
        weight = (1 / self.path.coef(time)[2]).clamp(max=5)[:, None, None, None]
        made = self.predict(noisy, before, after, side * time).float()
        return (weight * (made - (noisy - middle)).abs()).mean()

    def predict(
        self, noisy: Float[Tensor, "b c h w"], before: Float[Tensor, "b c h w"], after: Float[Tensor, "b c h w"],
        time: Tensor,
    ) -> Float[Tensor, "b c h w"]:  # fmt: skip
        """What the U-Net says of x_t at `time` (b,), negative on the side of the frame before."""
        return self.unet(torch.cat([noisy, before, after], 1), self.config.times + time).sample

    def grid(self, steps: int) -> Float[Tensor, "n"]:
        """The times of `steps` evaluations: falling evenly from T, then the last two, then the data.

        Raises InputError below 3 steps, since the last two and a first are needed, and above T / 2.
        """
        if steps < 3:
            raise InputError(f"--steps {steps}: cbb needs 3 steps or more")
        last = self.config.times - 1
        if steps > self.config.times // 2:
            raise InputError(f"--steps {steps}: more than the {last + 1} times of cbb divide into; "
                             f"{self.config.times // 2} are the most")  # fmt: skip
        falling = torch.arange(last, 1, -last / (steps - 2), dtype=torch.float64)[: steps - 2].floor()
        # Time 0 is the data, so that the index of a training step counts from 1.
        return Grids.indices([*(falling + 1).tolist(), 2.0, 1.0])

    def sample_latent(
        self, before: Float[Tensor, "b c h w"], after: Float[Tensor, "b c h w"], steps: int = STEPS, seed: int = 0,
        eta: float = 1.0,
    ) -> Float[Tensor, "b c h w"]:  # fmt: skip
        """The latent of the middle from those of its neighbours, by the bridge from the one after.

        With the objective `ddpm` it begins in noise of `seed`: ancestral for `eta` 1, DDIM for 0.
        """
        path, fresh = self.path, Fresh(seed)
        if path.bridge:
            start = end = after[:, None]
            # `eta` scales the fresh noise and nothing else: what the step leaves for it stays open.
            grid, step, noise = self.grid(steps), Universal(eta=1.0), lambda x, run: eta * fresh(x, run)
            edits: tuple[Edit, ...] = ()
        else:
            start, end = torch.randn(after[:, None].shape, generator=fresh.generator).to(after.device), None
            grid, step, noise, edits = Grids.trailing(path, steps), Universal(eta=eta), fresh, (_Bounded(),)

        def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            return self.predict(x[:, 0], before, after, time.long())[:, None]

        latent = Latent(start.shape[2], 1, *start.shape[-2:])
        denoiser = Plain(network, path, "difference" if path.bridge else "noise", latent)
        return sample(denoiser, start, grid, Cond(), step=step, noise=noise, y=end, edits=edits)[0][:, 0]

    @torch.inference_mode()
    def middle(
        self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h1 w1"], steps: int = STEPS, seed: int = 0,
        eta: float = 1.0,
    ) -> Float[Tensor, "3 h w"]:  # fmt: skip
        """The frame halfway between two pictures in [0, 1].

        Raises InputError for pictures of different sizes or with a side below 64, and for fewer than 3 steps.
        """
        sizes = [f"{picture.shape[2]}x{picture.shape[1]}" for picture in (frame0, frame1)]
        if sizes[0] != sizes[1]:
            raise InputError(f"cbb: the first picture is {sizes[0]}, the second {sizes[1]}; both must have one size")
        _, height, width = frame0.shape
        if min(height, width) < LEAST:
            raise InputError(f"cbb: pictures of {sizes[0]} are too small; sides of {LEAST} or more are wanted")
        self.grid(steps)
        if torch.equal(frame0, frame1):
            return frame0.clone()
        border = (0, -width % self.config.multiple, 0, -height % self.config.multiple)
        *hints, moving = (x.to(frame0.device) for x in aligned(frame0, frame1))
        warped, motion = (F.pad(x[None] if x.ndim == 3 else x, border, mode="replicate") for x in hints)
        pair = F.pad(torch.stack([frame0, frame1]), border, mode="replicate")[None]
        neighbours, features = self.encode(pair)
        ends = moved_by(neighbours, motion) if self.config.moved else neighbours
        code, _ = self.codebook(self.sample_latent(*ends.unbind(1), steps, seed, eta))
        made = self.decoder(code, neighbours, features, warped[None], motion)[0, :, :height, :width].clamp(0, 1)
        # Where nothing moves the mean is right already, and a decoder could only add to it.
        return ((frame0 + frame1) / 2).lerp(made, moving)

    def between(
        self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]
    ) -> Callable[[float], Float[Tensor, "3 h w"]]:
        """The function t -> picture of two pictures; it knows t = 0.5 only, and raises InputError for any other."""

        def at(t: float) -> Tensor:
            if t != 0.5:
                raise InputError(f"cbb makes the middle only, not the picture at {t:g}; halve again to get there")
            return self.middle(frame0, frame1, self.steps, self.seed, self.eta)

        return at
