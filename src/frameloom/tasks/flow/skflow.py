"""SKFlow: RAFT with large kernels: what moves far, or is hidden, is seen by one wide depthwise convolution.

Every convolution of the update block becomes a super-kernel block

    x <- gelu(x + FFN(x));  x <- gelu(x + depthwise_k(x)) for each k;  x <- gelu(x + W x);  out = FFN(x)

with k = 1 and 15 (1 and 7 in the recurrent cell); GMA's aggregation stays. Two frames, no history: here it is also the
honest baseline of `streamflow` and `videoflow`, which share its core.

Shangkun Sun, Yuanqi Chen, Yu Zhu, Guodong Guo, Ge Li, "SKFlow: Learning Optical Flow with Super Kernels",
NeurIPS 2022, arXiv 2205.14623.
"""

from dataclasses import dataclass
from pathlib import Path

from frameloom.motion.raft import RaftConfig, TwoFrame
from frameloom.tasks.flow.base import CROP, PAPER_RECIPE, RECIPE, SMALL_CROP, SMALL_SK, preset
from frameloom.tasks.flow.data import FlowBatches, batches
from frameloom.tasks.flow.published import fill
from frameloom.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """RAFT's sizes with SK blocks and aggregation."""

    cell: str = "sk"
    attention: bool = True


PRESETS = {"tiny": Config(**SMALL_SK), "paper": Config()}


class SKFlow(TwoFrame):
    """Large-kernel update blocks and aggregation; no history."""

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny` (half an hour of a core) or `paper`."""
        return preset(PRESETS, size, "skflow")

    @classmethod
    def recipe(cls, size: str) -> Recipe:
        """How a size is trained."""
        cls.preset(size)
        return RECIPE if size == "tiny" else PAPER_RECIPE

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> FlowBatches:
        """Pairs of `source`; of the world three a clip, as the methods with a history see them."""
        frames = 2 if source.startswith(("chairs", "kitti")) else 4
        return batches(source, frames, SMALL_CROP if size == "tiny" else CROP, seed)

    @classmethod
    def load_official(cls, path: Path) -> "SKFlow":
        """The network of a published checkpoint. Raises InputError for another method's or size's."""
        return fill(cls(PRESETS["paper"]), "skflow", path)
