"""Mixtures of experts: the same function under every parallelism, what it sends, and what it refuses."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from frameloom.claims import tutel as claim
from frameloom.cli import mixture, models
from frameloom.errors import InputError
from frameloom.scale.adapt import Links, Shape, Strategy, Tuner, all_to_all_seconds, cheapest, crossings, seconds, wire
from frameloom.scale.expert_states import distribute, from_tutel, join, read_tutel, spread, whole
from frameloom.scale.layout import Ranks, Stale, all_to_all, halo
from frameloom.scale.moe import MoE, auxiliary, average_gradients, expert_parameters, keep_local
from frameloom.scale.probe import CommCounter
from frameloom.scale.ranks import local
from frameloom.scale.routing import (
    CosineGate,
    balance_loss,
    decode,
    dispatch_mask,
    encode,
    importance_load_loss,
    route,
)
from frameloom.tasks.generation.models import stiv
from frameloom.training import load, save_pretrained, train

# --- routing ---------------------------------------------------------------------------------------------------------


def by_hand(chosen, best, capacity, prioritised):
    """Places in a plain loop: all first choices, then all second ones, in the order of tokens or of importance."""
    tokens, k = chosen.shape
    order = sorted(range(tokens), key=lambda t: -float(best[t])) if prioritised else range(tokens)
    taken, places = {}, torch.full((k, tokens), -1)
    for j in range(k):
        for t in order:
            expert = int(chosen[t, j])
            places[j, t] = taken.get(expert, 0)
            taken[expert] = int(places[j, t]) + 1
    return places, places < capacity


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.data())
def test_places_are_those_of_a_plain_loop(tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    factor = data.draw(st.sampled_from([0.5, 1.0, 1.25, 0.0, -1.0, -3.0]))
    prioritised = data.draw(st.booleans())
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens * 7 + experts))
    routing = route(logits, k, factor, prioritised=prioritised, multiple=4)
    best, chosen = logits.softmax(1).topk(k, dim=1)
    needed = int(torch.bincount(chosen.flatten(), minlength=experts).max()) if tokens else 0
    share = k * int(abs(factor) * math.ceil(tokens / experts))
    limit = {1: share, 0: needed, -1: min(needed, share)}[(factor > 0) - (factor < 0)]
    assert routing.limit == limit
    assert routing.size % 4 == 0
    assert limit <= routing.size < limit + 4 or (limit == 0 and routing.size == 4)
    places, kept = by_hand(chosen, best[:, 0] if tokens else best, limit, prioritised)
    assert torch.equal(routing.places, places)
    assert torch.equal(routing.kept, kept)
    if factor == 0:
        assert routing.dropped == 0
    if k > 1:
        assert torch.allclose(routing.gates.sum(0), torch.ones(tokens))


@pytest.mark.parametrize("weighed", [False, True])
def test_encode_and_decode_are_the_einsums_and_so_are_their_gradients(weighed):
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for dense in (False, True):
        routing = route(logits, 2, 0.75, multiple=4)
        assert 0 < routing.dropped < 1
        if dense:
            ones, gates = dispatch_mask(routing)
            first, second = (gates, ones) if weighed else (ones, gates)
            y = torch.einsum("tec,td->ecd", first, x)
            out = torch.einsum("tec,ecd->td", second, y.sin())
        else:
            out = decode(encode(x, routing, weighed).sin(), routing, weighed)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, logits))))
    for fast, slow in zip(*found, strict=True):
        assert torch.allclose(fast, slow, atol=1e-12)


def test_encode_and_decode_take_a_thousandth_of_the_einsums_multiply_adds():
    torch.manual_seed(0)
    fewer, _, same = claim.einsum(0, tokens=1024, experts=16, dim=4)
    assert same
    assert fewer > 1000


def test_batch_priority_keeps_the_tokens_that_the_gate_is_surest_of():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    assert route(logits, 1, 1.0).kept.tolist() == [[True, True, False, True]]
    assert route(logits, 1, 1.0, prioritised=True).kept.tolist() == [[False, True, True, True]]


def test_both_auxiliary_losses_are_least_when_the_load_is_even():
    even, uneven = torch.eye(4).repeat(8, 1) * 9, torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(32, 1)
    low, high = (balance_loss(logits, route(logits, 1, 1.0)) for logits in (even, uneven))
    assert float(low) == pytest.approx(1.0, abs=1e-5)
    assert float(high) == pytest.approx(4.0, rel=0.01)
    noise = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) / 4
    low, high = (importance_load_loss(logits, logits + noise, 1, 1.0) for logits in (even, uneven))
    assert float(low) < 0.01 < 1 < float(high)
    with pytest.raises(InputError, match="the load loss needs noise"):
        importance_load_loss(even, even, 1, 0.0)


def test_the_cosine_gate_sees_directions_alone_and_holds_its_temperature():
    torch.manual_seed(0)
    gate = CosineGate(8, 4)
    with torch.no_grad():
        gate.project.bias.zero_()
    x = torch.randn(5, 8)
    assert torch.allclose(gate(x), gate(7 * x), atol=1e-5)
    with torch.no_grad():
        assert float(gate(x).abs().max()) <= 2.0
        gate.temperature.fill_(50.0)
        assert float(gate(x).abs().max()) <= 100.001


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"gate": "cosine"}, {"weighed_first": True}, {"prioritised": True}])
def test_a_layer_on_one_device_is_its_experts_by_hand(settings):
    torch.manual_seed(0)
    layer = MoE(8, 16, 3, top_k=2, capacity=0.0, **settings).double().eval()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    weights, chosen = layer.gate(x.view(-1, 8)).softmax(1).topk(2)
    weights = weights / weights.sum(1, keepdim=True)
    own, wanted = layer.experts, torch.zeros(14, 8, dtype=torch.float64)
    for t, token in enumerate(x.view(-1, 8)):
        for g, e in zip(weights[t], chosen[t], strict=True):
            token_in = token * g if settings.get("weighed_first") else token
            y = torch.nn.functional.gelu(own.w1[e] @ token_in + own.b1[e]) @ own.w2[e] + own.b2[e]
            wanted[t] += y if settings.get("weighed_first") else g * y
    assert torch.allclose(layer(x), wanted.view(2, 7, 8), atol=1e-12)


def test_without_drops_groups_of_different_lengths_give_what_the_buffer_gives():
    torch.manual_seed(0)
    layer = MoE(16, 32, 5, top_k=2)
    x = torch.randn(40, 16, requires_grad=True)
    found = []
    for capacity in (0.0, 9.0):  # the second has room for all, and takes the way through the buffer
        assert layer._fits_grouped(x, capacity, Strategy()) == (capacity == 0)
        y = layer(x, capacity=capacity)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_one_seed_makes_one_layer_whatever_the_devices(four):
    one, parts = claim.layer_of(0).state_dict(), [found["state"] for found in four]
    for name, value in join(parts, 2).items():
        assert torch.equal(value, one[name]), name
    for rank, part in enumerate(parts):
        for name, value in spread(one, 4, rank).items():
            assert torch.equal(part[name], value), name


def test_a_copy_can_be_made_between_steps_and_the_auxiliary_loss_is_taken_once():
    layer = MoE(8, 16, 4)
    layer(torch.randn(5, 8))
    assert float(auxiliary(layer).detach()) > 0
    copy.deepcopy(layer)
    assert float(auxiliary(layer)) == 0


# --- on four ranks ---------------------------------------------------------------------------------------------------


def _all_of_four(rank):
    """Everything that takes four ranks, in one group of processes: starting them is most of the time."""
    return {"state": dict(claim.layer_of(0, dist.group.WORLD).state_dict()), "switching": claim.switching(rank, 0),
            "hops": claim.two_hops(rank, 0), "odd": _odd_loads(rank), "learned": _spread_and_joined(rank),
            "counted": _counted(rank, *LOADS), "tuned": _tuned(rank), "bands": _bands(rank, 4)}  # fmt: skip


@pytest.fixture(scope="module")
def four():
    return local(_all_of_four, 4)


@pytest.fixture(scope="module")
def two():
    return local(_all_of_two, 2)


def _all_of_two(rank):
    return {"wrapped": _wrapped(rank), "bands": _bands(rank, 2)}


def test_every_r_every_overlap_and_both_ways_are_the_einsum_on_one_device():
    """With one expert S is 4, and there is an r between 1 and S; its second offset, 18 wide, does not divide."""
    cases = [{"experts": 1, "dim": 18, "top_k": 1}, {"experts": 2}, {"experts": 4}, {"experts": 8}]
    found = claim.difference(3, cases, overlaps=(1, 2, 4), nodes=(1, 2))
    assert [set(one) for one in found] == [{0, 1, 2, 4}, {0, 1, 2}, {0, 1}, {0, 1}]
    assert max(max(one.values()) for one in found) < 1e-11


def test_four_experts_on_two_ranks_with_every_gate_and_order_are_the_einsum():
    cases = [{"experts": 4, "gate": "cosine", "capacity": 0.0}, {"experts": 4, "prioritised": True, "capacity": 0.5},
             {"experts": 2, "capacity": -0.5}, {"experts": 1, "top_k": 1, "weighed_first": False}]  # fmt: skip
    for one in claim.difference(1, cases, ranks=2):
        assert max(one.values()) < 1e-11


def test_switching_r_at_every_step_changes_no_curve_and_moves_no_parameter(four):
    for rank in (found["switching"] for found in four):
        assert rank["curve"] < 1e-9
        assert rank["curves"]["fixed"][-1] < rank["curves"]["fixed"][0]
        assert rank["still"]
        assert rank["bytes"], "a step's traffic depends on its r alone, not on the step before"
        assert rank["formula"]


def test_two_hops_are_one_hop_bit_for_bit_in_fewer_messages(four):
    for rank in (found["hops"] for found in four):
        assert rank["equal"]
        assert (rank["plain"], rank["far"], rank["near"]) == (2, 1, 1)
        assert rank["growth"] == 2  # each twice as large


def _odd_loads(rank):
    """Ranks with different numbers of tokens, one without any; then one with bad numbers."""
    layer = claim.layer_of(0, dist.group.WORLD)
    found = {}
    for r in layer.shape.degrees:
        x = claim.tokens_of(rank, 0, count=5 * rank).requires_grad_()
        y = layer(x, r=r, capacity=0.0)
        (y.square().sum() + auxiliary(layer)).backward()
        found[r] = y.detach(), x.grad
    assert torch.equal(copy.deepcopy(layer).eval()(x), layer(x)), "a copy speaks to the same ranks"
    auxiliary(layer)
    spare = nn.Linear(2, 1, bias=False)
    if rank == 1:
        spare(torch.ones(1, 2)).sum().backward()
    average_gradients(spare, dist.group.WORLD)
    assert spare.weight.grad.tolist() == [[0.25, 0.25]]
    bad = claim.tokens_of(rank, 0)
    if rank == 2:
        bad[3, 1] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        layer(bad)
    assert torch.isfinite(layer(claim.tokens_of(rank, 0))).all()
    return found


def test_ranks_may_bring_different_tokens_or_none_and_stop_together_at_bad_numbers(four):
    layer = claim.layer_of(0)
    for rank, found in enumerate(one["odd"] for one in four):
        x = claim.tokens_of(rank, 0, count=5 * rank).requires_grad_()
        y = layer(x, capacity=0.0)
        (y.square().sum() + auxiliary(layer)).backward()
        for made, gradient in found.values():
            assert torch.allclose(made, y, atol=1e-12)
            assert torch.allclose(gradient, x.grad, atol=1e-12)


def _wrapped(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    x = torch.randn(6, 8)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), MoE(8, 16, 2, mesh=mesh["ep"]))

    with pytest.raises(InputError, match="keep_local"):
        DistributedDataParallel(model())(x)
    with pytest.raises(InputError, match="ignored_params"):
        fully_shard(model(), mesh=mesh)(x)
    good = model()
    keep_local(good)
    before = good[1].experts.w1.clone()
    DistributedDataParallel(good)(x).sum().backward()
    excused = model()
    fully_shard(excused, mesh=mesh, ignored_params=set(expert_parameters(excused)))
    excused(x).sum().backward()
    return before, good[1].experts.w1.grad, excused[1].experts.w1.grad


def test_wrappers_that_would_mix_up_the_experts_are_refused_with_the_remedy(two):
    first, second = (found["wrapped"] for found in two)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.isfinite(first[2]).all()


def _spread_and_joined(rank):
    """A whole model handed out, trained a step beside data-parallel replicas, and put together again."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, 16, 4, top_k=2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="one is wanted"):
        distribute(model, mesh)
    distribute(model, mesh["ep"])
    assert model[1].experts.w1.shape == (2, 16, 8)
    assert all(torch.equal(value, before[name]) for name, value in whole(model).items())
    x = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))[rank]
    (model(x).square().sum() + auxiliary(model)).backward()
    average_gradients(model, dist.group.WORLD, replicas=mesh["dp"].get_group())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return whole(model)


