"""RAFT: optical flow by looking up correlations and refining, again and again.

For anyone who wants the method that all later ones stand on. Every cell of frame 0 is correlated with every cell of
frame 1; a separable GRU reads the correlations about the present guess and adds a step to it:

    flow <- flow + head(GRU(hidden; context, motion(C[x + flow], flow)))

Two frames, no history. The machinery is `frameloom.motion.raft`.

Zachary Teed, Jia Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020, arXiv 2003.12039.
"""

from dataclasses import dataclass

from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import TwoFrame
from frameloom.tasks.flow.learned import SMALL, Learned


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """RAFT's sizes."""


PRESETS = {"tiny": Config(**SMALL), "paper": Config(refinements=20, centred=True)}


class RAFT(Learned, TwoFrame):
    """All-pairs correlations and a recurrent cell; no attention, no history."""

    id, presets = "raft", PRESETS
