"""A causal language model of transformers split over ranks by torch's own tensor parallelism, for `flover`."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from frameloom.errors import InputError
from frameloom.training.pretrained import digest

_STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split attention heads and feed-forward widths, as the model's own plan says, and the vocabulary, over `mesh`.

    An iteration then takes two all-reduces a layer and one all-gather of the logits. Every rank must hold the same
    whole model before.

    Raises:
        InputError: ranks hold different models, or the model cannot be split over so many.
    """
    ranks, group = mesh.size(), mesh.get_group()
    same_everywhere(group, "--weights", digest(model))
    config, name = model.config, type(model).__name__
    rules: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    foreign = sorted(set(rules.values()) - set(_STYLES))
    if not rules or foreign:
        reason = f"its plan has {', '.join(foreign)}" if foreign else "it has no plan"
        raise InputError(f"{name}: cannot be split over ranks here ({reason}); models like Llama can")
    for what in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, what, ranks) % ranks:
            raise InputError(f"{name}: {getattr(config, what)} {what[4:].replace('_', ' ')} cannot be split over "
                             f"{ranks} ranks; a divisor of them can")  # fmt: skip
    plan: dict[str, Any] = {f"{model.base_model_prefix}.{path}": _STYLES[style]() for path, style in rules.items()}
    return parallelize_module(model, mesh, plan | {"lm_head": ColwiseParallel(output_layouts=Replicate())})


def same_everywhere(group: "dist.ProcessGroup", what: str, value: Any) -> None:
    """Raise InputError on every rank, and name one that differs, unless all ranks call this with the same `value`."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InputError(f"{what}: rank {rank} has {other} and rank 0 has {found[0]}; start all ranks alike")
