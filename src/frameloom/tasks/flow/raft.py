"""RAFT: optical flow by looking up correlations and refining, again and again.

For anyone who wants the method that all later ones stand on. Every cell of frame 0 is correlated with every cell of
frame 1; a separable GRU reads the correlations about the present guess and adds a step to it:

    flow <- flow + head(GRU(hidden; context, motion(C[x + flow], flow)))

Two frames, no history. The machinery is `frameloom.motion.raft`.

Zachary Teed, Jia Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020, arXiv 2003.12039.
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
    """RAFT's sizes."""


PRESETS = {"tiny": Config(**SMALL), "paper": Config()}


class RAFT(TwoFrame):
    """All-pairs correlations and a recurrent cell; no attention, no history."""

    @classmethod
    def preset(cls, size: str) -> Config:
        """`tiny` (half an hour of a core) or `paper`."""
        return preset(PRESETS, size, "raft")

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
    def load_official(cls, path: Path) -> "RAFT":
        """The network of a published checkpoint. Raises InputError for another method's or size's."""
        return fill(cls(PRESETS["paper"]), "raft", path)
