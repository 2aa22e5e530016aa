"""The fit of a network to one video: all frames every epoch, shuffled, until the schedule has run out."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.metrics.image import ms_ssim, ssim
from frameloom.progress import Progress, silent

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "l2": F.mse_loss,
    "fusion6": lambda out, target: 0.7 * F.l1_loss(out, target) + 0.3 * (1 - ssim(out, target)),
    "fusion10": lambda out, target: 0.7 * F.l1_loss(out, target) + 0.3 * (1 - ms_ssim(out, target)),
}


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up from 0.1 over the first tenth, then half a cosine down to 0; `progress` is in [0, 1]."""
    if progress < 0.1:
        return 0.1 + 0.9 * progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def fit(
    network: nn.Module,
    frames: UInt8[Tensor, "t 3 h w"],
    *,
    epochs: int,
    batch: int = 2,
    learning_rate: float = 1e-3,
    loss: str = "l2",
    seed: int = 0,
    mixed: bool = False,
    progress: Progress = silent,
    label: str = "fitting",
) -> None:
    """Train `network` in place, on its own device, so that `network(index, pictures)` returns `pictures`.

    `index` is (b,) frame numbers and `pictures` (b, 3, h, w) in [0, 1]. Adam without weight decay; the last
    incomplete batch of an epoch is dropped. The same seed gives the same weights. `mixed` runs the network in
    bfloat16 where autocast allows it; the loss is always float32.

    Raises InputError when there are fewer frames than `batch`, and when the loss is no longer finite.
    """
    count = frames.shape[0]
    if count < batch:
        raise InputError(f"the clip has {count} frame(s), fewer than one batch of {batch}; a fit needs more frames")
    if epochs < 1:
        raise InputError(f"--epochs {epochs}: a fit takes 1 epoch or more")
    if loss not in LOSSES:
        raise InputError(f"--loss {loss}: there are {', '.join(LOSSES)}")
    device = next(network.parameters()).device
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.999), fused=True)
    order = torch.Generator().manual_seed(seed)
    steps = count // batch
    total = epochs * steps
    for epoch in range(epochs):
        shuffled = torch.randperm(count, generator=order)
        for within in range(steps):
            step = epoch * steps + within
            optimiser.param_groups[0]["lr"] = learning_rate * learning_rate_factor(step / total)
            index = shuffled[within * batch : (within + 1) * batch]
            pictures = frames[index].to(device).float().div(255).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                out = network(index.to(device), pictures)
            value = LOSSES[loss](out.float(), pictures)
            if not math.isfinite(value.item()):
                raise InputError(f"the loss is not finite at step {step + 1} of {total}; use a lower learning rate")
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            progress(label, step + 1, total)
    network.eval()
