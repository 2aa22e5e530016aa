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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._gone, key, size)
        self.alive += size
        self.most = max(self.most, self.alive)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size


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
