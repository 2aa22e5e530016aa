"""What a person sees while work goes on: one line in, one line of method, one bar, one line out.

Everything here goes to standard error; standard output belongs to results and to `--json`.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frameloom.progress import Progress
from frameloom.units import in_bytes


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """The one JSON object of `--json`."""
    print(json.dumps(value, indent=2, default=str))


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}")


def listen() -> None:
    """Show the library's own notes (what was left out, what was rounded) as lines of their own."""
    log = logging.getLogger("frameloom")
    log.handlers = [_Notes()]
    log.propagate = False


@contextmanager
def bar(units: str = "frames") -> Iterator[Progress]:
    """A progress bar on a terminal; nothing where standard error is piped."""
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(),
               TextColumn(units), TextColumn("{task.fields[pace]}"), TimeRemainingColumn())  # fmt: skip
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}
        begun: dict[str, tuple[float, int]] = {}

        def tell(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total, pace="")
                begun[label] = time.monotonic(), done
            start, first = begun[label]
            pace = (done - first) / max(1e-6, time.monotonic() - start)
            progress.update(tasks[label], completed=done, total=total, pace=f"{pace:.1f}/s" if done > first else "")

        yield tell


def describe(clip, name: str) -> str:
    """`holiday.mov  1920x1080  29.97 fps  2 min 11 s  h264  with sound or subtitles  turned 90°`."""
    from frameloom.video.times import show_duration, show_rate

    info = clip.info
    parts = [name, f"{info.width}x{info.height}", f"{show_rate(info.rate)} fps{'' if info.regular else ' (varies)'}",
             show_duration(float(clip.duration)), info.codec]  # fmt: skip
    if info.colour.depth > 8:
        parts.append(f"{info.colour.depth} bit")
    if clip.source.passthrough and clip.source.passthrough.sound:
        parts.append("with sound or subtitles")
    if info.orientation:
        parts.append(str(info.orientation))
    return "  ".join(part for part in parts if part)


def describe_result(path: Path, frames: int, rate, seconds: float, duration: float) -> str:
    from frameloom.video.times import show_duration, show_rate

    return (f"{path}  {frames:,} frames  {show_rate(rate)} fps  {in_bytes(path.stat().st_size)}  "
            f"{show_duration(seconds)}  ({duration / max(seconds, 1e-6):.2g}x real time)")  # fmt: skip
