"""Checkpoints as their authors published them: what is in them is read, nothing in them is run.

A PyTorch file is a pickle, and a pickle is a program; our own files hold none, theirs come no other way. So this reads
the one part of that language that says where numbers lie: lists, dictionaries, text, and tensors as views of stored
bytes. A foreign name, whatever it is (a scheduler, `getattr`, an array of another library), becomes a `Placeholder`:
nothing is imported, nothing called. `torch.load(weights_only=True)` refuses a whole file for one such name, and
checkpoints as training leaves them are full of them. The bytes of a tensor are read when it is wanted, so an
optimizer's state beside the weights costs nothing.
"""

import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from frameloom.errors import InputError

WRAPPINGS = ("model", "state_dict", "model_state_dict", "params_ema", "params", "net")
PROGRAM = 2**26  # bytes of pickle; the largest published file has some hundred thousand
LEGACY = 0x1950A86A20F9469CFC6C, 1001  # how files of PyTorch before 1.6 begin

_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip


class Placeholder:
    """What a foreign name, and whatever is made of it, is here: nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class Stored(NamedTuple):
    """Where a run of numbers lies in the file, and how many there are."""

    key: str
    dtype: torch.dtype
    count: int


class View(NamedTuple):
    """A tensor that is yet to be read."""

    stored: Stored
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Typed(NamedTuple):
    """The kind of a storage, under the name that the file gives it."""

    dtype: torch.dtype


def _view(stored: Stored, offset: int, size: Iterable[int], stride: Iterable[int], *rest: Any) -> View:
    """A tensor's place; newer files say the kind of number beside it, for bytes without one."""
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if (
        not isinstance(stored, Stored)
        or len(size) != len(stride)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise ValueError("a tensor that lies nowhere")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), stored.dtype)
    return View(stored, offset, size, stride, dtype)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _typed(rebuild: Callable, kind: Any, args: tuple, state: Any) -> Any:
    """A tensor with attributes of its own, which are left away."""
    if rebuild not in _REBUILD.values():
        raise ValueError("a tensor of a foreign kind")
    return rebuild(*args)


