"""Several ranks on one machine, joined by gloo: for the self-test, for claims and for tests.

Real jobs are started by torchrun, which also restarts them; this is for finding out, not for production.
"""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

# Seconds that the others get, once a rank has died, to notice and say so before they are stopped.
PATIENCE = 0.0


class RankFailed(RuntimeError):
    """A rank died, raised or did not answer in time; the message names it and carries its traceback."""


def local(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `function(rank, *args)` in `world` processes that share a gloo group; what each returned, by rank.

    The function must be importable by name, and its arguments and results picklable. Every rank computes with one
    thread. Importing torch is paid once: ranks are forked from a server that has done so.

    Raises:
        RankFailed: the first rank that failed, with its traceback; the others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.tensor"])
    with tempfile.TemporaryDirectory() as folder:
        ends, ranks = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            work = (theirs, function, rank, world, f"{folder}/store", timeout, args)
            process = context.Process(target=_rank, args=work)
            process.start()
            theirs.close()
            ends.append(mine)
            ranks.append(process)
        try:
            return _collect(ends, timeout)
        except RankFailed:
            for process in ranks:
                process.join(PATIENCE)
            raise
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ends: list[Any], timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(found) + len(failures) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in found and rank not in failures]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            late = [rank for rank in range(len(ends)) if rank not in found]
            raise RankFailed(f"rank {', '.join(map(str, late))} of {len(ends)} did not answer within {timeout:g} s")
        for end in ready:
            rank = ends.index(end)
            try:
                good, value = pickle.loads(end.recv_bytes())
            except EOFError:
                good, value = False, ""
            if good:
                found[rank] = value
                continue
            if not failures:  # the others may only have lost it, and what they say may come first: hear them too
                deadline = min(deadline, time.monotonic() + 1.0)
            failures[rank] = f"failed:\n{value}" if value else "died"
    if failures:
        rank = min(failures, key=lambda rank: "peer" in failures[rank])
        raise RankFailed(f"rank {rank} of {len(ends)} {failures[rank]}")
    return [found[rank] for rank in range(len(ends))]


def _rank(end: Any, function: Callable[..., Any], rank: int, world: int, store: str, timeout: float,
          args: tuple) -> None:  # fmt: skip
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                                timeout=timedelta(seconds=timeout))  # fmt: skip
        answer = True, function(rank, *args)
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException:  # noqa: BLE001 - whatever it was, the parent tells it
        answer = False, traceback.format_exc()
    end.send_bytes(pickle.dumps(answer))
    end.close()
