"""Methods that come in sizes: which there are, and how each is trained."""

from collections.abc import Mapping
from typing import Any, ClassVar

from frameloom.errors import InputError
from frameloom.training.recipe import Recipe


class Sized:
    """A method with sizes. It says its `id`, its `presets`, and of each its recipe in `recipes`."""

    id: ClassVar[str]
    presets: ClassVar[Mapping[str, Any]]
    recipes: ClassVar[Mapping[str, Recipe]]

    @classmethod
    def preset(cls, size: str) -> Any:
        """The configuration of a size, `tiny` (what ships), `paper` or one that the method adds.

        Raises InputError for one that there is not.
        """
        if size not in cls.presets:
            raise InputError(f"--size {size}: no such size of {cls.id}; there are {', '.join(cls.presets)}")
        return cls.presets[size]

    @classmethod
    def recipe(cls, size: str) -> Recipe:
        """How a size is trained. Raises InputError for a size that there is not."""
        cls.preset(size)
        return cls.recipes[size]

    @classmethod
    def needs_world(cls, source: str, why: str = "") -> None:
        """Raises InputError unless the data are the synthetic world's."""
        if source != "world":
            raise InputError(f"--data {source}: {cls.id} learns from {why or 'world'}; give --data world")
