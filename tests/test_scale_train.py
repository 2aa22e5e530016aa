"""Training over real ranks: what one process would have made, bit for bit where sums keep their order."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from frameloom.errors import InputError, Interrupted
from frameloom.scale import megatron, ranks
from frameloom.scale.gpipe import Pipeline
from frameloom.scale.job import Run
from frameloom.scale.mesh import join, parse
from frameloom.scale.partition import cuts
from frameloom.scale.probe import CommCounter
from frameloom.scale.ranks import RankFailed, local
from frameloom.scale.train import train
from frameloom.tasks.generation.models.stiv import STIV, TINY, WORDS
from frameloom.training.recipe import Recipe

SMALL = replace(TINY, width=48, depth=6, heads=4, frames=4, channels=16, codec=4, text_width=32)
BATCH = 8


def _model(kind: torch.dtype) -> STIV:
    torch.manual_seed(0)
    model = STIV(SMALL)
    for value in model.parameters():
        nn.init.normal_(value, std=0.05)
    return model.to(kind).train()


def _batch(kind: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor], STIV]:
    model = _model(kind)
    torch.manual_seed(1)
    side = SMALL.side * SMALL.codec
    batch = {"given": torch.rand(BATCH, SMALL.frames) < 0.3,
             "video": torch.rand(BATCH, SMALL.frames, 3, side, side, dtype=kind),
             "ids": WORDS.encode(["a red ball rolls left"] * BATCH)}  # fmt: skip
    carry, given = model.pipeline_batch(batch)
    return carry, given, model


def _alone(parts: int, kind: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The reference: one process, the same micro-batches in the same order, divided by their number at the end."""
    carry, given, model = _batch(kind)
    losses = []
    for unit in range(parts):
        here = tuple(part.tensor_split(parts)[unit] for part in carry)
        for block in model.pipeline_blocks():
            here = block(*here, **{name: part.tensor_split(parts)[unit] for name, part in given.items()})
        here[0][0].backward()
        losses.append(here[0][0].detach())
    gradients = {name: value.grad / parts for name, value in model.named_parameters() if value.grad is not None}
    return float(torch.stack(losses).mean()), gradients


def _spread(rank: int, words: list[str], kind: torch.dtype) -> list:
    """Loss, gradients and traffic of a step under each of several ways to spread it."""
    found = []
    for text in words:
        parallel = parse(text)
        mesh = join(parallel, "cpu")
        carry, given, model = _batch(kind)
        shared = megatron.split(model, model.tensor_plan(), mesh)
        blocks = model.pipeline_blocks()
        begins = cuts([1.0] * len(blocks), parallel.pp * parallel.v)
        pipeline = Pipeline(blocks, begins, parallel, mesh, torch.device("cpu"))
        copies, which = parallel.dp, mesh["dp"].get_local_rank()
        carry = tuple(part.tensor_split(copies)[which] for part in carry)
        given = {name: part.tensor_split(copies)[which] for name, part in given.items()}
        pipeline.step(carry, given)  # the first also finds out the shapes
        model.zero_grad(set_to_none=True)
        with CommCounter(mesh) as counter:
            loss = pipeline.step(carry, given)
        megatron.add_up([model.get_parameter(name) for name in shared], mesh.get_group("tp"))
        megatron.average(model.parameters(), mesh.get_group("dp"))
        gradients = {name: value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
                     for name, value in model.named_parameters() if value.grad is not None}  # fmt: skip
        traffic = {key: (row.calls, row.bytes) for key, row in counter.found.items()}
        found.append((float(loss), gradients, traffic))
    return found


def _equal_in_two(rank: int, words: list[str]) -> None:
    for text, (loss, gradients, _) in zip(words, _spread(rank, words, torch.float32), strict=True):
        whole, expected = _alone(parse(text).m, torch.float32)
        assert loss == whole, text
        assert gradients, text
        for name, value in gradients.items():
            assert torch.equal(value, expected[name]), (text, name)


