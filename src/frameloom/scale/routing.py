"""Which token goes to which expert, and the way there and back.

A gate scores every expert for every token; the k best are its choices. An expert has a fixed number of places for the
tokens of a device; who finds them taken is dropped, and gets nothing from this choice. Two ways to move tokens:

    encode  buffer[expert, place] = token                       T k D numbers are copied
    decode  out[token] = sum over choices of gate * buffer[expert, place]     T k D multiply-adds

in place of the einsums with a one-hot (T, E, C) mask of GShard (Lepikhin et al., arXiv 2006.16668), which take T E C D
each; `dispatch_mask` keeps that form, to compare with.

C. Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", MLSys 2023, arXiv 2206.03382. Cosine gate and
load-balancing as in its released layers; batch-prioritised routing: C. Riquelme et al., "Scaling Vision with Sparse
Mixture of Experts", NeurIPS 2021, arXiv 2106.05974; importance and load losses there and in N. Shazeer et al., ICLR
2017, arXiv 1701.06538.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from frameloom.errors import InputError
from frameloom.scale.layout import Group


class Gate(nn.Module):
    """Logits of the experts, `(t, e)` in float32: a linear map without bias."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        # Routing is a matter of small differences: no half precision here.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight)


class CosineGate(nn.Module):
    """Logits as cosines between the token, brought to `width` numbers, and one direction an expert, over a temperature.

    The learned log of the inverse temperature begins at log 2 and is held below log 100.
    """

    def __init__(self, dim: int, experts: int, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.directions = nn.Parameter(0.01 * torch.randn(width, experts))
        self.temperature = nn.Parameter(torch.tensor([math.log(1 / 0.5)]))

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        with torch.autocast(x.device.type, enabled=False):
            token = F.normalize(self.project(x.to(self.directions.dtype)), dim=1)
            scale = self.temperature.clamp(max=math.log(100.0)).exp()
            return token @ F.normalize(self.directions, dim=0) * scale


@dataclass(frozen=True)
class Routing:
    """Where every token goes: choice j of token t to `places[j, t]` of `experts[j, t]`, weighed by `gates[j, t]`.

    `limit` places of an expert take tokens (later ones are dropped); its buffer has `size` places, rounded up so that
    it can be cut. `counts` says how many choices fell on each expert.
    """

    experts: Int[Tensor, "k t"]
    places: Int[Tensor, "k t"]
    gates: Float[Tensor, "k t"]
    counts: Int[Tensor, "e"]
    limit: int
    size: int

    @property
    def kept(self) -> Tensor:
        """Which choices found a place, `(k, t)`."""
        return self.places < self.limit

    @property
    def dropped(self) -> float:
        """The share of choices that found none."""
        return 1 - float(self.kept.float().mean()) if self.places.numel() else 0.0

    @property
    def rows(self) -> Int[Tensor, "k t"]:
        """Rows of the flattened buffer; dropped choices point behind its end."""
        end = len(self.counts) * self.size
        return torch.where(self.kept, self.experts * self.size + self.places, end)


def route(
    logits: Float[Tensor, "t e"],
    k: int,
    capacity: float,
    *,
    multiple: int = 1,
    prioritised: bool = False,
    normalise: bool = True,
    group: Group = None,
) -> Routing:
    """Choose experts and places for every token.

    All first choices find their places before any second one; among equals, earlier tokens go first, or with
    `prioritised` those whose best score is higher. The gradient goes through `gates`.

    Args:
        k: experts of a token.
        capacity: f > 0 gives an expert k * int(f * ceil(T / E)) places for T tokens; 0 as many as are needed, so that
            none is dropped; f < 0 what is needed, but no more than |f| gives.
        multiple: what the size of the buffer must be a multiple of. It does not change who is dropped: the places
            that rounding adds stay empty.
        normalise: the gates of a token sum to 1, for k > 1.
        group: devices that must agree on the places. T is the most tokens of any of them.

    Raises:
        InputError: logits that are no numbers (on any device of the group), or k beyond the experts.
    """
    tokens, experts = logits.shape
    if not 1 <= k <= experts:
        raise InputError(f"top={k}: a token goes to between 1 and all {experts} experts")
    scores = logits.softmax(1)
    best, chosen = scores.topk(k, dim=1)
    gates = best.T
    if k > 1 and normalise:
        gates = gates / gates.sum(0).clamp(min=torch.finfo(gates.dtype).eps)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    # One small message for all that the devices must agree on; if one meets bad numbers, all of them stop.
    facts = torch.stack([torch.tensor(tokens, device=logits.device), counts.max(), ~logits.isfinite().all()])
    if group is not None:
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=group)
    most, needed, broken = facts.tolist()
    if broken:
        raise InputError("the gate's logits are not finite; look at the tokens that reach the layer, "
                         "or try a lower learning rate")  # fmt: skip
    share = k * int(abs(capacity) * math.ceil(most / experts))
    limit = needed if capacity == 0 else share if capacity > 0 else min(needed, share)
    size = multiple * max(1, math.ceil(limit / multiple))

    order = best[:, 0].argsort(descending=True, stable=True) if prioritised else None
    turn = chosen if order is None else chosen[order]
    places = _places(turn.T.flatten(), counts).view(k, tokens)
    if order is not None:
        places = torch.empty_like(places).index_copy(1, order, places)
    return Routing(chosen.T, places, gates, counts, limit, size)


