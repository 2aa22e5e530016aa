"""Weights on disk: `config.json` beside `model.safetensors`, shipped, local or on the Hugging Face hub."""

import dataclasses
import hashlib
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from frameloom.atomic import aside, save_tensors
from frameloom.cards import card
from frameloom.device import check_device
from frameloom.errors import InputError


def save_pretrained(model: nn.Module, method: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write `config.json` and `model.safetensors` (parameters in `dtype`) into `folder`, each in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    note = {"method": method, "config": dataclasses.asdict(model.config)}
    with aside(folder / "config.json") as partial:
        partial.write_text(json.dumps(note, indent=2) + "\n")
        save_tensors(tensors, folder / "model.safetensors")
    return folder


def shipped(method: str) -> Path | None:
    """The folder of the tiny weights that come with the package, or None."""
    folder = files("frameloom") / "weights" / method
    return Path(str(folder)) if (folder / "config.json").is_file() else None


def load(method: str, weights: str | Path | None = None, *, size: str = "tiny", device: str = "cpu") -> Any:
    """The bare method: a module in evaluation mode, or a plain object for a method without weights.

    Args:
        method: its id, such as `"vfimamba"`.
        weights: None or `"tiny"` for the shipped ones; `"random"` for an untrained model of `size`; a folder with
            `config.json` and `model.safetensors`; a hub id (`"owner/name"`); or a checkpoint file as the
            authors published it, for methods whose card says so.

    Raises:
        InputError: no such method, device or weights, or weights of another method (both are named).
    """
    check_device(device)
    kind = card(method).load_class()
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        if weights is not None:
            raise InputError(f"--weights {weights}: {method} has no weights to load")
        return kind()
    if weights == "random":
        return kind(kind.preset(size)).to(device).eval()
    if weights in (None, "tiny"):
        folder = shipped(method)
        if folder is None:
            raise InputError(f"{method} ships no weights; give --weights, or make some: frameloom train {method}")
    elif Path(weights).is_file():
        if not hasattr(kind, "load_official"):
            raise InputError(f"--weights {weights}: {method} loads a folder or a hub id, not a single file")
        return kind.load_official(Path(weights)).to(device).eval()
    else:
        folder = _folder(str(weights))
    return _from_folder(kind, method, folder).to(device).eval()


def digest(method: Any) -> str:
    """A short name of a method's weights, equal when they are; empty for a method that has none."""
    if not isinstance(method, nn.Module):
        return ""
    total = hashlib.sha256()
    for name, value in method.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _folder(weights: str) -> Path:
    if Path(weights).is_dir():
        return Path(weights)
    if weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise InputError(f"--weights {weights}: no such folder or file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(weights, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"--weights {weights}: not a folder here, and not found on the hub "
                         f"({type(error).__name__})") from None  # fmt: skip


def _from_folder(kind: type, method: str, folder: Path) -> nn.Module:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            more = "; what its authors published is given as a file" if hasattr(kind, "load_official") else ""
            raise InputError(f"--weights {folder}: holds no {name}{more}")
    try:
        note = json.loads((folder / "config.json").read_text())
        found, settings = note["method"], note["config"]
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"--weights {folder}: not weights of a frameloom method ({error})") from None
    if found != method:
        raise InputError(f"--weights {folder}: these are weights of {found}, not of {method}")
    config_type = type(kind.preset("tiny"))
    try:
        config = config_type(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
        model = kind(config)
        model.load_state_dict({name: value.float() if value.is_floating_point() else value
                               for name, value in tensors.items()})  # fmt: skip
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--weights {folder}: do not fit {method} of this version ({reason})") from None
    return model


def ship(method: str, folder: str | Path) -> Path:
    """Put the weights of a finished run into the package, in float16."""
    model = _from_folder(card(method).load_class(), method, Path(folder))
    target = Path(str(files("frameloom"))) / "weights" / method
    shutil.rmtree(target, ignore_errors=True)
    return save_pretrained(model, method, target, torch.float16)
