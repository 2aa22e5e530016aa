"""Who does it: one unit at a time, beside its output and out of sight, until all of it is there.

A draft is a hidden folder next to the output, so that the rename at the end stays within one file system. The sidecar
takes its place just before the output does: whatever moment a worker is killed at, an output without its own sidecar
is never seen, and a sidecar without an output only means that the unit is still to be done.
"""

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from frameloom.errors import InputError
from frameloom.scale.farm.manifest import DRAFT, Unit, fingerprint, size

Perform = Callable[[Unit, Path], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: `made`, `kept` from an earlier run, or `failed` with the reason.

    `begun` is the Unix time at which the attempt that made it began, and `seconds` what that took.
    """

    input: str
    output: str
    status: str
    tries: int = 1
    frames: int | None = None
    begun: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", [], 0.0)}


@dataclass(frozen=True)
class Worker:
    """Makes the output of a unit by `perform(unit, path to write)`, which returns facts such as `frames`.

    `perform` must be importable by name. `threads` is what PyTorch may use, the same for every unit: on another number
    of threads sums can come out in another order, and the bytes of a result should not depend on how many workers
    there were. A unit is tried `tries` times, for at most `limit` seconds each time. With `gpu`, workers on a machine
    with several GPUs see one each, in turn. `check` raises InputError on a machine that would make something else.
    """

    perform: Perform
    threads: int = 1
    tries: int = 2
    limit: float | None = None
    gpu: bool = False
    preload: tuple[str, ...] = ()
    check: Callable[[Unit], None] | None = None

    def attempt(self, unit: Unit) -> dict[str, Any]:
        """Make the output in this process. Returns what `perform` said, `begun` and `seconds`.

        Raises whatever `perform` does; then there is no trace of the attempt.
        """
        import torch

        torch.set_num_threads(self.threads)
        if self.gpu and "LOCAL_RANK" in os.environ and (count := torch.cuda.device_count()) > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            os.environ["CUDA_VISIBLE_DEVICES"] = share(visible, int(os.environ["LOCAL_RANK"]))
        clock, begun = time.time(), time.perf_counter()
        if self.check is not None:
            self.check(unit)
        output = Path(unit.output)
        source = fingerprint(unit.input)
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name[:64]}.", suffix=DRAFT, dir=output.parent))
        try:
            draft = scratch / output.name
            facts = self.perform(unit, draft)
            if not draft.exists():
                raise InputError(f"{unit.output}: nothing was written")
            if (now := fingerprint(unit.input, full=False)) != {key: source[key] for key in now}:
                raise InputError(f"{unit.input}: was changed while it was read; it must be left alone")
            made = {"name": output.name, "bytes": size(draft), "frames": facts.get("frames")}
            note = {"input": source, "recipe": unit.recipe, "output": made}
            publish(draft, output, unit.sidecar, json.dumps(note, indent=2) + "\n")
        except InputError as error:  # a message is about the file that was asked for, not about its draft
            raise InputError(str(error).replace(f"{scratch}{os.sep}", f"{output.parent}{os.sep}")) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return facts | {"begun": round(clock, 3), "seconds": round(time.perf_counter() - begun, 3)}


def share(visible: str, number: int) -> str:
    """The GPU of the worker of that number: `"0,1,2"` in turn."""
    names = visible.split(",")
    return names[number % len(names)]


def publish(draft: Path, output: Path, sidecar: Path, note: str) -> None:
    """Let a finished draft and its sidecar appear, in an order that can be interrupted anywhere."""
    same = sidecar.is_file() and sidecar.read_bytes() == note.encode()
    if output.is_dir() or (output.exists() and not same):
        remove(output)
    written = draft.with_name(f"{draft.name}.sidecar")
    written.write_text(note)
    os.replace(written, sidecar)
    os.replace(draft, output)


def remove(output: Path) -> None:
    shutil.rmtree(output) if output.is_dir() else output.unlink()


def reason(error: BaseException) -> str:
    """One line about why an attempt failed."""
    if isinstance(error, InputError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def made(unit: Unit, tries: int, facts: dict[str, Any]) -> Outcome:
    return Outcome(unit.input, unit.output, "made", tries, facts.get("frames"), facts["begun"], facts["seconds"],
                   facts.get("notes", []))  # fmt: skip


def failed(unit: Unit, tries: int, error: str) -> Outcome:
    return Outcome(unit.input, unit.output, "failed", tries, error=error)
