"""StreamFlow: all flows of a group at once, better behind occluders."""

import torch

from frameloom.claims.base import Result
from frameloom.claims.flow import compare
from frameloom.motion.twins import Twins
from frameloom.progress import Progress


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Against SKFlow of the same budget."""
    alone, stacked = Twins((8, 16), (1, 2)), Twins((8, 16), (1, 2), stacked=True)
    same = {k: v.shape for k, v in alone.state_dict().items()} == {k: v.shape for k, v in stacked.state_dict().items()}
    stacked.load_state_dict(alone.state_dict())
    video = torch.rand(1, 1, 3, 64, 64)
    checks = {"stacking adds no parameters": same, "one frame as without": torch.equal(alone(video), stacked(video))}
    return compare("streamflow", "skflow", "state of the art on Sintel and KITTI, 63.82% faster than other multi-frame "
                   "methods", checks, seed, retrain, progress)  # fmt: skip
