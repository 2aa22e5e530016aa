"""Restyling frame by frame: slots, guidance, the gate, queues, and what a user can get wrong."""

import json
import logging
import sys
import threading
import time
from itertools import islice

import pytest
import torch

from frameloom.cli.app import main
from frameloom.cli.chain import parse_prompts
from frameloom.diffusion.analytic import GaussianMixture
from frameloom.diffusion.cond import Cond
from frameloom.diffusion.generator import Defaults, open_generator
from frameloom.diffusion.guide import CFG
from frameloom.diffusion.paths import VP, Flow
from frameloom.diffusion.step import Grids, Universal
from frameloom.errors import InputError
from frameloom.tasks.editing import Settings, indices, live
from frameloom.tasks.editing.base import GUIDANCE, LiveSource, Prompts, scalings
from frameloom.tasks.editing.sequential import Sequential
from frameloom.tasks.editing.streamdiffusion import Gate, Stream
from frameloom.tasks.editing.workers import DROPPED, Queue, through
from frameloom.tasks.generation.models.stiv import STIV, TINY
from frameloom.video.clip import Clip
from frameloom.video.reader import read
from media import make, moving

FOUR = (20, 30, 38, 45)


class Toy:
    """A generator whose latents are its pixels and whose denoiser is exact; it writes down what it is asked."""

    name, height, width, fps, needs_image = "toy", 4, 6, 8.0, False
    defaults, step = Defaults(), Universal(r=1.0)

    def __init__(self, path=None):
        means = torch.rand(3, 1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        self.exact = GaussianMixture(means, 1.0, path or VP.of())
        self.path, self.latent, self.denoiser, self.asked = self.exact.path, self.exact.latent, self, []

    def __call__(self, x, t, cond):
        self.asked.append((t.clone(), cond["label"].clone()))
        return self.exact(x, t, cond)

    def sites(self, kind):
        return iter(())

    def text(self, prompts):
        return self.exact.labels(torch.tensor([{"a": 0, "b": 1, "c": 2}.get(prompt, -1) for prompt in prompts]))

    def image(self, picture, cond):
        raise InputError("none")

    def guided(self, w):
        return CFG(w)

    def start(self, noise, steps):
        return noise

    def encode(self, video):
        return video

    def decode(self, latents):
        return latents

    def grid(self, steps):
        return Grids.trailing(self.path, steps) if isinstance(self.path, VP) else Grids.linear(self.path, steps)

    def latent_frames(self, frames):
        return frames


def pictures(count, seed=0, height=4, width=6):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def latents(live, frames):
    made = [latent for frame in frames for latent in live.advance(live.enter(frame))]
    return torch.cat(made + live.finish())


def random_stiv():
    torch.manual_seed(0)
    model = STIV(TINY).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.05)
    return model


# --- stream against sequential --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("noise", ["fixed", "ddim", "none"])
@pytest.mark.parametrize("path", [VP.of(), Flow()], ids=["vp", "flow"])
def test_every_frame_equals_its_own_steps_one_after_the_other(guidance, noise, path):
    settings = Settings(t_index=FOUR, guidance=guidance, noise=noise, w=1.3, delta=0.8)
    made = [latents(kind(Toy(path), "a", settings), pictures(9)) for kind in (Stream, Sequential)]
    assert made[0].shape == (9, 1, 3, 4, 6)
    assert float((made[0] - made[1]).abs().max()) < 1e-4 * float(made[1].abs().max())
    # Not because all frames are alike.
    assert float((made[1][1:] - made[1][:-1]).abs().amax((1, 2, 3, 4)).min()) > 1e-4


@pytest.mark.parametrize("guidance", ["self", "full"])
def test_networks_too(guidance):
    for model, prompt in ((open_generator("digits-16"), "3"), (random_stiv(), "a red ball")):
        settings = Settings(t_index=FOUR, guidance=guidance)
        made = [latents(kind(model, prompt, settings), pictures(6)) for kind in (Stream, Sequential)]
        assert float((made[0] - made[1]).abs().max()) < 1e-5 * max(1, float(made[1].abs().max()))


@pytest.mark.parametrize(("guidance", "price"), [("none", 3), ("self", 3), ("onetime", 4), ("full", 6)])
def test_a_launch_a_frame_and_the_paper_s_evaluations(guidance, price):
    model = Toy()
    stream = Stream(model, "a", Settings(t_index=(5, 20, 40), guidance=guidance))
    before = 0
    for number, frame in enumerate(pictures(6)):
        assert (stream.push(frame) is None) == (number < 2)
        if number >= 2:
            assert stream.report.evaluations - before == price == len(model.asked[-1][0])
        before = stream.report.evaluations
        assert stream.report.launches == len(model.asked) == number + 1
    assert len(stream.flush()) == 2
    assert stream.report.evaluations == 6 * price
    assert torch.equal(model.asked[2][0][:3], model.grid(50)[[5, 20, 40]])


