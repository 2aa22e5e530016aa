"""frameloom: published methods for video behind one command line and one Python API.

>>> import frameloom as fl
>>> clip = fl.read("holiday.mov")
>>> fl.interpolate(clip, fps=60)[2.0:4.0].save("part.mp4")

Names are looked up when they are first used, so that importing the package imports nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Clip": "frameloom.video.clip",
    "InputError": "frameloom.errors",
    "batch": "frameloom.cli.batch",
    "card": "frameloom.cards",
    "cards": "frameloom.cards",
    "compress": "frameloom.tasks.compression",
    "decompress": "frameloom.tasks.compression",
    "flow": "frameloom.tasks.flow",
    "generate": "frameloom.tasks.generation",
    "distill": "frameloom.tasks.distillation",
    "inspect": "frameloom.tasks.compression",
    "interpolate": "frameloom.tasks.interpolation",
    "live": "frameloom.tasks.editing",
    "load": "frameloom.training.pretrained",
    "plan": "frameloom.scale.plan",
    "predict": "frameloom.tasks.generation",
    "quantize": "frameloom.scale.qmoe",
    "read": "frameloom.video.reader",
    "serve": "frameloom.scale.serve",
    "stabilize": "frameloom.tasks.stabilization",
    "stream": "frameloom.scale.stream",
    "train": "frameloom.training.loop",
    "write": "frameloom.video.writer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'frameloom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
