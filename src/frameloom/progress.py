"""How long work tells of itself: one function, so that a bar, a log or nothing can listen."""

from collections.abc import Callable

# (what is going on, units done, units in all or None when nobody knows)
Progress = Callable[[str, int, int | None], None]


def silent(label: str, done: int, total: int | None) -> None:
    """Listens to nothing."""