def test_the_written_out_step_of_one_frame(monkeypatch):
    # LCM's own scalings are 0 and 1 to five digits at all but the last index.
    for place in ("streamdiffusion", "sequential"):
        scale = lambda path, t: (torch.full_like(t, 0.2), torch.full_like(t, 0.9))  # noqa: E731
        monkeypatch.setattr(f"frameloom.tasks.editing.{place}.scalings", scale)
    model, frame = Toy(), pictures(1)[0]
    settings = Settings(t_index=(10, 30), guidance="self", w=1.4, boundary=True)
    stream = Stream(model, "b", settings)
    z, cond, clean = stream.noises, model.text(["b"]), frame[None, None]
    x0 = clean
    for number, t in enumerate(model.grid(50)[[10, 30]]):
        a, _, c = model.path.coef(t)
        x = float(a) * x0 + float(c) * z[number : number + 1]
        x0 = 0.9 * (clean + 1.4 * (model.exact(x, t[None], cond).x0 - clean)) + 0.2 * x
    assert torch.allclose(latents(stream, [frame]), x0, atol=1e-5)
    assert torch.allclose(latents(Sequential(model, "b", settings), [frame]), x0, atol=1e-5)


def test_boundary_scalings_are_those_of_diffusers():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    for index in (1, 259, 999):
        skip, out = scalings(VP.of(), torch.tensor([index + 1.0]))
        wanted = scheduler.get_scalings_for_boundary_condition_discrete(index)
        assert (float(skip), float(out)) == pytest.approx([float(value) for value in wanted])
    assert [float(value) for value in scalings(VP.of(), torch.tensor([1.0]))] == [1, 0]


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_new_prompt_reaches_all_slots_at_once_and_nothing_is_lost():
    model = Toy()
    stream = Stream(model, "a", Settings(t_index=FOUR, guidance="onetime"))
    out = [stream.push(frame) for frame in pictures(5)]
    stream.say("c")
    out += [stream.push(frame) for frame in pictures(3, seed=1)]
    assert model.asked[4][1].tolist() == [0, 0, 0, 0, -1]
    assert model.asked[5][1].tolist() == [2, 2, 2, 2, -1]
    assert len([frame for frame in out if frame is not None] + stream.flush()) == 8


def test_a_ramp_goes_evenly_from_one_prompt_to_the_other():
    class Words(Toy):
        def text(self, prompts):
            return Cond({"text": torch.full((1, 2, 2), float(prompts[0]))}, {"text": torch.zeros(1, 2, 2)})

    prompts = Prompts(Words(), {0: "0", 4: "8"}, ramp=3)
    assert [float(prompts.at(number)["text"][0, 0, 0]) for number in range(9)] == [0, 0, 0, 0, 2, 4, 6, 8, 8]
    away = Prompts(Words(), {0: "1"}, negative="5")
    assert float(away.at(0).null()["text"].mean()) == 5


# --- the gate -------------------------------------------------------------------------------------------------------


def test_the_gate_skips_by_its_formula_and_ten_in_a_row_at_most():
    first = torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)
    second = torch.tensor([0.99 / 2 + 0.5, (1 - 0.99**2) ** 0.5 / 2 + 0.5, 0.5]).view(3, 1, 1)
    gate = Gate()
    gate.reference = first
    assert gate.probability(second) == pytest.approx(0.5, abs=1e-4)
    assert gate.probability(1 - first) == 0
    row = [gate.skips(first) for _ in range(33)]
    assert row == ([True] * 10 + [False]) * 3


def test_the_gate_looks_at_inputs_and_keeps_the_reference_of_what_it_skipped():
    class Same(Toy):
        def decode(self, latents):
            return torch.full_like(latents, 0.5)

        def __call__(self, x, t, cond):
            found = super().__call__(x, t, cond)
            return type(found)(torch.zeros_like(x), torch.zeros_like(x))

    stream = Stream(Same(), "a", Settings(similar=0.98))
    for frame in pictures(12):  # outputs are all alike, inputs are not
        stream.push(frame)
    assert stream.report.skipped == 0
    gate = Gate(most=1000)
    drift = torch.cat([torch.full((1, 1, 1), 1.0), torch.full((2, 1, 1), 0.5)])
    other = drift + torch.tensor([0.0, 0.04, 0.0]).view(3, 1, 1)
    gate.skips(drift)
    skipped = [gate.skips(other) for _ in range(200)]
    assert gate.reference is (drift if all(skipped) else other)
    assert sum(skipped) > 150


