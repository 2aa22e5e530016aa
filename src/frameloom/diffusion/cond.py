"""Conditions by name: what a network is told besides the noisy input, and what each becomes when it is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frameloom.errors import InputError


@dataclass(frozen=True)
class Cond:
    """Named tensors with a leading batch dimension, and their null values (of batch 1 or b).

    `text` `(b, n, d)` with `text_mask` `(b, n)`, `label` `(b,)`, `image` latents `(b, 1, c, h, w)`, `given` `(b, t)`
    with `clean` `(b, t, c, h, w)` are the names in use; an adapter takes those that its host knows.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    nulls: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Tensor | None:
        return self.values.get(name)

    def null(self, *names: str) -> "Cond":
        """The same with `names` dropped; with no names, all that have a null.

        Raises InputError for a name that has none.
        """
        if missing := [name for name in names if name not in self.nulls]:
            raise InputError(f"this model has no empty {missing[0]} to be guided by")
        chosen = names or tuple(self.nulls)
        empty = {name: self.nulls[name].expand_as(self.values[name]) for name in chosen if name in self.values}
        return Cond(self.values | empty, self.nulls)

    def replace(self, **values: Tensor) -> "Cond":
        return Cond(self.values | values, self.nulls)

    def rows(self, index: Tensor | slice) -> "Cond":
        """Some examples of the batch."""
        nulls = {name: value if len(value) == 1 else value[index] for name, value in self.nulls.items()}
        return Cond({name: value[index] for name, value in self.values.items()}, nulls)

    def repeat(self, times: int) -> "Cond":
        """The batch `times` times over: all examples, then all again."""
        return cat([self] * times)


def cat(conds: Sequence[Cond]) -> Cond:
    """Several batches as one. All must have the same names."""
    names = conds[0].values.keys()
    values = {name: torch.cat([cond.values[name] for cond in conds]) for name in names}
    nulls = {name: torch.cat([cond.nulls[name].expand_as(cond.values[name]) for cond in conds])
             for name in conds[0].nulls if name in names}  # fmt: skip
    return Cond(values, nulls)
