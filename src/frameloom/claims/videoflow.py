"""VideoFlow: every centre hears of one more frame either side at each iteration."""

import torch

from frameloom.claims.base import Result
from frameloom.claims.flow import compare
from frameloom.progress import Progress
from frameloom.tasks.flow.videoflow import VideoFlow


@torch.no_grad()
def reach() -> bool:
    """After one iteration a centre depends on its two neighbours and on nothing further."""
    model = VideoFlow(VideoFlow.preset("tiny")).eval()
    video = torch.rand(1, 7, 3, 32, 48)
    other = video.clone()
    other[:, [0, 1, 5, 6]] = torch.rand(1, 4, 3, 32, 48)
    first, second = (model(clip, 1, last=True)[0][0][:, 2] for clip in (video, other))
    return torch.equal(first, second)


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Against SKFlow of the same budget."""
    return compare("videoflow", "skflow", "Sintel 0.991 / 1.649, 7.6% / 15.1% lower errors than the best before",
                   {"one frame an iteration": reach()}, seed, retrain, progress)  # fmt: skip
