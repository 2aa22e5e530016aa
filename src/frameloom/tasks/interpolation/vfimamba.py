"""VFIMamba: the frame between two frames, with a selective scan over both at once.

For raising a frame rate when motion is large. A convolutional pyramid describes each frame; at its two
coarsest levels the pixels of both frames are *interleaved* into one sequence (pixel p of frame 0, pixel p of
frame 1, pixel p+1 of frame 0, ...) and four selective scans (rows, columns, and both backwards) let every
pixel meet its counterpart and all the others at linear cost. Two heads and the local blocks turn that into
flows from time t to both frames and a blending mask m, a U-Net adds what no flow explains:

    frame(t) = s(m) warp(frame 0, flow t->0) + (1 - s(m)) warp(frame 1, flow t->1) + residual,   s = sigmoid

Guozhen Zhang, Chunxu Liu, Yutao Cui, Xiaotong Zhao, Kai Ma, Limin Wang, "VFIMamba: Video Frame Interpolation
with State Space Models", NeurIPS 2024, arXiv 2407.02315.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.layers.losses import laplacian_loss
from frameloom.layers.selective_scan import scan_macs, selective_scan
from frameloom.layers.synthesis import ConvBlock, LocalBlock, Refinement, conv_prelu, resize
from frameloom.motion.warp import backward_warp
from frameloom.tasks.interpolation.triplets import Curriculum, Triplets
from frameloom.training.published import fill, table
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a VFIMamba. Level i of the pyramid has `width` * 2**i channels at stride 2**i.

    `depths`: convolutions (levels 0 to 2) and Mixed-SSM blocks (levels 3, 4). `states`: N of the scan.
    `merge`: how two frames become one sequence. `unmerge`: `exact` puts every token of the column scans back
    in its place; `released` repeats the axis mix-up that the published weights were trained with. `fixed_t`:
    trained for the middle only, other times take recursion.

    What else the published weights want: `shuffle`: the heads bring features to a finer grid by one shuffle of
    pixels by 4, or by two by 2, which sorts the channels otherwise; `bgr`: pictures as OpenCV reads them, blue first;
    `centred`: edges that make the sides fit are repeated on both sides, not to the right and below alone. In use,
    `scale` and `turned` are what `at` does if not told otherwise.
    """

    width: int
    depths: tuple[int, int, int, int, int]
    states: int = 16
    local_blocks: int = 2
    merge: Literal["interleaved", "sequential"] = "interleaved"
    unmerge: Literal["exact", "released"] = "exact"
    fixed_t: bool = True
    shuffle: Literal["once", "twice"] = "once"
    bgr: bool = False
    centred: bool = False
    scale: float = 1.0
    turned: bool = False


PRESETS = {
    "tiny": Config(width=8, depths=(1, 1, 1, 1, 1), states=8, local_blocks=1),
    "small": Config(width=16, depths=(2, 2, 2, 3, 3)),
    "paper": Config(width=32, depths=(2, 2, 2, 3, 3)),
}


RECIPES = {
    "tiny": Recipe(steps=3000, batch_size=8, lr=1e-3, final_lr=2e-5, weight_decay=1e-4, ema=0.998,
                   bf16=True, channels_last=True),
    # Published rates and decay; as many steps as 300 passes over the 51,312 triplets of Vimeo-90K.
    "small": Recipe(steps=481_000, batch_size=32, lr=2e-4, final_lr=2e-5, warmup=2000, weight_decay=1e-4,
                    bf16=True, channels_last=True),
}  # fmt: skip
RECIPES["paper"] = RECIPES["small"]
CROPS = {"tiny": 96, "small": 256, "paper": 256}


class PatchEmbed(nn.Module):
    """LayerNorm over the channels, then a 3x3 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.norm = nn.LayerNorm(inputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.proj(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class ChannelAttention(nn.Module):
    """Channels weighted by what their averages say together."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 30)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )
        self.attention.append(nn.Sigmoid())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x * self.attention(x)


