"""Words, sounds and joints of the world against its masks, pictures and trajectories."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from frameloom.world import BONES, JOINTS, KINDS, RATE, VOCABULARY, World
from frameloom.world.scene import COLOURS
from frameloom.world.sound import envelope

SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
H, W = 64, 64
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(world, b=0):
    return {asked.question: asked.answer for asked in world.questions()[b]}


def hue_name(rgb):
    """The named colour whose hue is nearest to that of the brightest half of some pixels (n, 3)."""
    bright = rgb[rgb.sum(-1) >= rgb.sum(-1).median()].mean(0)
    hue = colorsys.rgb_to_hsv(*bright.tolist())[0]
    apart = {name: abs((hue - colorsys.rgb_to_hsv(*colour)[0] + 0.5) % 1 - 0.5) for name, colour in COLOURS.items()}
    return min(apart, key=apart.get)


def direction(found, k):
    """What the trajectory of body k shows: the displacement of its depth, or else of its picture."""
    dx, dy = (found["points"][0, -1, k] - found["points"][0, 0, k]).tolist()
    away = float(found["depths"][0, -1, k] - found["depths"][0, 0, k])
    if abs(away) > 0.5:
        return "away from the camera" if away > 0 else "towards the camera"
    if max(abs(dx), abs(dy)) < 0.5:
        return "it does not move"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_in_the_vocabulary(kind):
    world = World(kind, range(40))
    texts = [*world.captions(), *(event.text for events in world.events() for event in events)]
    texts += [text for asked in world.questions() for question in asked for text in question]
    assert {word for text in texts for word in text.split()} <= set(VOCABULARY)
    for events in world.events():
        assert all(0 <= event.start < event.stop <= 16 for event in events)


@settings(FEW, max_examples=15)
@given(seed=SEEDS)
def test_answers_about_objects_are_true_of_masks_and_trajectories(seed):
    world = World("objects", [seed])
    made, found = world.render(H, W, ("rgb", "masks")), world.trajectories(H, W)
    seen = [k for k in range(1, 4) if made["masks"][0, :, k].sum(dim=(1, 2)).max() >= 4]
    asked = answers(world)
    assert asked["how many objects are there"] == NUMBERS[len(seen)]
    nearest = {}
    for k in seen:
        body = world.scenes[0].bodies[k]
        best = made["masks"][0, :, k].sum(dim=(1, 2)).argmax()
        pixels = made["rgb"][0, best].permute(1, 2, 0)[made["masks"][0, best, k] > 0]
        colour = hue_name(pixels)
        assert asked[f"what shape is the {colour} object"] == body.word
        assert asked[f"which way does the {colour} {body.word} move"] == direction(found, k)
        nearest[f"the {colour} {body.word}"] = float(found["depths"][0, 0, k])
    for question, answer in asked.items():
        if question.startswith("which is nearer"):
            pair = question.removeprefix("which is nearer at the start ").split(" or ")
            assert answer == min(pair, key=nearest.get)


@settings(FEW, max_examples=15)
@given(seed=SEEDS)
def test_captions_name_each_object_once_with_its_size_and_way(seed):
    world = World("objects", [seed])
    caption, found = world.captions()[0], world.trajectories(H, W)
    names = [body.full_name for body in world.scenes[0].bodies[1:]]
    assert sum(caption.count(f"a {name}") for name in names) == len(names)
    verbs = {"up": "rises", "down": "sinks", "it does not move": "stands still"}
    for k, name in enumerate(names, 1):
        way = direction(found, k)
        clause = caption.split(f"a {name}")[1].split(" and a ")[0]
        if way != "it does not move":
            assert verbs.get(way, way) in clause
        height = float(found["boxes"][0, 0, k, 3] - found["boxes"][0, 0, k, 1]) * float(found["depths"][0, 0, k])
        assert ("large" in name) == (height > 2 * 0.51 * world.scenes[0].focal * H)


def test_passing_behind_hides_part_of_the_one_behind():
    checked = 0
    for seed in range(60):
        world = World("objects", [seed])
        events = [event for event in world.events()[0] if " passes " in event.text]
        if not events:
            continue
        found, masks = world.trajectories(H, W), world.render(H, W, ("masks",))["masks"][0]
        names = [""] + [body.name for body in world.scenes[0].bodies[1:]]
        for event in events:
            where = "behind" if "behind" in event.text else "in front of"
            mover, other = event.text.removeprefix("the ").split(f" passes {where} the ")
            i, j = names.index(mover), names.index(other)
            middle = (event.start + event.stop - 1) // 2
            behind = i if where == "behind" else j
            front = j if where == "behind" else i
            assert found["depths"][0, middle, behind] > found["depths"][0, middle, front]
            dx = found["points"][0, :, i, 0] - found["points"][0, :, j, 0]
            assert dx[0] * dx[-1] < 0
            # Some pixel in the box of the hidden one shows the other at an instant of the event.
            hidden = 0
            for t in range(event.start, event.stop):
                x0, y0, x1, y1 = found["boxes"][0, t, behind].round().int().tolist()
                hidden += masks[t, front, y0:y1, x0:x1].sum()
            assert hidden > 0
            checked += 1
    assert checked >= 5


@FEW
@given(seed=SEEDS)
def test_objects_start_and_stop_when_events_say(seed):
    world = World("objects", [seed], frames=24, fps=12)
    found = world.trajectories(H, W)["centres"][0]
    names = [""] + [body.name for body in world.scenes[0].bodies[1:]]
    speed = found.diff(dim=0).norm(dim=-1)
    for event in world.events()[0]:
        if event.text.endswith("stops"):
            k = names.index(event.text.removeprefix("the ").removesuffix(" stops"))
            assert speed[event.start + 1 :, k].max() < 1e-3 if event.start + 1 < 23 else True
            assert speed[: event.start, k].max() > 0.01
        if event.text.endswith("starts to move"):
            k = names.index(event.text.removeprefix("the ").removesuffix(" starts to move"))
            assert speed[: event.start - 1, k].sum() < 1e-3
            assert speed[event.start :, k].max() > 0.01


@settings(FEW, max_examples=10)
@given(seed=SEEDS)
def test_impacts_sound_when_the_ball_meets_something(seed):
    fps, frames = 16, 48
    world = World("bounce", [seed], frames=frames, fps=fps)
    wave, contacts = world.sound()
    assert wave.shape == (1, frames * RATE // fps)
    step = RATE // 200
    power = wave[0].unfold(0, 2 * step, step).square().mean(-1)
    onset = torch.relu(power[1:] - power[:-1])
    centres = world.trajectories(H, W)["centres"][0, :, 1]
    bodies = world.scenes[0].bodies
    alone = [c for c in contacts[0] if sum(abs(c - other) < 4 for other in contacts[0]) == 1 and 2 < c < frames - 3]
    assert contacts[0]
    for contact in alone:
        window = onset[(contact - 3) * 200 // fps : (contact + 3) * 200 // fps]
        peak = (int(window.argmax()) + 1) / 200 + (contact - 3) / fps
        assert abs(peak * fps - contact) <= 1
        # At a contact the ball is on the ground, or turns back at the box.
        low = centres[contact, 1] - bodies[1].radius
        turned = (centres[contact + 1, 0] - centres[contact, 0]) * (centres[contact, 0] - centres[contact - 1, 0])
        assert low <= centres[contact - 3 : contact + 4, 1].min() - bodies[1].radius + 0.25 or turned <= 0
    hits = answers(world).get("how many times does the ball hit the ground")
    if hits is not None:
        assert hits == NUMBERS[sum("hits the ground" in event.text for event in world.events()[0])]
        fine = World("bounce", [seed], frames=frames * 8, fps=fps * 8)
        height = fine.trajectories(H, W)["centres"][0, :, 1, 1]
        minima = (height[1:-1] < height[:-2]) & (height[1:-1] <= height[2:])
        assert abs(int(minima.sum()) - NUMBERS.index(hits)) <= 1


@FEW
@given(seed=SEEDS)
def test_the_mouth_is_open_as_far_as_the_voice_is_loud(seed):
    world = World("talk", [seed], frames=32, fps=16)
    area = world.render(96, 96, ("masks",))["masks"][0, :, 2].sum(dim=(1, 2)).numpy()
    loudness = envelope(world.sound()[0][0].double().numpy())[(world.times * RATE).astype(int)]
    assert np.corrcoef(area, loudness)[0, 1] > 0.9


def test_the_mouth_follows_a_given_voice():
    time = np.arange(2 * RATE) / RATE
    voice = np.sin(2 * np.pi * 200 * time) * (time > 1)
    world = World("talk", [0], frames=16, fps=8, voice=[voice])
    area = world.render(96, 96, ("masks",))["masks"][0, :, 2].sum(dim=(1, 2))
    assert area[9:].min() > 2 * area[:7].max()
    torch.testing.assert_close(world.sound()[0][0], torch.from_numpy(voice).float())
    assert [event.text for event in world.events()[0]] == ["the person is silent", "the person talks"]


@FEW
@given(seed=SEEDS)
def test_joints_in_the_picture_are_the_projection_of_those_in_the_world(seed):
    world = World("figure", [seed], frames=5)
    space, picture = world.joints(H, W, views=2, arc=40)
    intrinsics, poses = world.cameras(H, W, views=2, arc=40)
    homogeneous = torch.cat([space, torch.ones_like(space[..., :1])], -1)
    camera = torch.einsum("bvtij,btkj->bvtki", torch.linalg.inv(poses)[..., :3, :], homogeneous)
    pixels = torch.einsum("bij,bvtkj->bvtki", intrinsics, camera)
    torch.testing.assert_close(pixels[..., :2] / pixels[..., 2:], picture, atol=1e-3, rtol=0)
    masks = world.render(H, W, ("masks",), views=2, arc=40)["masks"][0, :, :, 1]
    x, y = picture[0].long().unbind(-1)
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    v, t = torch.meshgrid(torch.arange(2), torch.arange(5), indexing="ij")
    on = masks[v[..., None], t[..., None], y.clamp(0, H - 1), x.clamp(0, W - 1)] > 0
    assert (on | ~inside).float().mean() > 0.97
    assert inside.any()


def test_bones_keep_their_length():
    space = World("figure", range(9), frames=12).joints(H, W)[0]
    for a, b in BONES:
        length = (space[:, :, JOINTS.index(a)] - space[:, :, JOINTS.index(b)]).norm(dim=-1)
        assert (length - length[:, :1]).abs().max() < 1e-4


def test_a_walker_goes_where_the_caption_says():
    world = World("figure", range(20))
    points = world.trajectories(H, W)["points"][:, :, 1, 0]
    for caption, x in zip(world.captions(), points, strict=True):
        if "walks" in caption:
            assert ("right" in caption) == bool(x[-1] > x[0])
        else:
            assert abs(float(x[-1] - x[0])) < 1


def test_a_flying_camera_turns_where_the_caption_says():
    world = World("flyover", range(6), frames=24)
    _, poses = world.cameras(H, W)
    for b, caption in enumerate(world.captions()):
        right, forward = poses[b, 0, :3, 0], poses[b, -1, :3, 2]
        assert ("right" in caption) == bool(right @ forward > 0)
