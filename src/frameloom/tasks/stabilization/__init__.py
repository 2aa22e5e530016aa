"""Take the shake out of a video."""

from frameloom.tasks.stabilization.base import Stabilizer, stabilize

__all__ = ["Stabilizer", "stabilize"]
