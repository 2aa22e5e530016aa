"""Make a video: from words, from a picture, from any frames."""

from frameloom.tasks.generation.base import generate

__all__ = ["generate"]