class ConvAttention(nn.Module):
    """Two 3x3 convolutions through a third of the channels, then channel attention (CAB)."""

    def __init__(self, channels: int):
        super().__init__()
        self.cab = nn.Sequential(
            nn.Conv2d(channels, channels // 3, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(channels // 3, channels, 3, 1, 1),
            ChannelAttention(channels),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.cab(x)


class FramePairScan(nn.Module):
    """Selective scans over two frames as one sequence, in four directions (SS2D).

    In and out: (2b, h, w, c), the first half of the batch being frame 0 of each pair and the second frame 1.
    """

    def __init__(self, channels: int, config: Config):
        super().__init__()
        inner, states, rank = 2 * channels, config.states, math.ceil(channels / 16)
        self.config, self.rank = config, rank
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(
            torch.empty(4, rank + 2 * states, inner).uniform_(-(inner**-0.5), inner**-0.5)
        )
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        # Steps start log-uniform in [1e-3, 1e-1]; the bias is their inverse softplus.
        step = torch.empty(4, inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def sequences(self, x: Float[Tensor, "b2 h w d"]) -> Float[Tensor, "l b 4 d"]:
        """Rows, columns, rows backwards, columns backwards."""
        axes = {"interleaved": ("(h w f)", "(w h f)"), "sequential": ("(f h w)", "(f w h)")}
        rows, columns = (rearrange(x, f"(f b) h w d -> {to} b d", f=2) for to in axes[self.config.merge])
        return torch.stack([rows, columns, rows.flip(0), columns.flip(0)], dim=2)

    def frames(self, y: Float[Tensor, "l b 4 d"], height: int) -> Float[Tensor, "b2 h w d"]:
        """The four scans back in place and added up."""
        forward, backward = y[:, :, :2], y[:, :, 2:].flip(0)
        rows, columns = (forward + backward).unbind(2)
        if self.config.unmerge == "released":
            # The frame axis runs fastest here, yet the published code treats it as if it ran slowest.
            columns = rearrange(columns, "(f w h) b d -> (f h w) b d", f=2, h=height)
        elif self.config.merge == "interleaved":
            columns = rearrange(columns, "(w h f) b d -> (h w f) b d", f=2, h=height)
        else:
            columns = rearrange(columns, "(f w h) b d -> (f h w) b d", f=2, h=height)
        order = {"interleaved": "(h w f)", "sequential": "(f h w)"}[self.config.merge]
        return rearrange(rows + columns, f"{order} b d -> (f b) h w d", f=2, h=height)

    def scan(self, x: Float[Tensor, "b2 h w d"]) -> Float[Tensor, "b2 h w d"]:
        """The four scans of the activated features, without gate and norm."""
        states = self.config.states
        tokens = self.sequences(x)
        mixed = torch.einsum("lbkd,kcd->lbkc", tokens, self.x_proj_weight)
        dt, B, C = mixed.split([self.rank, states, states], dim=-1)
        dt = torch.einsum("lbkr,kdr->lbkd", dt, self.dt_projs_weight)
        dt = F.softplus(dt.float() + self.dt_projs_bias)
        A = -self.A_logs.float().exp().view(4, -1, states).transpose(1, 2).contiguous()
        return self.frames(selective_scan(tokens, dt, A, B, C, self.Ds.view(4, -1)), x.shape[1])

    def forward(self, x: Float[Tensor, "b2 h w c"]) -> Float[Tensor, "b2 h w c"]:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.out_proj(self.out_norm(self.scan(x)) * F.silu(gate))


class MixedSSM(nn.Module):
    """The scan for what is far, convolution and channel attention for what is near, beside scaled skips."""

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = FramePairScan(channels, config)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.conv_blk = ConvAttention(channels)
        self.ln_2 = nn.LayerNorm(channels)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b2 c h w"]) -> Float[Tensor, "b2 c h w"]:
        x = x.permute(0, 2, 3, 1)
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        local = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2))
        return x.permute(0, 3, 1, 2) * self.skip_scale2.view(-1, 1, 1) + local


class MixedSSMStage(nn.Module):
    """Mixed-SSM blocks one after the other."""

    def __init__(self, channels: int, depth: int, config: Config):
        super().__init__()
        self.blocks = nn.ModuleList(MixedSSM(channels, config) for _ in range(depth))

    def forward(self, x: Float[Tensor, "b2 c h w"]) -> Float[Tensor, "b2 c h w"]:
        for block in self.blocks:
            x = block(x)
        return x


class FeaturePyramid(nn.Module):
    """Five levels of features of both frames; frames meet at the two coarsest."""

    def __init__(self, config: Config):
        super().__init__()
        widths = [config.width * 2**level for level in range(5)]
        self.block0 = ConvBlock(3, widths[0], config.depths[0])
        for level in (1, 2):
            setattr(self, f"patch_embed{level}", conv_prelu(widths[level - 1], widths[level], stride=2))
            setattr(self, f"block{level}", ConvBlock(widths[level], widths[level], config.depths[level]))
        for level in (3, 4):
            setattr(self, f"patch_embed{level}", PatchEmbed(widths[level - 1], widths[level]))
            setattr(self, f"block{level}", MixedSSMStage(widths[level], config.depths[level], config))

    def forward(self, frames: Float[Tensor, "b2 3 h w"]) -> list[Tensor]:
        levels = [self.block0(frames)]
        for level in range(1, 5):
            embed, block = getattr(self, f"patch_embed{level}"), getattr(self, f"block{level}")
            levels.append(block(embed(levels[-1])))
        return levels


class FlowHead(nn.Module):
    """Flow and mask updates from the features of one level, computed at 4/`scale` of the full size."""

    def __init__(self, channels: int, scale: int, hidden: int, extra: int, shuffle: str):
        super().__init__()
        self.scale = scale
        factors = {"once": (4,), "twice": (2, 2)}[shuffle]
        self.upsample = nn.Sequential(*(nn.PixelShuffle(factor) for factor in factors))
        self.conv = nn.Sequential(
            conv_prelu(channels * 2 // 16 + extra, hidden), conv_prelu(hidden, hidden), conv_prelu(hidden, 5)
        )

    def forward(
        self, features: Float[Tensor, "b c hs ws"], images: Float[Tensor, "b d h w"], flow: Tensor | None
    ) -> tuple[Float[Tensor, "b 4 h w"], Float[Tensor, "b 1 h w"]]:
        """`images` and the flow so far at full size; the updates are at full size and in its pixels."""
        factor = 4 / self.scale
        inputs = [self.upsample(features), resize(images, factor)]
        if flow is not None:
            inputs.append(resize(flow, factor) * factor)
        update = resize(self.conv(torch.cat(inputs, 1)).float(), 1 / factor)
        return update[:, :4] / factor, update[:, 4:]


class Synthesis(NamedTuple):
    """The frame, the flows t->0 and t->1, the mask logit, and the merged warps of every stage."""

    frame: Float[Tensor, "b 3 h w"]
    flow: Float[Tensor, "b 4 h w"]
    mask: Float[Tensor, "b 1 h w"]
    stages: list[Tensor]


def _both(pair: Tensor, flow: Tensor) -> Tensor:
    """Frames or features (2b c h w) warped by their halves of the flow; frame 0 first in the channels."""
    warped, _ = backward_warp(pair, torch.cat(flow.chunk(2, dim=1)))
    return torch.cat(warped.chunk(2), dim=1)


class VFIMamba(Sized, nn.Module):
    """The network. Submodules have the names that they have in the published weights."""

    id, presets, recipes = "vfimamba", PRESETS, RECIPES
    tile = None

    def __init__(self, config: Config):
        super().__init__()
        if config.unmerge == "released" and config.merge != "interleaved":
            raise ValueError("unmerge='released' is defined for merge='interleaved' only")
        self.config = config
        width = config.width
        self.feature_bone = FeaturePyramid(config)
        self.block = nn.ModuleList(
            FlowHead(levels * width, levels, 4 * width, extra, config.shuffle) for levels, extra in ((16, 7), (8, 18))
        )
        self.local_block = nn.ModuleList(LocalBlock(4 * width, 2 - i) for i in range(config.local_blocks))
        self.unet = Refinement(2 * width)
        for module in [*self.feature_bone.modules(), *self.unet.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)
        # Training starts from the warps alone.
        nn.init.zeros_(self.unet.conv.weight)

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> Triplets:
        """Triplets of `source` (`world`) at the crop of `size`, with motion that grows over the run."""
        cls.preset(size)
        cls.needs_world(source)
        return Triplets(CROPS[size], seed, Curriculum(start=CROPS[size] / 24, end=CROPS[size] / 6))

    @property
    def fixed_t(self) -> bool:
        """Whether the network knows the middle only, so that other times take recursion."""
        return self.config.fixed_t

    def between(
        self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]
    ) -> Callable[[float], Float[Tensor, "3 h w"]]:
        """The function t -> picture of two pictures."""
        return lambda t: self.at(frame0, frame1, t)

    def forward(
        self, pair: Float[Tensor, "b 2 3 h w"], t: float | Float[Tensor, " b"] = 0.5, scale: float = 1.0
    ) -> Synthesis:
        """Both frames in [0, 1], sides multiples of 16 and of 16/`scale`; flow is first sought at `scale` of the size.

        For 2K frames 0.5 and for 4K frames 0.25 find larger motion and cost less.
        """
        frames = self._ordered(rearrange(pair, "b f c h w -> (f b) c h w"))
        seen = resize(frames, scale)
        features = self.feature_bone(seen)
        flow, mask, stages = self._coarse(seen, features, t)
        if scale != 1:
            features = self.feature_bone(frames)
            flow, mask = resize(flow, 1 / scale) / scale, resize(mask, 1 / scale)

        images = torch.cat(frames.chunk(2), dim=1)
        warps = _both(frames, flow)
        for block in self.local_block:
            flow_update, mask_update = block(torch.cat([images, warps, mask], 1), flow)
            flow, mask = flow + flow_update, mask + mask_update
            warps = _both(frames, flow)
            stages.append(self._merge(warps, mask))

        warped, shrunk = [], flow
        for level in features:
            warped.append(_both(level, shrunk))
            shrunk = resize(shrunk, 0.5) / 2
        residual = self.unet(torch.cat([images, warps, mask, flow], 1), warped)
        frame = (self._merge(warps, mask) + residual).clamp(0, 1)
        return Synthesis(self._ordered(frame), flow, mask, [self._ordered(stage) for stage in stages])

    def _ordered(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Red first to the order that the weights know, and back."""
        return picture.flip(1) if self.config.bgr else picture

    def _coarse(self, frames: Tensor, features: list[Tensor], t: float | Tensor):
        images = torch.cat(frames.chunk(2), dim=1)
        time = torch.as_tensor(t, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
        time = time.expand(len(images), 1, *images.shape[-2:])
        joint = [torch.cat(level.chunk(2), dim=1) for level in features[:2:-1]]
        flow, mask = self.block[0](joint[0], torch.cat([images, time], 1), None)
        warps = _both(frames, flow)
        stages = [self._merge(warps, mask)]
        flow_update, mask_update = self.block[1](joint[1], torch.cat([images, warps, mask, time], 1), flow)
        flow, mask = flow + flow_update, mask + mask_update
        stages.append(self._merge(_both(frames, flow), mask))
        return flow, mask, stages

    @staticmethod
    def _merge(warps: Tensor, mask: Tensor) -> Tensor:
        share = torch.sigmoid(mask)
        return warps[:, :3] * share + warps[:, 3:] * (1 - share)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Laplacian-pyramid L1 of the frame, and half of that of each stage's merged warps.

        `batch`: `pair` (b, 2, 3, h, w), `middle` (b, 3, h, w) the true frame at `t` (b,).
        """
        made = self(batch["pair"], batch["t"])
        loss = laplacian_loss(made.frame, batch["middle"])
        return loss + 0.5 * sum(laplacian_loss(stage, batch["middle"]) for stage in made.stages)

    @torch.inference_mode()
    def at(
        self,
        frame0: Tensor,
        frame1: Tensor,
        t: float = 0.5,
        scale: float | int | None = None,
        rotate: bool | None = None,
    ) -> Tensor:
        """The frame at time `t` between two frames (3, h, w) or (b, 3, h, w) in [0, 1], of any size.

        `rotate` averages with the answer for the frames turned by 180 degrees. Without them `scale` and `rotate` are
        the configuration's.
        """
        scale = self.config.scale if scale is None else scale
        rotate = self.config.turned if rotate is None else rotate
        pair = torch.stack([frame0, frame1], dim=-4)
        pair = pair if pair.ndim == 5 else pair[None]
        batch, _, _, height, width = pair.shape
        multiple = max(32, math.ceil(16 / scale))
        missing = [-side % multiple for side in (width, height)]
        left, top = (more // 2 if self.config.centred else 0 for more in missing)
        border = (left, missing[0] - left, top, missing[1] - top)
        padded = F.pad(pair.flatten(0, 1), border, mode="replicate").unflatten(0, (batch, 2))
        frame = self(padded, t, scale).frame
        if rotate:
            frame = (frame + self(padded.flip(-1, -2), t, scale).frame.flip(-1, -2)) / 2
        return frame[..., top : top + height, left : left + width].float().reshape(frame0.shape)

    def tune(self, scale: float | int | None, turned: bool | None) -> None:
        """What `at` does from now on if not told otherwise; None leaves it as it is."""
        wanted = {"scale": None if scale is None else float(scale), "turned": turned}
        self.config = replace(self.config, **{key: value for key, value in wanted.items() if value is not None})

    def scan_macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of all selective scans for one pair of frames (sides multiples of 16)."""
        total = 0
        for level in (3, 4):
            tokens = 2 * (height >> level) * (width >> level)
            inner = 2 * self.config.width << level
            total += self.config.depths[level] * scan_macs(tokens, 4 * inner, self.config.states)
        return total

    @classmethod
    def load_official(cls, path: str | Path) -> "VFIMamba":
        """The network of a published checkpoint (`VFIMamba.pkl`, `VFIMamba_S.pkl`), its size read from it.

        The large one averages with turned pictures, as its authors use it.

        Raises InputError for a file that is not such a checkpoint, naming what does not fit.
        """
        # Masks and sizes of an attention that the network no longer has.
        state = {key: value for key, value in table(path).items() if "attn_mask" not in key and "HW" not in key}
        try:
            width = len(state["feature_bone.block0.conv.0.weight"])
            config = Config(
                width=width,
                depths=tuple(len({key.split(".")[3] for key in state if _is_layer(key, level)}) for level in range(5)),
                states=state["feature_bone.block4.blocks.0.self_attention.A_logs"].shape[1],
                local_blocks=len({key.split(".")[1] for key in state if key.startswith("local_block.")}),
                unmerge="released", shuffle="twice", bgr=True, centred=True, turned=width == PRESETS["paper"].width,
            )  # fmt: skip
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{path}: not a VFIMamba checkpoint, it has no {error}; VFIMamba.pkl would be one"
            ) from None
        return fill(lambda: cls(config), "vfimamba", path, state)


def _is_layer(key: str, level: int) -> bool:
    """Whether `key` is the bias of a convolution, or of a block's first norm, of that level."""
    inside, last = ("conv", ".bias") if level < 3 else ("blocks", ".ln_1.bias")
    return key.startswith(f"feature_bone.block{level}.{inside}.") and key.endswith(last)
