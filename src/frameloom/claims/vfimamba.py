"""VFIMamba: both frames in one scan, at linear cost, for motion that is large."""

import tempfile
from statistics import mean

import torch
from torch import Tensor

from frameloom.claims.base import Result
from frameloom.layers.selective_scan import attention_macs
from frameloom.progress import Progress
from frameloom.tasks.interpolation.blend import Blend
from frameloom.tasks.interpolation.dis import DIS
from frameloom.tasks.interpolation.vfimamba import VFIMamba
from frameloom.training import load, train
from frameloom.world import WorldDataset

SIZE = (128, 160)
CLIPS = 24
# Largest speed of a body over the two given frames, in pixels: small to large motion.
SPEEDS = (4.0, 8.0, 12.0)


def held_out(seed: int, speed: float) -> tuple[Tensor, Tensor]:
    """Pairs (n, 2, 3, h, w) and their true middles (n, 3, h, w), of scenes that training never draws."""
    data = WorldDataset("motion", 3, *SIZE, seed=900_000 + seed, length=CLIPS, motion=speed / 2, supersample=2)
    rgb = data.batch(range(CLIPS))["rgb"].clone()
    return rgb[:, ::2], rgb[:, 1]


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Shipped weights (or freshly trained ones) against blending and DIS on held-out scenes, by motion."""
    torch.manual_seed(seed)
    if retrain:
        with tempfile.TemporaryDirectory() as folder:
            model = load("vfimamba", train("vfimamba", folder, seed=seed, progress=progress))
    else:
        model = load("vfimamba")
    makers = {"blend": Blend(), "dis": DIS(), "vfimamba": model}
    scores: dict[str, dict[float, float]] = {name: {} for name in makers}
    for number, speed in enumerate(SPEEDS):
        pairs, middles = held_out(seed, speed)
        for name, maker in makers.items():
            made = [maker.between(first, second)(0.5) for first, second in pairs]
            scores[name][speed] = mean(_psnr(a, b) for a, b in zip(made, middles, strict=True))
        progress("interpolating", number + 1, len(SPEEDS))
    rows = [{"name": name} | {f"{speed:g} px": f"{value:.2f} dB" for speed, value in found.items()}
            for name, found in scores.items()]  # fmt: skip
    over_blend = mean(scores["vfimamba"][s] - scores["blend"][s] for s in SPEEDS)
    over_dis = mean(scores["vfimamba"][s] - scores["dis"][s] for s in SPEEDS)
    summary = f"{over_blend:+.2f} dB over blend (needs > 3), {over_dis:+.2f} dB over dis (needs >= 0)"
    return Result(
        "vfimamba",
        paper="+0.80 dB (4K) and +0.96 dB (2K) on X-TEST over the previous best, at linear cost",
        setting=f"{CLIPS} held-out world scenes a speed, {SIZE[1]}x{SIZE[0]}, largest motion {SPEEDS} px, seed {seed}",
        rows=rows,
        checks={"linear cost": linear_cost(model), "neighbours in the sequence": neighbours(model)},
        holds=over_blend > 3 and over_dis >= 0,
        summary=summary,
    )


def linear_cost(model: VFIMamba) -> bool:
    """Twice the area takes exactly twice the multiplications of the scans, and four times those of attention."""
    doubled = model.scan_macs(128, 128) == 2 * model.scan_macs(64, 128)
    return doubled and attention_macs(400, 8) == 4 * attention_macs(200, 8)


def neighbours(model: VFIMamba) -> bool:
    """The pixel of frame 1 follows the same pixel of frame 0 at once in every direction of the scan."""
    scan = model.feature_bone.block3.blocks[0].self_attention
    height, width = 3, 4
    place = torch.arange(height * width).view(1, height, width, 1)
    frames = torch.cat([place, place + height * width]).float()
    order = scan.sequences(frames)[:, 0, :, 0].long()
    steps = [(order[:, k] % (height * width))[::2] == (order[:, k] % (height * width))[1::2] for k in range(4)]
    return all(bool(step.all()) for step in steps)


def _psnr(made: Tensor, true: Tensor) -> float:
    return float(-10 * torch.log10(torch.mean((made - true) ** 2) + 1e-10))
