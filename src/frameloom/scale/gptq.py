"""GPTQ for many matrices at once: round weights one column at a time, and let the rest make up for the error.

With H = X^T X of the inputs that a layer sees, and U the upper Cholesky factor of H^-1, columns go left to right:

    q_i = round(w_i),    e = (w_i - q_i) / U_ii,    w_j -= e U_ij   for j > i

which changes what the layer gives for X as little as a greedy pass can. Blocks of columns keep the work in matrix
products, and a batch dimension over the experts of a mixture keeps the matrices large although experts are small.
Levels of a row are fixed before the first column; there is no ordering by activation and there are no groups.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv 2210.17323; batched over experts, and with rows of three levels, in E. Frantar,
D. Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models", 2023, arXiv 2310.16795.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from frameloom.scale import ternary

DAMPING = 0.1
BLOCK = 128


class Grid(NamedTuple):
    """A kind of rounding: two numbers for every row, weights to symbols, and symbols to weights.

    `fit(w)` gives `(..., h, 2)`; `round(w, rows)` symbols below `symbols`; `spread(symbols, rows)` weights again.
    """

    symbols: int
    fit: Callable[[Tensor], Tensor]
    round: Callable[[Tensor, Tensor], Tensor]
    spread: Callable[[Tensor, Tensor], Tensor]


def _span(w: Tensor) -> Tensor:
    low, high = ternary.levels(w).unbind(-1)
    step = ((high - low) / 3).bfloat16().float()
    return torch.stack([step, (-low / step).round().clamp(0, 3)], -1)


def _round(w: Tensor, rows: Tensor) -> Tensor:
    return ((w / rows[..., :1]).round() + rows[..., 1:]).clamp(0, 3).to(torch.int8)


def _spread(symbols: Tensor, rows: Tensor) -> Tensor:
    return (symbols - rows[..., 1:]) * rows[..., :1]


# Two bits are four even steps from the least to the greatest weight of a row, moved so that zero is one of them.
GRIDS = {
    "ternary": Grid(3, ternary.levels, ternary.quantise, ternary.spread),
    "2": Grid(4, _span, _round, _spread),
}


def nearest(w: Float[Tensor, "e h k"], grid: Grid) -> tuple[Int8[Tensor, "e h k"], Float[Tensor, "e h 2"]]:
    """Round every weight by itself, without data: the baseline. Symbols and the numbers of the rows."""
    rows = grid.fit(w)
    return grid.round(w, rows), rows


def gptq(
    w: Float[Tensor, "e h k"], hessian: Float[Tensor, "e k k"], grid: Grid, *, damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Int8[Tensor, "e h k"], Float[Tensor, "e h 2"], Bool[Tensor, "e"]]:  # fmt: skip
    """Round `e` matrices, each for inputs with its own H.

    Args:
        w: the matrices; the argument is not changed.
        hessian: X^T X of each; its scale does not matter. All zeros for an expert without inputs rounds to nearest.
        grid: what to round to.
        damping: share of H's mean diagonal that is added to its diagonal.
        block: columns between two updates of the rest.

    Returns:
        Symbols, the numbers of the rows, and which matrices had an H without a Cholesky factor and were rounded to
        nearest.
    """
    rows = grid.fit(w)
    upper, failed = _factor(hessian, damping)
    left = w.clone()
    symbols = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for begin in range(0, w.shape[2], block):
        end = min(begin + block, w.shape[2])
        errors = torch.empty_like(left[:, :, begin:end])
        for column in range(begin, end):
            weights = left[:, :, column]
            chosen = grid.round(weights[..., None], rows)
            symbols[:, :, column] = chosen[..., 0]
            error = (weights - grid.spread(chosen, rows)[..., 0]) / upper[:, None, column, column]
            left[:, :, column:end] -= error[..., None] * upper[:, None, column, column:end]
            errors[:, :, column - begin] = error
        left[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return symbols, rows, failed


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    h = hessian.clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1, keepdim=True)).clamp(min=1e-6)
    identity = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    lower, info = torch.linalg.cholesky_ex(h)
    failed = info != 0
    lower[failed] = identity
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    failed |= info != 0
    upper[failed] = identity
    return upper, failed
