"""Checkpoints of TensorFlow, read without it: `NAME.index` says where tensors lie in `NAME.data-00000-of-00001`.

The index is a sorted table of blocks as in LevelDB, which TensorFlow 1 packs with Snappy; its values are protocol
buffers. There is no program in such a file, numbers alone; still everything in it is held against the files' lengths.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from frameloom.errors import InputError

MAGIC = 0xDB4775248B80FB57
INDEX = 2**26  # bytes that an index may have; one of a thousand tensors has some ten thousand
_FOOTER = 48
_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


class Bundle:
    """The tensors of a checkpoint by the names that they have there; each is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises InputError for a file that is not the index of a checkpoint."""
        self.path = Path(path)
        try:
            data = self.path.read_bytes() if self.path.stat().st_size <= INDEX else b""
            self.shards, self.entries = _index(data)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        except (ValueError, IndexError, KeyError, struct.error):
            raise InputError(f"{path}: not the index of a TensorFlow checkpoint, or a damaged one; "
                             "model-NUMBER.index would be one") from None  # fmt: skip

    def read(self, name: str) -> Tensor:
        """Raises InputError for a tensor that does not lie where the index says."""
        entry = self.entries[name]
        shard = self.path.with_name(f"{self.path.stem}.data-{entry.shard:05d}-of-{self.shards:05d}")
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None or prod(entry.shape) * dtype.itemsize != entry.size:
            raise InputError(f"{self.path}: {name[:80]!r} is of a kind of number that is not read here")
        try:
            with open(shard, "rb") as file:
                if entry.offset + entry.size > file.seek(0, 2):
                    raise InputError(f"{shard}: cut off; {self.path.name} says more lies there")
                file.seek(entry.offset)
                data = bytearray(file.read(entry.size))
        except OSError as error:
            raise InputError(f"{shard}: {error.strerror or error}; it belongs beside {self.path.name}") from None
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape) if data else torch.empty(entry.shape)


def _index(data: bytes) -> tuple[int, dict[str, Entry]]:
    """How many files hold the tensors, and where each lies."""
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("no footer")
    footer = data[-_FOOTER:]
    at = _number(footer, _number(footer, 0)[1])[1]  # past the place of the block of metadata
    shards, entries = 0, {}
    for _, place in _pairs(_block(data, footer, at)):
        for key, value in _pairs(_block(data, place, 0)):
            fields = _fields(value)
            if not key:
                shards = _one(fields, 1)
                if _one(fields, 2):
                    raise ValueError("another order of bytes")
                continue
            sides = [_signed(_one(_fields(side), 1)) for tag, side in _fields(_one(fields, 2, b"")) if tag == 2]
            entry = Entry(_one(fields, 1), tuple(sides), *(_one(fields, tag) for tag in (3, 4, 5)))
            if min(entry.shape, default=0) < 0 or not 0 <= entry.shard < shards:
                raise ValueError("a tensor that lies nowhere")
            entries[key.decode()] = entry
    return shards, entries


def _block(data: bytes, place: bytes, at: int) -> bytes:
    """The block whose beginning and length are written in `place`."""
    begin, at = _number(place, at)
    size, _ = _number(place, at)
    if begin + size + 5 > len(data):
        raise ValueError("a block beyond the file")
    block = data[begin : begin + size]
    return _unpacked(block) if data[begin + size] else block


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key is written as what it shares with the one before, and the rest."""
    (restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise ValueError("a block without room")
    while at < end:
        shared, at = _number(block, at)
        own, at = _number(block, at)
        size, at = _number(block, at)
        if shared > len(key) or at + own + size > end:
            raise ValueError("an entry beyond its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + size]
        at += own + size


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The numbered fields of a protocol buffer."""
    found, at = [], 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(message, at)
        else:
            size, at = _number(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + size > len(message):
                raise ValueError("a field beyond its message")
            value, at = message[at : at + size], at + size
        found.append((tag >> 3, value))
    return found


def _one(fields: list[tuple[int, int | bytes]], tag: int, absent: int | bytes = 0) -> int | bytes:
    value = next((value for number, value in fields if number == tag), absent)
    if type(value) is not type(absent):
        raise ValueError("a field of another kind")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where what follows begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")


def _unpacked(data: bytes) -> bytes:
    """What Snappy packed: runs of bytes, and copies of what came before."""
    size, at = _number(data, 0)
    if size > INDEX:
        raise ValueError("too large")
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length, more = tag >> 2, max((tag >> 2) - 59, 0)
            if more:
                length = int.from_bytes(data[at : at + more], "little")
            at += more
            out += data[at : at + length + 1]
            at += length + 1
        else:
            wide = {1: 1, 2: 2, 3: 4}[tag & 3]
            back = int.from_bytes(data[at : at + wide], "little")
            at += wide
            length = (tag >> 2) + 1
            if wide == 1:
                length, back = (tag >> 2 & 7) + 4, back | (tag >> 5) << 8
            if not 0 < back <= len(out):
                raise ValueError("a copy of nothing")
            begin = len(out) - back
            run = bytes(out[begin : begin + length])
            out += (run * -(-length // back))[:length]
        if len(out) > size:
            break
    if len(out) != size:
        raise ValueError("another length than was said")
    return bytes(out)
