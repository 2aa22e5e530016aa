"""The weights of mixtures of experts between layouts: whole, spread over devices, and as Tutel's own files keep them.

A state dictionary is *whole* when its experts are those of one device: `...experts.w1` `(E, H, D)` and so on. Part
`rank` of W holds E/W of the experts or, with fewer experts than devices, a slice of the hidden units of one of them,
and the same slice of the second offset, padded to a multiple. Everything else is the same in all parts. `spread` and
`join` are plain functions of dictionaries, so that a checkpoint of 32 devices opens on one, and the reverse.

Tutel's layers (C. Hwang et al., MLSys 2023, arXiv 2206.03382), and with them the published Swin-MoE, are saved a file a
rank: `experts.batched_fc1_w`, `batched_fc2_w` `(own, H/S, D)`, `batched_fc1_bias`, `batched_fc2_bias`,
`gates.0.wg.weight`, or a cosine gate's `gates.0.{cosine_projector.*, sim_matrix, temperature}`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from frameloom.errors import InputError
from frameloom.scale.adapt import Shape
from frameloom.scale.layout import Ranks
from frameloom.scale.moe import MoE, layers
from frameloom.training.published import table

State = Mapping[str, Tensor]

_TUTEL = {
    "experts.batched_fc1_w": "experts.w1", "experts.batched_fc2_w": "experts.w2",
    "experts.batched_fc1_bias": "experts.b1", "experts.batched_fc2_bias": "experts.b2",
    "gates.0.wg.weight": "gate.weight",
    "gates.0.cosine_projector.weight": "gate.project.weight", "gates.0.cosine_projector.bias": "gate.project.bias",
    "gates.0.sim_matrix": "gate.directions", "gates.0.temperature": "gate.temperature",
}  # fmt: skip


def _is_expert(name: str) -> bool:
    return name.split(".")[-2:-1] == ["experts"] and name.split(".")[-1] in ("w1", "w2", "b1", "b2")


def spread(state: State, devices: int, rank: int) -> dict[str, Tensor]:
    """Part `rank` of a whole state. Raises InputError where experts and devices do not divide each other."""
    return {name: _slice(name, value, state, devices, rank) if _is_expert(name) else value
            for name, value in state.items()}  # fmt: skip


def _slice(name: str, value: Tensor, state: State, devices: int, rank: int) -> Tensor:
    experts, hidden, dim = state[name.rpartition(".")[0] + ".w1"].shape
    shape = Shape(devices, experts, dim, hidden)
    if name.endswith(".b2"):
        value = torch.nn.functional.pad(value, (0, math.ceil(dim / shape.shards) * shape.shards - dim))
    first = rank * experts // devices
    return value[first : first + shape.own].chunk(shape.shards, 1)[rank % shape.shards].clone()


def join(parts: Sequence[State], experts: int) -> dict[str, Tensor]:
    """The whole state of all parts, in the order of their ranks.

    Raises InputError: parts that are not those of so many experts.
    """
    whole = dict(parts[0])
    for name in filter(_is_expert, parts[0]):
        together = torch.cat([part[name] for part in parts])
        dim = parts[0][name.rpartition(".")[0] + ".w1"].shape[-1]
        if len(together) % experts:
            raise InputError(f"{name}: {len(parts)} parts hold {len(together)} slices, which are not {experts} experts")
        together = together.reshape(experts, -1, dim) if name[-2] == "w" else together.reshape(experts, -1)
        whole[name] = together[:, :dim] if name.endswith("b2") else together
    return whole


def from_tutel(parts: Sequence[State], prefix: str = "") -> dict[str, Tensor]:
    """The whole state of one layer, for `MoE.load_state_dict`, of the states that Tutel saved, one a rank.

    Args:
        prefix: where the layer lies in the model, such as `"layers.2.blocks.1.mlp._moe_layer."`.

    Raises:
        InputError: no such layer, or parts that do not fit together.
    """
    renamed = []
    for part in parts:
        own = {name.removeprefix(prefix): value for name, value in part.items() if name.startswith(prefix)}
        found = {ours: own[theirs] for theirs, ours in _TUTEL.items() if theirs in own}
        if "experts.w1" not in found:
            raise InputError(f"{prefix or 'state'}: holds no experts.batched_fc1_w of a Tutel layer")
        for name in ("experts.b1", "experts.b2"):  # (own, 1, n) in older files
            if name in found:
                found[name] = found[name].flatten(1)
        renamed.append(found)
    gate = renamed[0].get("gate.weight")
    experts = int(own["_num_global_experts"]) if "_num_global_experts" in own else len(gate) if gate is not None else 0
    experts = experts or renamed[0]["gate.directions"].shape[1]
    whole = join(renamed, experts)
    if whole["experts.w1"].shape[0] != experts or ("gate.weight" in whole and len(whole["gate.weight"]) != experts):
        raise InputError(f"{prefix or 'state'}: the gate and the experts differ in number")
    return whole


def read_tutel(paths: Sequence[Path]) -> list[dict[str, Tensor]]:
    """The files of a model that was saved a rank a file (`NAME.rank0`, `NAME.rank1`, ...), tensors only.

    Raises InputError naming the file that is none.
    """
    return [table(path, prefix="") for path in paths]


def distribute(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> None:
    """Give every rank its part of the experts of a model that each of them has whole.

    Raises InputError where experts and devices do not divide each other; the model is then as before.
    """
    ranks = Ranks(mesh)
    states = [spread(_own(layer), ranks.size, ranks.rank) for layer in layers(model)]
    for layer, state in zip(layers(model), states, strict=True):
        layer._place(layer.shape, ranks)
        for name, value in state.items():
            setattr(layer.experts, name.removeprefix("experts."), nn.Parameter(value))
        layer._mark()


def _own(layer: MoE) -> dict[str, Tensor]:
    return {f"experts.{name}": value for name, value in layer.experts.state_dict().items()}


@torch.no_grad()
def whole(model: nn.Module) -> dict[str, Tensor]:
    """The whole state of a model whose experts are spread, on every rank; all ranks must call."""
    state = dict(model.state_dict())
    for path, layer in model.named_modules():
        if isinstance(layer, MoE) and layer.ranks.size > 1:
            named = zip(("w1", "w2", "b1", "b2"), layer._weights(0), strict=True)
            state |= {f"{path}.experts.{name}".lstrip("."): value.clone() for name, value in named}
    return state
