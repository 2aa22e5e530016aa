"""What every flow network tells the trainer and the loader: its sizes, its recipe, its data, its published files."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from frameloom.motion.raft import RaftCore
from frameloom.tasks.flow.data import FlowBatches, batches
from frameloom.tasks.flow.published import fill, plain
from frameloom.training.recipe import Recipe
from frameloom.training.sizes import Sized

# What a core can train in a quarter of an hour. Stride 4: at this budget finer cells are worth more than width.
SMALL: dict[str, Any] = {
    "stride": 4, "stem": (16, 24, 32), "features": 48, "hidden": 32, "context": 32, "motion": (48, 40, 24, 16, 32),
    "mask": 64, "radius": 2, "levels": 3, "iterations": 4, "refinements": 6, "context_norm": "instance",
    "begins": "dis", "trust": 0.25, "stress": 10.0,
}  # fmt: skip
SMALL_SK = SMALL | {"encoder": "twins", "stem": (48, 48), "heads": (2, 2), "kernels": (1, 7), "cell_kernels": (1, 7)}
# One budget for a core and all that is built on it, so that claims compare methods and not patience.
RECIPE = Recipe(steps=1000, batch_size=3, lr=1.2e-3, final_lr=1e-5, warmup=100, hold=0.4, weight_decay=1e-5, ema=0.995,
                bf16=True)  # fmt: skip
RECIPE_SK = replace(RECIPE, steps=2400)
PAPER_RECIPE = Recipe(steps=100_000, batch_size=8, lr=2.5e-4, warmup=5000, weight_decay=1e-4)
SMALL_CROP, CROP = (64, 96), (432, 960)


class Learned(Sized):
    """A network with sizes. A method says its `id`, its `presets` and, where they differ, the rest."""

    tiny_recipe: ClassVar[Recipe] = RECIPE
    paper_recipe: ClassVar[Recipe] = PAPER_RECIPE

    @classmethod
    def recipe(cls, size: str) -> Recipe:
        """How a size is trained."""
        cls.preset(size)
        return cls.tiny_recipe if size.startswith("tiny") else cls.paper_recipe

    @classmethod
    def dataset(cls, source: str, size: str, seed: int) -> FlowBatches:
        """Clips of `source`, as long as the configuration says; for two frames at a time, of several pairs.

        Raises InputError for a source that there is not; see `frameloom.tasks.flow.data.batches`.
        """
        pairs = 2 if source.startswith(("chairs", "kitti")) else 4
        frames = getattr(cls.preset(size), "frames", pairs)
        return batches(source, frames, SMALL_CROP if size.startswith("tiny") else CROP, seed)

    @classmethod
    def load_official(cls, path: Path) -> RaftCore:
        """The network of a published checkpoint. Raises InputError for another method's or size's."""
        return fill(lambda: cls(cls.presets["paper"]), cls.id, path, cls.renamed)

    @staticmethod
    def renamed(key: str) -> str | None:
        """The name here of a published tensor; None for what the network never uses."""
        return plain(key)