def _places(experts: Int[Tensor, "n"], counts: Int[Tensor, "e"]) -> Int[Tensor, "n"]:
    """How many earlier entries name the same expert: one stable sort, whatever the number of experts."""
    order = experts.argsort(stable=True)
    first = counts.cumsum(0) - counts
    places = torch.arange(len(experts), device=experts.device) - first[experts[order]]
    return torch.empty_like(places).index_copy(0, order, places)


def encode(x: Float[Tensor, "t d"], routing: Routing, weighed: bool = False) -> Float[Tensor, "e c d"]:
    """Tokens at their experts' places, zeros elsewhere; `weighed` multiplies them by their gates already here."""
    k = len(routing.experts)
    rows = x.expand(k, *x.shape)
    if weighed:
        rows = rows * routing.gates[..., None].to(x.dtype)
    places = len(routing.counts) * routing.size
    # One row more takes what is dropped, and is cut off.
    buffer = x.new_zeros(places + 1, x.shape[1]).index_copy(0, routing.rows.flatten(), rows.flatten(0, 1))
    return buffer[:places].view(-1, routing.size, x.shape[1])


def decode(y: Float[Tensor, "e c d"], routing: Routing, weighed: bool = False) -> Float[Tensor, "t d"]:
    """The sum of what a token's experts made of it, by its gates (or without them, if they were `weighed` before)."""
    rows = routing.rows.clamp(max=len(routing.counts) * routing.size - 1)
    found = y.flatten(0, 1)[rows.flatten()].view(*rows.shape, y.shape[-1])
    weights = routing.kept.to(y.dtype) if weighed else routing.gates.to(y.dtype) * routing.kept
    return (found * weights[..., None]).sum(0)


def dispatch_mask(routing: Routing) -> tuple[Float[Tensor, "t e c"], Float[Tensor, "t e c"]]:
    """GShard's masks: ones where a token goes, and gates; what `encode` and `decode` make unnecessary."""
    experts = F.one_hot(routing.experts, len(routing.counts)).to(routing.gates.dtype)
    places = F.one_hot(routing.places.clamp(max=routing.size), routing.size + 1)[..., :-1].to(routing.gates.dtype)
    ones = torch.einsum("kte,ktc,kt->ktec", experts, places, routing.kept.to(routing.gates.dtype))
    return ones.sum(0), torch.einsum("ktec,kt->tec", ones, routing.gates)


def balance_loss(logits: Float[Tensor, "t e"], routing: Routing) -> Float[Tensor, ""]:
    """E * sum over experts of (mean score) * (share of first choices): 1 when the load is even. GShard's."""
    tokens, experts = logits.shape
    share = torch.bincount(routing.experts[0], minlength=experts).to(logits.dtype) / max(tokens, 1)
    return experts * (logits.softmax(1).sum(0) / max(tokens, 1) * share).sum()


def importance_load_loss(
    clean: Float[Tensor, "t e"], noisy: Float[Tensor, "t e"], k: int, noise: float
) -> Float[Tensor, ""]:
    """Half the sum of two squared coefficients of variation: of the scores that experts get, and of their load.

    The load is smooth: the probability that fresh noise on a token's clean logit would beat its k-th best noisy one.

    Args:
        clean, noisy: logits without and with noise of deviation `noise` / experts.

    Raises:
        InputError: no noise, without which the load has no gradient.
    """
    if noise <= 0:
        raise InputError(f"noise={noise:g}: the load loss needs noise on the gate, such as 1.0")
    threshold = noisy.topk(k, dim=1).values[:, -1:]
    load = torch.special.ndtr((clean - threshold) * (clean.shape[1] / noise))

    def variation(value: Tensor) -> Tensor:
        return value.var(correction=0) / (value.mean().square() + 1e-10)

    return (variation(clean.softmax(1).sum(0)) + variation(load.sum(0))) / 2