def test_experts_inside_a_node_and_replicas_across_learn_what_one_device_learns(four):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), MoE(8, 16, 4, top_k=2)).double()
    for x in torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)):
        ((model(x).square().sum() + auxiliary(model)) / 4).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for state in (found["learned"] for found in four):
        for name, value in model.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-12), name


# --- cost ------------------------------------------------------------------------------------------------------------


LOADS = Shape(4, 2, 32, 48), (4, 24, 64)


def _counted(rank, shape, capacities):
    layer = MoE(shape.dim, shape.hidden, shape.experts, mesh=dist.group.WORLD).eval()
    found = {}
    for capacity in capacities:
        x = torch.randn(shape.experts * capacity, shape.dim)
        for r in layer.shape.degrees:
            with CommCounter() as counter, torch.no_grad():
                layer(x, r=r)
            found[layer.routing.size, r] = claim.moved(counter)
    return found


def test_the_planner_names_the_r_that_sends_least_for_small_middle_and_large_loads(four):
    (shape, capacities), found = LOADS, four[0]["counted"]
    assert found == {(c, r): wire(shape, c, r) for c, r in found}
    best = [min(shape.degrees, key=lambda r, c=c: found[c, r]) for c in capacities]
    assert best == [cheapest(shape, c) for c in capacities] == [2, 1, 0]


