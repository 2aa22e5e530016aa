"""Restyle video by words, frame by frame as it comes."""

from frameloom.tasks.editing.base import Live, Settings, indices, live

__all__ = ["Live", "Settings", "indices", "live"]
