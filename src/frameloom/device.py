"""Where to compute, as a person names it: `cpu`, `cuda`, `cuda:1`."""

from typing import TYPE_CHECKING

from frameloom.errors import InputError

if TYPE_CHECKING:
    import torch


def check_device(device: "str | torch.device") -> None:
    """Raises InputError for a word that names no device, and for a device that this machine does not have.

    Whatever computes on a device that a person chose calls this before it writes anything.
    """
    if str(device) == "cpu":  # known without importing torch
        return
    import torch

    counts = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        counts[accelerator.type] = torch.accelerator.device_count()
    here = ", ".join(f"{kind}:{k}" if kind != "cpu" else kind for kind, count in counts.items() for k in range(count))
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: names no device; here there is {here}") from None
    # Without a number it is the current one of its kind.
    if (wanted.index or 0) >= counts.get(wanted.type, 0):
        raise InputError(f"--device {device}: this machine has no such device; here there is {here}")
