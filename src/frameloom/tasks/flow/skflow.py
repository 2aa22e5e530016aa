"""SKFlow: RAFT with large kernels: what moves far, or is hidden, is seen by one wide depthwise convolution.

Every convolution of the update block becomes a super-kernel block

    x <- gelu(x + FFN(x));  x <- gelu(x + depthwise_k(x)) for each k;  x <- gelu(x + W x);  out = FFN(x)

with k = 1 and 15 (1 and 7 in the recurrent cell); GMA's aggregation stays. Two frames, no history: here it is also the
honest baseline of `streamflow` and `videoflow`, which share its core.

Shangkun Sun, Yuanqi Chen, Yu Zhu, Guodong Guo, Ge Li, "SKFlow: Learning Optical Flow with Super Kernels",
NeurIPS 2022, arXiv 2205.14623.
"""

from dataclasses import dataclass

from frameloom.motion.config import RaftConfig
from frameloom.motion.raft import TwoFrame
from frameloom.tasks.flow.learned import RECIPE_SK, SMALL_SK, Learned


@dataclass(frozen=True, kw_only=True)
class Config(RaftConfig):
    """RAFT's sizes with SK blocks and aggregation."""

    cell: str = "sk"
    attention: bool = True


PRESETS = {"tiny": Config(**SMALL_SK), "paper": Config(refinements=15, centred=True)}


class SKFlow(Learned, TwoFrame):
    """Large-kernel update blocks and aggregation; no history."""

    id, presets, tiny_recipe = "skflow", PRESETS, RECIPE_SK
