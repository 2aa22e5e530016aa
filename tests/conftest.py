"""What many tests share: the real footage, when it is there, and small files made on the spot."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests run side by side; one thread each, in the processes that they start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, however busy the machine: a red test is a change of the code, not of the dice.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

CLIPS = Path(os.environ.get("FRAMELOOM_CLIPS", Path(__file__).parents[1] / ".." / "shared" / "clips")).resolve()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors: more threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real footage; tests that need it are skipped where it is absent."""
    if not CLIPS.is_dir():
        pytest.skip("the real footage is not here")
    return CLIPS