def test_a_frame_that_is_skipped_costs_nothing_and_still_comes_out():
    frames = torch.cat([pictures(4), pictures(1, seed=5).expand(20, -1, -1, -1), pictures(4, seed=6)])
    model = Toy()
    stream = Stream(model, "a", Settings(t_index=FOUR, similar=0.98))
    out = [stream.push(frame) for frame in frames]
    assert [frame is None for frame in out] == [True] * 3 + [False] * 25
    assert len(stream.flush()) == 3
    assert stream.report.skipped >= 17
    assert stream.report.launches == 28 - stream.report.skipped + 3


# --- queues and clips -----------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    made = Toy()
    monkeypatch.setattr("frameloom.tasks.editing.base.open_generator", lambda *_: made)
    return made


@pytest.mark.parametrize("method", ["streamdiffusion", "sequential"])
def test_a_clip_gives_a_frame_for_a_frame_from_anywhere(toy, method):
    clip = Clip.from_tensor(pictures(11, height=8, width=12), rate=10)
    made = live(clip, {0: "a", 6: "c"}, method, t_index=FOUR)
    whole = made.tensor()
    assert whole.shape == (11, 3, 4, 6)
    assert list(made.times) == list(clip.times)
    part = torch.stack([frame.rgb for frame in made.frames(4, 8)])
    assert torch.allclose(part, whole[4:8], atol=1e-5)
    assert torch.allclose(torch.stack([frame.rgb for frame in islice(made.frames(9), 2)]), whole[9:], atol=1e-5)
    assert len(toy.asked)


def test_what_does_not_depend_on_history_alone_is_taken_from_the_start(toy):
    frames = pictures(1).expand(14, -1, -1, -1) + 0.02 * pictures(14, seed=3)
    clip = Clip.from_tensor(frames.clamp(0, 1))
    made = live(clip, "a", similar=0.98, blend=0.3)
    whole = made.tensor()
    assert len(whole) == 14
    assert torch.allclose(torch.stack([frame.rgb for frame in made.frames(9, 12)]), whole[9:12])


def test_a_full_queue_waits_or_drops_the_oldest():
    stop = threading.Event()
    dropping = Queue(2, stop, drop=True)
    for number in range(5):
        dropping.put(number)
    assert [dropping.get() for _ in range(5)] == [DROPPED, DROPPED, DROPPED, 3, 4]
    waiting, inside, most = [], 0, 0

    def source():
        for number in range(40):
            waiting.append(number)
            yield number

    for taken, number in enumerate(through(source(), lambda items: (item + 1 for item in items), size=2)):
        assert number == taken + 1
        inside = len(waiting) - taken
        most = max(most, inside)
        time.sleep(0.001)
    assert most <= 9


@pytest.mark.parametrize("place", ["source", "first", "second"])
def test_an_exception_in_a_worker_ends_the_run_and_its_threads(place):
    def fails(where, items):
        for number, item in enumerate(items):
            if number == 5 and where == place:
                raise InputError(f"broken in the {where}")
            yield item

    before = threading.active_count()
    stages = [lambda items, where=where: fails(where, items) for where in ("first", "second")]
    with pytest.raises(InputError, match=f"broken in the {place}"):
        list(through(fails("source", iter(range(100))), *stages, size=2))
    running = through(iter(range(100)), *stages[:0], size=2)
    next(running)
    running.close()
    assert threading.active_count() == before


def test_dropped_frames_are_held_so_that_none_is_missing(toy):
    class Slow(Toy):
        def __call__(self, x, t, cond):
            time.sleep(0.03)
            return super().__call__(x, t, cond)

    clip = Clip.from_tensor(pictures(30), rate=200)
    source = LiveSource(clip.source, lambda: Stream(Slow(), "a", Settings(t_index=FOUR)), "slow", drop=True, queue=1)
    made = list(source.frames())
    assert [frame.time for frame in made] == list(clip.times)
    assert 5 < source.report.dropped < 28
    assert source.report.frames == 30


# --- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "told"), [
    ({"t_index": (45, 32)}, r"--t-index must ascend and stay below 50; got 45,32"),
    ({"t_index": (32, 50)}, r"--t-index must ascend and stay below 50; got 32,50"),
    ({"t_index": ()}, "got nothing"),
    ({"t_index": (32, 32)}, "must ascend"),
    ({"guidance": "half"}, "--guidance half: this must be one of none, self, onetime, full"),
    ({"from_noise": True, "guidance": "self"}, "use onetime"),
    ({"similar": 1.5}, "--similar 1.5"),
    ({"blend": 1.0}, "--temporal-blend 1"),
    ({"ramp": -1}, "--prompt-ramp -1"),
])  # fmt: skip
def test_settings_that_cannot_be(wrong, told):
    with pytest.raises(InputError, match=told):
        Settings(**wrong)


