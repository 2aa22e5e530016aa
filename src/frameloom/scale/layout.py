"""Moves between layouts of one tensor over many devices: who holds which slice, and the collective that changes it.

    all-to-all       every rank holds a piece for every other   ->  every rank holds a piece from every other
    2DH all-to-all   the same result in two hops: inside the node, then between nodes, with few and large messages
    gather           every rank holds a slice                   ->  every rank of a group holds the whole
    halo             every rank holds a band                    ->  the band and the borders of its two neighbours

All but the halo have gradients: the gradient of an all-to-all is an all-to-all, that of a gather a reduce-scatter. They
are asynchronous: what they return waits when it is first used, so that work begun in between overlaps with them; not
so with gloo (see `_moved`). A group of None is one device alone, on which every move is the identity.

The flexible all-to-all (pieces of all senders side by side on the axis of rows, so that an expert multiplies one large
matrix and not a small one per sender) and the two-dimensional hierarchical all-to-all are of
C. Hwang, W. Cui, Y. Xiong, Z. Yang, Z. Liu, H. Hu, Z. Wang, R. Salas, J. Jose, P. Ram, J. Chau, P. Cheng, F. Yang,
M. Yang, Y. Xiong, "Tutel: Adaptive Mixture-of-Experts at Scale", MLSys 2023, arXiv 2206.03382. The halo with borders of
the step before is that of M. Li et al., "DistriFusion", CVPR 2024, arXiv 2402.19481.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from frameloom.errors import InputError

Group = dist.ProcessGroup | None


class Ranks:
    """The devices of one dimension of a mesh, and the subgroups of them that moves need, each made once.

    Ask for every subgroup before the work begins: all of its members must make it, with nothing else under way.

    Args:
        mesh: a mesh of one dimension (`mesh["ep"]` of a larger one), a process group, or None for one device alone.

    Raises:
        InputError: a mesh of several dimensions.
    """

    def __init__(self, mesh: DeviceMesh | dist.ProcessGroup | None = None) -> None:
        if isinstance(mesh, DeviceMesh) and mesh.ndim != 1:
            raise InputError(f"a mesh of {mesh.ndim} dimensions: one is wanted, such as "
                             f'mesh["{(mesh.mesh_dim_names or ("ep",))[-1]}"]')  # fmt: skip
        group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.group: Group = group if self.size > 1 else None
        self._made: dict[tuple[int, ...], Group] = {}

    def inside(self, count: int) -> Group:
        """The group of `count` neighbours (0 .. count-1, count .. 2 count-1, ...) that this rank is in."""
        first = self.rank // count * count
        return self._among(tuple(range(first, first + count)))

    def across(self, count: int) -> Group:
        """The group of the ranks that stand where this one stands among its `count` neighbours."""
        return self._among(tuple(range(self.rank % count, self.size, count)))

    def _among(self, places: tuple[int, ...]) -> Group:
        if len(places) == 1 or len(places) == self.size:
            return None if len(places) == 1 else self.group
        if places not in self._made:
            everyone = dist.get_process_group_ranks(self.group)
            # Only members take part in the making, so that it also works for a part of a larger mesh.
            self._made[places] = dist.new_group([everyone[place] for place in places], use_local_synchronization=True)
        return self._made[places]

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # groups are connections, not data


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Piece i of the first dimension to rank i; what the ranks sent here, in their order, in its place."""
    return _moved(x, group, lambda x: functional.all_to_all_single(x, None, None, group))


def all_to_all_2dh(x: Tensor, ranks: Ranks, node: int) -> Tensor:
    """`all_to_all` over all `ranks` in two hops, for nodes of `node` neighbouring ranks each.

    Inside the node everything goes to the neighbour who stands where the receiver stands in the receiver's node; then
    such counterparts exchange between the nodes. Between nodes a rank sends size/node - 1 messages and not
    size - node, each `node` times as large.
    """
    nodes = ranks.size // node
    x = x.unflatten(0, (nodes, node, -1)).transpose(0, 1).flatten(0, 2)
    x = all_to_all(x, ranks.inside(node))
    x = x.unflatten(0, (node, nodes, -1)).transpose(0, 1).flatten(0, 2)
    return all_to_all(x, ranks.across(node))


