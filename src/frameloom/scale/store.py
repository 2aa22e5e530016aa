"""Where the weights of blocks are until they are needed: in RAM, in a file, or in any other form that can be fetched.

A store is two functions, so that anything can be one: a compressed file whose fetch is a decode, a network drive.

    fetch(block, into)   fill the tensors `into`, by name, which are on the device, with the block's weights
    homes(block)         the store's own tensors, if it has such, which stand for the block's parameters while the block
                         is away, and which an optimiser may write to

`fetch` is called from the thread that loads ahead, one block at a time.
"""

import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch
from torch import Tensor

from frameloom.errors import InputError
from frameloom.progress import Progress, silent


@runtime_checkable
class Store(Protocol):
    """The weights of blocks, by the number of the block. Where `homes` is None, blocks can be run and not trained."""

    def fetch(self, block: int, into: Mapping[str, Tensor]) -> None: ...

    def homes(self, block: int) -> Mapping[str, Tensor] | None: ...


class RamStore:
    """Weights in main memory, page-locked (pinned) where a GPU is to copy them while it computes."""

    def __init__(self, blocks: Sequence[Mapping[str, Tensor]], pin: bool = False) -> None:
        self._blocks = [{name: value.detach().cpu().pin_memory() if pin else value.detach()
                         for name, value in block.items()} for block in blocks]  # fmt: skip

    def fetch(self, block: int, into: Mapping[str, Tensor]) -> None:
        for name, value in self._blocks[block].items():
            into[name].copy_(value, non_blocking=True)

    def homes(self, block: int) -> Mapping[str, Tensor]:
        return self._blocks[block]


# --- files -----------------------------------------------------------------------------------------------------------

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip

# The longest table of contents that is read: that of a checkpoint of a hundred thousand tensors takes a tenth of it.
MOST_HEADER = 100 << 20

ALIGNMENT = 64


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: `begin` in bytes from the start of the file."""

    file: BinaryIO
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, into: Tensor) -> None:
        """Read it from the file into a tensor; straight into its memory where that is laid out like the file."""
        straight = into.device.type == "cpu" and into.dtype == self.dtype and into.is_contiguous()
        own = into if straight else torch.empty(self.shape, dtype=self.dtype)
        if self.bytes:
            raw = memoryview(own.detach().reshape(-1).view(torch.uint8).numpy())
            got = 0
            while got < self.bytes:  # a read may stop early, as it does at 2 GB
                count = os.preadv(self.file.fileno(), [raw[got:]], self.begin + got)
                if not count:
                    raise OSError(f"{self.file.name}: became shorter while it was in use")
                got += count
        if not straight:
            into.copy_(own)


class DiskStore:
    """Weights in files. What is read goes straight into the slot; the system's cache of files is all that is beside it.

    Make one with `of` (a checkpoint that is there: read only) or `written` (a scratch file: also for training).
    """

    def __init__(self, blocks: Sequence[Mapping[str, _Entry]], mapped: mmap.mmap | None = None) -> None:
        self._blocks, self._mapped = blocks, mapped

    @staticmethod
    def of(checkpoint: "Checkpoint", blocks: Sequence[Mapping[str, Tensor]]) -> "DiskStore":
        """The blocks' tensors, by their names, as they stand in a checkpoint.

        Raises InputError for a tensor that is not there or has another shape.
        """
        return DiskStore([checkpoint.entries(block) for block in blocks])

    @staticmethod
    def written(blocks: Sequence[Mapping[str, Tensor]], folder: str | Path | None = None,
                progress: Progress = silent) -> "DiskStore":  # fmt: skip
        """A scratch file with these tensors, which goes when the store does, also when the process is killed.

        `folder` is where to put it; /var/tmp if it is there, since /tmp may be memory.
        """
        if folder is None and "TMPDIR" not in os.environ and Path("/var/tmp").is_dir():
            folder = "/var/tmp"
        try:
            file = tempfile.TemporaryFile(dir=folder, prefix="frameloom")  # noqa: SIM115 - as long as the store
            found = []
            for number, block in enumerate(blocks):
                found.append({name: _Entry(file, _append(file, value), value.dtype, tuple(value.shape))
                              for name, value in block.items()})  # fmt: skip
                progress("writing blocks to disk", number + 1, len(blocks))
            file.flush()
            return DiskStore(found, mmap.mmap(file.fileno(), 0))
        except OSError as error:
            raise InputError(f"store disk: {folder or tempfile.gettempdir()} cannot take the blocks "
                             f"({error.strerror}); set TMPDIR to a folder on a disk with room") from None  # fmt: skip

    def fetch(self, block: int, into: Mapping[str, Tensor]) -> None:
        for name, entry in self._blocks[block].items():
            entry.read(into[name])
            self._unmap(entry)

    def homes(self, block: int) -> Mapping[str, Tensor] | None:
        """The scratch file as tensors: memory that is on disk, and in RAM only where somebody looks or writes."""
        if self._mapped is None:
            return None
        return {name: torch.frombuffer(self._mapped, dtype=entry.dtype, count=math.prod(entry.shape),
                                       offset=entry.begin).view(entry.shape) if entry.bytes
                else torch.empty(entry.shape, dtype=entry.dtype)
                for name, entry in self._blocks[block].items()}  # fmt: skip

    def _unmap(self, entry: _Entry) -> None:
        """What an optimiser wrote stays in the file, and no longer in this process's memory."""
        if self._mapped is not None and entry.bytes and hasattr(mmap, "MADV_DONTNEED"):
            start = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_DONTNEED, start, entry.begin + entry.bytes - start)