@given(st.integers(0, 5), st.integers(0, 3), st.integers(1, 300))
def test_what_is_sent_grows_with_the_load_and_with_r_only_through_tokens(devices, experts, capacity):
    shape = Shape(2**devices, 2**experts, 16, 32)
    for r in shape.degrees:
        growth = wire(shape, capacity + 1, r) - wire(shape, capacity, r)
        w = shape.devices
        assert growth == pytest.approx(2 * (w - 1) / w * r * shape.experts * 16 * 4)
    assert wire(shape, capacity, cheapest(shape, capacity)) == min(wire(shape, capacity, r) for r in shape.degrees)


def test_the_best_r_falls_as_the_load_grows():
    shape = Shape(64, 8, 1024, 4096, 2)
    for cost in (wire, lambda shape, capacity, r: seconds(shape, capacity, r, Links())):
        order = list(crossings(shape, [2**n for n in range(18)], cost))
        assert order == sorted(order, reverse=True)
        assert len(order) > 2


def test_two_hops_pay_on_many_nodes_with_small_messages_only():
    links = Links()
    assert all_to_all_seconds(2048, 1e6, links, two_hops=True) < all_to_all_seconds(2048, 1e6, links)
    assert all_to_all_seconds(16, 1e9, links, two_hops=True) > all_to_all_seconds(16, 1e9, links)
    assert all_to_all_seconds(8, 1e6, links, two_hops=True) == all_to_all_seconds(8, 1e6, links)


