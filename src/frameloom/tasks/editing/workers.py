"""Work on a stream in several threads joined by short queues: reading, the network and writing overlap."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from frameloom.video.clip import Frame

# Stands in a queue where a waiting frame stood that came too early to be worked on.
DROPPED = object()
_END = object()


class Stopped(Exception):
    """The other end of a queue is gone: nobody wants the work any more."""


class Queue:
    """At most `size` items wait. When it is full, `put` waits too; or, with `drop`, the oldest item gives way.

    What gives way leaves `DROPPED` in its place, so that the taker can still count.
    """

    def __init__(self, size: int, stop: threading.Event, drop: bool = False) -> None:
        self.size, self.stop, self.drop = size, stop, drop
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()

    def put(self, item: Any) -> None:
        with self._changed:
            while sum(held is not DROPPED for held in self._items) >= self.size:
                if self.drop and item is not _END:
                    oldest = next(k for k, held in enumerate(self._items) if held is not DROPPED)
                    self._items[oldest] = DROPPED
                else:
                    self._wait()
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> Any:
        with self._changed:
            while not self._items:
                self._wait()
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def _wait(self) -> None:
        if self.stop.is_set():
            raise Stopped
        self._changed.wait(0.05)


def through(items: Iterator[Any], *stages: Callable[[Iterator[Any]], Iterator[Any]], size: int = 4,
            drop: bool = False) -> Iterator[Any]:  # fmt: skip
    """`items` through `stages`, each in a thread of its own; results come in order.

    An exception anywhere ends all threads and is raised here; so does closing the iterator.

    Args:
        size: how many items wait before each stage. drop: whether the oldest of those before the first stage gives
            way when they are too many (see `Queue`).
    """
    stop, failures = threading.Event(), []
    queues = [Queue(size, stop, drop and number == 0) for number in range(len(stages) + 1)]

    def taken(queue: Queue) -> Iterator[Any]:
        while (item := queue.get()) is not _END:
            yield item

    def work(made: Iterator[Any], queue: Queue) -> None:
        try:
            for item in made:
                if stop.is_set():
                    raise Stopped
                queue.put(item)
            queue.put(_END)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by the reader of the results
            failures.append(error)
            stop.set()

    lines = [items, *(stage(taken(queue)) for stage, queue in zip(stages, queues, strict=False))]
    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(lines, queues, strict=True)]
    for thread in threads:
        thread.start()
    try:
        yield from taken(queues[-1])
    except Stopped:
        raise failures[0] from None
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def paced(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Frames no earlier than at their own instants: a file as a camera would have shown it."""
    begun = time.monotonic()
    first = None
    for frame in frames:
        first = frame.time if first is None else first
        time.sleep(max(0.0, begun + float(frame.time - first) - time.monotonic()))
        yield frame
