"""A whole batch: what is left to do, longest first, by one of three engines, and an account of it at the end."""

import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.scale.farm import cluster, local, torchrun
from frameloom.scale.farm.manifest import Unit, pending, sweep
from frameloom.scale.farm.worker import Outcome, Worker

ENGINES = ("local", "torchrun", "ray")
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Report:
    """What became of every unit, in the order in which it became known."""

    out: Path
    engine: str
    workers: int
    seconds: float
    outcomes: list[Outcome]

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def quarantine(self) -> Path:
        """The list of what failed; there is none where nothing did."""
        return self.out / QUARANTINE

    def as_dict(self) -> dict[str, Any]:
        counts = {status: self.count(status) for status in ("made", "kept", "failed")}
        return {"out": str(self.out), "engine": self.engine, "workers": self.workers,
                "seconds": round(self.seconds, 2)} | counts | {
                "files": [outcome.as_dict() for outcome in self.outcomes]}  # fmt: skip


def farm(
    plan: Callable[[], list[Unit]],
    worker: Worker,
    out: Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fail_fast: bool = False,
    lease: float = 30.0,
    progress: Progress = silent,
) -> Report | None:
    """Do all units that `plan` returns; under torchrun only rank 0 plans, and the other ranks return None.

    Args:
        workers: how many units at once, 2 if not said; torchrun's own --nproc-per-node decides for it.
        resume: keep outputs whose sidecar says that they are what their unit would make.
        overwrite: make outputs again that are there.
        fail_fast: stop at the first unit that has failed for good.
        lease: seconds of silence after which a rank's unit passes to another.

    Raises:
        InputError: as `manifest.pending` does, or the engine cannot start; nothing has been done then.
        Interrupted: Ctrl-C, or the store of the ranks is gone.
    """
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: there are {', '.join(ENGINES)}")
    if workers is not None and (workers < 1 or engine == "torchrun"):
        raise InputError(f"--workers {workers}: torchrun's --nproc-per-node says how many" if engine == "torchrun" else
                         f"--workers {workers}: how many files at once, 1 or more")  # fmt: skip
    if lease < 1:
        raise InputError(f"--lease {lease:g}: seconds of silence, 1 or more")
    if engine == "ray":
        cluster.check(worker)
    shared = None
    if engine == "torchrun":
        shared = torchrun.SharedList(*torchrun.connect(), lease, worker.tries)
        if shared.rank:
            return torchrun.follow(worker, shared, fail_fast)
        resume, workers = resume or torchrun.restarted(), shared.world
    workers = workers or 2
    begun = time.monotonic()
    try:
        units = plan()
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out), _swept(units):
            todo, kept = pending(units, resume, overwrite)
            todo = _longest_first(todo, worker.preload)
            outcomes = [Outcome(unit.input, unit.output, "kept", 0) for unit in kept]
            progress("files", len(kept), len(units))
            if shared is not None:
                shared.publish(todo)
                outcomes += torchrun.lead(worker, shared, fail_fast,
                                          lambda done: progress("files", len(kept) + done, len(units)))  # fmt: skip
            else:
                engine_run = local.run if engine == "local" else cluster.run
                with closing(engine_run(worker, todo, workers)) as work:
                    for outcome in work:
                        outcomes.append(outcome)
                        progress("files", len(outcomes), len(units))
                        if fail_fast and outcome.status == "failed":
                            break
            report = Report(out, engine, workers, time.monotonic() - begun, outcomes)
            quarantine(report, todo)
    except KeyboardInterrupt:
        raise Interrupted(f"{out}: stopped; what is made is kept, the same command with --resume goes on") from None
    except BaseException:
        if shared is not None:
            shared.abandon()
        raise
    return report


def _longest_first(units: list[Unit], preload: tuple[str, ...]) -> list[Unit]:
    """Graham's LPT rule: begun in this order, the last to finish is at most 4/3 - 1/(3 workers) of the best possible.

    R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969).
    """
    costs = local.costs([unit.input for unit in units], preload)
    costed = [replace(unit, cost=cost) for unit, cost in zip(units, costs, strict=True)]
    return sorted(costed, key=lambda unit: -unit.cost)


def quarantine(report: Report, units: list[Unit]) -> None:
    """List what failed, with the reason; the list is one that a batch takes. No list is left where nothing failed."""
    path = report.quarantine
    if not report.failures:
        path.unlink(missing_ok=True)
        return
    arguments = {unit.output: list(unit.arguments) for unit in units}
    rows = [{"input": os.path.abspath(outcome.input), "output": os.path.relpath(outcome.output, report.out),
             "options": shlex.join(arguments[outcome.output]), "error": outcome.error, "tries": outcome.tries}
            for outcome in sorted(report.failures, key=lambda outcome: outcome.output)]  # fmt: skip
    draft = path.with_name(f".{QUARANTINE}.draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(draft, path)


@contextmanager
def _swept(units: list[Unit]) -> Iterator[None]:
    """No drafts of workers that were killed, neither of an earlier run nor of this one."""
    sweep(units)
    try:
        yield
    finally:
        sweep(units)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder; the lock goes with the process, however that ends."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"--out {out}: another batch is at work there; wait for it, or give another folder"
            ) from None
        yield
    finally:
        os.close(handle)
