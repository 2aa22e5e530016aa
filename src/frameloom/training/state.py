"""A run's state on disk: weights, optimisers and a few facts in one safetensors file, replaced in one step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from frameloom.atomic import save_tensors
from frameloom.errors import InputError


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module | None],
    optimisers: Sequence[torch.optim.Optimizer],
    facts: Mapping[str, str],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the weights of `modules`, the slots of `optimisers`, `more` tensors and `facts`; whole or not at all."""
    tensors = {f"more.{name}": value for name, value in (more or {}).items()}
    for part, module in modules.items():
        if module is not None:
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    for which, optimiser in enumerate(optimisers):
        for number, slots in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{which}.{number}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_tensors(tensors, path, facts)


def read_facts(path: Path) -> dict[str, str] | None:
    """The facts of a state; None where there is no file. Raises InputError for a file that is no state."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: not the state of a run ({error}); delete it to begin anew") from None


def load_state(
    path: Path, modules: Mapping[str, nn.Module | None], optimisers: Sequence[torch.optim.Optimizer]
) -> None:
    """Put weights and slots back where `save_state` took them from."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    for part, module in modules.items():
        if module is not None:
            module.load_state_dict(parts.get(part, {}))
    slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimisers]
    parameters = [[one for group in optimiser.param_groups for one in group["params"]] for optimiser in optimisers]
    for name, value in parts.get("optimiser", {}).items():
        which, number, slot = name.split(".")
        like = parameters[int(which)][int(number)]
        if value.shape == like.shape:
            # In the parameter's own memory layout: fused optimisers pair numbers by where they lie.
            value = torch.empty_like(like, device="cpu", dtype=value.dtype).copy_(value)
        slots[int(which)].setdefault(int(number), {})[slot] = value
    for optimiser, kept in zip(optimisers, slots, strict=True):
        optimiser.load_state_dict({"state": kept, "param_groups": optimiser.state_dict()["param_groups"]})


def load_more(path: Path) -> dict[str, Tensor]:
    """The tensors that were saved beside the weights."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("more.")]  # noqa: SIM118 - not a mapping
        return {name.removeprefix("more."): file.get_tensor(name) for name in names}
