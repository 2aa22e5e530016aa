"""What the claims of the flow methods share: held-out scenes of the world, and a method beside its two-frame core."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from frameloom.claims.base import Result
from frameloom.progress import Progress
from frameloom.tasks.flow.base import FlowEstimator, estimate
from frameloom.tasks.interpolation.dis import DIS
from frameloom.training import load, train
from frameloom.training.pretrained import shipped
from frameloom.world import WorldDataset


def held_out(seed: int, clips: int = 12, frames: int = 7) -> dict[str, Tensor]:
    """Scenes that training never draws, 128x96, bodies up to 8 pixels a frame."""
    data = WorldDataset("motion", frames, 96, 128, seed=900_000 + seed, length=clips, motion=8.0, supersample=2,
                        outputs=("rgb", "flow", "occlusion"))  # fmt: skip
    return data.batch(range(clips))


def errors(method: FlowEstimator, scenes: dict[str, Tensor]) -> dict[str, float]:
    """Mean endpoint error in pixels over all, matched and occluded pixels."""
    found = estimate(method, scenes["rgb"].clone())
    distance = torch.linalg.vector_norm(found.fwd - scenes["flow"], dim=2)[found.valid]
    hidden = scenes["occlusion"][:, :, 0][found.valid].bool()
    return {"all": float(distance.mean()), "matched": float(distance[~hidden].mean()),
            "occluded": float(distance[hidden].mean())}  # fmt: skip


def compare(
    method: str, core: str, paper: str, checks: dict[str, bool], seed: int, retrain: bool, progress: Progress,
    note: Callable[[FlowEstimator, dict[str, Tensor]], str] | None = None,
) -> Result:  # fmt: skip
    """A method against its core (same steps, batch, crops and scenes) and DIS; weights that do not ship are trained.

    `note` says more of the method on the scenes.
    """
    scenes, models = held_out(seed), {"dis": DIS()}
    for name in (core, method):
        if shipped(name) and not retrain:
            models[name] = load(name)
            continue
        with tempfile.TemporaryDirectory() as folder:
            models[name] = load(name, train(name, folder, seed=seed, progress=progress))
    found = {name: errors(model, scenes) for name, model in models.items()}
    gain = 1 - found[method]["occluded"] / found[core]["occluded"]
    lead = 1 - found[method]["all"] / found["dis"]["all"]
    return Result(
        method,
        paper=paper,
        setting=f"12 held-out world clips of 7 frames, 128x96, seed {seed}; both networks tiny, same budget",
        rows=[{"name": name} | {part: f"{value:.3f} px" for part, value in row.items()} for name, row in found.items()],
        checks=checks,
        holds=gain >= 0.2 and lead > 0,
        summary=f"occluded error {100 * gain:+.1f}% lower than {core} (needs >= 20), in all {100 * lead:+.1f}% lower "
        "than dis (needs > 0)",
        notes=[] if note is None else [note(models[method], scenes)],
    )
