"""SplatFlow: the motion of the pair before helps where a pixel is hidden."""

import torch

from frameloom.claims.base import Result
from frameloom.claims.flow import compare
from frameloom.progress import Progress
from frameloom.tasks.flow.splatflow import State, aligned


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Against plain GMA of the same budget."""
    motion, flow = torch.rand(1, 4, 5, 6), torch.zeros(1, 2, 5, 6)
    flow[:, 0] = 2
    exact = torch.equal(aligned(State(motion, flow))[..., 2:], motion[..., :-2])
    return compare("splatflow", "gma", "Sintel 1.12 / 2.07, 19.4% / 16.2% lower errors than the best before",
                   {"whole flows move features exactly": exact}, seed, retrain, progress)  # fmt: skip