# The only functions that a file can have called.
_REBUILD: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _view,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _Reader(pickle._Unpickler):
    """The language of pickles without its calls.

    Of the two readers in Python this is the one written in it: the other makes a table as long as a file tells it to.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)
    # Room is made for as many bytes as the file says before there are any; PyTorch writes none of these.
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILD:
            return _REBUILD[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name.removesuffix("Storage") in _DTYPES:
            return _Typed(_DTYPES[name.removesuffix("Storage")])
        found = getattr(torch, name, None) if module == "torch" else None
        return found if isinstance(found, torch.dtype) else Placeholder

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            return Placeholder()
        _, kind, key, _, count, *view = pid
        if any(view) or not isinstance(kind, _Typed) or type(count) is not int or count < 0:
            raise ValueError("a storage of a foreign kind")
        return Stored(str(key), kind.dtype, count)

    def load_build(self) -> None:
        """The state of an object: nothing here has any."""
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build


class _Archive:
    """A file of PyTorch 1.6 or later: a zip of one pickle and the bytes of every storage."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.zip, self.size = zipfile.ZipFile(file), size
        found = [name for name in self.zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("no pickle, or several")
        self.folder = found[0].removesuffix("data.pkl")
        if self._has("byteorder") and self._bytes("byteorder", 8).decode() != sys.byteorder:
            raise ValueError("another order of bytes")
        with self.zip.open(self._entry("data.pkl", PROGRAM)) as program:
            self.content = _Reader(program).load()

    def _has(self, name: str) -> bool:
        return self.folder + name in self.zip.NameToInfo

    def _entry(self, name: str, most: int) -> zipfile.ZipInfo:
        entry = self.zip.getinfo(self.folder + name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > min(most, self.size):
            raise ValueError("packed, or too large")
        return entry

    def _bytes(self, name: str, most: int) -> bytearray:
        entry = self._entry(name, most)
        data = bytearray(entry.file_size)
        with self.zip.open(entry) as part:
            part.readinto(data)
        return data

    def read(self, stored: Stored) -> bytearray:
        """The bytes of a storage."""
        return self._bytes(f"data/{stored.key}", stored.count * stored.dtype.itemsize)


class _Older:
    """A file of PyTorch before 1.6: five pickles and then the storages, one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        magic, version, host = (_Reader(file).load() for _ in range(3))
        if (magic, version) != LEGACY or not isinstance(host, dict):
            raise ValueError("not a file of PyTorch")
        if host.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError("another order of bytes")
        self.kinds: dict[str, torch.dtype] = {}
        reader = _Reader(file)
        found, reader.persistent_load = reader.persistent_load, lambda pid: self._noted(found(pid))
        self.content = reader.load()
        self.places: dict[str, int] = {}
        for key in _Reader(file).load():
            self.places[key] = file.tell()
            (count,) = struct.unpack("<q", file.read(8))
            if count < 0:
                raise ValueError("a storage of a negative length")
            file.seek(count * self.kinds[key].itemsize, 1)

    def _noted(self, stored: Any) -> Any:
        if isinstance(stored, Stored):
            self.kinds[stored.key] = stored.dtype
        return stored

    def read(self, stored: Stored) -> bytearray:
        """The bytes of a storage."""
        self.file.seek(self.places[stored.key])
        (count,) = struct.unpack("<q", self.file.read(8))
        return bytearray(self.file.read(min(count, stored.count) * stored.dtype.itemsize))


class _Tensors:
    """The tensors of an open file, every storage read once."""

    def __init__(self, source: "_Archive | _Older", size: int) -> None:
        self.source, self.size, self.read = source, size, {}

    def __call__(self, view: View) -> Tensor:
        count = 1
        for side in view.size:
            count *= side
        if view.stored not in self.read:
            data = self.source.read(view.stored)
            if len(data) != view.stored.count * view.stored.dtype.itemsize:
                raise ValueError("a storage that is cut off")
            self.read[view.stored] = data
        data = self.read[view.stored]
        reach = view.offset + sum((side - 1) * step for side, step in zip(view.size, view.stride, strict=True)) + 1
        # A tensor of strides of zero is as large as it says, however few bytes there are: no larger than the file.
        if count and (reach * view.dtype.itemsize > len(data) or count > self.size):
            raise ValueError("a tensor beyond its storage")
        if not count:
            return torch.empty(view.size, dtype=view.dtype)
        return torch.frombuffer(data, dtype=view.dtype).as_strided(view.size, view.stride, view.offset)


@contextmanager
def _opened(path: Path):
    """What is in a PyTorch file, and what reads its tensors; whatever damage does is one line."""
    try:
        with open(path, "rb") as file:
            whole = file.read(4) == b"PK\x03\x04"
            size = file.seek(0, 2)
            file.seek(0)
            source = _Archive(file, size) if whole else _Older(file)
            yield source.content, _Tensors(source, size)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a published checkpoint") from None
    except Exception as error:  # noqa: BLE001 - a stranger's pickle can fail in any way
        raise InputError(f"{path}: not a file of tensors, or a damaged one ({type(error).__name__}); "
                         "give a PyTorch checkpoint") from None  # fmt: skip


def read(path: str | Path) -> Any:
    """All of a PyTorch file: dictionaries, lists, numbers and tensors, with a `Placeholder` for all else.

    Raises InputError for any other file.
    """
    with _opened(Path(path)) as (content, tensors):
        return _filled(content, tensors, {})


def _filled(value: Any, tensors: _Tensors, done: dict[int, Any]) -> Any:
    """The same with tensors in it; what stands in several places is looked at once, however often it is nested."""
    if id(value) not in done:
        if isinstance(value, View):
            made = tensors(value)
        elif isinstance(value, dict):
            made = {key: _filled(entry, tensors, done) for key, entry in value.items()}
        elif type(value) in (list, tuple):
            made = type(value)(_filled(entry, tensors, done) for entry in value)
        else:
            made = value
        done[id(value)] = made
    return done[id(value)]


def table(path: str | Path, prefix: str = "module.") -> dict[str, Tensor]:
    """The flat table of tensors of a PyTorch file, out of whatever it is wrapped in.

    A table among other things is looked for under the usual names (`model`, `state_dict`, ...). Names lose `prefix`:
    training on several devices puts one before them all.

    Raises InputError for anything else.
    """
    with _opened(Path(path)) as (content, tensors):
        for _ in WRAPPINGS:
            if isinstance(content, dict) and not _flat(content):
                content = next((content[name] for name in WRAPPINGS if isinstance(content.get(name), dict)), None)
        if not (isinstance(content, dict) and _flat(content)):
            raise InputError(f"{path}: holds no flat table of tensors; give a published checkpoint")
        return {key.removeprefix(prefix): tensors(view) for key, view in content.items()}


def _flat(content: dict) -> bool:
    return all(isinstance(key, str) and isinstance(value, View) for key, value in content.items())


def shown(key: str) -> str:
    """A name out of a file, fit for a terminal: no longer than a line, nothing in it that a terminal obeys."""
    return (key if key.isprintable() else key.encode("unicode_escape").decode())[:80]


def fill(make: Callable[[], nn.Module], name: str, path: str | Path, state: dict[str, Tensor]) -> nn.Module:
    """The network that `make` makes, with the tensors of a published checkpoint by the names that they have here.

    Nothing of its size is made before the tensors are known to fit.

    Raises InputError that names the method, the file and the first tensor that does not fit.
    """
    with torch.device("meta"):
        own = make().state_dict()
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        key = min(wrong)
        raise InputError(f"{path}: does not fit {name}: {key} is {list(state[key].shape)} there and "
                         f"{list(own[key].shape)} here; a file of another size or method?")  # fmt: skip
    for what, keys in (("has no", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        keys = {key for key in keys if not key.endswith("num_batches_tracked")}
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{path}: not a checkpoint of {name}: it {what} {shown(min(keys))}{more}")
    model = make()
    model.load_state_dict(state, strict=False)
    return model.eval()
