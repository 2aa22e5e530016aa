"""The `.flm` file: a header that says what the video is, and named sections that hold it.

Layout, little-endian: 8 bytes of magic, the format version (2 bytes), the header's length and CRC-32 (4 bytes
each), the header as JSON, then the sections one after the other. The header lists every section's name,
length and CRC-32, so the length of a file is known from its header to the byte.

Reading treats a file as untrusted: nothing is allocated on the word of the file alone.
"""

import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

from frameloom.errors import InputError
from frameloom.video.colour import BT601, BT709, BT2020, SITINGS, Colour

MAGIC = b"\x89FLM\r\n\x1a\n"
FORMAT = 2  # the highest that this reads; a file is written in the lowest that holds it
_PREFIX = struct.Struct("<8sHII")

MAX_HEADER = 1 << 20
MAX_SIDE = 1 << 16
MAX_PIXELS = 1 << 26
MAX_FRAMES = 1 << 24
MAX_SECTIONS = 512


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every compressed video says of itself.

    `config` belongs to the method: plain JSON values, checked by the method itself. `reader` is the lowest
    format version whose readers understand the sections: 1, or 2 where side numbers of a quantiser are float32.
    """

    method: str
    config: dict[str, Any]
    width: int
    height: int
    frames: int
    rate: Fraction
    colour: Colour
    pixel_aspect: Fraction = Fraction(1)
    reader: int = 1


@dataclass(frozen=True)
class Container:
    """A header and its sections, in file order."""

    header: Header
    sections: dict[str, bytes]

    def section(self, name: str, origin: str = "the file") -> bytes:
        """The bytes of one section; InputError when there is none of that name."""
        if name not in self.sections:
            raise InputError(f"{origin}: section '{name}' is missing")
        return self.sections[name]

    def to_bytes(self) -> bytes:
        body = {
            field.name: getattr(self.header, field.name)
            for field in fields(Header)
            if field.name not in ("rate", "pixel_aspect", "colour")
        }
        body["rate"] = self.header.rate.as_integer_ratio()
        body["pixel_aspect"] = self.header.pixel_aspect.as_integer_ratio()
        body["colour"] = asdict(self.header.colour)
        if self.header.colour.siting == Colour.siting:  # the usual place is left unsaid, as all files once did
            del body["colour"]["siting"]
        body["sections"] = [[name, len(payload), zlib.crc32(payload)] for name, payload in self.sections.items()]
        text = json.dumps(body, separators=(",", ":")).encode()
        prefix = _PREFIX.pack(MAGIC, self.header.reader, len(text), zlib.crc32(text))
        return b"".join([prefix, text, *self.sections.values()])


def parse(data: bytes, origin: str = "the file") -> Container:
    """Read a container; `origin` is the name that errors carry.

    Raises InputError for a file of another kind, of a newer format, cut short or damaged, naming the section.
    """
    header, table, start = _parse_header(data, origin)
    sections = {}
    for name, length, crc in table:
        payload = data[start : start + length]
        if len(payload) < length:
            raise InputError(f"{origin}: section '{name}' is cut short ({len(payload)} of {length} bytes)")
        if zlib.crc32(payload) != crc:
            raise InputError(f"{origin}: section '{name}' is damaged; its checksum does not match")
        sections[name] = payload
        start += length
    if start != len(data):
        raise InputError(f"{origin}: damaged; {len(data) - start} bytes follow the last section")
    return Container(header, sections)


def whole(value: Any, low: int, high: int, what: str, origin: str) -> int:
    """`value` if it is an integer in [low, high]; otherwise the InputError that a damaged header deserves."""
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{origin}: the header is damaged; {what} must be a whole number in {low}..{high}")
    return value


def _parse_header(data: bytes, origin: str) -> tuple[Header, list[tuple[str, int, int]], int]:
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{origin}: not a frameloom file; `frameloom compress` makes one")
    if len(data) < _PREFIX.size:
        raise InputError(f"{origin}: the header is cut short")
    _, version, length, crc = _PREFIX.unpack_from(data)
    _check_version(version, origin)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if length > MAX_HEADER or zlib.crc32(text) != crc:
        cut = length <= MAX_HEADER and len(text) < length
        raise InputError(f"{origin}: the header is {'cut short' if cut else 'damaged'}")
    try:
        body = json.loads(text)
        table = [(name, size, check) for name, size, check in body.pop("sections")]
        ratios = {name: tuple(body.pop(name)) for name in ("rate", "pixel_aspect")}
        colour = body.pop("colour")
        known = {field.name for field in fields(Header)} - {"rate", "pixel_aspect", "colour"}
        if not isinstance(colour, dict) or set(body) != known or len(table) > MAX_SECTIONS:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{origin}: the header is damaged") from None

    _check_version(whole(body["reader"], 1, 1 << 16, "reader", origin), origin)
    names = [name for name, _, _ in table if isinstance(name, str) and name.isidentifier()]
    named = len(set(names)) == len(table)
    if not (isinstance(body["method"], str) and isinstance(body["config"], dict) and named):
        raise InputError(f"{origin}: the header is damaged")
    for name, size, check in table:
        whole(size, 0, len(data), f"the length of section '{name}'", origin)
        whole(check, 0, (1 << 32) - 1, f"the checksum of section '{name}'", origin)
    whole(body["width"], 1, MAX_SIDE, "width", origin)
    whole(body["height"], 1, MAX_SIDE, "height", origin)
    whole(body["width"] * body["height"], 1, MAX_PIXELS, "width times height", origin)
    whole(body["frames"], 1, MAX_FRAMES, "frames", origin)
    for name, ratio in ratios.items():
        whole(len(ratio), 2, 2, f"the parts of {name}", origin)
        for part in ratio:
            whole(part, 1, 1 << 32, name, origin)
    fractions = {name: Fraction(*ratio) for name, ratio in ratios.items()}
    header = Header(**fractions, colour=_colour(colour, origin), **body)
    return header, table, _PREFIX.size + len(text)


def _check_version(version: int, origin: str) -> None:
    if version > FORMAT:
        raise InputError(f"{origin}: needs frameloom format {version}; this reads {FORMAT}")


def _colour(values: dict[str, Any], origin: str) -> Colour:
    values = {"siting": Colour.siting} | values
    if set(values) != {field.name for field in fields(Colour)} or type(values["full_range"]) is not bool:
        raise InputError(f"{origin}: the header is damaged; the colour description is not complete")
    for name in ("matrix", "primaries", "transfer"):
        whole(values[name], 0, 255, name, origin)
    if values["matrix"] not in (BT709, 4, 5, BT601, 7, BT2020):
        raise InputError(f"{origin}: the header is damaged; colour matrix {values['matrix']} is not known")
    whole(values["depth"], 1, 16, "depth", origin)
    if values["siting"] not in SITINGS:
        raise InputError(f"{origin}: the header is damaged; the place of chroma is not known")
    return Colour(**values)
