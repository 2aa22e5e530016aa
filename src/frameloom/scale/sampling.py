"""How a request chooses its tokens: its own settings and its own random numbers, whoever is decoded beside it.

And how likely the model held what was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from frameloom.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a request chooses its tokens: greedily at `temperature` 0, else from the `top_k` likeliest (0: all) that
    make up `top_p` of the probability, with the random numbers of `seed`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature {self.temperature}: a number from 0 (greedy) to 100 is wanted")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k}: a whole number of 1 or more is wanted, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: a share above 0 and up to 1 is wanted")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: a whole number from 0 to 2^63 - 1 is wanted")


GREEDY = Sampling()


@dataclass(frozen=True)
class Likelihood:
    """The natural logarithm of the probability that the model gave to a token, and its likeliest tokens with theirs.

    The model's own, over all tokens: temperature, `top_k` and `top_p` have no part in it.
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def sample(
    logits: Float[Tensor, "rows vocabulary"], settings: Sequence[Sampling], chances: Sequence[float]
) -> Int[Tensor, "rows"]:
    """A token for every row, by its own settings and its own random number in [0, 1).

    The number is looked up in the cumulative distribution in the order of the vocabulary, so that rounding of logits,
    which differs between batch sizes, changes a token only within that rounding of a step of the distribution.
    """
    best = logits.argmax(-1)
    drawn = [row for row, how in enumerate(settings) if how.temperature > 0]
    if not drawn:
        return best
    how, at = [settings[row] for row in drawn], torch.tensor(drawn, device=logits.device)

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    heat = column([h.temperature for h in how], torch.float64)
    keep = column([h.top_k or logits.shape[-1] for h in how], torch.long).clamp(max=logits.shape[-1])
    share = column([h.top_p for h in how], torch.float64)
    # A row that is no number fails later; here it must only not disturb.
    chance = torch.softmax(logits[at].double().nan_to_num(nan=0.0) / heat, -1)
    falling, order = chance.sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    ranked = torch.arange(logits.shape[-1], device=logits.device)
    falling = torch.where((ranked < keep) & (before < share), falling, 0.0)
    left = torch.zeros_like(chance).scatter(-1, order, falling)
    climb = left.cumsum(-1)
    dice = column([chances[row] for row in drawn], torch.float64)
    # The first token whose cumulative probability exceeds the number; never one of probability zero.
    best[at] = torch.searchsorted(climb, dice * climb[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)[:, 0]
    return best


def likelihoods(
    logits: Float[Tensor, "rows vocabulary"], chosen: Int[Tensor, "rows"], counts: Sequence[int]
) -> list[Likelihood]:
    """Of the token chosen in every row, with the `counts` likeliest of the row."""
    logs = logits.double().log_softmax(-1)
    own = logs.gather(-1, chosen[:, None])[:, 0].tolist()
    best, tokens = logs.topk(min(max(counts), logs.shape[-1]), dim=-1)
    pairs = zip(tokens.tolist(), best.tolist(), strict=True)
    return [Likelihood(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for logprob, (ids, values), count in zip(own, pairs, counts, strict=True)]  # fmt: skip