PIPELINES = {
    1: ["pp=1,schedule=gpipe,microbatches=2,remat=always"],
    2: ["pp=2,schedule=gpipe,microbatches=4", "pp=2,schedule=gpipe,microbatches=8,remat=always",
        "pp=2,microbatches=2,remat=except_last", "pp=2,schedule=interleaved,v=2,microbatches=4,remat=always"],
    4: ["pp=4,schedule=gpipe,microbatches=4,remat=always", "pp=4,schedule=1f1b,microbatches=8"],
}  # fmt: skip


@pytest.mark.parametrize("world", PIPELINES)
def test_a_pipeline_makes_the_gradients_of_one_process_bit_for_bit(world):
    local(_equal_in_two, world, PIPELINES[world])


def test_every_gradient_comes_from_some_stage():
    found = local(_spread, 2, ["pp=2,microbatches=2"], torch.float32)
    names = {name for ((_, gradients, _),) in found for name in gradients}
    assert names == set(_alone(2, torch.float32)[1])


def _near(found: list, words: list[str]) -> None:
    """Sums in another order: 1e-11 in double precision. The loss is a copy's own, so it is compared for dp = 1."""
    for text, (loss, gradients, _) in zip(words, found, strict=True):
        parallel = parse(text)
        whole, expected = _alone(parallel.m * parallel.dp, torch.float64)
        if parallel.dp == 1:
            assert loss == pytest.approx(whole, rel=1e-11)
        for name, value in gradients.items():
            scale = expected[name].abs().max().clamp(min=1e-6)
            assert (value - expected[name]).abs().max() <= 1e-11 * scale, (text, name)


def test_split_matrices_and_copies_make_the_same_gradients_and_send_what_the_formulas_say():
    words = ["pp=2,tp=2,microbatches=2", "pp=2,tp=2,microbatches=2,scatter=off", "pp=2,dp=2,microbatches=2"]
    ranks = local(_spread, 4, words, torch.float64)
    for found in ranks:
        _near(found, words)
    # Tokens (and the text beside them) of one micro-batch, in double precision.
    b, m = BATCH // 2, 2
    tokens = b * SMALL.frames * SMALL.side**2 * SMALL.width * 8
    sentence = b * WORDS.length * SMALL.width * 8
    for found in ranks:
        calls, size = found[0][2]["all_reduce", "tp"]
        layers = SMALL.depth // 2  # of this stage
        # Four pairs of split matrices a layer, a sum forward and one backward each; the text's gradient is one more.
        assert calls == m * layers * 9
        assert size == m * layers * (8 * tokens + sentence)
    cut, uncut = (ranks[0][index][2]["send", "pp"][1] for index in (0, 1))
    assert uncut == 2 * cut


def test_two_ranks_share_matrices_alone():
    words = ["tp=2,pp=1,microbatches=2"]
    for found in local(_spread, 2, words, torch.float64):
        _near(found, words)


def _train(rank: int, jobs: dict[str, str], stop: int = 0) -> str:
    """Train into every folder in its way; with `stop`, Ctrl-C comes at that step, and what is said is returned."""
    STIV.preset = classmethod(lambda cls, size: SMALL)  # in this process alone
    step = Run.step

    def stopped(run: Run, batch: dict, number: int, seed: int) -> tuple[float, float]:
        if stop and number == stop:
            raise KeyboardInterrupt
        return step(run, batch, number, seed)

    Run.step = stopped
    said = ""
    for out, text in jobs.items():
        try:
            train("stiv", out, parallel=text, recipe=TINY_RUN, save_every=0.0 if stop else 1e9)
        except Interrupted as told:
            said = str(told)
    return said


TINY_RUN = Recipe(steps=3, batch_size=4, lr=1e-3, warmup=1, ema=0.9, clip_norm=0.1)


def _curve(folder: str) -> list[float]:
    """Loss and gradient norm of the logged steps."""
    rows = [json.loads(row) for row in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "norm")]


