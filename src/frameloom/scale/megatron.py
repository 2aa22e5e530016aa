"""Megatron's PTD-P: pipeline, tensor and data parallelism at once, and what has to be added up between them.

Tensor parallelism shares every matrix among t ranks. Of two matrices in a row the first is split by its outputs and
the second by its inputs, so that a rank works on its part of what lies between, and only the sum of the results is
exchanged:

    y = sum_r f(x A_r) B_r        (one all-reduce forward, one backward; two such pairs a layer)

What crosses from a stage to the next is the same on all t ranks; each sends a t-th of it, and the receivers gather.
Data parallelism averages gradients once a step. How many ranks for which is `frameloom.scale.plan`'s question.

D. Narayanan, M. Shoeybi, J. Casper, P. LeGresley, M. Patwary, V. Korthikanti, D. Vainbrand, P. Kashinkunti,
J. Bernauer, B. Catanzaro, A. Phanishayee, M. Zaharia, "Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM", SC 2021, arXiv 2104.04473.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from frameloom.errors import InputError

STYLES = {"column": ColwiseParallel, "row": RowwiseParallel}


def split(model: nn.Module, plan: dict[str, str], mesh: "dist.DeviceMesh") -> list[str]:
    """Share the matrices that `plan` names among the ranks of `mesh["tp"]`, in place.

    Args:
        plan: module names to `column` (split by outputs), `row` (split by inputs), `entry` (its inputs feed several
            split matrices: their gradients are added up before they cross, in one all-reduce) or `shared`: parameters
            that every rank has whole but uses on its part of the activations only.

    Returns:
        The names of the shared parameters; their gradients are to be added up over the ranks (`add_up`).

    Raises InputError for a size that the ranks do not divide.
    """
    ranks = mesh["tp"].size()
    styles, shared = {}, []
    for name, style in plan.items():
        module = model.get_submodule(name)
        if style == "shared":
            shared += [f"{name}.{key}" for key, _ in module.named_parameters()]
            continue
        if style == "entry":
            if ranks > 1:
                module.register_forward_pre_hook(lambda _, inputs: tuple(_everywhere(x, mesh["tp"]) for x in inputs))
            continue
        size = module.weight.shape[0 if style == "column" else 1]
        if size % ranks:
            raise InputError(f"--parallel tp={ranks}: {name} has {size} {style}s, which {ranks} ranks cannot share")
        styles[name] = STYLES[style]()
    if ranks > 1:
        parallelize_module(model, mesh["tp"], styles)
    return shared if ranks > 1 else []


def _everywhere(x: Tensor, mesh: "dist.DeviceMesh") -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def add_up(parameters: Iterable[nn.Parameter], group: "dist.ProcessGroup") -> None:
    """Sum the gradients of parameters over a group, in one message."""
    _reduce([p.grad for p in parameters if p.grad is not None], group, 1.0)


def average(parameters: Iterable[nn.Parameter], group: "dist.ProcessGroup") -> None:
    """Average the gradients of parameters over copies of the model, in one message; shards do so by themselves."""
    _reduce([p.grad for p in parameters if p.grad is not None], group, 1 / group.size())


@torch.no_grad()
def _reduce(gradients: Sequence[Tensor], group: "dist.ProcessGroup", scale: float) -> None:
    if group.size() == 1 or not gradients:
        return
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    flat *= scale
    for part, mine in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(mine.view_as(part))


@torch.no_grad()
def clip(mine: dict[str, nn.Parameter], own: dict[str, nn.Parameter], names: Sequence[str], limit: float,
         group: "dist.ProcessGroup", parted: Collection[str] = (),
         copies: "dist.ProcessGroup | None" = None) -> Tensor:  # fmt: skip
    """Scale all gradients of a pipeline so that their joint norm is at most `limit`; returns the norm before.

    The norm is taken over the norms of the parameters in the order of the whole model, so that it is the same number
    however the model is cut.

    Args:
        mine: the parameters of this rank. `own`: those of them that it counts (of tied ones, one rank).
        names: of the whole model's parameters, in order. `group`: the pipeline's.
        parted: parameters of which the ranks of `copies` hold different parts, as of experts.
    """
    like = next(iter(mine.values()))
    norms = torch.zeros(len(names), dtype=like.dtype, device=like.device)
    for index, name in enumerate(names):
        if name in own and (gradient := own[name].grad) is not None:
            norm = torch.linalg.vector_norm(gradient)
            norms[index] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if parted:
        at = torch.tensor([name in parted for name in names], device=like.device)
        squares = norms.square() * at
        dist.all_reduce(squares, group=copies)
        norms = torch.where(at, squares.sqrt(), norms)
    if group.size() > 1:
        dist.all_reduce(norms, group=group)  # every parameter lives on one stage: the others add zeros
    total = torch.linalg.vector_norm(norms)
    share = (limit / (total + 1e-6)).clamp(max=1.0)
    for parameter in mine.values():
        if parameter.grad is not None:
            parameter.grad.mul_(share.to(parameter.grad.dtype))
    return total


Boundary = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def whole(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors go from stage to stage as they are."""
    return carry


def boundary(mesh: "dist.DeviceMesh") -> tuple[Boundary, Boundary]:
    """`receive` and `send` of a stage that exchanges a t-th of every boundary tensor with each of t ranks."""
    group = mesh.get_group("tp")

    def receive(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_Gather.apply(part, group) for part in carry)

    def send(carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for part in carry:
            if part.shape[-1] % group.size():
                raise InputError(f"--parallel tp={group.size()}: a boundary tensor is {part.shape[-1]} wide, which as "
                                 "many ranks cannot share; scatter=off would do")  # fmt: skip
        return tuple(_Scatter.apply(part, group) for part in carry)

    return receive, send


def _mine(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    return x.chunk(group.size(), -1)[group.rank()].contiguous()


def _all(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)


class _Scatter(torch.autograd.Function):
    """Keep this rank's part; the gradient, of which every rank has its part, is gathered."""

    @staticmethod
    def forward(context, x, group):
        context.group = group
        return _mine(x, group)

    @staticmethod
    def backward(context, gradient):
        return _all(gradient, context.group), None


class _Gather(torch.autograd.Function):
    """Gather the parts; the gradient is the same on every rank, so that each takes its part and nothing is added."""

    @staticmethod
    def forward(context, x, group):
        context.group = group
        return _all(x, group)

    @staticmethod
    def backward(context, gradient):
        return _mine(gradient, context.group), None
