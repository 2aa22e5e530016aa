"""NIRVANA: its parts as published, chains of groups that decode by themselves, and what is refused."""

import logging
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frameloom.bitstream.container import Container, parse
from frameloom.bitstream.entropy import rounded
from frameloom.bitstream.nearby import LIMIT, pack_nearby, spike_table, unpack_nearby
from frameloom.bitstream.varint import pack_numbers, unpack_numbers
from frameloom.errors import InputError
from frameloom.metrics import psnr
from frameloom.tasks.compression.base import compress, decompress
from frameloom.tasks.compression.fit import State
from frameloom.tasks.compression.framing import grouped
from frameloom.tasks.compression.nirvana import FREQUENCY, Config, Nirvana, centres, read_index
from frameloom.video.clip import Clip

SMALL = Config(patch=8, hidden=12, channels=4)
QUICK = {"patch": 8, "hidden": 12, "channels": 4, "iterations": 40, "later": 10}


def moving(frames: int = 7, height: int = 28, width: int = 45, speed: int = 2) -> Clip:
    """A smooth random texture that slides by."""
    noise = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(noise, size=(height + 8, width + 32), mode="bicubic").clamp(0, 1)[0]
    views = [texture[:, :height, speed * k : speed * k + width] for k in range(frames)]
    return Clip.from_tensor((torch.stack(views) * 255).round().to(torch.uint8), 25)


def two_scenes(cut: int = 4, frames: int = 9) -> Clip:
    """Two textures, of different colours."""
    chance = torch.Generator().manual_seed(1)
    fine = torch.rand(2, 3, 64, 64, generator=chance)
    tint = torch.tensor([[0.2, 0.9, 0.2], [0.9, 0.2, 0.4]])[:, :, None, None]
    return Clip.from_tensor((fine * tint * 255).byte()[(torch.arange(frames) >= cut).long()])


def network(config: Config = SMALL) -> Nirvana:
    torch.manual_seed(0)
    return Nirvana(config)


@pytest.fixture(scope="module")
def fitted() -> bytes:
    """Groups of 3, 3, 3 and 1 frames; the first and the last are key groups."""
    return Nirvana.encode(moving(10), key=3, **QUICK)


def test_the_networks_have_their_sizes():
    with torch.device("meta"):
        paper = Nirvana(Nirvana.preset("paper"))
    shapes = [tuple(one.latent.shape) for name, one in paper.coded() if name.endswith("weight")]
    assert shapes == [(512, 2), (512, 512), (4096, 512), (96, 16, 3, 3), (9, 8, 3, 3)]
    assert sum(one.latent.numel() for _, one in paper.coded()) == paper.config.parameters == 2_380_017
    tiny = network(Nirvana.preset("tiny"))
    assert sum(one.latent.numel() for _, one in tiny.coded()) == tiny.config.parameters


def test_the_parameters_do_not_grow_with_the_frame():
    same = network()
    for height, width in ((8, 8), (28, 45), (96, 64)):
        assert same.pictures(height, width).shape == (3, 3, height, width)


def test_weights_start_where_a_sine_network_starts():
    made = network(Nirvana.preset("paper"))
    for layer, bound, reach in zip(made.stem, (1 / 2, math.sqrt(6 / 512) / 30, math.sqrt(6 / 512) / 30), (200, 3, 3),
                                   strict=True):  # fmt: skip
        weight = layer.weight().detach()
        assert weight.abs().max() == pytest.approx(bound, rel=1e-6)
        assert weight.abs().mean() == pytest.approx(bound / 2, rel=0.12)
        assert layer.weight.div == layer.weight.integers().abs().max() == reach
        assert layer.bias().abs().max() <= bound + 2**-8