def _tuned(rank):
    """A layer under a tuner, with a clock that runs by bytes: the fastest is the one that sends least."""
    torch.manual_seed(0)
    layer = MoE(32, 48, 2, mesh=dist.group.WORLD).eval()
    layer.tuner = Tuner([Strategy(r) for r in layer.shape.degrees], dist.group.WORLD)
    choose, record, taken = layer.tuner.choose, layer.tuner.record, {}

    def noted(size):
        strategy = choose(size)
        taken.setdefault(size, []).append(strategy.r)
        return strategy

    def by_bytes(size, strategy, seconds):
        # One rank alone would choose otherwise; the slowest one counts, for all of them.
        favours = 1e-3 if rank == 0 and strategy.r == 1 else 1.0
        record(size, strategy, wire(layer.shape, size, strategy.r) * favours)

    layer.tuner.choose, layer.tuner.record = noted, by_bytes
    for _ in range(8):
        for capacity in (4, 24, 64):
            with torch.no_grad():
                layer(torch.randn(2 * capacity, 32))
    return taken


def test_the_tuner_tries_everything_once_and_then_keeps_the_best_of_each_load(four):
    for taken in (found["tuned"] for found in four):
        assert {size: rs[-2:] for size, rs in taken.items()} == {4: [2, 2], 24: [1, 1], 64: [0, 0]}
        assert all(rs[:6] == [0, 0, 1, 1, 2, 2] for rs in taken.values())


# --- halo ------------------------------------------------------------------------------------------------------------


