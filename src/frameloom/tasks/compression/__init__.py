"""Store a video in a file that decodes on its own, by a neural codec or a conventional one."""

from frameloom.tasks.compression.base import Report, VideoCodec, compress, decompress, inspect

__all__ = ["Report", "VideoCodec", "compress", "decompress", "inspect"]
