"""The detector against the world's own clips, and against clips that are wrong in one known way."""

import re

import pytest
import torch
import torch.nn.functional as F

from frameloom.errors import InputError
from frameloom.world import World
from frameloom.world.detector import COLOUR_NAMES, WORDS, Wanted, _studios, detect, parse_caption, period, score, seam

CLIPS = 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toys(count, side=32, clips=CLIPS, frames=16, first=910_000):
    world = World("toys", range(first, first + clips), frames, size=side, count=count)
    return world.render(side, side, supersample=2)["rgb"], world.captions()


@pytest.fixture(scope="module")
def one():
    return toys(1)


@pytest.fixture(scope="module")
def two():
    return toys(2)


@pytest.fixture(scope="module")
def both(one, two):
    return torch.cat([one[0], two[0]]), one[1] + two[1]


def blurred(video, size):
    return F.avg_pool2d(video.flatten(0, 1), size, 1, size // 2, count_include_pad=False).view_as(video)


def empty(video):
    """The clips without their shapes."""
    nearest = [min(_studios(32, 32), key=lambda studio: float((clip - studio).abs().median())) for clip in video]
    return torch.stack(nearest)[:, None].expand_as(video)


def noisy(video, deviation):
    grain = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    return (video + deviation * grain).clamp(0, 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a large red ball rolls left", [Wanted("large", "red", "ball", "left")]),
        ("a small yellow capsule sinks", [Wanted("small", "yellow", "capsule", "down")]),
        (
            "a small red box slides right behind a large blue ball",
            [Wanted("small", "red", "box", "right", "behind"), Wanted("large", "blue", "ball")],
        ),
        (
            "a small red box slides right in front of a large blue ball that rises and a small green box stands still",
            [
                Wanted("small", "red", "box", "right", "in front of"),
                Wanted("large", "blue", "ball", "up"),
                Wanted("small", "green", "box"),
            ],
        ),
    ],
)
def test_a_caption_is_read(text, wanted):
    assert parse_caption(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog barks",
        "a red ball rolls left",
        "a small red ball",
        "a small red box slides right behind",
        "a small red box rises and a small green ball",
        "a small red box slides towards the camera",
    ],
)
def test_what_the_world_does_not_say_is_refused_in_one_line(text):
    with pytest.raises(InputError, match="caption") as caught:
        parse_caption(text)
    assert "\n" not in str(caught.value)


def test_every_caption_of_the_world_is_read():
    for world in (World("toys", range(60), frames=2, count=count) for count in (1, 2)):
        for scene, text in zip(world.scenes, world.captions(), strict=True):
            bodies = {(body.size, body.colour, body.word, body.moves) for body in scene.bodies[1:]}
            assert {(want.size, want.colour, want.word, want.moves) for want in parse_caption(text)} == bodies


def test_true_clips_of_one_shape_are_right(one):
    found = score(*one)
    assert min(found[name] for name in ("identity", "identity_clip", "shape", "colour_set", "direction")) >= 0.97
    assert found["background"] == 1
    assert found["flicker"] < 1e-4
    assert found["jitter"] < 0.3
    assert 0.7 < found["speed_ratio"] < 1.3
    assert abs(found["drift"]) < 0.03


def test_true_clips_of_two_shapes_are_right_where_both_are_seen(two):
    found = score(*two)
    assert min(found[name] for name in ("identity", "identity_clip", "shape", "colour_set", "direction")) >= 0.97


def test_sixteen_pixels_are_enough_for_one_shape():
    found = score(*toys(1, side=16))
    assert min(found[name] for name in ("identity", "colour_set", "direction")) >= 0.95


def test_coverage_and_centroid_are_those_of_the_masks(one):
    world = World("toys", range(910_000, 910_000 + CLIPS), count=1)
    masks = world.render(128, 128, ("masks",))["masks"][:, :, 1]
    true = F.avg_pool2d(masks, 4)
    found = detect(one[0])
    colour = [COLOUR_NAMES.index(parse_caption(text)[0].colour) for text in one[1]]
    rows = torch.arange(CLIPS)
    assert (found.coverage[rows, :, colour] - true).abs().sum((-2, -1)).div(true.sum((-2, -1))).mean() < 0.08
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    middle = torch.stack([(true * x).sum((-2, -1)), (true * y).sum((-2, -1))], -1) / true.sum((-2, -1))[..., None]
    assert (found.centroid[rows, :, colour] - middle).norm(dim=-1).max() < 0.5
    word = torch.tensor([WORDS.index(parse_caption(text)[0].word) for text in one[1]])
    assert (found.overlap[rows, :, colour].argmax(-1) == word[:, None]).float().mean() > 0.97


def test_captions_of_other_clips_are_wrong(both):
    video, captions = both
    other = captions[3:CLIPS] + captions[:3] + captions[CLIPS + 3 :] + captions[CLIPS : CLIPS + 3]
    found = score(video, other)
    assert found["identity"] < 0.25
    assert found["direction"] < 0.25
    assert found["colour_set"] < 0.4


