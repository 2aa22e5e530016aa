"""The repeated blocks of a model: what a window can slide over, and what has to stay.

Where a model keeps a list of layers, each is a block. A list whose elements differ, such as the levels of a U-Net, is
opened, and its elements' own lists are taken instead.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.units import in_bytes

# A block that is smaller than this share of the largest would waste the room of a large one: it stays.
SMALL = 1 / 8
# Blocks that hold less than this share of the weights are not worth a window.
WORTH = 0.5


@dataclass(frozen=True)
class Block:
    """A module whose weights come and go, with the parameters that do, by their names in the model."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Parts:
    """A model taken apart: its `blocks`, and the names of parameters in them that `tied` keeps in place."""

    blocks: list[Block]
    tied: list[str]


def take_apart(model: nn.Module, names: Sequence[str] | None = None) -> Parts:
    """The blocks of a model in the order of their definition; of the modules with these names where they are given.

    Raises:
        InputError: no repeated blocks, compiled ones, or parameters that are no plain tensors.
    """
    _check_plain(model)
    modules = _named(model, names) if names is not None else _found(model)
    prefixes = {name: f"{name}." if name else "" for name, _ in modules}
    tied = _tied(model, modules)
    blocks = []
    for name, module in modules:
        own = {prefixes[name] + key: value for key, value in module.named_parameters() if id(value) not in tied}
        if own:
            blocks.append(Block(name, module, own))
    for block in blocks:
        _check_parameters(block)
    listed = [name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in tied]
    return Parts(blocks, listed)


def size(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(value.numel() * value.element_size() for value in module.parameters())


def _found(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = list(_walk("", model))
    largest = max((size(module) for _, module in found), default=0)
    kept = [(name, module) for name, module in found if size(module) >= SMALL * largest]
    if len(kept) < 2 or sum(size(module) for _, module in kept) < WORTH * size(model):
        parts = sorted(((size(child), name) for name, child in model.named_children()), reverse=True)[:4]
        told = ", ".join(f"{name} ({in_bytes(count)})" for count, name in parts) or "nothing at all"
        raise InputError(f"{type(model).__name__}: no repeated list of blocks holds most of its weights; it is made of "
                         f"{told}; name the blocks yourself, such as blocks=[...]")  # fmt: skip
    return kept


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    dot = f"{name}." if name else ""
    if not _is_list(module):
        for key, child in module.named_children():
            yield from _walk(dot + key, child)
        return
    heavy = [(dot + key, child) for key, child in module.named_children() if size(child)]
    kinds = Counter(_signature(child) for _, child in heavy)
    for key, child in heavy:
        inner = list(_walk(key, child)) if kinds[_signature(child)] == 1 else []
        # An element like none of its siblings is a level, if lists of its own make it up.
        if len(inner) > 1 and sum(size(part) for _, part in inner) >= 0.8 * size(child):
            yield from inner
        else:
            yield key, child


def _is_list(module: nn.Module) -> bool:
    heavy = [child for child in module.children() if size(child)]
    if isinstance(module, nn.ModuleList):
        return bool(heavy)
    # A Sequential is as often one layer after another as it is a list: its elements must be alike.
    return isinstance(module, nn.Sequential) and len(heavy) > 1 and len({_signature(child) for child in heavy}) == 1


def _signature(module: nn.Module) -> tuple:
    return type(module), tuple((name, tuple(value.shape)) for name, value in module.named_parameters())


def _named(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            known = ", ".join(key for key, child in model.named_children() if size(child))
            raise InputError(f"blocks {name}: the model has no such module; it has {known}") from None
        listed = [(f"{name}.{key}", child) for key, child in module.named_children() if size(child)]
        found += listed if isinstance(module, nn.ModuleList) else [(name, module)]
    for name, _ in found:
        if inside := [other for other, _ in found if other != name and other.startswith(f"{name}.")]:
            raise InputError(f"blocks {name}: holds {inside[0]}, which is a block too; name one of them")
    if len(found) < 2:
        raise InputError("blocks: two or more are wanted, or the name of a list of them")
    return found


def _tied(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> set[int]:
    """Parameters that more than one part of the model uses, as the same parameter or as the same memory."""
    inside = {id(module): number for number, (_, block) in enumerate(modules) for module in block.modules()}
    users: dict[object, set[int]] = {}
    values: dict[object, dict[int, nn.Parameter]] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            key = _memory(value)
            users.setdefault(key, set()).add(inside.get(id(module), -1))
            values.setdefault(key, {})[id(value)] = value
    shared = (key for key in users if len(users[key]) > 1 or len(values[key]) > 1)
    return {name for key in shared for name in values[key] if users[key] != {-1}}


def _memory(value: Tensor) -> object:
    if value.device.type == "meta" or not value.numel():
        return id(value)
    return value.untyped_storage().data_ptr()


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            where = name or type(model).__name__
            raise InputError(f"{where}: is compiled, and a compiled block keeps the addresses of its weights; "
                             "stream the model before torch.compile, or leave that away")  # fmt: skip


def _check_parameters(block: Block) -> None:
    for name, value in block.parameters.items():
        if type(value) is not nn.Parameter:
            raise InputError(f"{name}: is a {type(value).__name__}; only plain parameters can be streamed: stream the "
                             "model before it is quantised or sharded")  # fmt: skip
        if not _dense(value):
            raise InputError(f"{name}: its elements lie apart or on top of each other in memory (strides "
                             f"{value.stride()}); make it contiguous() first")  # fmt: skip


def _dense(value: Tensor) -> bool:
    return value.layout is torch.strided and (
        value.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(value)
    )
