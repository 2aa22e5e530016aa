"""Each ingredient of Boosted NeRV on top of the last, at one size and one number of steps; then the rate.

Published at 1.5 million parameters and 300 epochs on 132 frames of 720x1280 (read off a plot): HNeRV 35.1 to 37.8 dB,
NeRV 29.1 to 33.7 dB; at 0.05 bits a pixel HNeRV 33.65 to 36.91 dB.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from frameloom.bitstream.container import parse
from frameloom.bitstream.entropy import gaussian_bits
from frameloom.claims.base import Result
from frameloom.metrics import psnr
from frameloom.progress import Progress
from frameloom.tasks.compression.base import describe
from frameloom.tasks.compression.boost_nerv import LEAST_SPREAD, Adan, BoostNeRV, boosted_loss
from frameloom.tasks.compression.fit import fit
from frameloom.tasks.compression.fitted import FEW, Fitted
from frameloom.tasks.compression.hnerv import HNeRV, NeRV
from frameloom.tasks.compression.nerv import Config, Learner, of_size
from frameloom.video.clip import Clip
from frameloom.world.world import World

ADAM, ADAN = {"learning_rate": HNeRV.rate}, {"learning_rate": BoostNeRV.rate, "optimiser": Adan}


def run(*, seed: int, retrain: bool, progress: Progress, epochs: int = 16) -> Result:
    """Fit the ladder, batch 1, and measure what is drawn at 8 bits; with `retrain`, four times as long.

    Every rung has about the parameters of `HNeRV.preset("tiny")`, never more.
    """
    epochs *= 4 if retrain else 1
    rendered = World("flyover", [seed], frames=32).render(64, 128)["rgb"][0]
    pictures = (rendered * 255).round().to(torch.uint8)
    size = HNeRV.preset("tiny").parameters
    plain, indexed = HNeRV.preset("tiny"), NeRV.preset("tiny")
    sine = {"sine": True, "doubled": 2, "kernels": (1, 3)}
    ladder: list[tuple[str, Config, dict[str, Any]]] = [
        ("hnerv", plain, ADAM),
        ("+ sines, two blocks", replace(plain, **sine), ADAM),
        ("+ time", replace(plain, **sine, time=FEW), ADAM),
        ("+ loss", replace(plain, **sine, time=FEW), ADAM | {"loss": boosted_loss}),
        ("+ Adan: boost-nerv", replace(plain, **sine, time=FEW), ADAN | {"loss": boosted_loss}),
        ("nerv", indexed, ADAM),
        ("boosted nerv", replace(indexed, sine=True, time=FEW), ADAN | {"loss": boosted_loss}),
    ]
    rows, found, learners = [], {}, {}
    for name, config, settings in ladder:
        config = _no_larger(config, size)
        started = time.process_time()
        learner = _fitted(pictures, config, epochs, seed, progress, settings)
        found[name], learners[name] = learner.network.measured(pictures), learner
        rows.append({"name": name, "psnr": f"{found[name]:.2f} dB", "parameters": f"{config.parameters:,}",
                     "processor": f"{time.process_time() - started:.0f} s"})  # fmt: skip
    boosted = learners["+ Adan: boost-nerv"].network.config
    sooner = _epochs_to(pictures, boosted, found["hnerv"], epochs, seed, progress)
    rows[4]["epochs to hnerv's dB"] = f"{sooner} of {epochs}"

    learned, more, checks = _rate(pictures, learners["+ Adan: boost-nerv"].network, epochs, seed, progress)
    rows += more
    gains = found["+ Adan: boost-nerv"] - found["hnerv"], found["boosted nerv"] - found["nerv"]
    return Result(
        "boost-nerv",
        paper="HNeRV 35.1 to 37.8 dB, NeRV 29.1 to 33.7 dB at 1.5M parameters and 300 epochs (read off a plot)",
        setting=f"world flyover, 32 frames of 64x128, {epochs} epochs, batch 1, at most {size:,} parameters, "
        f"seed {seed}",
        rows=rows,
        checks=checks,
        holds=gains[0] > 0 and gains[1] > 0 and sooner < epochs and learned > 0,
        summary=f"{gains[0]:+.2f} dB over hnerv, {gains[1]:+.2f} dB over nerv (needs > 0); at 4 bits, "
        f"{learned:+.2f} dB over min-max (needs > 0)",
        notes=["equal steps, not equal time: a boosted step takes several times as long at this size"],
    )


def _no_larger(config: Config, size: int) -> Config:
    config = of_size(config, size)
    return config if config.parameters <= size else replace(config, channels=config.channels - 1)


def _fitted(
    pictures: UInt8[Tensor, "t 3 h w"],
    config: Config,
    epochs: int,
    seed: int,
    progress: Progress,
    settings: dict[str, Any],
    psnr: float | None = None,
) -> Learner:
    """A learner after its fit, without a rate stage; `psnr` ends the fit as soon as it is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = Learner(BoostNeRV(config)).to(memory_format=torch.channels_last)
    learner.network.begin_at(pictures)

    def reached(_: int) -> bool:
        learner.freeze(pictures)
        return learner.network.measured(pictures) >= psnr

    settings = settings | {"learning_rate": settings["learning_rate"](config)}
    fit(learner, pictures, epochs=epochs, batch=1, seed=seed, progress=progress,
        reached=None if psnr is None else reached, slow=learner.encoder, **settings)  # fmt: skip
    learner.freeze(pictures)
    return learner