def _bands(rank, world):
    whole = torch.arange(world * 3 * 2.0).view(1, world * 3, 2)
    group, stale, found = dist.group.WORLD, Stale(), []
    found.append(halo(whole[:, 3 * rank : 3 * rank + 3], 1, 2, group))
    for step in range(3):
        found.append(halo(whole[:, 3 * rank : 3 * rank + 3] + 100 * step, 1, 2, group, stale))
    assert stale.take() is not None
    assert stale.take() is None
    with pytest.raises(InputError, match="at most 3 can be sent"):
        halo(whole[:, 3 * rank : 3 * rank + 3], 1, 4, group)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_halo_is_the_neighbours_borders_of_this_step_or_of_the_one_before(world, two, four):
    rows = torch.arange(world * 3 * 2.0).view(1, world * 3, 2)
    padded = nn.functional.pad(rows, (0, 0, 2, 2))
    for rank, (fresh, *steps) in enumerate(found["bands"] for found in {2: two, 4: four}[world]):
        wanted = padded[:, 3 * rank : 3 * rank + 7]
        assert torch.equal(fresh, wanted)
        neighbours = nn.functional.pad(torch.ones_like(rows), (0, 0, 2, 2))[:, 3 * rank : 3 * rank + 7]
        for step, made in enumerate(steps):
            border = wanted + 100 * max(step - 1, 0) * neighbours
            assert torch.equal(made[:, 2:5], wanted[:, 2:5] + 100 * step)
            assert torch.equal(made[:, :2], border[:, :2])
            assert torch.equal(made[:, 5:], border[:, 5:])


def test_alone_every_move_is_the_identity():
    x = torch.randn(1, 4, 2)
    assert torch.equal(halo(x, 1, 1), nn.functional.pad(x, (0, 0, 1, 1)))
    assert all_to_all(x, None) is x
    assert Ranks().inside(1) is Ranks().across(1) is None


# --- checkpoints -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
def test_spreading_and_joining_give_the_layer_back(experts, devices, dim):
    if experts % devices and devices % experts:
        return
    layer = MoE(dim, 8, experts)
    state = {f"blocks.1.{name}": torch.randn_like(value) for name, value in layer.state_dict().items()}
    again = join([spread(state, devices, rank) for rank in range(devices)], experts)
    assert again.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.items())


def test_a_layer_that_tutel_saved_on_four_ranks_opens_on_one(tmp_path):
    torch.manual_seed(0)
    layer, prefix = MoE(6, 8, 2), "layers.2.blocks.1.mlp._moe_layer."
    names = {"w1": "batched_fc1_w", "w2": "batched_fc2_w", "b1": "batched_fc1_bias", "b2": "batched_fc2_bias"}
    paths = []
    for rank in range(4):
        part = spread(layer.state_dict(), 4, rank)
        saved = {f"{prefix}experts.{names[name.split('.')[1]]}": value for name, value in part.items() if "exp" in name}
        saved[f"{prefix}gates.0.wg.weight"] = layer.gate.weight.detach()
        saved[f"{prefix}_num_global_experts"] = torch.tensor(2)
        saved[f"{prefix}experts.batched_fc1_bias"].unsqueeze_(1)  # as older files have it
        paths.append(tmp_path / f"swin.pth.rank{rank}")
        torch.save({"model": saved, "epoch": 3}, paths[-1])
    again = MoE(6, 8, 2)
    again.load_state_dict(from_tutel(read_tutel(paths), prefix))
    x = torch.randn(9, 6)
    assert torch.equal(again(x), layer(x))
    with pytest.raises(InputError, match="holds no experts"):
        from_tutel(read_tutel(paths), "layers.3.")
    with pytest.raises(InputError, match="are not 2 experts"):
        from_tutel(read_tutel(paths[:3]), prefix)
    paths[0].write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="not a file of tensors"):
        read_tutel(paths)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((6, 4, 8, 64), r"experts=4 on 6 devices: one must divide the other; 2, 3, 6"),
        ((4, 6, 8, 64), r"experts=6 on 4 devices: one must divide the other; 2, 4, 8"),
        ((8, 2, 8, 30), "hidden=30: an expert is cut over 4 devices, which does not divide it; 32 would do"),
    ],
)
def test_devices_experts_and_hidden_units_that_do_not_divide_are_named_with_what_would(settings, message):
    devices, experts, dim, hidden = settings
    with pytest.raises(InputError, match=message):
        Shape(devices, experts, dim, hidden)