def test_requests_that_cannot_be(toy, monkeypatch):
    clip = Clip.from_tensor(pictures(3))
    for told, call in {
        "one of them says": lambda: live(clip, "a", t_index=(3,), strength=0.5),
        "--strength 2": lambda: live(clip, "a", strength=2),
        "only 6 steps are left": lambda: live(clip, "a", strength=0.1, steps=8),
        "no setting wide": lambda: live(clip, "a", wide=1),
        "sequential skips no frames": lambda: live(clip, "a", "sequential", similar=0.9),
        "the first frame has none": lambda: live(clip, {3: "a"}),
        "bytes that are no text": lambda: live(clip, "a\udcff"),
        "--queue 0": lambda: live(clip, "a", queue=0),
        '--then "blue"': lambda: parse_prompts("a", ["blue"]),
        '--then "0: b"': lambda: parse_prompts("a", ["0: b"]),
    }.items():
        with pytest.raises(InputError, match=told):
            call()
    monkeypatch.setattr(toy, "needs_image", True, raising=False)
    with pytest.raises(InputError, match="makes video from a picture"):
        live(clip, "a")
    assert parse_prompts("a", ["12: b"]) == {0: "a", 12: "b"}


def test_strengths():
    assert indices(1.0, 4) == (0, 16, 33, 49)
    assert indices(0.5, 2) == (24, 49)
    assert indices(0.01, 1) == (48,)


def test_notes_say_what_to_expect(caplog):
    with caplog.at_level(logging.INFO, "frameloom"):
        Stream(open_generator("digits-16"), "3", Settings(guidance="full"))
        assert "was not distilled; expect blur below 20 steps" in caplog.text
        assert "--guidance full without --negative" in caplog.text
        caplog.clear()
        stream = Stream(Toy(), "a", Settings(t_index=FOUR))
    assert not caplog.text
    assert stream.boundary


def test_frames_of_another_size_begin_anew_and_none_is_lost(caplog):
    stream = Stream(Toy(), "a", Settings(t_index=(5, 20, 40)))
    first, second = pictures(5), pictures(4, seed=1, height=8, width=12)
    out = [stream.push(frame) for frame in [*first, *second]]
    assert "frame 5 is 12x8 after 6x4: the stream begins anew" in caplog.text
    out = [frame for frame in out if frame is not None] + stream.flush()
    alone = [frame for frames in (first, second) for frame in _alone(frames)]
    assert len(out) == 9
    assert stream.report.launches == 5 + 2 + 4 + 2
    assert torch.allclose(torch.stack(out), torch.stack(alone), atol=1e-5)


def _alone(frames):
    stream = Stream(Toy(), "a", Settings(t_index=(5, 20, 40)))
    return [made for frame in frames if (made := stream.push(frame)) is not None] + stream.flush()


def test_from_noise_the_input_does_not_matter():
    settings = Settings(t_index=(0, 20), guidance="onetime", from_noise=True)
    first, second = (latents(Stream(Toy(), "a", settings), pictures(4, seed=seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert float((first[0] - first[1]).abs().max()) > 1e-3
    assert torch.allclose(first, latents(Sequential(Toy(), "a", settings), pictures(4)), atol=1e-4)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    log = logging.getLogger("frameloom")
    monkeypatch.setattr(log, "propagate", log.propagate)
    monkeypatch.setattr(log, "handlers", log.handlers)
    source = make(tmp_path / "in.mp4", moving(8, 32, 48), rate=12)
    out = tmp_path / "out.mp4"

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["frameloom", "live", str(source), str(out), *flags])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    given = ("--weights", "digits-16", "--prompt", "3")
    code, said, told = run(*given, "--then", "4: 5", "--t-index", "20,32", "--json")
    assert code == 0, told
    facts = json.loads(said)
    assert (facts["frames"], facts["launches"], facts["evaluations"]) == (8, 9, 16)
    assert "streamdiffusion with digits-16 on cpu, steps 20,32 of 50, guidance none, 1 frames behind" in told
    assert len(read(out)) == 8
    out.unlink()
    for flags, line in {
        ("--t-index", "45,32"): "--t-index must ascend and stay below 50; got 45,32",
        ("--t-index", "a"): "--t-index a: whole numbers separated by commas",
        ("--prompt", "eleven"): 'digits-16 does not know "eleven"',
        ("--drop", "--resume"): "--resume: what --drop leaves out depends on the clock",
        ("--guidance", "self", "--from-noise"): "use onetime",
    }.items():
        code, said, told = run(*given, *flags)
        assert (code, said) == (2, "")
        assert told.splitlines()[-1].startswith("frameloom: ")
        assert line in told.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