def _weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def test_training_ends_in_the_same_weights_however_it_is_spread(tmp_path):
    one, two, halves, shards = (str(tmp_path / name) for name in ("one", "two", "halves", "shards"))
    local(_train, 1, {one: "pp=1,microbatches=4"})
    local(_train, 2, {two: "pp=2,microbatches=4", halves: "tp=2,microbatches=4",
                      shards: "dp=2,microbatches=2,shard=on"})  # fmt: skip
    assert _curve(two) == _curve(one)
    for other in (halves, shards):  # Adam forgives a gradient of the wrong size: its norm does not
        assert _curve(other) == pytest.approx(_curve(one), rel=1e-3)
    for name, value in _weights(one).items():
        assert torch.equal(_weights(two)[name], value), name
        for other in (halves, shards):
            torch.testing.assert_close(_weights(other)[name], value, rtol=1e-3, atol=1e-5)


def test_a_stopped_run_goes_on_upon_another_mesh_to_the_same_end(tmp_path):
    whole, moved = str(tmp_path / "whole"), str(tmp_path / "moved")
    said = local(_train, 2, {moved: "pp=2,microbatches=4"}, 2)
    assert all("stopped at step 2; the same command goes on from the last save" in line for line in said)
    assert (tmp_path / "moved" / "state").is_dir()
    assert not (tmp_path / "moved" / "model.safetensors").exists()
    local(_train, 1, {moved: "pp=1,microbatches=4", whole: "pp=1,microbatches=4"})
    for name, value in _weights(whole).items():
        assert torch.equal(_weights(moved)[name], value), name
    rows = [json.loads(row)["step"] for row in (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [0, 2]


def _told(rank: int, folders: list[str]) -> list[str]:
    """What a rank says of every run, one after the other in one group."""
    said = []
    for out in folders:
        try:
            _train(rank, {out: "pp=2,microbatches=4"})
        except InputError as error:
            said.append(str(error))
    return said


DAMAGES = {
    "a part is gone": lambda state: (state / "__1_0.distcp").unlink(),
    "a part is cut": lambda state: os.truncate(state / "__0_0.distcp", 100),
    "a part is empty": lambda state: os.truncate(state / "__1_0.distcp", 0),
    "its list is gone": lambda state: (state / ".metadata").unlink(),
    "its list is cut": lambda state: os.truncate(state / ".metadata", 50),
}


def test_a_state_that_is_damaged_or_cannot_be_written_is_one_line_of_every_rank(tmp_path):
    run, full = tmp_path / "run", tmp_path / "full"
    local(_train, 2, {str(run): "pp=2,microbatches=4"}, 2)
    broken = [tmp_path / name for name in DAMAGES]
    for folder, damage in zip(broken, DAMAGES.values(), strict=True):
        shutil.copytree(run, folder)
        damage(folder / "state")
    full.mkdir()
    (full / "state.part").write_text("in the way")
    for said in local(_told, 2, [str(folder) for folder in [*broken, full]]):
        *damaged, unwritten = said
        for folder, line in zip(broken, damaged, strict=True):
            assert line.startswith(f"{folder}/state: is no state of this run, or a damaged one ("), line
            assert line.endswith("); remove it to begin anew"), line
        assert unwritten.startswith(f"{full}/state.part: cannot be written ("), unwritten
        assert unwritten.endswith("); the last whole state is kept; the same command goes on from it")
        assert not any(mark in line for line in said for mark in ("\n", "Traceback"))


EXPERTS = {"experts": 4, "top_k": 2, "capacity": 1.25}


def _train_experts(rank: int, jobs: dict[str, tuple[str, int | str]]) -> None:
    STIV.preset = classmethod(lambda cls, size: SMALL)
    for out, (text, r) in jobs.items():
        train("stiv", out, parallel=text, recipe=TINY_RUN, config=EXPERTS, r=r, save_every=1e9)


def test_copies_that_share_experts_end_in_the_weights_of_one_process_whatever_r(tmp_path):
    one, auto, zero = (str(tmp_path / name) for name in ("one", "auto", "zero"))
    local(_train_experts, 1, {one: ("microbatches=2", "auto")})
    local(_train_experts, 2, {auto: ("dp=2,microbatches=1", "auto"), zero: ("dp=2,microbatches=1", 0)})
    for other in (auto, zero):
        assert _curve(other) == pytest.approx(_curve(one), rel=1e-3)
    first = _weights(one)
    assert first["blocks.1.mixture.experts.w1"].shape == (4, 4 * SMALL.width, SMALL.width)
    for name, value in first.items():
        for other in (auto, zero):
            torch.testing.assert_close(_weights(other)[name], value, rtol=1e-3, atol=1e-5)


def test_experts_go_with_copies_alone():
    for text in ("pp=2", "tp=2", "dp=2,shard=on"):
        with pytest.raises(InputError, match="takes dp alone, whose copies share the experts; dp=2 would do"):
            train("stiv", "nowhere", parallel=text, config=EXPERTS)
    with pytest.raises(InputError, match="experts=4 on 3 devices: one must divide the other"):
        train("stiv", "nowhere", parallel="dp=3,microbatches=1", config=EXPERTS)


def _deserted(rank: int, out: str) -> str:
    STIV.preset = classmethod(lambda cls, size: SMALL)
    step = Run.step

    def leave(run: Run, batch: dict, number: int, seed: int) -> tuple[float, float]:
        if rank == 1 and number == 1:
            os._exit(9)
        return step(run, batch, number, seed)

    Run.step = leave
    try:
        train("stiv", out, parallel="pp=2,microbatches=2", recipe=TINY_RUN)
    except InputError as told:
        Path(out, "told").write_text(str(told))
        raise
    return "finished"


def test_a_rank_that_is_gone_is_named_by_those_that_are_left(tmp_path, monkeypatch):
    told = tmp_path / "run" / "told"
    monkeypatch.setattr(ranks, "PATIENCE", 20.0)
    with pytest.raises(RankFailed, match="rank 1 of 2 died"):
        local(_deserted, 2, str(tmp_path / "run"))
    assert "rank 0: rank 1 is gone" in told.read_text()
    assert "the same command goes on from the last save" in told.read_text()


def test_heads_batches_and_ranks_that_do_not_divide_are_one_line():
    with pytest.raises(InputError, match=r"tp=4: 6 heads cannot be shared; tp=1, 2, 3 or 6 would"):
        train("stiv", "nowhere", parallel="tp=4")
    with pytest.raises(InputError, match=r"a batch of 24 does not fall into 10 equal parts"):
        train("stiv", "nowhere", parallel="pp=2,microbatches=10")
    with pytest.raises(InputError, match=r"pp x v = 16: the model has 8 blocks"):
        train("stiv", "nowhere", parallel="pp=16,microbatches=24,schedule=gpipe")
    with pytest.raises(InputError, match=r"start it with torchrun --nproc-per-node 2"):
        train("stiv", "nowhere", parallel="pp=2")
    with pytest.raises(InputError, match="microbatches=3: schedule=interleaved takes whole groups of pp=2; 2 or 4"):
        train("stiv", "nowhere", parallel="pp=2,v=2,schedule=interleaved,microbatches=3")
    with pytest.raises(InputError, match=r"its training step is not a row of blocks"):
        train("vfimamba", "nowhere", parallel="pp=1")
    wrong = {"qq=2": "write NAME=VALUE with pp", "pp=two": "a whole number", "pp=0": "1 or more",
             "remat=maybe": "there are never, always", "schedule=zb": "there are gpipe, 1f1b"}  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(InputError, match=message):
            parse(text)
    assert not Path("nowhere").exists()


def _unequal(rank: int, out: str) -> None:
    train("stiv", out, parallel="pp=2,microbatches=4", seed=rank, recipe=TINY_RUN)


def test_ranks_that_were_asked_for_different_things_are_told_so(tmp_path):
    with pytest.raises(RankFailed, match=r"rank 1 was started with command .* all ranks must run one command"):
        local(_unequal, 2, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
