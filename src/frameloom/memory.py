"""How much memory a computation takes: the bytes of tensors alive at once, counted, the same on every device."""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at once among those made inside the block; weights made before do not count.

    >>> with PeakMemory() as meter:
    ...     model(x)
    >>> meter.most
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self._known: dict[int, weakref.finalize] = {}
        self._older: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # A view or an update of a tensor from before is no new memory: its storage came in with the arguments.
        for storage in _storages((args, kwargs)):
            key = storage._cdata
            if key not in self._known and key not in self._older:
                self._older[key] = weakref.finalize(storage, self._older.pop, key, None)
        made = function(*args, **(kwargs or {}))
        for storage in _storages(made):
            self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._older:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._gone, key, size)
        self.alive += size
        self.most = max(self.most, self.alive)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    plain = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and type(leaf) in _PLAIN]
    return [tensor.untyped_storage() for tensor in plain if not tensor.is_meta]


# Wrapper tensors (DTensor and its like) have no storage of their own; what they wrap passes by itself.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def peak(call: Callable[[], object]) -> int:
    """The peak of one call, in bytes."""
    with PeakMemory() as meter:
        call()
    return meter.most


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


def available() -> int:
    """Bytes of main memory that are free for use now."""
    import psutil

    return psutil.virtual_memory().available
