"""Whether a file is shorter than its own container says: the one sure sign that it was cut off.

Numbers of frames and durations in headers are no such sign: lossless trims, dropped frames and long last frames
all disagree with them in files that are whole.
"""

from pathlib import Path
from typing import BinaryIO

_BOXES = {
    kind.encode()
    for kind in ("ftyp", "moov", "mdat", "free", "wide", "skip", "pnot", "uuid", "meta", "moof", "styp", "sidx", "mfra")
}
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def cut_short(path: Path) -> bool:
    """True if an MP4, QuickTime, Matroska, WebM or AVI file ends before its outermost parts do. Reads headers."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(16)
        file.seek(0)
        if head[4:8] in _BOXES:
            return _boxes(file) > size
        if head[:4] == _EBML:
            return _segments(file, size) > size
        if head[:4] == b"RIFF":
            return _chunks(file, size) > size
        return False


def _boxes(file: BinaryIO) -> int:
    """The end of the last top-level box of ISO/IEC 14496-12; a box of size 0 reaches to the end of the file."""
    end = 0
    while True:
        file.seek(end)
        head = file.read(16)
        if head[4:8] not in _BOXES:  # what follows is no part of the container
            return end
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:
            return end
        end += size


def _segments(file: BinaryIO, size: int) -> int:
    """The end of the last top-level element of EBML; one of unknown size (a live recording) reaches to the end."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(12)
        if head[:4] not in (_EBML, _SEGMENT) or len(head) < 5 or head[4] == 0:
            return end
        width = 9 - head[4].bit_length()
        value = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if value == (1 << 7 * width) - 1:
            return end
        end += 4 + width + value
    return end


def _chunks(file: BinaryIO, size: int) -> int:
    """The end of the last RIFF chunk; OpenDML files have several. A size of 0 is of a recorder that never closed."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(8)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or not length:
            return end
        end += 8 + length + length % 2
    return end