def test_rounding_lets_the_gradient_through():
    x = torch.tensor([0.2, 1.7, -2.5], requires_grad=True)
    (rounded(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [1, 2, 3]
    made = network()
    weight = made.stem[1].weight
    weight().sum().backward()
    assert torch.allclose(weight.latent.grad, (weight.scale / weight.div).expand_as(weight.latent))
    assert torch.equal(weight().detach(), weight.latent.detach().round() * (weight.scale / weight.div).detach())


def test_div_is_the_largest_integer_or_1():
    weight = network().stem[1].weight
    weight.latent.data.mul_(4)
    weight.renew()
    assert weight.div == weight.latent.detach().abs().max().round()
    weight.latent.data.zero_()
    weight.renew()
    assert weight.div == 1
    assert not weight().any()


def test_a_frame_depends_on_what_all_share_and_on_its_own_code_alone():
    made = network()
    features, codes = made.features(torch.rand(5, 2)), made.frame_codes()
    whole = made.draw(features, codes)
    for frame in range(3):
        other = codes.clone()
        other[frame] += 1
        changed = (made.draw(features, other) != whole).flatten(2).any(-1).any(0)
        assert changed.tolist() == [k == frame for k in range(3)]


def test_frames_are_told_apart_as_published():
    codes = network().frame_codes()
    assert torch.allclose(
        codes[2],
        torch.tensor(
            [
                2.0,
                2.0,
                0.02,
                0.02,
            ]
        )
        .add(torch.tensor([0, math.pi / 2] * 2))
        .sin(),
    )
    assert torch.equal(codes[0], torch.tensor([0.0, 1, 0, 1]))


def test_stems_are_sines_of_thirty_times_and_read_patch_centres():
    made = network()
    at = centres(2, 4)
    assert at.tolist()[:2] == [[-0.75, -0.5], [-0.25, -0.5]]
    assert at[:, 0].max() == 0.75
    hidden = torch.sin(FREQUENCY * made.stem[0](at))
    expected = made.stem[2](torch.sin(FREQUENCY * made.stem[1](hidden))).reshape(8, 4, 4, 4)
    assert torch.equal(made.features(at), expected)


def test_a_bit_is_priced_by_its_distance_from_what_the_file_has():
    made = network()
    whole = made.integers()
    made.relate_to(whole, anew=True)
    torch.manual_seed(0)
    near = sum(float(one.bits().detach()) for _, one in made.coded())
    made.relate_to([run + 5 for run in whole], anew=True)
    assert sum(float(one.bits().detach()) for _, one in made.coded()) > 4 * near


@pytest.mark.parametrize("spread", [0, 0.02, 1, 30, 800])
def test_integers_near_others_come_back_and_cost_about_their_entropy(spread):
    chance = np.random.default_rng(0)
    before = [chance.integers(-900, 900, 20_000), chance.integers(-3, 4, 50)]
    runs = [np.clip(run + np.round(chance.laplace(0, spread, run.shape)).astype(int), -LIMIT, LIMIT) for run in before]
    data = pack_nearby(runs, before)
    assert all(map(np.array_equal, unpack_nearby(data, [20_000, 50], before), runs))
    counts = np.unique(runs[0] - before[0], return_counts=True)[1] / 20_000
    entropy = -(counts * np.log2(counts)).sum()
    assert len(data) < 1.03 * max(entropy, 0) * 20_000 / 8 + 60 or spread == 800
    assert len(data) < 2.05 * 20_000
    alone = pack_nearby(runs, None)
    assert all(map(np.array_equal, unpack_nearby(alone, [20_000, 50], None), runs))


def test_tables_of_spikes_are_tables():
    for zero, ratio, reach in ((1, 0, 1), (65_535, 65_535, LIMIT), (30_000, 40_000, 7)):
        table = spike_table(zero, ratio, reach)
        assert len(table) == 2 * reach + 1
        assert table.sum() == 1 << 16
        assert table.min() >= 1
        rest = np.delete(table, table.argmax())
        assert (np.diff(rest[-reach + 1 :]) <= 0).all() or reach == 1


def test_integers_too_large_are_said():
    with pytest.raises(ValueError, match="2047"):
        pack_nearby([np.array([LIMIT + 1])], None)


def test_a_fit_learns_the_clip_and_later_groups_go_on_from_it():
    clip = moving(6)
    truth = clip.tensor()
    back = decompress(Nirvana.encode(clip, **QUICK | {"iterations": 120})).tensor()
    short = decompress(Nirvana.encode(clip[:3], **QUICK | {"iterations": 2})).tensor()
    anew = decompress(Nirvana.encode(clip[3:], **QUICK | {"iterations": 10})).tensor()
    assert psnr(back[:3], truth[:3]) > psnr(short, truth[:3]) + 6
    assert psnr(back[3:], truth[3:]) > psnr(anew, truth[3:]) + 2


def test_a_frame_that_stands_still_costs_little():
    still = Clip.from_tensor(moving(1).bytes_tensor().expand(6, -1, -1, -1))
    settings = QUICK | {"iterations": 120, "later": 20, "rate_weight": 1e-2}
    first, rest = [one["bytes"] for one in Nirvana.inspect(Nirvana.encode(still, **settings))["groups"]]
    _, moved = [one["bytes"] for one in Nirvana.inspect(Nirvana.encode(moving(6), **settings))["groups"]]
    assert rest < 0.75 * moved
    assert rest < first / 4


def test_a_quality_that_is_there_ends_a_group():
    still = Clip.from_tensor(moving(1).bytes_tensor().expand(6, -1, -1, -1))
    steps = []
    data = Nirvana.encode(
        still, **QUICK | {"iterations": 300}, quality=15.0, progress=lambda *call: steps.append(call[0])
    )
    assert set(steps) == {"group 1 of 2"}
    assert len(steps) < 300
    assert psnr(decompress(data).tensor(), still.tensor()) > 14.99
    assert Nirvana.inspect(data)["groups"][1]["bytes"] < 60


def test_the_encoders_network_is_the_files():
    clip = moving(3)
    made = network()
    target = clip.tensor()
    made.relate_to(None, anew=True)
    made.fit(target, steps=20)
    payload = made.to_payload(None)
    again = network(replace(SMALL))
    integers = again.read(payload, None)
    again.load(payload, integers)
    assert all(map(np.array_equal, integers, made.integers()))
    for (_, one), (_, other) in zip(made.coded(), again.coded(), strict=True):
        assert torch.equal(one(), other())
    assert torch.equal(made.pictures(28, 45), again.pictures(28, 45))
    assert torch.allclose(again.render(28, 45, (0, 0, 45, 28)), made.pictures(28, 45).detach().clamp(0, 1), atol=1e-5)


DECODE = """
import sys, torch
from frameloom.tasks.compression.nirvana import Nirvana
data = open(sys.argv[1], "rb").read()
torch.save([torch.stack(list(Nirvana.decode(data, frames))) for frames in (None, [5, 0, 3])], sys.argv[2])
"""


def test_a_fresh_process_decodes_the_same_bits_whole_or_in_part(tmp_path, fitted):
    file, out = tmp_path / "clip.flm", tmp_path / "frames.pt"
    file.write_bytes(fitted)
    here = torch.stack(list(Nirvana.decode(fitted)))
    assert here.shape == (10, 3, 28, 45)
    # Two threads there, one here.
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", DECODE, str(file), str(out)], check=True, cwd=tmp_path, env=environment)
    everything, some = torch.load(out, weights_only=True)
    assert torch.equal(everything, here)
    assert torch.equal(some, here[[5, 0, 3]])


def test_any_frames_in_any_order_are_bitwise_those_of_the_whole(fitted):
    whole = torch.stack(list(Nirvana.decode(fitted)))
    for chosen in ([9], [7], [4, 0, 0, 8, 2], [5, 7, 9], range(1, 10, 3)):
        assert torch.equal(torch.stack(list(Nirvana.decode(fitted, chosen))), whole[list(chosen)])
    assert torch.equal(decompress(fitted)[2:5].tensor(), whole[2:5])


@pytest.mark.parametrize("region", [(0, 0, 45, 28), (9, 3, 1, 1), (7, 8, 20, 16), (40, 24, 5, 4), (0, 27, 45, 1)])
def test_a_region_is_bitwise_the_crop_of_the_whole(fitted, region):
    x, y, w, h = region
    whole = torch.stack(list(Nirvana.decode(fitted)))[..., y : y + h, x : x + w]
    assert torch.equal(torch.stack(list(Nirvana.decode(fitted, region=region))), whole)


def test_a_region_draws_only_batches_that_it_touches(fitted, monkeypatch):
    calls = []
    forward = Nirvana.forward
    monkeypatch.setattr(Nirvana, "forward", lambda self, at: calls.append(len(at)) or forward(self, at))
    next(Nirvana.decode(fitted, [0]))
    assert calls == [16, 8]
    calls.clear()
    next(Nirvana.decode(fitted, [0], region=(0, 0, 8, 8)))
    assert calls == [16]


@pytest.mark.parametrize("region", [(0, 0, 46, 1), (-1, 0, 4, 4), (0, 0, 0, 4), (44, 27, 2, 1)])
def test_a_region_outside_the_frame_is_refused(fitted, region):
    with pytest.raises(InputError, match="the frame is 45x28"):
        next(Nirvana.decode(fitted, region=region))


def test_decoding_begins_at_the_last_key_group(fitted):
    container = parse(fitted)
    groups = read_index(container)
    assert [(one.key, one.first, one.frames) for one in groups] == [
        (True, 0, 3), (False, 3, 3), (False, 6, 3), (True, 9, 1)
    ]  # fmt: skip
    stored = bytearray(container.section("groups"))
    stored[: groups[3].start] = bytes(groups[3].start)
    spoilt = Container(container.header, container.sections | {"groups": bytes(stored)}).to_bytes()
    assert torch.equal(next(Nirvana.decode(spoilt, [9])), next(Nirvana.decode(fitted, [9])))
    with pytest.raises(InputError):
        next(Nirvana.decode(spoilt, [8]))


def test_the_file_is_its_header_and_its_groups(fitted):
    found = Nirvana.inspect(fitted)
    assert set(found["sections"]) == {"header", "groups", "index"}
    assert sum(section["bytes"] for section in found["sections"].values()) == len(fitted)
    assert sum(one["bytes"] for one in found["groups"]) == found["sections"]["groups"]["bytes"]


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 28, 45), (4, 5, 3), (2, 9, 64)])
def test_single_frames_odd_sizes_and_frames_below_a_patch(frames, height, width):
    clip = moving(frames, height, width)
    back = decompress(Nirvana.encode(clip, **QUICK)).tensor()
    assert back.shape == (frames, 3, height, width)
    assert psnr(back, clip.tensor()) > 12


