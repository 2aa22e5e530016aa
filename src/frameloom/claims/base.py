"""What every claim shares: its result, how it is printed, and where it is kept."""

import importlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from frameloom.cards import card
from frameloom.errors import InputError
from frameloom.progress import Progress, silent


@dataclass
class Result:
    """A claim that was run.

    `paper` is what the paper says; `setting` what was run here; `rows` the figures of each method; `checks`
    the exact properties, by name; `holds` the verdict on the quality claim AND all checks; `summary` one line.
    """

    method: str
    paper: str
    setting: str
    rows: list[dict[str, Any]]
    checks: dict[str, bool]
    holds: bool
    summary: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holds = bool(self.holds) and all(self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        where = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {_cores()} cores"}
        return asdict(self) | where

    def lines(self) -> list[str]:
        """As a page of text."""
        out = [f"{self.method}: {self.paper}", f"  here: {self.setting}"]
        width = max(len(str(row["name"])) for row in self.rows)
        for row in self.rows:
            rest = "   ".join(f"{key} {value}" for key, value in row.items() if key != "name")
            out.append(f"  {row['name']:{width}}   {rest}")
        out.append(f"  {self.summary}   {'holds' if self.holds else 'DOES NOT HOLD'}")
        out.append("  exact   " + " · ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in self.checks.items()))
        return out + [f"  note: {note}" for note in self.notes] + [f"  {self.seconds:.0f} s"]


Claim = Callable[..., Result]


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def run_claim(
    method: str, *, seed: int = 0, retrain: bool = False, save: bool = False, progress: Progress = silent
) -> Result:
    """Run the claim of a method; with `save`, keep the result for its card and the docs.

    Raises InputError for a method whose card has no claim.
    """
    found = card(method)
    if not found.claim:
        raise InputError(f"{method}: a baseline has no claim of its own; the methods' claims run against it")
    module = importlib.import_module(f"frameloom.claims.{method.replace('-', '_')}")
    begun = time.perf_counter()
    result: Result = module.run(seed=seed, retrain=retrain, progress=progress)
    result.seconds = round(time.perf_counter() - begun, 1)
    if save:
        folder = Path(str(files("frameloom"))) / "methods" / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{method}.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    return result
