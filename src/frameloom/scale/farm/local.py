"""Processes on this machine: one for every attempt, so that a decoder that crashes takes one attempt with it.

Importing PyTorch is paid once: the processes are forked from a server that has done so. Nothing of a file's decoder
outlives the file, so that memory cannot grow over a long list.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from typing import Any

from frameloom.scale.farm.manifest import Unit
from frameloom.scale.farm.worker import Outcome, Worker, failed, made, reason


class Died(Exception):
    """A process ended without an answer, or was stopped because it took too long."""


class _Child:
    """`function(item)` in a process of its own."""

    def __init__(self, function: Callable[[Any], Any], item: Any, slot: int, limit: float | None,
                 preload: tuple[str, ...]) -> None:  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__, *preload])
        self.item, self.slot, self.limit = item, slot, limit
        self.end, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(theirs, function, item, slot), daemon=True)
        with _without_main():
            self.process.start()
        self.deadline = time.monotonic() + limit if limit else float("inf")
        theirs.close()

    def answer(self) -> Any:
        """What it returned; raises `Died`. Call it when `end` is ready, or the deadline has passed."""
        if not self.end.poll():
            raise Died(f"took longer than {self.limit:g} s")
        try:
            good, value = self.end.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            death = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
            raise Died(f"its process died: {death}") from None
        if not good:
            raise Died(value)
        return value

    def stop(self, patience: float = 0.0) -> None:
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.end.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes started here do not run the caller's script again, which need not guard itself against that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(end: Any, function: Callable[[Any], Any], item: Any, slot: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to everybody; who started us decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.setdefault("LOCAL_RANK", str(slot))  # which of those on this machine; torchrun has said so already
    try:
        answer = True, function(item)
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent tells it
        answer = False, reason(error)
    end.send(answer)
    end.close()
    os._exit(0)  # what a decoder left behind is not worth waiting for


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def each(function: Callable[[Any], Any], items: Iterator[Any], processes: int, limit: float | None = None,
         preload: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """`function` of every item, each in a process of its own, at most so many at once, as they finish.

    Yields (item, what was returned, or `Died`). Items are asked for only when a process may have one.
    """
    running: list[_Child] = []
    more = True
    try:
        while running or more:
            while more and len(running) < processes:
                item = next(items, None)
                if item is None:
                    more = False
                else:
                    slot = min(set(range(processes)) - {child.slot for child in running})
                    running.append(_Child(function, item, slot, limit, preload))
            if not running:
                continue
            patience = min(child.deadline for child in running) - time.monotonic()
            ready = wait([child.end for child in running], None if patience == float("inf") else max(0.0, patience))
            now = time.monotonic()
            for child in [c for c in running if c.end in ready or c.deadline <= now]:
                try:
                    answer = child.answer()
                except Died as death:
                    answer = death
                child.stop(patience=0.0 if isinstance(answer, Died) else 5.0)
                running.remove(child)
                # Whoever listens may have another try to make of it: look again before saying that nothing is left.
                more = True
                yield child.item, answer
    finally:
        for child in running:
            child.stop()


def run(worker: Worker, units: Iterable[Unit], processes: int) -> Iterator[Outcome]:
    """Every unit's outcome as it is known; a unit that failed is tried again before new ones are begun."""
    again: deque[tuple[Unit, int]] = deque()
    fresh = ((unit, 1) for unit in units)

    def queue() -> Iterator[tuple[Unit, int] | None]:
        while True:
            yield again.popleft() if again else next(fresh, None)

    with closing(each(_Attempt(worker), queue(), processes, worker.limit, worker.preload)) as answers:
        for (unit, tries), answer in answers:
            if not isinstance(answer, Died):
                yield made(unit, tries, answer)
            elif tries < worker.tries:
                again.append((unit, tries + 1))
            else:
                yield failed(unit, tries, str(answer))


class _Attempt:
    """A worker's attempt at a (unit, try), as a function that can be sent to a process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __call__(self, item: tuple[Unit, int]) -> dict[str, Any]:
        return self.worker.attempt(item[0])


def headers(paths: list[str]) -> list[float]:
    """About how much work is in each file: pixels of all frames by its header, else its bytes."""
    return [_cost(path) for path in paths]


def costs(paths: list[str], preload: tuple[str, ...] = (),
          look: Callable[[list[str]], list[float]] = headers) -> list[float]:  # fmt: skip
    """`look(paths)`, in another process: a header can crash a decoder, or hang it. Where it does, in two halves."""
    if not paths:
        return []
    [(_, found)] = each(look, iter([paths]), 1, 60.0 + len(paths), preload)
    if not isinstance(found, Died):
        return found
    if len(paths) == 1:
        return [0.0]
    half = len(paths) // 2
    return costs(paths[:half], preload, look) + costs(paths[half:], preload, look)


def _cost(path: str) -> float:
    import av

    try:
        with av.open(path, metadata_errors="ignore") as file:
            stream = file.streams.video[0]
            seconds = float(file.duration / av.time_base) if file.duration else 0.0
            frames = stream.frames or seconds * float(stream.average_rate or 25)
            return float(frames * stream.width * stream.height)
    except (av.error.FFmpegError, OSError, IndexError):
        return float(os.path.getsize(path)) if os.path.isfile(path) else 0.0