def test_encoding_holds_one_group(monkeypatch):
    clip, alive = moving(9), []
    read = clip.source.frames

    def frames(start=0, stop=None):
        for number, frame in enumerate(read(start, stop)):
            alive.append(number)
            yield frame

    monkeypatch.setattr(clip.source, "frames", frames)
    seen = []
    Nirvana.encode(clip, **QUICK | {"iterations": 1, "later": 1}, progress=lambda *call: seen.append(len(alive)))
    assert seen == [4, 7, 9] or seen == [3, 6, 9]


def test_the_same_seed_gives_the_same_file_and_leaves_the_chance_of_others_alone(fitted):
    torch.manual_seed(5)
    again = Nirvana.encode(moving(10), key=3, **QUICK)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert again == fitted
    assert torch.equal(drawn, torch.rand(1))
    assert Nirvana.encode(moving(3), seed=1, **QUICK) != Nirvana.encode(moving(3), **QUICK)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [(1, 30), (2, 10), (4, 1)])
def test_a_killed_fit_goes_on_to_the_same_file(tmp_path, fitted, at):
    def stop(label, done, total):
        if label == f"group {at[0]} of 4" and done == at[1]:
            raise Killed

    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        Nirvana.encode(moving(10), key=3, state=State(path, "this", every=0.0), progress=stop, **QUICK)
    seen = []
    state = State(path, "this", resume=True)
    resumed = Nirvana.encode(moving(10), key=3, state=state, progress=lambda *call: seen.append(call[0]), **QUICK)
    assert resumed == fitted
    assert len(seen) < 70
    assert not [label for label in seen if int(label.split()[1]) < at[0]]


