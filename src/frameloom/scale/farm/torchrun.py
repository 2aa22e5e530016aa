"""Ranks that torchrun started, on one machine or many, sharing one list through torch's rendezvous store.

Rank 0 writes the list. Every rank takes the next number from an atomic counter, does that unit in a process of its own
as on one machine, and notes the outcome. A rank shows that it lives by a counter that it moves on every few seconds.
When the list is at its end, ranks look for units without an outcome: where the holder's counter has stood still for a
lease, as the looker's own clock measures it, the unit passes to whoever exchanges the holder's name first.

torchrun itself stops every rank when one dies, and with --max-restarts starts all of them again: outcomes are read
from the sidecars then. Leases are for ranks that fall silent, and for starters that let the others live.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

from frameloom.errors import InputError, Interrupted
from frameloom.scale.farm.local import run as run_here
from frameloom.scale.farm.manifest import Unit
from frameloom.scale.farm.worker import Outcome, Worker, failed

if TYPE_CHECKING:
    from torch.distributed import Store

PIECE = 1000  # units in one message
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def restarted() -> bool:
    """Whether torchrun starts this rank again after one of the ranks had died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def connect() -> tuple["Store", int, int]:
    """The store that torchrun's ranks share, this rank, and how many there are."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(f"--engine torchrun: {', '.join(missing)} not set; start it as torchrun --nproc-per-node 2 "
                         "-m frameloom batch ... --engine torchrun")  # fmt: skip
    from torch.distributed import DistError, PrefixStore, rendezvous

    try:
        store, rank, world = next(rendezvous("env://"))
    except (DistError, ValueError, OSError) as error:
        raise InputError(
            f"--engine torchrun: no store at MASTER_ADDR:MASTER_PORT ({error}); torchrun sets them"
        ) from None
    return PrefixStore(f"batch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, world


class SharedList:
    """Units in a store, taken by ranks under a lease of so many seconds."""

    def __init__(self, store: "Store", rank: int, world: int, lease: float, tries: int = 2) -> None:
        self.store, self.rank, self.world, self.lease, self.tries = store, rank, world, lease, tries
        self._hold([])
        self._watched: dict[str, tuple[bytes, float]] = {}

    def publish(self, units: list[Unit]) -> None:
        """Rank 0 gives out the list: every recipe once, and units in pieces, for a store does not take any length."""
        self._hold(units)
        recipes = list({json.dumps(unit.recipe): None for unit in units})
        number = {text: k for k, text in enumerate(recipes)}
        rows = [(unit.input, unit.output, unit.arguments, number[json.dumps(unit.recipe)]) for unit in units]
        for first in range(0, len(rows), PIECE):
            self.store.set(f"units/{first}", json.dumps(rows[first : first + PIECE]))
        self.store.set("units", json.dumps({"count": len(rows), "recipes": [json.loads(text) for text in recipes]}))

    def abandon(self) -> None:
        """Rank 0 has no list, or cannot go on: the others are to leave."""
        with suppress(RuntimeError):
            self.store.set("units", "null")
            self.stop()

    def receive(self) -> bool:
        """The other ranks wait for it. False if there is none."""
        head = json.loads(self.store.get("units"))
        units = []
        for first in range(0, head["count"] if head else 0, PIECE):
            for source, output, arguments, number in json.loads(self.store.get(f"units/{first}")):
                units.append(Unit(source, output, tuple(arguments), head["recipes"][number]))
        self._hold(units)
        return head is not None

    def _hold(self, units: list[Unit]) -> None:
        self.units, self._numbers = units, {unit.output: number for number, unit in enumerate(units)}

    def take(self) -> Iterator[Unit]:
        """Units for this rank, until all have an outcome or somebody has called for a stop."""
        while not self.stopped and (number := self.store.add("cursor", 1) - 1) < len(self.units):
            self.store.set(f"holder/{number}", f"{self.rank} 1")
            yield self.units[number]
        while not self.stopped and (left := self._open()):
            for number in left:
                if self._lost(number) and self._take_over(number):
                    yield self.units[number]
            time.sleep(min(0.2, self.lease / 10))

    @property
    def stopped(self) -> bool:
        return self.store.check(["stop"])

    def stop(self) -> None:
        self.store.set("stop", "1")

    def note(self, outcome: Outcome) -> None:
        self.store.set(f"outcome/{self._numbers[outcome.output]}", json.dumps(asdict(outcome)))
        self.store.add("finished", 1)

    def outcomes(self) -> list[Outcome]:
        """Of all units that have one."""
        left = set(self._open())
        keys = [f"outcome/{number}" for number in range(len(self.units)) if number not in left]
        found: list[bytes] = []
        for first in range(0, len(keys), PIECE):
            found += self.store.multi_get(keys[first : first + PIECE])
        return [Outcome(**json.loads(text)) for text in found]

    def _open(self) -> list[int]:
        """Units without an outcome: few questions if there are few."""
        ends = [*range(0, len(self.units), PIECE), len(self.units)]
        return [number for pair in pairwise(ends) for number in self._open_in(*pair)]

    def _open_in(self, first: int, last: int) -> list[int]:
        if self.store.check([f"outcome/{number}" for number in range(first, last)]):
            return []
        if last - first == 1:
            return [first]
        half = (first + last) // 2
        return self._open_in(first, half) + self._open_in(half, last)

    def _holder(self, number: int) -> bytes:
        return self.store.get(f"holder/{number}") if self.store.check([f"holder/{number}"]) else b""

    def _lost(self, number: int) -> bool:
        """Whether neither the holder of a unit nor its sign of life has changed for a lease."""
        holder = self._holder(number)
        beat = f"beat/{holder.decode().partition(' ')[0]}"
        state = holder + b" " + (self.store.get(beat) if holder and self.store.check([beat]) else b"")
        now = time.monotonic()
        then, since = self._watched.get(str(number), (b"", now))
        if then != state:
            self._watched[str(number)] = state, now
            return False
        return now - since > self.lease

    def _take_over(self, number: int) -> bool:
        """Become the holder in the place of a silent one, unless somebody else was faster."""
        old = self._holder(number)
        before = int(old.split()[1]) if old else 0
        mine = f"{self.rank} {before + 1}"
        if self.store.compare_set(f"holder/{number}", old.decode(), mine) != mine.encode():
            return False
        if before >= self.tries:
            self.note(failed(self.units[number], before, f"the ranks that had it died or fell silent, {before} times"))
            return False
        return True

    @contextmanager
    def alive(self, tell: Callable[[int], None] = lambda done: None) -> Iterator[None]:
        """Show the others that this rank lives, and tell how many units have an outcome."""
        end, store = threading.Event(), self.store.clone()

        def beat() -> None:
            count = 0
            while not end.is_set():
                try:
                    store.set(f"beat/{self.rank}", str(count := count + 1))
                    tell(min(store.add("finished", 0), len(self.units)))
                except RuntimeError:  # the store is gone; the rank will notice at its next question
                    return
                end.wait(min(2.0, self.lease / 5))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def farewell(self) -> None:
        """Leave; rank 0, which may hold the store, only when every other rank has left or fallen silent."""
        if self.rank:
            self.store.add("left", 1)
            return
        quiet, last = time.monotonic(), b""
        while self.store.add("left", 0) < self.world - 1 and time.monotonic() - quiet < self.lease:
            keys = [key for rank in range(1, self.world) if self.store.check([key := f"beat/{rank}"])]
            state = b" ".join(self.store.multi_get(keys)) if keys else b""
            if state != last:
                quiet, last = time.monotonic(), state
            time.sleep(0.05)


def lead(worker: Worker, shared: SharedList, fail_fast: bool, tell: Callable[[int], None]) -> list[Outcome]:
    """Rank 0 does its share, waits for the others', and returns the outcomes of all."""
    with _connected(), shared.alive(tell):
        _share(worker, shared, fail_fast)
        found = shared.outcomes()
        shared.farewell()
    return found


def follow(worker: Worker, shared: SharedList, fail_fast: bool) -> None:
    """Every other rank does its share, if rank 0 has a list for it.

    Raises InputError where `worker.check` does, before it takes anything.
    """
    with _connected():
        if shared.receive():
            if worker.check is not None:
                for unit in {json.dumps(unit.recipe): unit for unit in shared.units}.values():
                    worker.check(unit)
            with shared.alive():
                _share(worker, shared, fail_fast)
                shared.farewell()


def _share(worker: Worker, shared: SharedList, fail_fast: bool) -> None:
    for outcome in run_here(worker, shared.take(), 1):
        shared.note(outcome)
        if fail_fast and outcome.status == "failed":
            shared.stop()


@contextmanager
def _connected() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise Interrupted(f"--engine torchrun: the ranks' store is gone ({error}); the same command with --resume "
                          "goes on") from None  # fmt: skip
