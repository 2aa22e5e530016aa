"""A decoder on a thread of its own, and what an event loop sees of it: answers that grow, counts, and no blocking."""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from frameloom.errors import InputError
from frameloom.scale.flover import FusedDecoder, QueueFull, Request
from frameloom.scale.sampling import Sampling

log = logging.getLogger("frameloom")

# Upper ends of the intervals of the time to the first token, in seconds.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Seconds between iterations with nothing to do: ranks that follow must hear something before their wait times out.
BEAT = 30.0


class Broken(RuntimeError):
    """The decoder itself failed; nothing more is decoded."""


@dataclass(frozen=True)
class Wish:
    """One text that is wanted: what `FusedDecoder.submit` takes."""

    prompt: Sequence[int]
    limit: int
    sampling: Sampling
    likeliest: int | None = None


class Engine:
    """Steps a `FusedDecoder` while there is something to do. `open` to `close`, then `submit`s are `Answer`s.

    At most as many texts are open as there are slots and places in the queue, so that readers who do not read take
    no more memory than that; `answers` counts them.
    """

    def __init__(self, decoder: FusedDecoder) -> None:
        self.decoder = decoder
        self.broken = ""
        self.answers = 0
        self.ended: Counter[str] = Counter()
        self.tokens = self.refused = 0
        self.first_counts, self.first_sum = [0] * (len(BUCKETS) + 1), 0.0
        self.mean_seconds = 1.0
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def open(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Cancel what is under way and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def submit(self, wishes: Sequence[Wish], id: str | None = None) -> "Answer":
        """To be called on the event loop; all of them are decoded, or none.

        Raises what `FusedDecoder.submit` raises, and Broken.
        """
        if self.broken:
            raise Broken(self.broken)
        try:
            if self.answers + len(wishes) > self.decoder.slots + self.decoder.queue:
                raise QueueFull(f"{self.answers} answers are under way or unread, and {len(wishes)} more do not fit")
            answer = Answer(self, wishes, id)
        except QueueFull:
            self.refused += 1
            raise
        self._wake.set()
        return answer

    def cancel(self, request: Request) -> None:
        self.decoder.cancel(request)
        self._wake.set()

    @property
    def retry_after(self) -> int:
        """Whole seconds after which there may be room: how long the queue takes at the present pace."""
        rounds = 1 + self.decoder.waiting / self.decoder.slots
        return min(60, max(1, math.ceil(self.mean_seconds * rounds)))

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.wait(BEAT)
                self._wake.clear()
                self.decoder.step()
                while self.decoder.busy and not self._stopping:
                    self.decoder.step()
            self.decoder.close()
        except Exception as error:
            log.exception("decoding failed")
            self.broken = f"decoding failed ({type(error).__name__}: {error})"
            self.decoder.abandon(self.broken)

    def metrics(self) -> str:
        """In the text format of Prometheus."""
        d = self.decoder
        gauges = {"slots": d.slots, "active": d.active, "waiting": d.waiting, "answers_open": self.answers,
                  "cache_bytes": d.cache.nbytes, "up": int(not self.broken)}  # fmt: skip
        totals = {"tokens": self.tokens, "refused": self.refused, "iterations": d.iterations, "prefills": d.prefills,
                  "rows": d.rows, "moves": d.moves, "moved_bytes": d.moved_bytes}  # fmt: skip
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE frameloom_{name} gauge", f"frameloom_{name} {value}"]
        for name, value in totals.items():
            lines += [f"# TYPE frameloom_{name}_total counter", f"frameloom_{name}_total {value}"]
        lines.append("# TYPE frameloom_requests_total counter")
        lines += [f'frameloom_requests_total{{finish="{how}"}} {self.ended[how]}'
                  for how in ("length", "stop", "cancelled", "failed")]  # fmt: skip
        lines.append("# TYPE frameloom_first_token_seconds histogram")
        below = 0
        for edge, count in zip((*BUCKETS, "+Inf"), self.first_counts, strict=True):
            below += count
            lines.append(f'frameloom_first_token_seconds_bucket{{le="{edge}"}} {below}')
        lines += [f"frameloom_first_token_seconds_sum {self.first_sum:.6f}",
                  f"frameloom_first_token_seconds_count {below}"]  # fmt: skip
        return "\n".join(lines) + "\n"


class Answer:
    """The texts of one request as they come; `leave` it when done with it, or when nobody listens any more."""

    def __init__(self, engine: Engine, wishes: Sequence[Wish], id: str | None) -> None:
        self._engine, self._news = engine, asyncio.Event()
        self._begun = time.monotonic()
        self._heard: set[Request] = set()
        self._left: set[int] = set()
        self._tell: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        self.requests: list[Request] = []
        try:
            for number, wish in enumerate(wishes):
                name = f"{id}/{number}" if id and number else id
                request = engine.decoder.submit(
                    wish.prompt, wish.limit, wish.sampling, id=name, on_token=self._on_token, likeliest=wish.likeliest
                )
                self.requests.append(request)
                engine.answers += 1
        except InputError:
            self.leave()
            raise

    def _on_token(self, request: Request) -> None:
        """Runs on the decoder's thread, as do the counts it keeps."""
        engine, now = self._engine, time.monotonic()
        engine.tokens += bool(request.finish in ("", "stop", "length"))
        if request.tokens and request not in self._heard:
            self._heard.add(request)
            waited = now - self._begun
            engine.first_sum += waited
            engine.first_counts[sum(waited > edge for edge in BUCKETS)] += 1
        if request.done:
            engine.ended[request.finish] += 1
            engine.mean_seconds += 0.1 * (now - self._begun - engine.mean_seconds)
        try:
            self._tell(self._news.set)
        except RuntimeError:  # the event loop has ended, and with it whoever would have listened
            log.debug("nobody listens to %s", request.id)

    async def parts(self) -> AsyncIterator[tuple[int, list[int], bool]]:
        """(which of the texts, new tokens of it, whether that is its end), until all have ended or been left.

        One token or more at a time; at the end there may be none.
        """
        sent, open = [0] * len(self.requests), set(range(len(self.requests)))
        while open := open - self._left:
            await self._news.wait()
            self._news.clear()
            for which in sorted(open):
                request = self.requests[which]
                done = request.done  # asked first: tokens come before the end, so that none is missed
                fresh = request.tokens[sent[which] :]
                sent[which] += len(fresh)
                if done:
                    open.discard(which)
                if fresh or done:
                    yield which, fresh, done

    def leave(self, which: int | None = None) -> None:
        """Give up what is left of it all, or of one text; safe to call again."""
        for number in range(len(self.requests)) if which is None else [which]:
            if number not in self._left:
                self._left.add(number)
                self._engine.answers -= 1
                if not self.requests[number].done:
                    self._engine.cancel(self.requests[number])
