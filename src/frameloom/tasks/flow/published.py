"""Checkpoints as the authors published them: read safely, renamed, compared with what is wanted."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from frameloom.errors import InputError


def read_state(path: Path) -> dict[str, Tensor]:
    """The flat table of tensors of a PyTorch file, without `module.` and whatever it is wrapped in.

    Raises InputError for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a file of tensors ({reason}); give a PyTorch checkpoint") from None
    for wrapping in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no flat table of tensors; give a published checkpoint")
    return {key.removeprefix("module."): value for key, value in state.items()}


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


def fill(model: nn.Module, name: str, path: Path, rename: Callable[[str], str | None] = plain) -> nn.Module:
    """Load a published checkpoint into `model`; `rename` gives the name here of a key there.

    Raises InputError that names the method, the file and the first tensor that does not fit.
    """
    state = {rename(key): value for key, value in read_state(path).items() if rename(key) is not None}
    own = model.state_dict()
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        key = min(wrong)
        raise InputError(f"{path}: does not fit {name}: {key} is {list(state[key].shape)} there and "
                         f"{list(own[key].shape)} here; a file of another size or method?")  # fmt: skip
    for what, keys in (("has no", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        keys = {key for key in keys if not key.endswith("num_batches_tracked")}
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{path}: not a checkpoint of {name}: it {what} {min(keys)}{more}")
    model.load_state_dict(state, strict=False)
    return model.eval()
