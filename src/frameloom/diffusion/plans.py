"""Plans: which frame is at which noise level when. A row a step, a column a frame; `sample` follows one as its grid.

What does not fit one run is a loop of its own: `diagonal` is a queue of frames, each a little noisier than the one
before it, that gives a clean frame at its head for every new one at its tail.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.diffusion.paths import Path
from frameloom.diffusion.predict import Prediction
from frameloom.diffusion.step import ancestral_share, universal


def together(grid: Tensor, frames: int) -> Float[Tensor, "n t"]:
    """All frames at the same level."""
    return grid[:, None].expand(-1, frames).clone()


def prefix(grid: Tensor, frames: int, known: int) -> Float[Tensor, "n t"]:
    """The first `known` frames clean throughout, the others together."""
    plan = together(grid, frames)
    plan[:, :known] = 0
    return plan


def staircase(grid: Tensor, frames: int, lag: int = 1) -> Float[Tensor, "n t"]:
    """Every frame `lag` steps behind the one before it: `(len(grid) + lag (frames - 1), frames)`."""
    rows = torch.arange(len(grid) + lag * (frames - 1))[:, None] - lag * torch.arange(frames)
    return grid[rows.clamp(0, len(grid) - 1)]


def chunks(grid: Tensor, frames: int, size: int) -> Float[Tensor, "n t"]:
    """`size` frames after `size` frames, each chunk with the ones before it clean."""
    steps = len(grid) - 1
    count = -(-frames // size)
    rows = torch.arange(count * steps + 1)[:, None] - steps * (torch.arange(frames) // size)
    return grid[rows.clamp(0, steps)]


# What a network says of `(b, f, c, h, w)` at times `(b, f)`, in block `r` of the queue.
Estimate = Callable[[Tensor, Tensor, int], Prediction]


def diagonal(
    path: Path,
    times: Float[Tensor, "n"],
    window: int,
    queue: Float[Tensor, "b q c h w"],
    estimate: Estimate,
    tail: Callable[[Tensor], Tensor],
    eta: float = 0.0,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Float[Tensor, "b c h w"]]:
    """An endless diagonal queue with lookahead (FIFO-Diffusion, arXiv 2405.11473).

    Entry i of the queue proper holds a frame at `times[i]`, ascending, the head first; before it stand `window // 2`
    frames that have left, as context. In one round every entry goes one level down: half-overlapping blocks of `window`
    frames, the tail first, of which only the noisier half is kept. Then the head leaves, all move up, and
    `tail(queue)` gives the new last entry.

    Args:
        times: as many as the queue has entries, a multiple of `window`.
        queue: `window // 2` entries of context, then the entries proper.
    """
    half = window // 2
    levels = torch.cat([times[:1].expand(half), times])
    below = torch.cat([times.new_zeros(half + 1), times[:-1]])
    queue = queue.clone()
    b = len(queue)
    while True:
        for r in reversed(range(len(times) // half)):
            at = slice(r * half, r * half + window)
            t, s = levels[at].expand(b, -1), below[at].expand(b, -1)
            x = queue[:, at]
            p = estimate(x, t, r)
            if eta:
                made = universal(path, x, p, t, s, ancestral_share(path, t, s, eta), noise(x))
            else:
                made = universal(path, x, p, t, s)
            queue[:, r * half + half : r * half + window] = made[:, half:]
        yield queue[:, half].clone()
        last = tail(queue)
        queue[:, :-1] = queue[:, 1:].clone()
        queue[:, -1:] = last
