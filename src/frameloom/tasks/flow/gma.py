"""GMA: RAFT for hidden motion: a cell that cannot be matched borrows the motion of cells that look like it.

    aggregated = motion + gamma softmax(q k^T / sqrt(d)) v(motion),   q, k from the context, gamma starting at 0

Two frames, no history: here it is also the honest baseline of `splatflow`, which shares its core.

Shihao Jiang, Dylan Campbell, Yao Lu, Hongdong Li, Richard Hartley, "Learning to Estimate Hidden Motions with Global
Motion Aggregation", ICCV 2021, arXiv 2104.02409.
"""

from dataclasses import dataclass

from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import TwoFrame
from frameloom.tasks.flow.learned import SMALL, Learned


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """RAFT's sizes with aggregation."""

    attention: bool = True


PRESETS = {"tiny": Config(**SMALL), "paper": Config(centred=True)}


class GMA(Learned, TwoFrame):
    """RAFT whose cells borrow motion from cells that look alike; no history."""

    id, presets = "gma", PRESETS
