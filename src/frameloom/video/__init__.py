"""Real video in and out: lazy clips over PyAV, frame-exact, colour-exact, sound kept."""

import av.logging

from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import Colour

# PyAV's own log handler takes the interpreter's lock from FFmpeg's worker threads; a decoder that is closed while
# one of them complains of a damaged stream would wait for ever. FFmpeg's handler needs no lock, and stays silent.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)

__all__ = ["Clip", "Colour", "Frame", "Info", "Source"]
