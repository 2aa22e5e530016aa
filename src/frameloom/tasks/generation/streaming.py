"""A generator whose network comes and goes block by block (`frameloom.scale.stream`): the same video in less memory."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frameloom.device import check_device
from frameloom.diffusion.generator import Generator, open_generator
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.scale.store import Checkpoint
from frameloom.scale.stream import Streamed, stream

log = logging.getLogger("frameloom")

# The flag's words, and what `stream` calls them.
OPTIONS = {"k": "k", "k2": "k_prime", "keep": "pin", "store": "store", "budget": "budget"}


def open_streamed(
    weights: str | None, device: str, options: Mapping[str, Any], progress: Progress = silent
) -> tuple[Generator, list[Streamed]]:
    """A model as `open_generator` gives it, its denoising networks streamed. Text encoders and decoders are whole.

    On the CPU the networks of a diffusers pipeline in a folder are read block by block from there, and never are in
    memory whole; other models are loaded first, and their blocks then go to RAM or to a scratch file.

    Args:
        options: `k` blocks that take turns, `keep` that stay beside them (`frameloom.stream` counts both as its k),
            `k2` swapped together, `budget` (bytes); `store` is ram or disk.

    Raises:
        InputError: other options, or numbers that do not go together.
    """
    if unknown := [name for name in options if name not in OPTIONS]:
        raise InputError(f"--stream {unknown[0]}: has {', '.join(OPTIONS)}")
    check_device(device)
    given = {OPTIONS[name]: value for name, value in options.items()}
    given["k"] = given["k"] + given.get("pin", 0) if "k" in given else None
    on_cpu = torch.device(device).type == "cpu"
    store = given.pop("store", None) or ("disk" if on_cpu else "ram")
    if store not in ("ram", "disk"):
        raise InputError(f"--stream store={store}: ram or disk")
    given |= {"device": device, "progress": progress}
    folder = Path(weights or "")
    # Not for a GPU: a pipeline moves all its networks to one device when it is put together.
    if store == "disk" and on_cpu and (hosts := _empty_hosts(folder)):
        from frameloom.diffusion.pipeline import load_pipeline

        made = [stream(host, store=folder / name, **given) for name, host in hosts.items()]
        return load_pipeline(str(folder), hosts=hosts), made
    model = open_generator(weights)
    own = networks(model)
    made = [stream(host, store=store, **given) for host in own]
    _move(model, own, device)
    return model, made


def networks(model: Generator) -> list[nn.Module]:
    """The denoising networks in a model: one, or the two of Wan 2.2."""
    host = getattr(model, "host", None) or getattr(model.denoiser, "host", model)
    if not isinstance(host, nn.Module):
        raise InputError(f"--stream: needs a model whose layers can be reached, and {model.name} is none")
    low = getattr(model.denoiser, "low", None)
    return [host] if low is None else [host, low]


def _empty_hosts(folder: Path) -> dict[str, nn.Module]:
    """Networks of a pipeline in a folder, without weights, by the names of their folders; none where it takes more.

    AnimateDiff's is put together from two checkpoints, and old files have other names than the modules of today.
    """
    import diffusers
    from accelerate import init_empty_weights

    from frameloom.diffusion.pipeline import FAMILIES

    try:
        index = json.loads((folder / "model_index.json").read_text())
        family = FAMILIES[index["_class_name"]]
        names = [name for name in (family.part, "transformer_2") if index.get(name, [None])[0] == "diffusers"]
        kinds = {name: getattr(diffusers, index[name][1]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
    if index["_class_name"] == "AnimateDiffPipeline":
        return {}
    hosts: dict[str, nn.Module] = {}
    for name, kind in kinds.items():
        # Positions and the like are buffers that no file has: they are made.
        with init_empty_weights(include_buffers=False):
            hosts[name] = kind.from_config(kind.load_config(folder / name)).eval().requires_grad_(False)
        checkpoint = Checkpoint(folder / name)
        if any(key not in checkpoint for key, _ in hosts[name].named_parameters()):
            log.warning("%s: has other names than the model's own; it is loaded whole first", folder / name)
            return {}
    return hosts


def _move(model: Generator, hosts: list[nn.Module], device: str) -> None:
    """Everything but the streamed networks to the device; they have seen to themselves."""
    whole = model if isinstance(model, nn.Module) else None
    parts = list(whole.children()) if whole is not None else list(model.pipe.components.values())  # type: ignore[attr-defined]
    for part in parts:
        if isinstance(part, nn.Module) and whole not in hosts and part not in hosts:
            part.to(device)
