"""HNeRV against NeRV at one size and one budget, on four clips of 32 frames of 64x128.

Published at 1.5 million parameters and 300 epochs on 132 frames of 640x1280: 35.57 dB against 30.87 dB.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frameloom.bitstream.container import parse
from frameloom.claims.base import Result
from frameloom.metrics import psnr
from frameloom.progress import Progress
from frameloom.tasks.compression.base import describe
from frameloom.tasks.compression.fitted import Fitted
from frameloom.tasks.compression.hnerv import HNeRV, NeRV
from frameloom.tasks.compression.nerv import Config, of_size, solve_width
from frameloom.video.clip import Clip
from frameloom.world.world import World

PUBLISHED = {350_000: (32, 15), 750_000: (48, 30), 1_500_000: (68, 54), 3_000_000: (97, 91)}
# The gain at this size that the claim asks for, in dB.
NEEDED = 2.0

_DECODE = """
import sys, torch
from frameloom.tasks.compression.base import decompress
decoded = decompress(sys.argv[1], [int(sys.argv[3])] if sys.argv[3] else None)
torch.save(decoded.bytes_tensor(), sys.argv[2])
"""


def run(*, seed: int, retrain: bool, progress: Progress, epochs: int = 300) -> Result:
    """Fit both networks to every clip, and to the first also HNeRV with NeRV's kernels and channels; read the files.

    One clip says little: a fit's result moves by half a decibel with nothing but its random numbers, and the gain by
    twice that from clip to clip. So the mean is judged. Rows are measured on frames decoded from the files. Everything
    is fitted anew each time, so `retrain` changes nothing.
    """
    plain = HNeRV.preset("tiny")
    even = of_size(replace(plain, kernels=(3, 3), reduction=2.0), plain.parameters)
    rows: list[dict[str, Any]] = []
    gains: list[float] = []
    checks: dict[str, bool] = {}

    def fitted(name: str, method: type[Fitted], config: Config, pictures: Tensor, clip: str) -> tuple[float, tuple]:
        started = time.perf_counter()
        network = method.fitted_to(pictures, config, epochs=epochs, seed=seed, progress=progress)
        seconds = time.perf_counter() - started
        data = network.to_bytes(describe(Clip.from_tensor(pictures), method.method, {}))
        decoded = torch.stack(list(method.decode(data)))
        found = float(psnr(decoded, pictures.float() / 255))
        rows.append({"name": name, "clip": clip, "psnr": f"{found:.2f} dB", "parameters": f"{config.parameters:,}",
                     "file": f"{len(data):,} bytes", "fit": f"{seconds:.0f} s"})  # fmt: skip
        return found, (network, data, decoded)

    for kind, scene in clips(seed):
        rendered = World(kind, [scene], frames=32).render(64, 128)["rgb"][0]
        shown = (rendered * 255).round().to(torch.uint8), f"{kind} {scene}"
        before, _ = fitted("nerv", NeRV, NeRV.preset("tiny"), *shown)
        after, made = fitted("hnerv", HNeRV, plain, *shown)
        gains.append(after - before)
        if len(gains) == 1:
            evenly, _ = fitted("hnerv (3,3; r=2)", HNeRV, even, *shown)
            checks = _checks(*made, shown[0].float() / 255) | {"hnerv (3,3; r=2) is worse": evenly < after}
    gain = sum(gains) / len(gains)
    return Result(
        "hnerv",
        paper="+4.70 dB over NeRV at 1.5M parameters, 300 epochs, 132 frames of 640x1280",
        setting=f"{len(gains)} clips of the world, 32 frames of 64x128, {epochs} epochs, batch 2, seed {seed}",
        rows=rows,
        checks=checks,
        holds=gain > NEEDED,
        summary=f"{gain:+.2f} dB over nerv on the mean of {len(gains)} clips (needs > {NEEDED:g}), from "
        f"{min(gains):+.2f} to {max(gains):+.2f}",
    )


def clips(seed: int) -> list[tuple[str, int]]:
    """Kind and number of the scenes: flights over photographs, and textured bodies in front of a moving camera."""
    return [(kind, 2 * seed + number) for kind in ("flyover", "motion") for number in range(2)]


def _checks(network: Fitted, data: bytes, decoded: Tensor, target: Tensor) -> dict[str, bool]:
    """What must be so of a fitted network and its file, however good the pictures are."""
    count = len(target)
    with torch.inference_mode():
        fitted = torch.cat([network(torch.tensor([k])) for k in range(count)])
        permuted = network(torch.arange(count).flip(0))
    stored = float(psnr(decoded, target))
    return {
        "quantisation costs < 0.3 dB": float(psnr(fitted, target)) - stored < 0.3,
        "a frame comes from its own embedding": bool(psnr(permuted, target) < stored - 3),
        "widths as published": all(
            (_width(HNeRV, size), _width(NeRV, size)) == widths for size, widths in PUBLISHED.items()
        ),
        **_file_checks(data, decoded),
    }


def _width(method: type[Fitted], size: int) -> int:
    return solve_width(size, method.preset("paper"))


def _file_checks(data: bytes, decoded: Tensor) -> dict[str, bool]:
    """What a decoder that has the file and nothing else gives, and how long the file is."""
    container = parse(data)
    sections = HNeRV.inspect(data)["sections"]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "clip.flm"), Path(folder, "frames.pt")
        file.write_bytes(data)

        def elsewhere(frame: str) -> Tensor:
            subprocess.run([sys.executable, "-c", _DECODE, file, out, frame], check=True)
            return torch.load(out, weights_only=True)

        everything, alone = elsewhere(""), elsewhere("17")
    return {
        "a fresh process decodes the same frames": bool(torch.equal(everything, (decoded * 255).round().byte())),
        "frame 17 alone is frame 17 of all": bool(torch.equal(alone[0], everything[17])),
        "the file is its header and sections": (
            sections["header"]["bytes"] + sum(map(len, container.sections.values())) == len(data)
        ),
        "the encoder is not in the file": set(container.sections)
        == {"weights", "weights_sides", "embeddings", "embeddings_sides"},
    }
