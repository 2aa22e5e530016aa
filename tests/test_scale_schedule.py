"""Schedules as data, what they would take, where a model is cut, and what micro-batches must not change."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frameloom.errors import InputError
from frameloom.memory import peak
from frameloom.scale.gpipe import Stage, commit, defer
from frameloom.scale.partition import Part, cuts, profile
from frameloom.scale.schedule import Action, Schedule, schedule
from frameloom.scale.simulate import Costs, bubble, idle_share, live, simulate

WAYS = st.one_of(
    st.tuples(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 24), st.just(1)),
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)).map(
        lambda pkv: ("interleaved", pkv[0], pkv[0] * pkv[1], pkv[2])
    ),
)


@settings(max_examples=60, deadline=None)
@given(WAYS)
def test_every_schedule_is_whole_and_can_be_walked_and_takes_what_the_closed_form_says(way):
    name, p, m, v = way
    made = schedule(name, p, m, v)
    made.check()
    line = simulate(made, Costs(1.0 / v, 2.0 / v))
    share = idle_share(name, p, m, v)
    # Interleaving fills the bubble as computed where every rank has more to do than its warm-up holds.
    if name != "interleaved" or m > p or v == 1:
        assert line.idle(0) == pytest.approx(share, abs=1e-9)
        assert line.length == pytest.approx(3.0 * m * (1 + bubble(name, p, m, v)), rel=1e-9)
    for rank in range(p):
        assert made.live(rank) == live(name, p, m, v, rank)


@pytest.mark.parametrize(
    ("p", "m", "shares", "held"),
    [(2, 4, (0.2, 0.1111, 0.0588), (4, 2, 5, 9)), (4, 8, (0.2727, 0.1579, 0.0857), (8, 4, 11, 19)),
     (8, 32, (0.1795, 0.0986, 0.0519), (32, 8, 23, 39))],
)  # fmt: skip
def test_published_figures_of_idle_time_and_memory(p, m, shares, held):
    ways = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
    found = [schedule(name, p, m, v) for name, v in ways]
    idle = [round(simulate(one, Costs(1.0 / one.v, 2.0 / one.v)).idle(0), 4) for one in found]
    assert idle == [shares[0], *shares]
    assert tuple(one.live(0) for one in found) == held


def test_overhead_and_the_way_between_ranks_are_counted():
    line = simulate(schedule("gpipe", 2, 1), Costs(1.0, 2.0, overhead=0.1, hop=0.5))
    assert line.length == pytest.approx(2 * 1.1 + 2 * 2.1 + 2 * 0.5)


def test_a_broken_schedule_says_what_is_wrong():
    good = schedule("1f1b", 2, 2)
    first, second = good.ranks
    with pytest.raises(ValueError, match="deadlock: rank 0 waits with B0 of 0 for B0 of 1"):
        Schedule((first[:1] + (Action("B", 0, 0),) + first[1:2] + first[3:], second[::-1]), 2).walk()
    with pytest.raises(ValueError, match="F1 of 0 is missing"):
        Schedule((tuple(a for a in first if a != Action("F", 0, 1)), second), 2).check()
    with pytest.raises(ValueError, match="is there twice"):
        Schedule((first + first[:1], second), 2).check()
    with pytest.raises(ValueError, match="lives on rank"):
        Schedule((second, first), 2).check()


@given(st.lists(st.integers(1, 30).map(float), min_size=1, max_size=9), st.integers(1, 5))
def test_cuts_are_the_best_there_are(costs, stages):
    if stages > len(costs):
        with pytest.raises(InputError, match=f"the model has {len(costs)} blocks"):
            cuts(costs, stages)
        return

    def rank(begins: tuple[int, ...]) -> tuple[float, float]:
        ends = [*begins[1:], len(costs)]
        parts = [sum(costs[begin:end]) for begin, end in zip(begins, ends, strict=True)]
        return max(parts), sum(part**2 for part in parts)

    every = [(0, *inner) for inner in combinations(range(1, len(costs)), stages - 1)]
    assert rank(tuple(cuts(costs, stages))) == min(map(rank, every))


def _blocks(count: int, width: int, dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))
             for _ in range(count)]  # fmt: skip
    return [Part(lambda x, net=net, **_: (x + net(x),), [net]) for net in parts]


def test_costs_are_counted_without_computing():
    with torch.device("meta"):
        found = profile(_blocks(2, 8), (torch.empty(3, 8),), {})
    assert found[0].flops == 2 * 2 * 3 * 8 * 32
    assert found[0].parameters == 2 * 8 * 32 + 32 + 8
    assert found[0].boundary == 3 * 8 * 4
    # the input, what GELU takes and what the second matrix takes
    assert found[0].saved == (8 + 32 + 32) * 3 * 4


def test_a_block_that_returns_no_tensors_is_named():
    with pytest.raises(InputError, match="block 0 returns dict"):
        profile([Part(lambda x, **_: {"x": x}, [])], (torch.ones(1),), {})


@pytest.mark.parametrize("remat", ["always", "except_last"])
def test_what_is_computed_again_draws_the_same_numbers(remat):
    gradients = []
    for way in ("never", remat):
        stage = Stage(_blocks(2, 8, dropout=0.5), 0, way, m=2)
        for step in range(2):
            stage.begin(step)
            for unit in range(2):
                x = torch.full((3, 8), float(unit + 1), requires_grad=True)
                stage(x).square().sum().backward()
        gradients.append([value.grad for value in stage.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(value.any() for value in gradients[0])


def test_dropout_hangs_on_step_and_microbatch_and_not_on_where_a_block_lives():
    blocks, x = _blocks(2, 8, dropout=0.5), torch.ones(3, 8)
    whole, first, second = (
        Stage(blocks, 0, "never", 2),
        Stage(blocks[:1], 0, "never", 2),
        Stage(blocks[1:], 1, "never", 2),
    )

    def run(step: int) -> list[torch.Tensor]:
        for stage in (whole, first, second):
            stage.begin(step)
        made = []
        for _ in range(2):
            made.append(whole(x))
            assert torch.equal(second(first(x)), made[-1])
        return made

    (one, two), (three, _), (again, _) = run(0), run(1), run(0)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)


def test_rematerialisation_keeps_what_a_stage_was_given_and_little_else():
    def held(remat: str) -> int:
        stage = Stage(_blocks(8, 32), 0, remat, m=4)
        for value in stage.parameters():
            value.grad = torch.zeros_like(value)

        def step() -> None:
            stage.begin(0)
            units = [torch.ones(64, 32, requires_grad=True) for _ in range(4)]
            made = [stage(x) for x in units]  # as GPipe: all forwards, then all backwards
            for out in reversed(made):
                out.sum().backward()

        return peak(step)

    assert held("always") < 0.45 * held("never")


def test_a_block_that_changes_its_input_cannot_be_computed_again():
    stage = Stage([Part(lambda x, **_: (x.mul_(2),), [])], 3, "always", 1)
    with pytest.raises(InputError, match="blocks 3 to 3: one of them changes its input in place"):
        stage(torch.ones(2, requires_grad=True) * 1)


def test_running_statistics_are_those_of_the_whole_batch_taken_once():
    torch.manual_seed(0)
    x = torch.randn(16, 6, 5)

    def net() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Flatten())

    whole, deferred, naive = net(), defer(net()), net()
    whole(x)
    stage = Stage([Part(lambda x, **_: (deferred(x),), [deferred])], 0, "always", 4)
    with stage.trial():  # as torch does before the first step
        stage(torch.ones(4, 6, 5))
    for part in x.chunk(4):
        stage(part.clone().requires_grad_()).square().sum().backward()
        naive(part)
    commit(stage)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(deferred[0], name), getattr(whole[0], name), rtol=1e-6, atol=1e-6)
    assert (naive[0].running_var - whole[0].running_var).abs().max() > 1e-2
    deferred.eval(), whole.eval()
    torch.testing.assert_close(deferred(x), whole(x))