def _epochs_to(
    pictures: UInt8[Tensor, "t 3 h w"], config: Config, psnr: float, epochs: int, seed: int, progress: Progress
) -> int:
    """Epochs of the same schedule after which the boosted decoder draws `psnr` dB."""
    done = 0

    def watch(label: str, step: int, total: int | None) -> None:
        nonlocal done
        done = step
        progress(label, step, total)

    _fitted(pictures, config, epochs, seed, watch, ADAN | {"loss": boosted_loss}, psnr)
    return math.ceil(done / len(pictures))


def _rate(
    pictures: UInt8[Tensor, "t 3 h w"], plain: BoostNeRV, epochs: int, seed: int, progress: Progress
) -> tuple[float, list[dict[str, Any]], dict[str, bool]]:
    """dB of a file of 4 bits a parameter over min-max of the fit without its rate stage; rows and exact checks."""
    config, target = plain.config, pictures.float() / 255
    goal = config.parameters // 2 + BoostNeRV.overhead
    network = BoostNeRV.fitted_to(pictures, config, epochs=epochs, target=goal, seed=seed, progress=progress)
    data = network.smallest(describe(Clip.from_tensor(pictures), "boost-nerv", {}), {}, pictures, goal, None)
    container = parse(data)
    levels = container.header.config["levels"]
    kept, back = network.as_stored(levels), BoostNeRV.from_container(container).state_dict()
    learned = float(psnr(torch.stack(list(BoostNeRV.decode(data))), target))
    # The quantiser of HNeRV, on the network that the rate stage begins with.
    levelled = sum(map(len, Fitted.pack(plain, 16).values()))
    plain.load_state_dict(Fitted.as_stored(plain, 16))
    with torch.inference_mode():
        drawn = torch.cat([plain(torch.tensor([number])) for number in range(len(pictures))])
    minmax = float(psnr(drawn, target))
    estimated, coded = _estimated(network, levels), 8 * len(container.sections["weights"])
    rows = [
        {"name": "4 bits, learned", "psnr": f"{learned:.2f} dB", "file": f"{len(data):,} bytes"},
        {"name": "4 bits, min-max", "psnr": f"{minmax:.2f} dB", "file": f"{levelled:,} bytes of weights"},
    ]
    checks = {
        "the file holds what was fitted, bit for bit": all(torch.equal(kept[name], back[name]) for name in kept),
        "the file is at most as long as asked": len(data) <= goal,
        "estimated bits within 1% of the file's": abs(estimated - coded) < 0.01 * coded,
    }
    return learned - minmax, rows, checks


@torch.no_grad()
def _estimated(network: BoostNeRV, levels: int) -> float:
    """Bits of all codes under the Gaussians of their runs, by formula."""
    bits = 0.0
    for name, value in network.state_dict().items():
        for run in network.codes(name, value, levels)[1]:
            spread = run.double().std(correction=0).clamp(min=LEAST_SPREAD)
            bits += float(gaussian_bits(run.double(), run.double().mean(), spread, 1e-12).sum())
    return bits
