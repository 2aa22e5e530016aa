"""What a sampling run knows of itself: the step it is at, the branch it is in, what hooks and solvers remember."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from frameloom.diffusion.paths import Path
from frameloom.diffusion.predict import Prediction


@dataclass
class Report:
    """Counted while sampling: evaluations per branch (an example each), launches of the network, frames that it saw."""

    evaluations: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    frames: int = 0
    cache_hits: int = 0

    @property
    def nfe(self) -> int:
        """Network evaluations a sample: a pair of branches counts two even when it runs as one batch."""
        return sum(self.evaluations.values())


@dataclass
class Ctx:
    """One run of the loop. Step `i` of `n` goes from time `t` to `s`; `state` is what guides, solvers and hooks keep.

    `remember` gives a hook a place of its own for every site and branch: sharing one between the conditional and the
    unconditional branch is the classic mistake of caches.
    """

    path: Path
    n: int
    i: int = 0
    t: Tensor | None = None
    s: Tensor | None = None
    y: Tensor | None = None
    branch: str = ""
    noise: Callable[[Tensor, "Ctx"], Tensor] | None = None
    evaluate: Callable[[Tensor, Tensor], Prediction] | None = None
    state: dict[Any, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    @property
    def fraction(self) -> float:
        """How much of the run is done, in [0, 1)."""
        return self.i / max(self.n, 1)

    def remember(self, hook: object, site: str = "") -> dict[str, Any]:
        """What `hook` keeps at `site` in the present branch."""
        return self.state.setdefault((id(hook), site, self.branch), {})

    @contextmanager
    def within(self, branch: str) -> Iterator[None]:
        before, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = before


_CURRENT: ContextVar[Ctx | None] = ContextVar("frameloom_sampling", default=None)


def current() -> Ctx | None:
    """The run that is under way in this thread, or None."""
    return _CURRENT.get()


@contextmanager
def running(ctx: Ctx) -> Iterator[Ctx]:
    """Make `ctx` the current run."""
    token = _CURRENT.set(ctx)
    try:
        yield ctx
    finally:
        _CURRENT.reset(token)
