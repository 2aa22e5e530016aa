"""Distillation: frozen pairs, reflow, one step, 2-rectified flow++; every exact property, and stops in the middle."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from frameloom.claims import instaflow as straight
from frameloom.claims import plane
from frameloom.claims import rfpp as exact
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.denoiser import Latent, Plain, velocity
from frameloom.diffusion.distill import (
    Pairs,
    as_flow,
    jump,
    make_pairs,
    ode,
    one_step_loss,
    regrown,
    straightness,
    transport_cost,
)
from frameloom.diffusion.generator import open_generator
from frameloom.diffusion.paths import EDM, VP, Flow
from frameloom.diffusion.run import sample
from frameloom.diffusion.step import Grids, Initial, Universal, step
from frameloom.errors import InputError, Interrupted
from frameloom.tasks.distillation import distill
from frameloom.tasks.distillation.features import Features
from frameloom.tasks.distillation.instaflow import dropped
from frameloom.tasks.distillation.rfpp import RFpp, invert, sampled

NOTE = {"teacher": "t", "solver": "euler", "steps": 5, "guidance": 1.0}


def teacher():
    return plane.Exact("vp", 0)


def store(folder, count=40, model=None, solver="euler", note=NOTE, **more):
    model = model or teacher()
    draw = ode(model.denoiser, model.grid(5), step(solver))
    return make_pairs(folder, draw, model.text("012"), count, plane.SHAPE, note, shard=16, **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def student_of(out, recipe, **more):
    settings = {"pairs": 300, "steps": 40, "batch": 16, "sampling": 5, "save_every": 0.0}
    return distill(recipe, teacher(), out, **(settings | more))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_the_teachers_map_of_noises_that_grow_from_their_seeds(tmp_path):
    pairs, model = store(tmp_path), teacher()
    draw = ode(model.denoiser, model.grid(5), Universal())
    assert torch.allclose(draw(pairs.noise, model.text("012").rows(pairs.which)), pairs.data, atol=1e-5)
    shard = load_file(tmp_path / "pairs-00001.safetensors")
    assert set(shard) == {"seed", "data", "which"}
    assert torch.equal(regrown(shard["seed"], plane.SHAPE), pairs.noise[16:32])
    assert json.loads((tmp_path / "pairs.json").read_text())["teacher"] == "t"
    assert torch.equal(pairs.batch([7, 8])["data"], pairs.batch([7, 3])["data"])


def test_pairs_that_were_stopped_go_on_to_the_same_store(tmp_path):
    store(tmp_path / "a")

    def stop(label, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "b", progress=stop)
    half = tmp_path / "b" / ".pairs-00002.safetensors.1.partial"  # what a killed process leaves is in nobody's way
    half.write_bytes(b"half of a shard")
    assert len(list((tmp_path / "b").glob("pairs-*.safetensors"))) == 2
    kept = (tmp_path / "b" / "pairs-00000.safetensors").stat().st_mtime_ns
    store(tmp_path / "b")
    half.unlink()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "b" / "pairs-00000.safetensors").stat().st_mtime_ns == kept


def test_pairs_of_two_teachers_or_settings_do_not_mix(tmp_path):
    store(tmp_path)
    with pytest.raises(InputError, match=r"made with another teacher \(t, not u\)"):
        store(tmp_path, note=NOTE | {"teacher": "u"})
    with pytest.raises(InputError, match="another guidance"):
        store(tmp_path, note=NOTE | {"guidance": 2.0})
    with pytest.raises(InputError, match="another count"):
        store(tmp_path, count=41)


@pytest.mark.parametrize("solver", ["ancestral", "lcm"])
def test_a_stochastic_solver_is_refused(tmp_path, solver):
    with pytest.raises(InputError, match="reflow needs an ODE sampler"):
        store(tmp_path, solver=solver)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_shard_is_one_line(tmp_path):
    store(tmp_path)
    (tmp_path / "pairs-00001.safetensors").write_bytes(b"1234567890")
    with pytest.raises(InputError, match=r"pairs-00001.*not a shard of pairs"):
        Pairs(tmp_path)


# --- flows -----------------------------------------------------------------------------------------------------------


def test_a_straight_coupling_is_exact_in_one_step():
    assert straight.straight_is_exact(3)


def test_straightness_is_zero_for_a_straight_flow_and_the_closed_form_for_a_bent_one():
    noise = plane.unit(500, 1)
    line = Plain(lambda x, t, cond: torch.ones_like(x), Flow(), "velocity", Latent(2, 1, 1, 1))
    assert straightness(line, noise, Cond(), 20) < 1e-9
    # u = 2t in both directions: displacement 1 + 1/n, so S = 2 * (1/3 + O(1/n)).
    bent = Plain(lambda x, t, cond: (2 * t).view(-1, 1, 1, 1, 1).expand_as(x), Flow(), "velocity", Latent(2, 1, 1, 1))
    assert straightness(bent, noise, Cond(), 500) == pytest.approx(2 / 3, rel=0.02)


def test_a_jump_to_the_end_is_the_estimate_and_the_one_step_loss_compares_it():
    flow, noise = plane.ring("flow"), plane.unit(8, 2)
    told = flow.labels(plane.classes(8))
    end = jump(flow, noise, 1.0, 0.0, told)
    assert torch.allclose(end, flow(noise, torch.ones(8), told).x0, atol=1e-6)
    assert float(one_step_loss(flow, noise, end, told).max()) == 0
    assert float(one_step_loss(flow, noise, end + 1, told).min()) == pytest.approx(1, rel=1e-4)


def test_transport_cost_of_a_move():
    noise = plane.unit(4, 0)
    assert transport_cost(noise, noise + 2).tolist() == pytest.approx([8] * 4, rel=1e-4)


def test_u_shaped_times_follow_their_closed_form():
    assert exact.follows_u_shape(1)
    times = RFpp().times(1000)
    assert times.min() >= 1e-5
    assert times.max() <= 1 - 1e-5


def test_the_first_velocity_is_the_analytic_one():
    assert exact.starts_exact(1)


def test_an_untrained_exact_student_is_its_teacher():
    model = open_generator("digits-16")
    student = model.student(1, exact=True)
    x, told = torch.randn(3, *model.denoiser.latent.shape()[1:]), model.labels([1, 2, 3])
    t = torch.tensor([0.2, 0.6, 0.97])
    with torch.no_grad():
        assert torch.equal(velocity(student.denoiser, x, t, told), velocity(as_flow(model.denoiser), x, t, told))
        plain = model.student(1).denoiser
        hosted = {}
        plain.host.register_forward_pre_hook(lambda module, args: hosted.update(t=args[1]))
        plain(x, torch.ones(3), told)
    assert hosted["t"].tolist() == [1000.0] * 3  # the time of pure noise, as the teacher's embedding knows it
    assert student.defaults.guidance == 1


def test_the_new_sampler_is_eulers_at_one_step_and_on_a_straight_flow():
    flow, noise = plane.ring("flow"), plane.unit(16, 4)
    told = flow.labels(plane.classes(16))
    run = lambda den, n, kind, told: sample(den, noise, Grids.linear(Flow(), n), told, step=kind)[0]  # noqa: E731
    assert torch.equal(run(flow, 1, Universal(), told), run(flow, 1, Initial(), told))
    assert not torch.allclose(run(flow, 3, Universal(), told), run(flow, 3, Initial(), told), atol=1e-3)
    line = Plain(lambda x, t, cond: torch.ones_like(x), Flow(), "velocity", Latent(2, 1, 1, 1))
    for kind in (Initial(), Initial(second_order=True)):
        assert torch.allclose(run(line, 4, kind, Cond()), noise - 1, atol=1e-5)


def test_the_new_sampler_goes_back_to_the_first_noise():
    flow, noise = plane.ring("flow"), plane.unit(16, 4)
    told, seen = flow.labels(plane.classes(16)), []
    sample(flow, noise, Grids.linear(Flow(), 2), told, step=step("rfpp"), callback=lambda ctx, x: seen.append(x))
    first = flow(noise, torch.ones(16), told).x0
    assert torch.allclose(seen[0], 0.5 * first + 0.5 * noise, atol=1e-6)
    with pytest.raises(InputError, match="begins with a picture"):
        sample(flow, noise, torch.tensor([0.5, 0.0]), told, step=step("rfpp"))


def test_inversion_finds_the_noise_again():
    flow, noise = plane.ring("flow", std=0.5), plane.unit(64, 5)
    told = flow.labels(plane.classes(64))
    data = sample(flow, noise, Grids.linear(Flow(), 100), told)[0]
    again = sample(flow, invert(flow, data, told, 100), Grids.linear(Flow(), 100), told)[0]
    assert float((again - data).abs().mean()) < 0.1


def test_an_even_number_of_evaluations_is_no_second_order():
    flow, noise = plane.ring("flow"), plane.unit(4, 0)
    told = flow.labels(plane.classes(4))
    assert sampled(flow, noise, told, 3, second_order=True).shape == noise.shape
    with pytest.raises(InputError, match="N must be odd"):
        sampled(flow, noise, told, 4, second_order=True)


def test_a_teacher_whose_noise_ends_early_is_refused_by_the_guard():
    early = plane.ring("flow")
    # EDM that ends at 80 as well: the paper asks its network for more noise than it was trained on.
    for path in (VP.of("linear"), EDM(t_max=80.0)):
        early.path = path
        with pytest.raises(InputError, match="was trained down to"):
            sampled(early, plane.unit(2, 0), early.labels(plane.classes(2)), 1)


def test_the_loss_is_the_papers():
    rule, line = RFpp(loss="lpips-huber/t"), torch.zeros(2, *plane.SHAPE)
    flow = Plain(lambda x, t, cond: line, Flow(), "velocity", Latent(2, 1, 1, 1))
    noise, data, t = plane.unit(2, 0), plane.unit(2, 1), torch.tensor([0.25, 0.5])
    c = 0.00054 * 2
    h = ((noise - data).square().flatten(1).sum(1) + c * c).sqrt().sub(c) / 2
    seen = lambda made, true: (made - true).abs().flatten(1).sum(1)  # noqa: E731
    x = (1 - t).view(-1, 1, 1, 1, 1) * data + t.view(-1, 1, 1, 1, 1) * noise
    found = rule.error(flow, noise, data, Cond(), t, seen)
    assert torch.allclose(found, (1 - t) * h + (x - data).abs().flatten(1).sum(1) / t, atol=1e-5)


def test_the_ladder_has_the_papers_rungs():
    assert [(c.exact, c.density, c.loss) for c in map(RFpp.config, "ABCDEF")] == [
        (False, 0, "l2"), (True, 0, "l2"), (True, 4, "l2"), (True, 4, "huber"), (True, 4, "lpips-huber"),
        (True, 4, "lpips-huber/t")]  # fmt: skip
    with pytest.raises(InputError, match="config G"):
        RFpp.config("G")


def test_the_feature_metric_is_zero_for_equals_and_refuses_other_scales():
    net, video = Features(3, 10), torch.rand(2, 1, 3, 16, 16)
    assert float(net.distance(video, video).max().detach()) == 0
    assert float(net.distance(video.flip(3), video).min().detach()) > 0
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        net.distance(video, 255 * video)


def test_some_conditions_are_dropped():
    told = teacher().text("012").rows(torch.arange(300) % 3)
    assert dropped(told, 0.0) is told
    assert 0.3 < float((dropped(told, 0.5)["label"] == -1).float().mean()) < 0.7


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "stop"), [("reflow", ("pairs", 1)), ("reflow", ("one-step", 9)), ("rfpp", ("rfpp", 7))]
)
def test_a_run_that_was_stopped_ends_in_the_same_student(tmp_path, recipe, stop):
    def tell(label, done, total):
        if label.startswith(stop[0]) and done == stop[1]:
            raise KeyboardInterrupt

    whole = load_file(student_of(tmp_path / "a", recipe) / "model.safetensors")
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        student_of(tmp_path / "b", recipe, progress=tell)
    assert not (tmp_path / "b" / "model.safetensors").exists()
    again = load_file(student_of(tmp_path / "b", recipe) / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_one_reflow_straightens_and_another_teacher_is_refused(tmp_path):
    model, noise = teacher(), plane.unit(300, 9)
    told = model.text("012").rows(plane.classes(300))
    out = student_of(
        tmp_path / "s", "reflow", steps=300, batch=128, reflow=1.0, pairs=1000, sampling=20, save_every=60.0
    )
    student = plane.Net(plane.Config(distilled=1))
    student.load_state_dict(load_file(out / "model.safetensors"))
    assert straightness(student.denoiser, noise, told) < 0.3 * straightness(
        model.denoiser, noise, told, guide=model.guided(2.0)
    )
    with pytest.raises(InputError, match="made with another teacher"):
        distill("reflow", plane.Net(plane.Config()), out, pairs=1000, steps=300)
    with pytest.raises(InputError, match="other settings"):
        student_of(tmp_path / "s", "reflow")


@pytest.mark.parametrize(("recipe", "solver"), [("reflow", "ddim"), ("rfpp", "rfpp")])
def test_a_student_of_a_shipped_model_is_opened_like_any_other(tmp_path, recipe, solver):
    out = distill(recipe, "digits-16", tmp_path, pairs=6, steps=2, batch=2, sampling=2)
    student = open_generator(str(out))
    assert (student.defaults.steps, student.defaults.guidance) == (1, 1.0)
    assert isinstance(student.denoiser.path, Flow)
    told = student.text(["3"])
    made = ode(student.denoiser, student.grid(1), step(solver))(torch.randn(1, 1, 4, 8, 8), told)
    assert student.decode(made).shape == (1, 1, 3, 16, 16)


def test_guidance_for_a_student_is_warned_of(caplog):
    with caplog.at_level("WARNING", logger="frameloom"):
        open_generator("digits-16").student(1).guided(2.0)
    assert "guidance in its weights" in caplog.text


def test_too_few_pairs_are_warned_of(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="frameloom"):
        distill("reflow", plane.Net(plane.Config()), tmp_path, pairs=3, steps=2, batch=2, sampling=2)
    assert "learn them by heart" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "--recipe magic: there are reflow, instaflow, rfpp"),
        ({"teacher": "tiny-nothing"}, "no such folder and no shipped model"),
        ({"solver": "leap"}, "--solver leap"),
        ({"solver": "ancestral"}, "reflow needs an ODE sampler"),
        ({"pairs": 0}, "--pairs 0"),
        ({"steps": 0}, "--steps 0"),
        ({"prompts": []}, "holds no sentence"),
        ({"prompts": ["seventeen"]}, "does not know"),
        ({"colour": 3}, "has no setting colour"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, changes, message):
    asked = {"recipe": "reflow", "teacher": "digits-16", "pairs": 2, "steps": 1} | changes
    with pytest.raises(InputError, match=message):
        distill(asked.pop("recipe"), asked.pop("teacher"), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_status_2_for_prompts_without_a_sentence(tmp_path):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n")
    command = [sys.executable, "-m", "frameloom", "distill", "--recipe", "reflow", "--teacher", "digits-16"]
    done = subprocess.run(
        [*command, "--prompts", str(empty), "-o", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("holds no sentence; one a line is wanted")
    assert not (tmp_path / "out").exists()
