"""A model with compressed experts as a folder: `config.json`, safetensors, and the way back to a model.

    config.json              method, bits, code and its dictionary's checksum, SHA-256 of every file, the host's config
    dense.safetensors        all that is no expert, bfloat16
    experts-BB-GG.safetensors  a group of experts of a layer, as they were finished

An expert's matrix is one of

    w_comp int16, row_off int32, ter_minmax bfloat16    ternary, the dictionary code: multiplied without decoding
    packed uint8, grid bfloat16                         two bits, four weights a byte
    ranged uint8, rows bfloat16                         either, range-coded: smaller on disk, decoded when it is loaded

The folder of a published `_qmoe` checkpoint (`noexp.pt`, `exp00.pt`, ...) is read as well.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from frameloom.atomic import save_tensors
from frameloom.bitstream.rangecoder import pack_symbols, unpack_symbols
from frameloom.errors import InputError
from frameloom.scale.experts import Experts, assign, experts_of, host_of, read_config, shapes, skeleton
from frameloom.scale.gptq import GRIDS
from frameloom.scale.ternary import TernaryLinear, dictionary, encode
from frameloom.training.published import table

VERSION = 1
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.json",
             "merges.txt", "generation_config.json")  # fmt: skip


class TwoBitLinear(nn.Module):
    """A linear layer without bias whose weights take two bits each; decoded on use.

    Args:
        packed: four weights a byte, the first in the lowest bits, row by row over the whole matrix.
        grid: step and zero of every row, bfloat16, by turns.
        width: input features.
    """

    def __init__(self, packed: UInt8[Tensor, "n"], grid: Tensor, width: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, grid.numel() // 2
        if packed.numel() != (self.out_features * width + 3) // 4:
            raise InputError(f"{packed.numel()} bytes are no {self.out_features} x {width} weights of two bits")
        self.register_buffer("packed", packed)
        self.register_buffer("grid", grid.reshape(-1).bfloat16())

    @classmethod
    def from_symbols(cls, symbols: Int8[Tensor, "h k"], rows: Float[Tensor, "h 2"]) -> "TwoBitLinear":
        flat = F.pad(symbols.reshape(-1), (0, -symbols.numel() % 4)).view(-1, 4).to(torch.uint8)
        packed = flat[:, 0] | flat[:, 1] << 2 | flat[:, 2] << 4 | flat[:, 3] << 6
        return cls(packed, rows, symbols.shape[1])

    def dense(self) -> Float[Tensor, "h k"]:
        """The matrix, in float32."""
        symbols = torch.stack([self.packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).view(-1)
        symbols = symbols[: self.out_features * self.in_features].view(self.out_features, -1)
        return GRIDS["2"].spread(symbols, self.grid.view(-1, 2).float())

    def forward(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b h"]:
        return F.linear(x.float(), self.dense()).to(x.dtype)


def linear_of(symbols: Int8[Tensor, "h k"], rows: Float[Tensor, "h 2"], bits: str) -> nn.Module:
    """The layer that multiplies with a rounded matrix."""
    if bits == "ternary":
        return TernaryLinear(*encode(symbols), rows, symbols.shape[1])
    return TwoBitLinear.from_symbols(symbols, rows)


def stored(symbols: Int8[Tensor, "h k"], rows: Float[Tensor, "h 2"], bits: str, pack: str) -> dict[str, Tensor]:
    """The tensors that keep a rounded matrix in a file."""
    if pack == "range":
        data = pack_symbols(symbols.numpy().reshape(-1).astype(np.int64), GRIDS[bits].symbols)
        return {"ranged": torch.frombuffer(bytearray(data), dtype=torch.uint8), "rows": rows.reshape(-1).bfloat16()}
    return dict(linear_of(symbols, rows, bits).named_buffers())


_KINDS = {"w_comp": torch.int16, "row_off": torch.int32, "ter_minmax": torch.bfloat16, "packed": torch.uint8,
          "grid": torch.bfloat16, "ranged": torch.uint8, "rows": torch.bfloat16}  # fmt: skip


def restored(state: dict[str, Tensor], shape: tuple[int, int], bits: str) -> nn.Module:
    """The layer whose matrix `stored` kept; InputError for tensors of another matrix, or damaged ones."""
    for name, value in state.items():
        if value.dtype != _KINDS[name] or value.ndim != 1:
            raise InputError(f"{name} is {value.dtype} {tuple(value.shape)}; {_KINDS[name]} in one dimension is right")
    try:
        if "ranged" in state:
            flat = unpack_symbols(state["ranged"].numpy().tobytes(), shape[0] * shape[1], GRIDS[bits].symbols)
            symbols = torch.from_numpy(flat.astype(np.int8)).view(shape)
            layer = linear_of(symbols, state["rows"].float().view(shape[0], 2), bits)
        elif bits == "ternary":
            layer = TernaryLinear(state["w_comp"], state["row_off"], state["ter_minmax"], shape[1])
        else:
            layer = TwoBitLinear(state["packed"], state["grid"], shape[1])
    except KeyError as error:
        raise InputError(f"an expert lacks {error.args[0]}; the file is not of this format") from None
    except (RuntimeError, TypeError) as error:
        raise InputError(f"an expert of {shape[0]} x {shape[1]} weights is damaged ({type(error).__name__})") from None
    if layer.out_features != shape[0]:
        raise InputError(f"an expert has {layer.out_features} rows; its model says {shape[0]}")
    return layer


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and goes away when it does not."""
    if out.exists():
        raise InputError(f"{out}: is there already; name a folder that is not")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def save_dense(model: nn.Module, folder: Path) -> None:
    """Write all parameters of a model whose experts were taken out, tied ones once."""
    seen: dict[int, str] = {}
    values = {}
    for name, value in model.state_dict().items():
        if seen.setdefault(value.data_ptr(), name) == name:
            values[name] = value.bfloat16().contiguous() if value.is_floating_point() else value.contiguous()
    save_tensors(values, folder / "dense.safetensors")