def test_settings_of_a_layer_are_checked():
    for wrong, message in (({"gate": "fancy"}, "there are linear, cosine"), ({"top_k": 5}, "top=5"),
                           ({"balance": "load"}, "needs noise"), ({"r": 3}, "r=3: 4 experts on 1 devices allow 0, 1"),
                           ({"balance": "x"}, "share and load"), ({"node": 3}, "node=3")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            MoE(8, 16, 4, **wrong)
    with pytest.raises(InputError, match="logits are not finite"):
        MoE(8, 16, 4)(torch.full((3, 8), float("inf")))


# --- in the toolkit's transformer ------------------------------------------------------------------------------------

SMALL = replace(stiv.TINY, width=64, depth=4, heads=2)


def test_stiv_with_experts_learns_and_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = stiv.STIV(replace(SMALL, experts=4, capacity=0.5))
    assert [block.mixture is not None for block in model.blocks] == [False, True, False, True]
    batch = {"video": torch.rand(2, 16, 3, 32, 32), "ids": stiv.WORDS.encode(["a red ball rolls left"] * 2),
             "given": torch.zeros(2, 16, dtype=torch.bool)}  # fmt: skip
    nn.init.normal_(model.patch_out.weight, std=0.02)
    nn.init.normal_(model.modulation[1].weight, std=0.02)
    model.loss(batch).backward()
    mixture = model.blocks[1].mixture
    assert mixture.routing.dropped > 0
    assert float(mixture.gate.weight.grad.abs().max()) > 0
    assert float(mixture.experts.w1.grad.abs().max()) > 0
    model.eval()
    x, t, text = torch.randn(2, 16, 128, 2, 2), torch.tensor([0.5, 0.9]), model.text(["a red ball", "a blue box"])
    with torch.no_grad():
        both = model(x, t, text["text"], text["text_mask"])
        alone = model(x[:1], t[:1], text["text"][:1], text["text_mask"][:1])
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_a_dense_checkpoint_without_the_new_settings_still_opens(tmp_path):
    import json

    model = stiv.STIV(SMALL)
    save_pretrained(model, "stiv", tmp_path)
    note = json.loads((tmp_path / "config.json").read_text())
    for name in ("experts", "top_k", "capacity", "balance"):
        del note["config"][name]
    (tmp_path / "config.json").write_text(json.dumps(note))
    again = load("stiv", tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert load("stiv").config.experts == 0


def test_train_with_experts_from_the_shell_says_so_and_writes_weights_that_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(stiv.PRESETS, "tiny", SMALL)
    monkeypatch.setattr("frameloom.tasks.generation.data.captioned", lambda *a, **k: _Clips())
    config, r = mixture.config("stiv", "experts=4,top=2,capacity=1.5,r=2")
    assert r == 2
    assert "one process holds all experts" in capsys.readouterr().err
    out = train("stiv", tmp_path / "run", steps=2, config=config, workers=0)
    assert '"experts": 4' in (out / "run.json").read_text()
    assert "experts = 4" in (out / "README.md").read_text()
    assert load_file(out / "model.safetensors")["blocks.1.mixture.experts.w1"].shape == (4, 256, 64)
    assert load("stiv", out).config.top_k == 2
    train("stiv", tmp_path / "run", steps=2, config=config, workers=0)  # finished already: nothing to do
    with pytest.raises(InputError, match="other settings"):
        train("stiv", tmp_path / "run", steps=2, workers=0)


class _Clips:
    def sample(self):
        return torch.rand(4, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def batch(self, indices, progress):
        video = torch.rand(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(indices[0]))
        return {"video": video, "ids": stiv.WORDS.encode(["a red ball rolls left"] * 2),
                "given": torch.zeros(2, 16, dtype=torch.bool)}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("expert=3", "no such setting; there are experts, top, capacity, r"),
        ("experts=x", "'x' is not a number"),
        ("experts=4,experts=8", "experts is said twice"),
        ("top=1", "the number of experts is missing"),
        ("experts=4,top=5", "between 1 and all 4 experts"),
        ("experts=4,capacity=nan", "a factor such as 1.25"),
        ("experts=4,r=some", "or auto"),
    ],
)
def test_the_flag_says_what_is_wrong(flag, message):
    with pytest.raises(InputError, match=message):
        mixture.config("stiv", flag)


def test_experts_and_stages_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="a model with mixtures of experts takes dp alone"):
        models.train("stiv", tmp_path / "run", moe="experts=4", parallel="pp=2")
    assert not (tmp_path / "run").exists()


def test_a_method_without_such_layers_is_refused(tmp_path):
    with pytest.raises(InputError, match="vfimamba has no layers that could be mixtures of experts; stiv has"):
        mixture.config("vfimamba", "experts=4")
    with pytest.raises(InputError, match="vfimamba: has no setting experts"):
        train("vfimamba", tmp_path / "run", config={"experts": 4})
    assert not Path(tmp_path / "run").exists()
