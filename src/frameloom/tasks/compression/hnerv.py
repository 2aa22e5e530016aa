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

from frameloom.progress import Progress
from frameloom.tasks.compression.base import pack_times
from frameloom.tasks.compression.fitted import Fitted
from frameloom.tasks.compression.nerv import Config
from frameloom.tasks.compression.official import Official
from frameloom.video.clip import Clip


class Published(Fitted):
    """A method whose authors' checkpoints can be put into a file."""

    @classmethod
    def of_published(cls, clip: Clip, path: str | Path, fit: str | None, progress: Progress) -> bytes:
        """The file of a network that its authors' code fitted to the clip, whose embeddings are made here if the
        checkpoint has none. `fit` says which part of a frame the network draws, where that is not all of it.

        Raises InputError for another file, and for a clip of another size or length.
        """
        network, header = Official(cls, path).with_clip(clip, fit, progress)
        return network.to_bytes(header, pack_times(clip))

    @classmethod
    def load_official(cls, path: str | Path) -> "Published":
        """The network in a `quant_vid.pth` of the authors, of any size and length.

        Raises InputError that names the first key or shape that is not as published.
        """
        return Official(cls, path).alone()


class HNeRV(Published):
    """What a file holds: the decoder's weights and the embeddings, `(t, d, rows, columns)`."""

    method: ClassVar[str] = "hnerv"
    families: ClassVar[dict[str, dict[str, Any]]] = {"hnerv": {}}

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny`: 32 frames of 64x128, 40 thousand parameters. `paper`: 132 of 640x1280, 1.5 million."""
        if size == "tiny":
            return Config(height=64, width=128, frames=32, strides=(4, 2, 2, 2), channels=19, lowest=8, embedding=8)
        return Config(height=640, width=1280, frames=132, strides=(5, 4, 4, 2, 2), channels=68)


class NeRV(Published):
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
