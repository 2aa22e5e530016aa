"""Make a video: from words, from a picture, from any frames."""

from frameloom.tasks.generation.base import generate
from frameloom.tasks.generation.given import inbetween, predict

__all__ = ["generate", "inbetween", "predict"]
