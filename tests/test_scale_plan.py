"""Plans: published sizes, what is legal, what fits, and how they are shown; and the self-test."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.claims.megatron import PUBLISHED, counted
from frameloom.errors import InputError
from frameloom.scale.mesh import parse
from frameloom.scale.plan import DEVICES, GPT, Device, blocks_of, parse_gpt, plan, plans
from frameloom.scale.selftest import selftest

MEDIUM = GPT(1024, 24, 16)


def test_published_sizes_rates_and_days_follow_from_the_formulas():
    sizes = [round(GPT(width, layers, heads).parameters / 1e9, 1) for width, layers, heads, *_ in PUBLISHED]
    assert sizes == [1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0]
    assert round(GPT(12288, 96, 96).days(300e9, 1024, 140e12)) == 34
    assert round(GPT(25600, 128, 160).days(450e9, 3072, 163e12)) == 84
    assert round(3072 * 163e12 / 1e15) == 501
    assert counted()


def test_blocks_of_a_gpt_add_up_to_its_closed_forms():
    blocks = MEDIUM.blocks()
    assert sum(block.parameters for block in blocks) == round(MEDIUM.parameters)
    three = 3 * sum(block.flops for block in blocks)
    assert three == pytest.approx(MEDIUM.flops(1, recompute=False), rel=1e-12)
    # Computing again repeats the layers' forward pass and not that of the logits.
    again = three + sum(block.flops for block in blocks[:-1])
    assert again == pytest.approx(MEDIUM.flops(1), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 12, 16]), st.sampled_from([16, 24, 64]))
def test_every_plan_is_legal_and_fits_and_the_fastest_is_first(devices, batch):
    device = DEVICES["a100"]
    found = plans(MEDIUM.blocks(), MEDIUM.heads, batch, devices, device)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        assert one.p * one.t * one.d == devices
        assert MEDIUM.heads % one.t == 0
        assert one.b * one.d * one.m == batch
        assert one.memory <= device.memory
        assert parse(one.words()).world == devices  # `train --parallel` takes it
    # The plan prices every stage like the slowest; the simulated step, with stages as they are, is never longer.
    best = found[0]
    assert 0.7 * best.seconds < best.timeline().length <= best.seconds * (1 + 1e-9)


def test_splitting_and_recomputation_save_memory_and_recomputation_costs_time():
    found = plans(MEDIUM.blocks(), 16, 16, 8, DEVICES["h200"])

    def least(**want) -> float:
        return min(one.memory for one in found if all(getattr(one, key) == value for key, value in want.items()))

    assert least(t=8, remat=False) < least(t=2, remat=False)
    assert least(p=8, t=1, remat=True) < least(p=8, t=1, remat=False)
    keep, again = (next(o for o in found if (o.p, o.t, o.b, o.v, o.remat) == (8, 1, 1, 1, r)) for r in (False, True))
    assert again.seconds > keep.seconds


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    small = Device(1e12, 1e9, 1e9, 1e9)
    with pytest.raises(InputError, match=r"nothing fits; the least is .* GB a device .*--devices \d+ would help most"):
        plans(MEDIUM.blocks(), 16, 16, 2, small)
    with pytest.raises(InputError, match="no p x t x d = 29 divides"):
        plans(MEDIUM.blocks(), 16, 3, 29, Device(1e12, 1e12, 1e9, 1e9, per_node=1), most=1)
    with pytest.raises(InputError, match="there are a100, h100, h200"):
        plan("stiv", devices=8, device="abacus")
    with pytest.raises(InputError, match=r"write gpt:width=12288"):
        parse_gpt("gpt:wide=3")
    with pytest.raises(InputError, match="layers, heads must be given"):
        parse_gpt("gpt:width=64")


def test_the_paper_size_of_the_toolkits_model_is_planned_by_its_own_blocks():
    blocks, heads, batch, steps, _ = blocks_of("stiv", "paper")
    assert len(blocks) == 48  # 46 blocks and the two ends
    assert heads == 48
    assert sum(block.parameters for block in blocks) == pytest.approx(8.85e9, rel=0.01)
    # 18 bytes of 8.85 billion parameters are twice an H100: a copy takes two or more of them.
    assert all(one.p * one.t >= 2 for one in plans(blocks, heads, batch, 64, DEVICES["h100"], most=1))
    assert steps == 400_000


def _run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "frameloom", *words], capture_output=True, text=True, check=False)


def test_plan_and_selftest_from_the_shell(tmp_path):
    trace = tmp_path / "step.json"
    shape = "gpt:width=1024,layers=24,heads=16"
    done = _run("plan", shape, "--devices", "8", "--batch", "16", "--tokens", "1e9", "--trace", str(trace), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == round(MEDIUM.parameters)
    assert found["plans"][0]["days"] > 0
    assert json.loads(trace.read_text())["traceEvents"]
    failed = _run("plan", "stiv", "--devices", "8", "--memory", "1GB")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "nothing fits" in failed.stderr


def test_the_selftest_passes_here_with_two_and_with_four_ranks():
    for ranks in (2, 4):
        for check in selftest(ranks):
            assert check.good or check.name == "pace of a pipeline", (check.name, check.seen)
