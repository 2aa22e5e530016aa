"""A Ray cluster: the one that RAY_ADDRESS names, or a small one on this machine for as long as the work lasts.

Only paths travel, never frames: the object store stays empty, and the files must be where every node can read them.
Ray's own workers are the processes that a decoder may crash, and Ray itself tries again what died or raised.
"""

import logging
import os
from collections.abc import Iterator

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
    if mine:
        own = {"num_cpus": workers * worker.threads, "object_store_memory": STORE, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if os.environ.get("RAY_ADDRESS") else own))
    try:
        attempt = ray.remote(num_cpus=worker.threads, max_retries=worker.tries - 1, retry_exceptions=True)(_attempt)
        waiting, running = iter(units), {}
        while True:
            while len(running) < workers and (unit := next(waiting, None)):
                running[attempt.remote(worker, unit)] = unit
            if not running:
                return
            [ready], _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready)
            try:
                outcome = made(unit, 1, ray.get(ready))
            except ray.exceptions.RayTaskError as error:
                outcome = failed(unit, worker.tries, reason(error.cause))
            except ray.exceptions.RayError as error:
                outcome = failed(unit, worker.tries, f"its process died ({type(error).__name__})")
            yield outcome
    finally:
        if mine:
            ray.shutdown()


def _attempt(worker: Worker, unit: Unit) -> dict:
    return worker.attempt(unit)
