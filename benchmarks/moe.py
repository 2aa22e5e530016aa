"""A mixture-of-experts layer on local processes: time and bytes of every strategy, beside GShard's fixed way.

    python benchmarks/moe.py [--ranks 4] [--experts 2] [--dim 512] [--hidden 256] [--places 8,64,256,1024] [--json]

`einsum` is r = 1 with one-hot masks in place of encode and decode. Times are of a forward and a backward pass, the best
of several, of the slowest rank; processes that share cores tell about ratios, not about a cluster.
"""

import argparse
import json
import time

import torch
import torch.distributed as dist

from frameloom.scale.adapt import cheapest
from frameloom.scale.layout import apart, beside, exchange
from frameloom.scale.moe import MoE
from frameloom.scale.probe import CommCounter
from frameloom.scale.ranks import local
from frameloom.scale.routing import dispatch_mask, route


def gshard(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer in the fixed parallelism r = 1, with einsums over (token, expert, place)."""
    shape, ranks = layer.shape, layer.ranks
    routing = route(layer.gate(x), layer.top_k, layer.capacity, multiple=shape.shards, group=ranks.group)
    ones, gates = dispatch_mask(routing)
    y = torch.einsum("tec,td->ecd", ones, x).reshape(shape.devices, shape.own, -1, shape.dim)
    y = layer._network(beside(exchange(y, ranks)), layer._weights(1))
    y = exchange(apart(y, shape.devices), ranks).reshape(shape.experts, -1, shape.dim)
    return torch.einsum("tec,ecd->td", gates, y)


def measure(rank: int, experts: int, dim: int, hidden: int, places: list[int], tries: int) -> list[dict]:
    torch.manual_seed(0)
    layer = MoE(dim, hidden, experts, mesh=dist.group.WORLD)
    rows = []
    for capacity in places:
        x = torch.randn(experts * capacity, dim, requires_grad=True)
        ways = {f"r={r}": lambda x, r=r: layer(x, r=r) for r in layer.shape.degrees}
        ways |= {"r=1, 4 chunks": lambda x: layer(x, r=1, overlap=4), "r=1, einsum": lambda x: gshard(layer, x)}
        best = dict.fromkeys(ways, float("inf"))
        sent = {}
        for attempt in range(tries + 1):
            for name, way in ways.items():
                layer.zero_grad(set_to_none=True)
                dist.barrier()
                begun = time.perf_counter()
                with CommCounter() as counter:
                    way(x).square().sum().backward()
                spent = torch.tensor(time.perf_counter() - begun)
                dist.all_reduce(spent, dist.ReduceOp.MAX)
                sent[name] = sum(counter.total(one).wire for one in ("all_to_all", "all_gather", "reduce_scatter"))
                if attempt:
                    best[name] = min(best[name], float(spent))
        planned = cheapest(layer.shape, layer.routing.size)
        rows.append({"places": capacity, "planner": f"r={planned}"}
                    | {name: f"{1e3 * best[name]:.1f} ms, {sent[name] / 1e6:.2f} MB" for name in ways})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--places", default="8,64,256,1024")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    places = [int(value) for value in options.places.split(",")]
    rows = local(measure, options.ranks, options.experts, options.dim, options.hidden, places, options.tries,
                 timeout=600.0)[0]  # fmt: skip
    for row in rows:
        print(json.dumps(row) if options.json else "  ".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
