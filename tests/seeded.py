"""Weights and pictures that are the same everywhere: from a name or a number by whole-number arithmetic.

With them a network of an author's own code and ours can be given one checkpoint and one video, each in its own place,
and only numbers need to be carried from one to the other.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) by a name; the raw stream of this generator is guaranteed never to change."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1).reshape(shape)


def tensor(name: str, *shape: int) -> Tensor:
    """A weight of that published name: of a size that keeps activations in range, none of them at a neutral value."""
    u, last = uniform(name, *shape), name.rpartition(".")[2]
    if last == "running_var" or last in ("Ds", "skip_scale", "skip_scale2"):
        u = 1 + 0.2 * u
    elif last == "A_logs":
        u = np.log(np.arange(1, shape[1] + 1)) + 0.1 * u
    elif last == "dt_projs_bias":
        u = u - 3
    elif last == "gamma":
        u = 0.5 + 0.1 * u
    elif len(shape) == 1:
        u = 0.7 + 0.3 * u if last == "weight" else 0.02 * u
    else:
        # Blocks that add to their input would grow without end, and a flow be longer than the picture.
        gain = 0.4 if "flow_head" in name else 0.9
        u = gain * u * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(u.astype(np.float32))


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A checkpoint's table: by published names, without `module.`."""
    made = {name: tensor(name, *shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    counts = {name: torch.tensor(1) for name in shapes if name.endswith("num_batches_tracked")}
    return made | counts


def video(frames: int, height: int, width: int) -> Tensor:
    """A textured picture that moves by (3, 1) pixels a frame: (frames, 3, height, width), whole numbers to 255."""
    base = ((uniform("texture", height + frames + 4, width + 3 * frames + 4, 3) + 1) * 128).astype(np.int64)
    soft = sum(base[y : y + height + frames, x : x + width + 3 * frames] for y in range(5) for x in range(5))
    soft = np.clip((soft - 25 * 128) * 5 // 25 + 128, 0, 255)
    moved = [soft[k : k + height, 3 * k : 3 * k + width] for k in range(frames)]
    return torch.from_numpy(np.stack(moved)).permute(0, 3, 1, 2).float()
