"""HNeRV against NeRV at one size and one training budget, on 32 frames of 64x128.

Published at 1.5 million parameters and 300 epochs on 132 frames of 640x1280: 35.57 dB against 30.87 dB.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import skimage.data
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from frameloom.bitstream.container import parse
from frameloom.metrics import psnr
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.base import describe
from frameloom.tasks.compression.hnerv import Config, HNeRV, NeRV, solve_width
from frameloom.video.clip import Clip

PUBLISHED = {350_000: (32, 15), 750_000: (48, 30), 1_500_000: (68, 54), 3_000_000: (97, 91)}
SIZE = 40_000

_DECODE = """
import sys, torch
from frameloom.tasks.compression.base import decompress
decoded = decompress(sys.argv[1], [int(sys.argv[3])] if sys.argv[3] else None)
torch.save(decoded.bytes_tensor(), sys.argv[2])
"""


def moving_camera() -> UInt8[Tensor, "t 3 h w"]:
    """32 frames of 64x128: a camera that pans and zooms over a photograph, with a nearer layer passing faster."""
    # Halved first, so that a pixel of the clip is about one of the photograph and nothing aliases.
    far, near = (
        F.interpolate(torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255, scale_factor=0.5,
                      mode="bicubic", antialias=True)
        for photo in (skimage.data.astronaut(), skimage.data.chelsea())
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.linspace(-0.5, 0.5, 64), torch.linspace(-1, 1, 128), indexing="ij")

    def look(photo: Tensor, x: float, y: float, zoom: float) -> Tensor:
        place = torch.stack([x + zoom * columns, y + zoom * rows], -1)[None]
        return F.grid_sample(photo, place, mode="bicubic", padding_mode="reflection", align_corners=False)[0]

    frames = []
    for k in range(32):
        u = k / 31
        picture = look(far, -0.25 + 0.5 * u, -0.3 + 0.2 * u, 0.55 - 0.1 * u)
        edge = 0.9 - 1.3 * u
        inside = (((columns - edge) / 0.35) ** 2 + ((rows - 0.1) / 0.3) ** 2 < 1).float()
        layer = look(near, 0.1 + 0.1 * u - 0.5 * edge, 0.0, 0.5)
        frames.append((1 - inside) * picture + inside * layer)
    return (torch.stack(frames).clamp(0, 1) * 255).round().to(torch.uint8)


def measure(seed: int = 0, epochs: int = 150, progress: Progress = silent) -> dict[str, Any]:
    """Fit both networks, and HNeRV with NeRV's plan of kernels and channels, and measure what their files hold.

    `rows` are measured on frames decoded from the file; `checks` are true or false; `quantisation_cost` is in dB.
    """
    pictures = moving_camera()
    clip = Clip.from_tensor(pictures)
    target = pictures.float() / 255
    plain = HNeRV.preset("tiny")
    even = replace(plain, kernels=(3, 3), reduction=2.0)
    plans: list[tuple[str, type[HNeRV], Config]] = [
        ("hnerv", HNeRV, plain),
        ("nerv", NeRV, NeRV.preset("tiny")),
        ("hnerv (3,3; r=2)", HNeRV, replace(even, channels=solve_width(SIZE, even))),
    ]
    rows: list[dict[str, Any]] = []
    checks: dict[str, bool] = {}
    cost = 0.0
    for name, method, config in plans:
        started = time.perf_counter()
        network = method.fit(pictures, config, epochs=epochs, seed=seed, progress=progress)
        seconds = time.perf_counter() - started
        data = network.to_bytes(describe(clip, method.method, asdict(config)))
        decoded = torch.stack(list(method.decode(data)))
        row = {"method": name, "psnr": float(psnr(decoded, target)), "seconds": seconds, "bytes": len(data),
               "parameters": config.parameters}  # fmt: skip
        rows.append(row)
        if name == "hnerv":
            with torch.inference_mode():
                fitted = torch.cat([network(torch.tensor([k])) for k in range(len(pictures))])
            cost = float(psnr(fitted, target)) - row["psnr"]
            checks |= _file_checks(data, decoded)
    checks["widths as published"] = all(
        (_width(HNeRV, size), _width(NeRV, size)) == widths for size, widths in PUBLISHED.items()
    )
    checks["quantisation costs less than 0.3 dB"] = cost < 0.3
    by_name = {row["method"]: row["psnr"] for row in rows}
    return {
        "rows": rows[:2],
        "gain": by_name["hnerv"] - by_name["nerv"],
        "checks": checks,
        "quantisation_cost": cost,
        "ablation": {
            "rows": [rows[0], rows[2]],
            "holds": by_name["hnerv (3,3; r=2)"] < by_name["hnerv"],
        },
        "holds": by_name["hnerv"] > by_name["nerv"] and all(checks.values()),
        "seed": seed,
        "epochs": epochs,
    }


def _width(method: type[HNeRV], size: int) -> int:
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
        == {"weights", "weight_sides", "embeddings", "embedding_sides"},
    }
