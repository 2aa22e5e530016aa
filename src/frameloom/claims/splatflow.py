"""SplatFlow: the motion of the pair before helps where a pixel is hidden."""

from itertools import pairwise

import torch
from torch import Tensor

from frameloom.claims.base import Result
from frameloom.claims.flow import compare
from frameloom.progress import Progress
from frameloom.tasks.flow.splatflow import SplatFlow, State, aligned


def run(*, seed: int, retrain: bool, progress: Progress) -> Result:
    """Against plain GMA of the same budget."""
    motion, flow = torch.rand(1, 4, 5, 6), torch.zeros(1, 2, 5, 6)
    flow[:, 0] = 2
    exact = torch.equal(aligned(State(motion, flow))[..., 2:], motion[..., :-2])
    return compare("splatflow", "gma", "Sintel 1.12 / 2.07, 19.4% / 16.2% lower errors than the best before",
                   {"whole flows move features exactly": exact}, seed, retrain, progress, control)  # fmt: skip


def control(model: SplatFlow, scenes: dict[str, Tensor]) -> str:
    """What is left of the gain with no history, and with that of another clip."""
    video, said = scenes["rgb"].clone(), []
    for name in ("its own", "no", "another clip's"):
        state, found = None, []
        for first, second in pairwise(video.unbind(1)):
            if state is not None and name != "its own":
                state = None if name == "no" else State(state.motion.roll(1, 0), state.flow.roll(1, 0), state.features)
            flow, state = model.step(first, second, state)
            found.append(flow)
        # The first pair has no history in any case.
        distance = torch.linalg.vector_norm(torch.stack(found, 1) - scenes["flow"], dim=2)[:, 1:]
        said.append(f"{distance[scenes['occlusion'][:, 1:, 0].bool()].mean():.3f} px with {name} history")
    return f"occluded error after the first pair: {', '.join(said)}"
