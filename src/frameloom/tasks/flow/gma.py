"""GMA: RAFT for hidden motion: a cell that cannot be matched borrows the motion of cells that look like it.

    aggregated = motion + gamma softmax(q k^T / sqrt(d)) v(motion),   q, k from the context, gamma starting at 0

Two frames, no history: here it is also the honest baseline of `splatflow`, which shares its core.

Shihao Jiang, Dylan Campbell, Yao Lu, Hongdong Li, Richard Hartley, "Learning to Estimate Hidden Motions with Global
Motion Aggregation", ICCV 2021, arXiv 2104.02409.
"""

from dataclasses import dataclass
from pathlib import Path

from frameloom.motion.raft import RaftConfig, TwoFrame
from frameloom.tasks.flow.base import CROP, PAPER_RECIPE, RECIPE, SMALL, SMALL_CROP, preset
from frameloom.tasks.flow.data import FlowBatches, batches
from frameloom.tasks.flow.published import fill
from frameloom.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """RAFT's sizes with aggregation."""

    attention: bool = True


PRESETS = {"tiny": Config(**SMALL), "paper": Config()}


class GMA(TwoFrame):
    """RAFT whose cells borrow motion from cells that look alike; no history."""

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny` (half an hour of a core) or `paper`."""
        return preset(PRESETS, size, "gma")

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
    def load_official(cls, path: Path) -> "GMA":
        """The network of a published checkpoint. Raises InputError for another method's or size's."""
        return fill(cls(PRESETS["paper"]), "gma", path)
