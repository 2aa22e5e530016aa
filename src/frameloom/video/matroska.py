"""The shape of pixels in a Matroska or WebM file, written in after the muxer is done.

FFmpeg's muxer takes it from a field of the stream that PyAV 18 gives no way to set; without it VP9, AV1 and FFV1,
whose own headers say nothing either, lose an anamorphic picture's shape. The muxer leaves a gap behind its table of
contents (an element called Void): what follows moves into it, and nothing else in the file moves.
"""

import zlib
from contextlib import nullcontext
from fractions import Fraction
from io import BytesIO
from pathlib import Path

_SEGMENT, _SEEK_HEAD, _VOID, _INFO, _TRACKS = (
    bytes.fromhex(text) for text in ("18538067", "114d9b74", "ec", "1549a966", "1654ae6b")
)
_ENTRY, _VIDEO, _CRC, _SEEK, _POSITION = (bytes.fromhex(text) for text in ("ae", "e0", "bf", "4dbb", "53ac"))
_DISPLAY = [bytes.fromhex(text) for text in ("54b0", "54ba", "54b2")]  # width, height, unit
_RATIO = 3  # the unit in which width and height are those of the shape alone


def set_display_aspect(target: Path | BytesIO, aspect: Fraction) -> bool:
    """Write the shape of the whole picture (width over height) into the one video track of a file.

    False if the file is not laid out as expected; it is then left as it was.
    """
    with nullcontext(target) if isinstance(target, BytesIO) else open(target, "r+b") as file:
        file.seek(0)
        head = file.read(1 << 20)
        begin = _find(head, 0, _SEGMENT)
        if begin is None:
            return False
        first = begin[1]
        places = {}
        at = first
        while at < len(head) and _TRACKS not in places:
            name, start, end = _element(head, at)
            places[name] = (at, start, end)
            at = end
        if not {_SEEK_HEAD, _VOID, _INFO, _TRACKS} <= set(places) or places[_TRACKS][2] > len(head):
            return False
        (_, seek, gap), (void, _, moved), (_, body, past) = places[_SEEK_HEAD], places[_VOID], places[_TRACKS]
        if gap != void:
            return False
        values = (aspect.numerator, aspect.denominator, _RATIO)
        fields = b"".join(name + _number(value) for name, value in zip(_DISPLAY, values, strict=True))
        tracks = _TRACKS + _sized(_checked(_with_display(head[body:past], fields)))
        grown = len(tracks) - (past - places[_TRACKS][0])
        room = moved - void - grown
        if room < 2 or (room > 127 + 2 and room < 10):
            return False
        space = _VOID + (bytes([0x80 | room - 2]) if room < 129 else (1 << 56 | room - 9).to_bytes(8, "big"))
        space += bytes(room - len(space))
        contents = _moved(head[seek:gap], moved - first, past - first, grown)
        if contents is None:
            return False
        file.seek(seek)
        file.write(contents + space + head[moved : places[_TRACKS][0]] + tracks)
        return True


def _element(data: bytes, at: int) -> tuple[bytes, int, int]:
    """(id, start, end of the content) of the element at a place; one of unknown size reaches to the end."""
    width = 9 - data[at].bit_length()
    start = at + width
    length = 9 - data[start].bit_length()
    size = int.from_bytes(data[start : start + length], "big") & ((1 << 7 * length) - 1)
    unknown = size == (1 << 7 * length) - 1
    return data[at:start], start + length, len(data) if unknown else start + length + size


def _children(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 0
    while at < len(data):
        name, start, end = _element(data, at)
        found.append((name, data[start:end]))
        at = end
    return found


def _find(data: bytes, at: int, wanted: bytes) -> tuple[int, int, int] | None:
    while at < len(data):
        name, start, end = _element(data, at)
        if name == wanted:
            return at, start, end
        at = end
    return None


def _sized(content: bytes, width: int = 0) -> bytes:
    """Content behind its length, which takes `width` bytes (as few as one or four if not told)."""
    width = width or (1 if len(content) < 127 else 4)
    return (1 << 7 * width | len(content)).to_bytes(width, "big") + content


def _number(value: int) -> bytes:
    return _sized(value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"), 1)


def _with_display(tracks: bytes, fields: bytes) -> bytes:
    """The tracks with `fields` in the video's description in place of what was said of its display."""

    def video(content: bytes) -> bytes:
        kept = [name + _sized(part) for name, part in _children(content) if name not in _DISPLAY]
        return b"".join(kept) + fields

    def entry(content: bytes) -> bytes:
        return b"".join(name + _sized(video(part) if name == _VIDEO else part) for name, part in _children(content))

    return b"".join(
        name + _sized(entry(part) if name == _ENTRY else part) for name, part in _children(tracks) if name != _CRC
    )


def _checked(content: bytes) -> bytes:
    return _CRC + _sized(zlib.crc32(content).to_bytes(4, "little"), 1) + content


def _moved(contents: bytes, low: int, high: int, by: int) -> bytes | None:
    """The table of contents where everything between two places begins `by` bytes earlier."""
    out = b""
    for name, part in _children(contents):
        if name == _CRC:
            continue
        inner = b""
        for kind, value in _children(part):
            if name == _SEEK and kind == _POSITION:
                place = int.from_bytes(value, "big")
                place -= by if low <= place < high else 0
                value = place.to_bytes(len(value), "big")
            inner += kind + _sized(value, 1)
        out += name + _sized(inner, 1)
    # The length must stay: sizes of one byte are what FFmpeg writes here.
    out = _checked(out) if _children(contents)[0][0] == _CRC else out
    return out if len(out) == len(contents) else None