@pytest.mark.parametrize(
    ("words", "swapped", "measure"),
    [
        (("left", "right"), ("right", "left"), "direction"),
        (("rises", "sinks"), ("sinks", "rises"), "direction"),
        (("ball", "box"), ("box", "ball"), "identity"),
        (("red", "orange", "yellow"), ("orange", "yellow", "red"), "colour_set"),
    ],
)
def test_one_wrong_word_is_found_out(one, words, swapped, measure):
    named = [k for k, text in enumerate(one[1]) if any(f" {word}" in f" {text}" for word in words)]
    change = dict(zip(words, swapped, strict=True))
    wrong = [" ".join(change.get(word, word) for word in one[1][k].split()) for k in named]
    assert named
    assert score(one[0][named], wrong)[measure] < 0.05


def test_backwards_and_still_clips_move_wrongly_and_keep_their_shapes(both):
    video, captions = both
    backwards, still = score(video.flip(1), captions), score(video[:, 8:9].expand_as(video), captions)
    assert backwards["direction"] == 0
    assert backwards["identity"] > 0.95
    assert still["direction"] == 0
    assert still["speed_ratio"] < 0.02
    assert still["jitter"] < 0.01


def test_shuffled_frames_are_jittery(one):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert score(one[0][:, order], one[1])["jitter"] > 5 * score(*one)["jitter"]


def test_blur_and_noise_cost_little_by_little(both):
    video, captions = both[0][::2], both[1][::2]
    for worse in ((blurred(video, 3), blurred(video, 7)), (noisy(video, 0.05), noisy(video, 0.25))):
        little, much = (score(clip, captions) for clip in worse)
        assert little["identity"] > 0.75
        assert little["direction"] > 0.85
        assert much["identity"] < little["identity"] - 0.2
    assert score(noisy(video, 0.05), captions)["flicker"] > 0.03


def test_an_object_that_fades_is_drift_and_no_excuse(one):
    video, captions = one
    share = torch.linspace(-1, 1, 16).clamp(min=0)[None, :, None, None, None]
    found = score(torch.lerp(video, empty(video), share), captions)
    assert found["drift"] < -0.4
    assert found["identity"] < 0.9


def test_a_second_object_that_is_missing_is_found_out(one):
    extra = [f"{text} and a small {'blue' if 'blue' not in text else 'red'} ball stands still" for text in one[1]]
    found = score(one[0], extra)
    assert found["identity"] == found["identity_clip"] == found["colour_set"] == 0
    assert 0.4 < found["shape"] < 0.6


def test_an_object_that_nobody_named_is_found_out(two):
    found = score(two[0], [re.split(" and | behind | in front of ", text)[0] for text in two[1]])
    assert found["colour_set"] == 0
    assert found["shape"] > 0.9


def test_another_place_is_no_studio(one):
    assert score((one[0] * 0.8 + 0.02), one[1])["background"] == 0


@pytest.mark.parametrize("shape", [(1, 1, 3, 32, 32), (1, 2, 3, 16, 16), (2, 20, 3, 16, 24)])
def test_grey_holds_nothing_at_any_size(shape):
    found = score(torch.full(shape, 0.5), ["a small red ball rolls left"] * shape[0])
    assert set(found.values()) == {0.0}


def test_what_is_no_picture_at_all_does_not_stop_it():
    video = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 3 - 1
    video[0, 0] = torch.nan
    found = score(video, ["a small red ball rolls left", "a large blue box rises"])
    assert found["identity"] < 0.3
    assert all(value == value for value in found.values())


def test_a_cut_is_a_seam_and_a_smooth_clip_has_none():
    video, _ = toys(1, clips=4, frames=32)
    assert 0.7 < seam(video, [16]) < 1.4
    jump = torch.cat([video[:, :16], video.roll(1, 0)[:, 16:]], 1)
    assert seam(jump, [16]) > 5


def test_a_loop_has_its_period_and_an_even_pace_has_none(one):
    loop = one[0][:4].repeat(1, 4, 1, 1, 1)
    assert period(loop, 16) > 0.8
    assert period(loop, 11) < 0.3
    assert abs(period(toys(1, clips=4, frames=48)[0], 16)) < 0.4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: score(torch.zeros(2, 4, 3, 16, 16), ["a small red ball rises"]), "2 clips need as many captions"),
        (lambda: seam(torch.zeros(1, 4, 3, 8, 8), [4]), "between 1 and 3"),
        (lambda: seam(torch.zeros(1, 2, 3, 8, 8), [1]), "nothing to compare"),
        (lambda: period(torch.zeros(1, 8, 3, 16, 16), 7), "lag 7"),
    ],
)
def test_mistakes_are_answered_in_one_line(act, message):
    with pytest.raises(InputError, match=message):
        act()
