"""A Ray cluster: the one that RAY_ADDRESS names, or a small one on this machine for as long as the work lasts.

Only paths travel, never frames: the object store stays empty, and the files must be where every node can read them.
Ray's own workers are the processes that a decoder may crash, and Ray starts a task again whose worker or node died.
"""

import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

from frameloom.errors import InputError
from frameloom.scale.farm.manifest import Unit
from frameloom.scale.farm.worker import Outcome, Worker, failed, made, reason

PATIENCE = 20.0  # seconds that a cluster has to answer
STORE = 80 << 20  # bytes of a cluster of our own; Ray asks for 75 MiB at least


def check(worker: Worker) -> None:
    """Raises InputError where there is no Ray, none at RAY_ADDRESS, or where it cannot do what is asked for."""
    try:
        import ray
    except ImportError:
        raise InputError('--engine ray: Ray is not installed; pip install "frameloom[cluster]"') from None
    if worker.limit is not None:
        raise InputError("--limit: not with --engine ray, which lets a task that hangs be; take local or torchrun")
    if (address := _address()) and not ray.is_initialized() and (problem := _unusable()):
        raise InputError(f"RAY_ADDRESS={address}: no Ray cluster can be joined there ({problem}); give the address of "
                         "one that runs, or none for one on this machine; a cluster with tokens needs "
                         "RAY_AUTH_MODE=token")  # fmt: skip


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


def _address() -> str | None:
    """Whose cluster to join; None for one of our own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


# Ray says why in an exception, or in a log before it ends the process.
_TRIAL = """
import logging, sys
import ray
try:
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
except Exception as error:
    print("REASON", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    sys.exit(1)
ray.shutdown()
"""


def _unusable() -> str:
    """Why the cluster of RAY_ADDRESS cannot be joined; nothing where it can.

    Tried in another process: Ray waits for minutes for a cluster that does not answer, and then ends its process.
    """
    with subprocess.Popen([sys.executable, "-c", _TRIAL], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL, text=True, errors="replace") as trial:  # fmt: skip
        try:
            _, said = trial.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            trial.kill()
            _, said = trial.communicate()
            late = True
        else:
            late = False
    if trial.returncode == 0:
        return ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line.removeprefix("REASON ") for line in lines if line.startswith("REASON ")]
    # A line of Ray's log: "[time W process thread] file:line: what happened".
    logged = [line.rpartition("] ")[2].partition(": ")[2] for line in lines if line.startswith("[")]
    reason = (told or [line for line in logged if line] or ["no answer"])[0]
    return f"{reason[:200].rstrip('.')}{f'; given up after {PATIENCE:g} s' if late else ''}"


def _join(ray: Any, cpus: int) -> None:
    """The cluster of RAY_ADDRESS, or one of our own."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if _address():
        ray.init(**quiet)
    else:
        ray.init(num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, **quiet)


def _attempt(worker: Worker, unit: Unit) -> tuple[bool, Any]:
    try:
        return True, worker.attempt(unit)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - to Ray, an exit is a worker that died
        return False, reason(error)