def _append(file: BinaryIO, value: Tensor) -> int:
    """Write a tensor, in the order of its own elements, and say where it begins."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    begin = file.tell()
    file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return begin


class Checkpoint:
    """Where the tensors of a safetensors file, or of all files of a sharded checkpoint, are; nothing else is read.

    Raises InputError for a path that is neither and for a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        for file in _files(self.path):
            self._entries |= _table(file)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entries(self, wanted: Mapping[str, Tensor]) -> dict[str, _Entry]:
        """Where these tensors are; they must have the shapes of `wanted`, and may have another type of number."""
        for name, value in wanted.items():
            if name not in self._entries:
                raise InputError(
                    f"{self.path}: holds no {name}, which the model needs; take the model's own checkpoint"
                )
            if self._entries[name].shape != tuple(value.shape):
                raise InputError(f"{self.path}: {name} is {list(self._entries[name].shape)}, and the model's is "
                                 f"{list(value.shape)}; take the model's own checkpoint")  # fmt: skip
        return {name: self._entries[name] for name in wanted}


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, those that the index of a folder names, or the only one in the folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint; a .safetensors file or a folder with one is wanted")
    if index := sorted(path.glob("*.safetensors.index.json")):
        try:
            names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index[0]}: not an index of a sharded checkpoint") from None
        found = [path / Path(str(name)).name for name in names]
    else:
        found = sorted(path.glob("*.safetensors"))
    if not found or not all(file.is_file() for file in found) or (len(found) > 1 and not index):
        raise InputError(f"{path}: holds {len(found) or 'no'} .safetensors files that can be told apart; name one")
    return found


def _table(path: Path) -> dict[str, _Entry]:
    """A safetensors file's table of contents; every number in it is checked against the file."""
    file = open(path, "rb")  # noqa: SIM115 - as long as its entries
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size <= 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
        raise InputError(f"{path}: not a safetensors file, or one that ends early")
    try:
        table: dict[str, Any] = json.loads(file.read(length))
        return {name: _entry(file, 8 + length, size, row) for name, row in table.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: its table of contents is damaged; get the file again") from None


def _entry(file: BinaryIO, base: int, size: int, row: dict[str, Any]) -> _Entry:
    begin, end = row["data_offsets"]
    entry = _Entry(file, base + begin, _DTYPES[row["dtype"]], tuple(row["shape"]))
    whole = all(isinstance(number, int) and number >= 0 for number in (begin, end, *entry.shape))
    if not whole or end - begin != entry.bytes or base + end > size:
        raise ValueError("a tensor outside the file")
    return entry
