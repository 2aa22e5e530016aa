"""Checkpoints of flow networks as the authors published them: renamed, compared with what is wanted."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from frameloom.training import published
from frameloom.training.published import table


def plain(key: str) -> str | None:
    """The name here of a published key; None for what is in the files and never used.

    Doubles of a norm, the rest of the Twins backbone, relative positions of an attention without positions.
    """
    unused = (
        ".norm3." in key,
        ".svt.norm." in key,
        key.startswith("att.pos_emb."),
        ".velocity_update_block.mlp." in key,
    )
    return None if any(unused) else key


def fill(
    make: Callable[[], nn.Module], name: str, path: Path, rename: Callable[[str], str | None] = plain
) -> nn.Module:
    """The network that `make` makes with a published checkpoint in it; `rename` gives the name here of a key there.

    Raises InputError that names the method, the file and the first tensor that does not fit.
    """
    state = {rename(key): value for key, value in table(path).items() if rename(key) is not None}
    return published.fill(make, name, path, state)