def test_a_cut_inside_a_group_is_noted_once(caplog):
    with caplog.at_level(logging.INFO, "frameloom"):
        sizes = [len(pictures) for pictures, _ in grouped(two_scenes(), 3, False)]
    assert sizes == [3, 3, 3]
    assert [record.message for record in caplog.records] == [
        "a cut at frame 4 lies inside a group; --split-on-cuts ends groups at cuts"
    ]


@pytest.mark.parametrize(("cut", "sizes", "begins"), [(4, [3, 1, 3, 2], 2), (6, [3, 3, 3], 2)])
def test_groups_end_at_cuts_when_asked(cut, sizes, begins):
    groups = list(grouped(two_scenes(cut), 3, True))
    assert [len(pictures) for pictures, _ in groups] == sizes
    assert [at_cut for _, at_cut in groups] == [k == begins for k in range(len(sizes))]
    data = Nirvana.encode(two_scenes(cut), split_on_cuts=True, **QUICK | {"iterations": 5, "later": 1})
    assert [one.key for one in read_index(parse(data))] == [k in (0, begins) for k in range(len(sizes))]
    assert len(list(Nirvana.decode(data))) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 30}, "--patch 30: the head needs a multiple of 4"),
        ({"patch": 0}, "--patch 0"),
        ({"group": 0}, "--group 0: a group has 1 to 64 frames"),
        ({"hidden": 0}, "--hidden 0"),
        ({"hidden": 1 << 20}, "of this size cannot be meant"),
        ({"size": 5000}, "--size 5000: nirvana's file follows from the video; use --rate-weight"),
        ({"iterations": 0}, "--iterations 0: it is 1 or more"),
        ({"later": -1}, "--later -1"),
        ({"key": -1}, "--key -1"),
        ({"minutes": 0.0}, "--minutes 0.0: it is above 0"),
        ({"rate_weight": -1.0}, "--rate-weight -1.0"),
        ({"quality": math.nan}, "--quality nan: a finite number"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
    ],
)
def test_settings_that_make_no_file_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Nirvana.encode(moving(), **QUICK | settings)


