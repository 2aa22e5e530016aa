"""Real video in and out: lazy clips over PyAV, frame-exact, colour-exact, sound kept."""

from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import Colour

__all__ = ["Clip", "Colour", "Frame", "Info", "Source"]