def describe(folder: Path, host: dict[str, Any], bits: str, pack: str, rounding: str) -> None:
    """Write `config.json` over the files that are there."""
    files = {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}
    code = dictionary()
    table = {"zero": code.zero, "pairs": code.pairs, "size": len(code), "sha256": code.checksum}
    note = {"method": "qmoe", "version": VERSION, "bits": bits, "pack": pack, "rounding": rounding,
            "dictionary": table, "files": files, "host": host}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(note, indent=2) + "\n")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_compressed(folder: str | Path) -> bool:
    """Whether `load` is the way to open this folder."""
    folder = Path(folder)
    return (folder / "noexp.pt").is_file() or (
        (folder / "config.json").is_file() and read_config(folder).get("method") == "qmoe"
    )


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, decoded: int = 0) -> nn.Module:
    """The transformers model of a folder that `frameloom quantize` made, or of a published `_qmoe` checkpoint.

    Args:
        folder: where it is.
        dtype: of what is no expert; stored as bfloat16, and computed fastest in float32 on a CPU.
        decoded: experts of a layer that are kept as plain matrices after use, the last used ones.

    Returns:
        A `PreTrainedModel` in evaluation mode, with `generate` where its family has it. Its experts stay compressed.

    Raises:
        InputError: no such folder, another method's or version's, another dictionary, damaged files.
    """
    from transformers import CONFIG_MAPPING

    folder = Path(folder)
    official = (folder / "noexp.pt").is_file()
    note = {"host": read_config(folder), "bits": "ternary"} if official else _note(folder)
    kind = note["host"].get("model_type", "")
    host = host_of(kind, str(folder))
    try:
        config = CONFIG_MAPPING[kind](**{key: value for key, value in note["host"].items() if key != "model_type"})
        model = skeleton(config, host)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{folder}: its description fits no {kind} model ({type(error).__name__})") from None
    values = read_official(folder) if official else _read(folder, note)
    for path, module in experts_of(model).items():
        count, first, second = shapes(module)
        layers = []
        for number in range(count):
            name = f"{path}.expert_{number}"
            try:
                layers.append((restored(_under(values, f"{name}.wi."), first, note["bits"]),
                               restored(_under(values, f"{name}.wo."), second, note["bits"])))  # fmt: skip
            except InputError as error:
                raise InputError(f"{folder}: {name}: {error}") from None
        model.set_submodule(path, Experts(layers, host, host.between(config), decoded))
    assign(model, {name: value.to(dtype) if value.is_floating_point() else value
                   for name, value in values.items() if ".expert_" not in name}, folder)  # fmt: skip
    return model


def _under(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one matrix, by their last names."""
    return {name: values[prefix + name] for name in _KINDS if prefix + name in values}


def _note(folder: Path) -> dict[str, Any]:
    note = read_config(folder)
    if note.get("method") != "qmoe" or not isinstance(note.get("host"), dict):
        raise InputError(f"{folder}: is no model with compressed experts; frameloom quantize makes one")
    if note.get("version") != VERSION or note.get("bits") not in GRIDS:
        raise InputError(f"{folder}: is of version {note.get('version')}, {note.get('bits')} bits; "
                         f"version {VERSION} and {' or '.join(GRIDS)} can be read")  # fmt: skip
    code, table = dictionary(), note.get("dictionary")
    theirs = table if isinstance(table, dict) else {}
    if theirs.get("sha256") != code.checksum:
        raise InputError(f"{folder}: is coded with another dictionary ({str(theirs.get('sha256'))[:12]}, p(0) = "
                         f"{theirs.get('zero')}); {code.checksum[:12]}, p(0) = {code.zero}, can be read")  # fmt: skip
    return note


def _read(folder: Path, note: dict[str, Any]) -> dict[str, Tensor]:
    files = note.get("files")
    if not isinstance(files, dict) or "dense.safetensors" not in files:
        raise InputError(f"{folder}: its config.json names no dense.safetensors")
    values: dict[str, Tensor] = {}
    for name, digest in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{folder}: holds no {name}; its config.json names it")
        if _digest(path) != digest:
            raise InputError(f"{path}: is not the file that was written (another SHA-256); copy the folder again")
        try:
            values |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged ({type(error).__name__})") from None
    return values


def read_official(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a published `_qmoe` folder, by name; nothing in its files is executed.

    Raises InputError for a file that holds anything but tensors by name.
    """
    values: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.pt")):
        if path.name == "sizes.pt":
            continue  # lengths of w_comp, for those who allocate first
        values |= table(path, prefix="")
    return values