def test_a_fit_that_is_not_finite_names_the_layer():
    made = network()
    made.stem[1].weight.latent.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"not finite at step 1 \(layer stem.1.weight\)"):
        made.fit(moving(3).tensor(), steps=2)


def test_minutes_bound_the_whole_clip(tmp_path):
    report = compress(moving(), tmp_path / "out.flm", "nirvana", **QUICK | {"iterations": 100_000}, minutes=0.01)
    assert report.seconds < 5


def test_hostile_headers_are_refused_before_anything_is_allocated(fitted):
    container = parse(fitted)
    for change in (
        {"patch": 6}, {"patch": 4096}, {"patch": 8.0}, {"group": 65}, {"group": 2}, {"hidden": 4096, "channels": 4096},
        {"channels": 0}, {"groups": 0}, {"groups": 11}, {"groups": 2}, {"more": 1}, {"hidden": True},
    ):  # fmt: skip
        header = replace(container.header, config=container.header.config | change)
        with pytest.raises(InputError):
            list(Nirvana.decode(Container(header, container.sections).to_bytes()))
    large = replace(container.header, width=8192, height=8192, config=asdict(SMALL) | {"groups": 4, "group": 64})
    with pytest.raises(InputError, match="of this size cannot be meant"):
        Config.from_header(large)
    for numbers in ([2**40 + 1, 3], [1, 3, 0, 3, 0, 3, 0, 2], [0, 3, 0, 3, 0, 3, 0, 1]):
        bad = Container(container.header, container.sections | {"index": pack_numbers(numbers)}).to_bytes()
        with pytest.raises(InputError):
            next(Nirvana.decode(bad))


def test_mutated_files_decode_or_are_refused(fitted):
    container = parse(fitted)
    count, _ = unpack_numbers(container.section("index"), 8)
    assert len(count) == 8
    chance = random.Random(0)
    refused = 0
    for _ in range(120):
        name = chance.choice(["groups", "groups", "groups", "index"])
        payload = bytearray(container.sections[name])
        for _ in range(chance.randrange(1, 4)):
            # The first bytes of a group are its tables.
            place = chance.choice([0, read_index(container)[1].start]) if name == "groups" else 0
            place = min(place + chance.randrange(80), len(payload) - 1)
            payload[place] = chance.randrange(256)
        if chance.random() < 0.2:
            del payload[chance.randrange(len(payload)) :]
        bad = Container(container.header, container.sections | {name: bytes(payload)}).to_bytes()
        try:
            picture = next(Nirvana.decode(bad, [chance.choice([0, 5, 9])]))
            assert picture.shape == (3, 28, 45)
            assert picture.isfinite().all()
        except InputError:
            refused += 1
    assert 30 < refused < 120