def exchange(x: Tensor, ranks: Ranks, node: int = 1) -> Tensor:
    """The all-to-all itself: in one hop, or in two where `node` lies between one and all."""
    return all_to_all_2dh(x, ranks, node) if 1 < node < ranks.size else all_to_all(x, ranks.group)


def beside(x: Tensor) -> Tensor:
    """`(ranks, own, rows, d)` from all senders to `(own, ranks * rows, d)`: one long matrix for every own expert.

    This is the flexible layout: the multiplication stays large however many senders there are.
    """
    return x.transpose(0, 1).flatten(1, 2)


def apart(x: Tensor, size: int) -> Tensor:
    """The way back of `beside`, for `size` ranks: `(own, ranks * rows, d)` to `(ranks, own, rows, d)`."""
    return x.unflatten(1, (size, -1)).transpose(0, 1)


def gather(x: Tensor, group: Group) -> Tensor:
    """The slices of all ranks of the group one after another on the first dimension; the gradient is scattered back."""
    return _moved(x, group, lambda x: functional.all_gather_single(x, 0, group))


def _moved(x: Tensor, group: Group, move: Callable[[Tensor], Tensor]) -> Tensor:
    """`move(x)`, on its way; with gloo it has arrived.

    With several collectives of one group under way, threads of gloo have been seen to spin for ever on a loaded machine
    (PyTorch 2.13). There each is waited for, in the backward pass too.
    """
    if group is None:
        return x
    if dist.get_backend(group) != "gloo":
        return move(x.contiguous())
    return functional.wait_tensor(move(_Settled.apply(x.contiguous())))


class _Settled(torch.autograd.Function):
    """The same tensor; its gradient has arrived before anything else sets off."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return functional.wait_tensor(gradient)


@dataclass
class Stale:
    """Borders on their way, for a `halo` that does not wait: those of the step before, one `Stale` a layer.

    After the last step `take` what is still on its way: a message that nobody takes blocks its group.
    """

    works: list = field(default_factory=list)
    borders: tuple[Tensor, Tensor] | None = None
    sent: tuple[Tensor, Tensor] | None = None  # kept until they have left

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Wait for the borders on their way; None if there are none."""
        for work in self.works:
            work.wait()
        found, self.works, self.borders, self.sent = self.borders, [], None, None
        return found


@torch.no_grad()
def halo(x: Tensor, dim: int, size: int, group: Group = None, stale: Stale | None = None) -> Tensor:
    """`x` between the last `size` rows of the rank before and the first `size` rows of the rank after.

    Rank i holds band i of a tensor that was cut along `dim`; before the first and after the last band come zeros.

    Args:
        size: rows (or frames) of the borders; every band must have as many.
        stale: the neighbours' values of the last call with this `Stale` instead of today's, which are on their way
            until the next one; the first call waits for its own. For steps that change a tensor little.

    Returns:
        A tensor that is `2 * size` longer along `dim`.

    Raises:
        InputError: a band shorter than its border.
    """
    if x.shape[dim] < size:
        raise InputError(f"a halo of {size} along dimension {dim}: the band has {x.shape[dim]}; "
                         f"at most {x.shape[dim]} can be sent, or cut into fewer bands")  # fmt: skip
    first, last = x.narrow(dim, 0, size).contiguous(), x.narrow(dim, x.shape[dim] - size, size).contiguous()
    before, after = torch.zeros_like(first), torch.zeros_like(last)
    rank, count = (0, 1) if group is None else (group.rank(), group.size())
    operations = []
    for neighbour, mine, theirs in ((rank - 1, first, before), (rank + 1, last, after)):
        if 0 <= neighbour < count:
            operations += [dist.P2POp(dist.isend, mine, group=group, group_peer=neighbour),
                           dist.P2POp(dist.irecv, theirs, group=group, group_peer=neighbour)]  # fmt: skip
    held = stale.take() if stale is not None else None
    works = dist.batch_isend_irecv(operations) if operations and size else []
    if stale is None or held is None:
        for work in works:
            work.wait()
        works = []
    if stale is not None:
        stale.works, stale.borders, stale.sent = works, (before, after), (first, last)
    before, after = held or (before, after)
    return torch.cat([before, x, after], dim)
