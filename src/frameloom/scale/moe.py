"""Tutel: a mixture-of-experts layer that changes its parallelism at every step, for nothing.

For whom puts experts into a video transformer and changes batch, resolution and the number of devices. A gate sends
every token to k of E feed-forward networks (see `frameloom.scale.routing`):

    y_t = sum over the k best experts e of  g_te * (act(x_t W1_e' + b1_e) W2_e + b2_e)

On W devices the weights lie in one layout, whatever the parallelism: E/W whole experts a device, or, with fewer experts
than devices, one of S = W/E slices of an expert along its hidden units. A number r says how they meet their tokens:

    r = 0       all weights are gathered on all devices; tokens stay
    1 <= r <= S tokens go to r copies of their expert; each copy is made of S/r devices that gather their slices, share
                the copy's tokens and compute H/r of the hidden units; the r partial results are summed

All are the same function with the same gradients, so that the cheapest can be taken at every step
(`frameloom.scale.adapt`); no parameter ever moves. On one device all are the identity.

Sketch: y = encode(x); y = all_to_all(repeat(y, r)); y = ffn(y, gather(weights)); y = sum_r(all_to_all(y)); decode(y).

C. Hwang, W. Cui, Y. Xiong, Z. Yang, Z. Liu, H. Hu, Z. Wang, R. Salas, J. Jose, P. Ram, J. Chau, P. Cheng, F. Yang,
M. Yang, Y. Xiong, "Tutel: Adaptive Mixture-of-Experts at Scale", MLSys 2023, arXiv 2206.03382.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from frameloom.errors import InputError
from frameloom.scale.adapt import Shape, Strategy, Tuner, cheapest
from frameloom.scale.layout import Ranks, apart, beside, exchange, gather
from frameloom.scale.routing import (
    CosineGate,
    Gate,
    Routing,
    balance_loss,
    decode,
    encode,
    importance_load_loss,
    route,
)

GATES = {"linear": Gate, "cosine": CosineGate}
Weights = tuple[Tensor, Tensor, Tensor, Tensor]


class Experts(nn.Module):
    """The weights of a device: `w1`, `w2` `(own, H/S, D)`, `b1` `(own, H/S)` and `b2` `(own, ceil(D/S))`.

    The second matrix lies transposed, so that both are cut along the same dimension. On one device these are whole
    experts: `(E, H, D)`, `(E, H)` and `(E, D)`.
    """

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        slices = shape.hidden // shape.shards
        self.w1 = nn.Parameter(torch.empty(shape.own, slices, shape.dim))
        self.w2 = nn.Parameter(torch.empty(shape.own, slices, shape.dim))
        self.b1 = nn.Parameter(torch.zeros(shape.own, slices))
        self.b2 = nn.Parameter(torch.zeros(shape.own, math.ceil(shape.dim / shape.shards)))
        self.begin(shape, rank)

    @torch.no_grad()
    def begin(self, shape: Shape, rank: int) -> None:
        """Draw uniformly within one over the root of the inputs, expert by expert: one seed, one model, any W."""
        # The draw is made where the weights are not: on a meta device it only keeps the random numbers in step.
        seed = int(torch.randint(2**62, (), device="cpu"))
        if self.w1.is_meta:
            return
        first, part = rank * shape.experts // shape.devices, slice(*_cut(shape, rank))
        for number in range(shape.own):
            rng = torch.Generator("cpu").manual_seed((seed + first + number) % 2**63)
            for weight, inputs in ((self.w1, shape.dim), (self.w2, shape.hidden)):
                drawn = torch.rand(shape.hidden, shape.dim, generator=rng, device="cpu") * 2 - 1
                weight[number] = drawn[part] * inputs**-0.5


def _cut(shape: Shape, rank: int) -> tuple[int, int]:
    """Which hidden units of its expert a device holds."""
    size = shape.hidden // shape.shards
    return rank % shape.shards * size, (rank % shape.shards + 1) * size


class MoE(nn.Module):
    """A feed-forward layer of many experts, of which every token meets `top_k`.

    >>> layer = MoE(dim=192, hidden=768, experts=8)          # on one device
    >>> layer = MoE(192, 768, 8, mesh=mesh["ep"])             # on many; every rank builds its own part
    >>> y = layer(x, r=2)                                     # another parallelism, for this step
    >>> loss = loss + 0.01 * auxiliary(model)

    Args:
        capacity: places of an expert, as a factor; 0 drops none; see `frameloom.scale.routing.route`.
        gate: `"linear"` or `"cosine"`.
        noise: in training, noise of deviation `noise` / experts is added to the logits.
        balance: the auxiliary loss: `"share"` (GShard's) or `"load"` (importance and load; needs `noise`).
        r: `"auto"` takes the one that sends least for the load at hand; or a number.
        node: neighbouring ranks of a node, where tokens shall go in two hops: inside the node, then between nodes.
        tuner: finds the strategy by trying instead, and overrides `r`.
        weighed_first: gates multiply the tokens on the way in and not on the way out.

    After a forward pass `routing` tells where its tokens went.

    Raises:
        InputError: experts and devices of which neither divides the other, hidden units that do not divide, an unknown
            gate or balance, r that the layout does not allow.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        top_k: int = 1,
        capacity: float = 1.0,
        gate: str = "linear",
        noise: float = 0.0,
        prioritised: bool = False,
        normalise: bool = True,
        weighed_first: bool = False,
        balance: str = "share",
        activation: Callable[[Tensor], Tensor] = F.gelu,
        r: int | str = "auto",
        node: int = 1,
        tuner: Tuner | None = None,
        mesh: DeviceMesh | dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise InputError(f"gate={gate}: no such gate; there are {', '.join(GATES)}")
        if balance not in ("share", "load"):
            raise InputError(f"balance={balance}: no such auxiliary loss; there are share and load")
        if balance == "load" and noise <= 0:
            raise InputError(f"noise={noise:g}: the load loss needs noise on the gate, such as 1.0")
        if not 1 <= top_k <= experts:
            raise InputError(f"top={top_k}: a token goes to between 1 and all {experts} experts")
        self.top_k, self.capacity, self.noise, self.balance = top_k, float(capacity), float(noise), balance
        self.prioritised, self.normalise, self.weighed_first = prioritised, normalise, weighed_first
        self.activation, self.tuner = activation, tuner
        self.gate = GATES[gate](dim, experts)
        self.node = node
        self._place(Shape(1, experts, dim, hidden), Ranks(mesh))
        self.r = r if r == "auto" else self.shape.check(int(r))
        self.experts = Experts(self.shape, self.ranks.rank)
        self._mark()
        self.auxiliary: Tensor | None = None
        self.routing: Routing | None = None

    def _place(self, shape: Shape, ranks: Ranks) -> None:
        """Learn which devices there are, and join every group that a strategy needs: a switch must not make any."""
        if self.node < 1 or ranks.size % self.node:
            raise InputError(f"node={self.node}: {ranks.size} devices are not made of nodes of so many")
        self.shape, self.ranks = replace(shape, devices=ranks.size), ranks
        for r in self.shape.degrees[1:]:
            ranks.inside(self.shape.shards // r)
        if self.node > 1:
            ranks.inside(self.node), ranks.across(self.node)

    def _mark(self) -> None:
        for value in self.experts.parameters():
            value.local_expert = True

    def forward(
        self,
        x: Float[Tensor, "*b d"],
        r: int | None = None,
        overlap: int | None = None,
        node: int | None = None,
        capacity: float | None = None,
        top_k: int | None = None,
    ) -> Float[Tensor, "*b d"]:
        """The experts' answers to every token; devices may bring different numbers of tokens, or none.

        Args:
            r, overlap, node: the strategy (see `frameloom.scale.adapt.Strategy`), for this call; node 1 is one hop.
            capacity, top_k: others than the layer's, for this call.
        """
        self._refuse_wrappers()
        tokens = x.reshape(-1, self.shape.dim)
        k, factor = top_k or self.top_k, self.capacity if capacity is None else float(capacity)
        clean = self.gate(tokens)
        logits = clean
        if self.training and self.noise:
            logits = clean + torch.randn_like(clean) * (self.noise / self.shape.experts)
        # A size that every strategy at hand can cut.
        overlaps = [one.overlap for one in self.tuner.candidates] if self.tuner else []
        multiple = self.shape.shards * math.lcm(overlap or 1, *overlaps)
        routing = route(logits, k, factor, multiple=multiple, prioritised=self.prioritised, normalise=self.normalise,
                        group=self.ranks.group)  # fmt: skip
        self.routing = replace(routing, gates=routing.gates.detach())
        if self.training:
            self.auxiliary = balance_loss(logits, routing) if self.balance == "share" else importance_load_loss(
                clean, logits, k, self.noise)  # fmt: skip
        strategy, timed = self._strategy(routing.size, r, overlap, node)
        begun = _now(tokens) if timed else 0.0
        if self._fits_grouped(tokens, factor, strategy):
            y = self._grouped(tokens, routing, self._weights(0))
        else:
            y = encode(tokens, routing, self.weighed_first)
            y = decode(self._run(y, strategy), routing, self.weighed_first)
        if timed:
            self.tuner.record(routing.size, strategy, _now(y) - begun)
        return y.view_as(x)

    def _strategy(self, size: int, r: int | None, overlap: int | None, node: int | None) -> tuple[Strategy, bool]:
        """What to run, and whether the tuner wants to know how long it took."""
        if self.tuner and r is None and overlap is None and node is None:
            return self.tuner.choose(size), not self.tuner.settled(size)
        if r is None:
            r = cheapest(self.shape, size) if self.r == "auto" else self.r
        found = Strategy(self.shape.check(r), overlap or 1, node or self.node)
        if found.node not in (1, self.node):
            raise InputError(f"node={found.node}: this layer was made for nodes of {self.node}; 1 is one hop")
        return found, False

    def _weights(self, r: int) -> Weights:
        """The weights that r computes with, gathered where it needs more than there are."""
        own, shape, ranks = self.experts, self.shape, self.ranks
        if r == 0:
            w1, w2 = (gather(part, ranks.group).reshape(shape.experts, -1, shape.dim) for part in (own.w1, own.w2))
            b1, b2 = (gather(part, ranks.group).reshape(shape.experts, -1) for part in (own.b1, own.b2))
            return w1, w2, b1, b2[:, : shape.dim]
        if shape.shards == 1:
            return own.w1, own.w2, own.b1, own.b2
        w1, w2 = (gather(part, ranks.inside(shape.shards // r)).view(1, -1, shape.dim) for part in (own.w1, own.w2))
        b1 = gather(own.b1, ranks.inside(shape.shards // r)).view(1, -1)
        b2 = gather(own.b2, ranks.inside(shape.shards)).view(1, -1)[:, : shape.dim]
        return w1, w2, b1, b2 / r  # r partial results are summed: each brings its part of the offset

    def _run(self, y: Float[Tensor, "e c d"], strategy: Strategy) -> Float[Tensor, "e c d"]:
        """All experts on their places, wherever the experts are."""
        weights = self._weights(strategy.r)
        if strategy.r == 0 or self.ranks.size == 1:
            return self._network(y, weights)
        shape, r = self.shape, strategy.r
        # All chunks set off before the first is computed, and each goes back as soon as it is done.
        sent = []
        for chunk in y.chunk(strategy.overlap, 1):
            if shape.shards > 1:
                chunk = chunk.repeat(1, r, 1)
            chunk = chunk.reshape(shape.devices, shape.own, -1, shape.dim)
            sent.append(exchange(chunk, self.ranks, strategy.node))
        done = (apart(self._network(beside(chunk), weights), shape.devices) for chunk in sent)
        back = [exchange(chunk, self.ranks, strategy.node) for chunk in done]
        if shape.shards > 1:
            back = [chunk.reshape(shape.experts, r, -1, shape.dim).sum(1) for chunk in back]
        return torch.cat([chunk.reshape(shape.experts, -1, shape.dim) for chunk in back], 1)

    def _network(self, x: Float[Tensor, "n c d"], weights: Weights) -> Float[Tensor, "n c d"]:
        w1, w2, b1, b2 = weights
        h = self.activation(torch.baddbmm(b1[:, None], x.to(w1.dtype), w1.mT))
        return torch.baddbmm(b2[:, None].to(h.dtype), h, w2.to(h.dtype))

    def _fits_grouped(self, x: Tensor, capacity: float, strategy: Strategy) -> bool:
        """Whether all experts are here and nothing is dropped, so that no buffer is needed; the kernel's limits."""
        here = strategy.r == 0 or self.ranks.size == 1
        lines_up = x.dtype == self.experts.w1.dtype and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        lines_up = lines_up and not torch.is_autocast_enabled(x.device.type)
        return here and lines_up and capacity == 0 and not self.weighed_first and self.shape.dim % 8 == 0 \
            and self.shape.hidden % 8 == 0 and len(x) > 0  # fmt: skip

    def _grouped(self, x: Float[Tensor, "t d"], routing: Routing, weights: Weights) -> Float[Tensor, "t d"]:
        """Tokens sorted by expert, and one multiplication of groups of different lengths: no empty places."""
        w1, w2, b1, b2 = weights
        chosen = routing.experts.flatten()
        order = chosen.argsort(stable=True)
        ends = routing.counts.cumsum(0).to(torch.int32)
        sorted_experts = chosen[order]
        h = self.activation(F.grouped_mm(x[order % len(x)], w1.mT, offs=ends) + b1[sorted_experts])
        y = F.grouped_mm(h, w2, offs=ends) + b2[sorted_experts]
        y = torch.empty_like(y).index_copy(0, order, y).view(*routing.experts.shape, -1)
        return (y * routing.gates[..., None].to(y.dtype)).sum(0)

    def _refuse_wrappers(self) -> None:
        """Experts differ from rank to rank: a wrapper that averages or shards them again would destroy them."""
        if self.ranks.size == 1:
            return
        own = {id(value) for value in self.experts.parameters()}
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            names = {name for name, value in wrapper.module.named_parameters() if id(value) in own}
            if names - set(wrapper.parameters_to_ignore):
                raise InputError("a mixture of experts inside DistributedDataParallel: it averages experts that "
                                 "differ; call frameloom.scale.moe.keep_local(model) before wrapping")  # fmt: skip
        managed = getattr(self.experts, "_is_fsdp_managed_module", False)
        if managed and not all(getattr(value, "local_expert", False) for value in self.experts.parameters()):
            raise InputError("a mixture of experts inside fully_shard: its experts are spread already; "
                             "pass ignored_params=set(frameloom.scale.moe.expert_parameters(model))")  # fmt: skip


def _now(x: Tensor) -> float:
    """The time in seconds at which everything before on the device of `x` is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def layers(model: nn.Module) -> Iterator[MoE]:
    """Every mixture of experts of a model."""
    return (module for module in model.modules() if isinstance(module, MoE))


def auxiliary(model: nn.Module) -> Tensor:
    """The sum of the layers' auxiliary losses of the last forward pass, taken once; 0 for a model without any."""
    found = [layer.auxiliary for layer in layers(model) if layer.auxiliary is not None]
    for layer in layers(model):
        layer.auxiliary = None  # a graph must not outlive its step, nor stand in the way of a copy of the model
    return torch.stack(found).sum() if found else torch.zeros(())


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that differ from rank to rank."""
    return [value for layer in layers(model) for value in layer.experts.parameters()]


def keep_local(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave the experts alone; call it before wrapping."""
    own = {id(value) for value in expert_parameters(model)}
    names = [name for name, value in model.named_parameters() if id(value) in own]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None = None) -> None:
    """The gradient of the mean loss of all ranks, after every rank's `backward` of its own.

    An expert has already gathered the gradient of all tokens that it saw, which only wants to be divided; what every
    rank holds a copy of is averaged.

    Args:
        group: all ranks that train together.
        replicas: ranks that hold the same experts, where `group` is larger than a layer's mesh.
    """
    own = {id(value) for value in expert_parameters(model)}
    for value in model.parameters():
        if value.requires_grad and value.grad is None:
            value.grad = torch.zeros_like(value)  # a rank without a use for it must still take part
        if value.grad is None:
            continue
        among = replicas if id(value) in own else group
        if among is not None:
            dist.all_reduce(value.grad, group=among)
        value.grad /= group.size()
