"""HNeRV: a video as a small network and, for each frame, a tiny embedding that it unfolds to the frame.

For whoever wants any frame of a video in one forward pass, without the frames before it, from one file.

An encoder E maps a frame to an embedding, a decoder D maps it back; both are fitted to one video:
    minimise  mean_t | D(E(x_t)) - x_t |^2,      then keep  D and e_t = E(x_t),  quantised to 8 and 6 bits.
D is a chain of blocks  convolution -> pixel shuffle -> GELU  whose kernels grow and whose channels shrink
slowly (by 1.2 a block), which spreads the parameters evenly over the depth. The encoder is thrown away.

`NeRV` is the baseline: the same chain, fed with an encoding of the frame's number instead of an embedding.

H. Chen, M. Gwilliam, S.-N. Lim, A. Shrivastava, HNeRV: A Hybrid Neural Representation for Videos, CVPR 2023,
arXiv 2304.02633. H. Chen et al., NeRV: Neural Representations for Videos, NeurIPS 2021, arXiv 2110.13903.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from frameloom.errors import InputError
from frameloom.tasks.compression.fitted import Fitted
from frameloom.tasks.compression.nerv import Config
from frameloom.training.published import read


class HNeRV(Fitted):
    """What a file holds: the decoder's weights and the embeddings, `(t, d, rows, columns)`."""

    method: ClassVar[str] = "hnerv"
    families: ClassVar[dict[str, dict[str, Any]]] = {"hnerv": {}}

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: 32 frames of 64x128, 40 thousand parameters. `paper`: 132 of 640x1280, 1.5 million."""
        if size == "tiny":
            return Config(height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=19, lowest=8, embedding=8)
        return Config(height=640, width=1280, frames=132, strides=(5, 4, 4, 2, 2), channels=68)

    @classmethod
    def load_official(cls, path: str | Path) -> "HNeRV":
        """The network in a `quant_vid.pth` of the authors: 132 frames of 640x1280, 1.5 million parameters.

        Raises InputError that names the first key or shape that is not as published.
        """
        stored = read(path)
        if not (isinstance(stored, dict) and isinstance(stored.get("model"), dict)):
            raise InputError(f"{path}: key 'model' is missing; the official file has 'embed' and 'model'")
        with torch.device("meta"):
            network = cls(cls.preset("paper"))
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        state = {"embeddings": _official(stored.get("embed"), "embed", shapes["embeddings"], path)}
        names = {"stem": "decoder.0.conv.downconv", "head": "head_layer"} | {
            f"blocks.{k}.conv": f"decoder.{k + 1}.conv.upconv.0" for k in range(len(network.blocks))
        }
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                key = f"{theirs}.{kind}"
                state[f"{ours}.{kind}"] = _official(stored["model"].get(key), key, shapes[f"{ours}.{kind}"], path)
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False).eval()


class NeRV(Fitted):
    """The baseline: the frame's number, encoded by sines and cosines, in place of the embedding."""

    method: ClassVar[str] = "nerv"
    families: ClassVar[dict[str, dict[str, Any]]] = {"nerv": {"indexed": True, "kernels": (3, 3), "reduction": 2.0}}

    @classmethod
    def preset(cls, size: str) -> Config:
        """The sizes of `HNeRV.preset`, by NeRV's own plan of channels and kernels."""
        if size == "tiny":
            return Config(
                height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=13, lowest=8, **cls.families["nerv"]
            )
        return Config(height=640, width=1280, frames=132, strides=(5, 4, 2, 2), channels=54, **cls.families["nerv"])


def _official(entry: Any, key: str, shape: torch.Size, path: str | Path) -> Tensor:
    """One tensor of the authors' file: low + scale * symbols."""
    parts = [entry.get(part) for part in ("min", "scale", "quant")] if isinstance(entry, dict) else [None]
    if not all(isinstance(part, Tensor) for part in parts):
        raise InputError(f"{path}: key '{key}' is missing or is not a quantised tensor")
    low, scale, symbols = parts
    try:
        value = low.float() + scale.float() * symbols.float()
    except RuntimeError:
        raise InputError(f"{path}: key '{key}' has side numbers that do not fit its symbols") from None
    if value.shape != shape:
        raise InputError(f"{path}: key '{key}' has shape {tuple(value.shape)}; it must be {tuple(shape)}")
    return value
