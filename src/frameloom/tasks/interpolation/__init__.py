"""Raise (or change) the frame rate of a video: pictures at instants nobody recorded."""

from frameloom.tasks.interpolation.base import Interpolator, interpolate

__all__ = ["Interpolator", "interpolate"]
