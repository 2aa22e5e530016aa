"""A Ray cluster: the one that RAY_ADDRESS names, or a small one on this machine for as long as the work lasts.

Only paths travel, never frames: the object store stays empty, and the files must be where every node can read them.
Ray's own workers are the processes that a decoder may crash, and Ray starts a task again whose worker or node died.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

from frameloom.errors import InputError
from frameloom.scale.farm.manifest import Unit
from frameloom.scale.farm.worker import Outcome, Worker, failed, made, reason

STORE = 80 << 20  # bytes of a cluster of our own; Ray asks for 75 MiB at least


def check(worker: Worker) -> None:
    """Raises InputError where there is no Ray, or where it cannot do what is asked for."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError('--engine ray: Ray is not installed; pip install "frameloom[cluster]"') from None
    if worker.limit is not None:
        raise InputError("--limit: not with --engine ray, which lets a task that hangs be; take local or torchrun")


def run(worker: Worker, units: list[Unit], workers: int) -> Iterator[Outcome]:
    """Every unit's outcome as it is known, at most `workers` at once, each on `worker.threads` cores."""
    import ray

    mine = not ray.is_initialized()
    again: deque[tuple[Unit, int]] = deque()
    fresh = iter([(unit, 1) for unit in units])
    with redirect_stdout(sys.stderr):  # where Ray tells of tasks that died
        if mine:
            _join(ray, workers * worker.threads)
        try:
            wants = {"num_cpus": worker.threads, "num_gpus": int(worker.gpu)}  # without, Ray hides the GPUs
            attempt = ray.remote(max_retries=worker.tries - 1, **wants)(_attempt)
            running: dict[Any, tuple[Unit, int]] = {}
            while True:
                while len(running) < workers and (item := again.popleft() if again else next(fresh, None)):
                    running[attempt.remote(worker, item[0])] = item
                if not running:
                    return
                [ready], _ = ray.wait(list(running), num_returns=1)
                unit, tries = running.pop(ready)
                try:
                    good, answer = ray.get(ready)
                except ray.exceptions.RayTaskError as error:  # not even begun: nothing there to import it from
                    yield failed(unit, 1, reason(error.cause))
                    continue
                except ray.exceptions.RayError as error:  # as often as max_retries allows
                    yield failed(unit, worker.tries, f"its process died ({type(error).__name__})")
                    continue
                if good:
                    yield made(unit, tries, answer)
                elif tries < worker.tries:
                    again.append((unit, tries + 1))
                else:
                    yield failed(unit, tries, answer)
        finally:
            if mine:
                ray.shutdown()


def _join(ray: Any, cpus: int) -> None:
    """The cluster of RAY_ADDRESS, or one of our own."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, **quiet)


def _attempt(worker: Worker, unit: Unit) -> tuple[bool, Any]:
    try:
        return True, worker.attempt(unit)
    except Exception as error:  # noqa: BLE001 - whatever it was, the driver tells it
        return False, reason(error)
