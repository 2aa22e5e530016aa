"""SEM: integers in, the same integers out, whatever the priors; prices that both sides find; what is refused."""

import copy
import hashlib
import os
import random
import subprocess
import sys
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frameloom.bitstream.container import Container, parse
from frameloom.errors import InputError
from frameloom.metrics import psnr
from frameloom.tasks.compression.base import compress, decompress, inspect
from frameloom.tasks.compression.pairs import Pairs, pairs
from frameloom.tasks.compression.sem import SEM, Config, check_settings
from frameloom.tasks.compression.sem_coder import LatentCoder
from frameloom.tasks.compression.sem_network import GDN, REACH, Gained, MaskedConv, wavefronts
from frameloom.training.pretrained import load, save_pretrained
from frameloom.video.clip import Clip, Frame, Source
from frameloom.world.dataset import clip as world_clip

SMALL = Config(widths=(6, 8), hidden=6, weights=(100.0, 10_000.0, 1e6))
VARIANTS = [
    pytest.param({"spatial": spatial, "temporal": temporal, "gop": gop}, id=f"{spatial=} {temporal=} {gop=}")
    for spatial, temporal, gop in [(True, True, 3), (False, True, 3), (True, False, 3), (False, False, 3),
                                   (True, True, 1)]
]  # fmt: skip


def moving(frames: int = 5, height: int = 24, width: int = 40) -> Clip:
    """A rough texture that slides by."""
    noise = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(noise, size=(height + frames, width + 2 * frames), mode="bicubic").clamp(0, 1)[0]
    views = [texture[:, k : k + height, 2 * k : 2 * k + width] for k in range(frames)]
    return Clip.from_tensor((torch.stack(views) * 255).round().to(torch.uint8), 25)


def digest_of(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in module.parameters())).hexdigest()


def untrained(seed: int = 0, config: Config = SMALL) -> SEM:
    torch.manual_seed(seed)
    return SEM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Untrained weights, whose latents have many values all the same."""
    return save_pretrained(untrained(), "sem", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def file(folder) -> bytes:
    return SEM.encode(moving(), rate=2.5, gop=3, spatial=True, weights=folder)


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_variant_gives_the_integers_of_the_encoder_and_the_pictures_they_stand_for(settings, folder):
    network, clip = load("sem", folder), moving()
    data = SEM.encode(clip, rate=2.5, weights=folder, **settings)
    integers = [network.integers(frame.rgb, 2.5) for frame in clip]
    assert max(float(latent.abs().max()) for latent in integers) > 3
    assert all(map(torch.equal, SEM.latents(data, weights=folder), integers))
    for made, latent in zip(SEM.decode(data, weights=folder), integers, strict=True):
        assert torch.equal(made, network.draw(latent, 2.5, 24, 40))


def test_the_latent_itself_may_be_priced_in_place_of_its_change(tmp_path):
    save_pretrained(untrained(config=replace(SMALL, difference=False)), "sem", tmp_path)
    network, clip = load("sem", tmp_path), moving()
    assert not network.config.difference
    data = SEM.encode(clip, rate=2, spatial=True, weights=tmp_path)
    assert all(map(torch.equal, SEM.latents(data, weights=tmp_path), (network.integers(x.rgb, 2.0) for x in clip)))


@pytest.mark.parametrize("wanted", [[4], [0, 2, 1], [4, 4, 0], []])
def test_any_frames_decode_as_they_do_among_all(wanted, file, folder):
    everything = list(SEM.decode(file, weights=folder))
    some = list(SEM.decode(file, wanted, weights=folder))
    assert len(some) == len(wanted)
    assert all(torch.equal(made, everything[number]) for made, number in zip(some, wanted, strict=True))


def test_a_fresh_process_with_more_threads_reads_the_same_integers(file, folder, tmp_path):
    (tmp_path / "clip.flm").write_bytes(file)
    script = (
        "import sys, torch; from frameloom.tasks.compression.sem import SEM; torch.set_num_threads(2);"
        "torch.save(torch.cat(list(SEM.latents(open(sys.argv[1], 'rb').read(), weights=sys.argv[2]))), sys.argv[3])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "clip.flm"), str(folder), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert torch.equal(torch.load(tmp_path / "out.pt"), torch.cat(list(SEM.latents(file, weights=folder))))


def test_decompress_takes_the_weights_that_a_file_was_made_with(file, folder):
    clip = decompress(file, [3, 1], weights=folder)
    made = list(SEM.decode(file, [3, 1], weights=folder))
    assert all(torch.equal(frame.rgb, picture) for frame, picture in zip(clip, made, strict=True))


def test_integers_beyond_every_table_are_escaped(tmp_path):
    network = untrained()
    with torch.no_grad():
        network.pictures.down[-1].log_gain += 7.0
    save_pretrained(network, "sem", tmp_path)
    clip = moving(3)
    integers = [network.integers(frame.rgb, 3.0) for frame in clip]
    assert max(float(latent.abs().max()) for latent in integers) > 10_000
    data = SEM.encode(clip, rate=3, weights=tmp_path)
    assert all(map(torch.equal, SEM.latents(data, weights=tmp_path), integers))


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (32, 16)])
@pytest.mark.parametrize("frames", [1, 2])
def test_frames_of_any_size_and_clips_of_any_length(size, frames, folder):
    clip = moving(frames, *size)
    for spatial in (False, True):
        data = SEM.encode(clip, rate=2, spatial=spatial, weights=folder)
        made = list(SEM.decode(data, weights=folder))
        assert len(made) == frames
        assert all(picture.shape == (3, *size) for picture in made)


def test_a_file_made_with_other_weights_is_refused(file, folder, tmp_path):
    save_pretrained(untrained(1), "sem", tmp_path)
    with pytest.raises(InputError, match=r"made with other weights \([0-9a-f]{16}\) than .* \([0-9a-f]{16}\)"):
        next(SEM.decode(file, weights=tmp_path))
    with pytest.raises(InputError, match="than the shipped ones"):
        next(SEM.decode(file))


def test_integers_that_do_not_come_out_as_they_went_in_are_noticed(file, folder, monkeypatch):
    """As on a machine whose arithmetic is another."""
    priced = LatentCoder._walk

    def elsewhere(self, model, z, before, *rest):
        return priced(self, model, z + 1, before, *rest)

    monkeypatch.setattr(LatentCoder, "_walk", elsewhere)
    with pytest.raises(InputError, match="frame 0 does not come out as it went in"):
        list(SEM.decode(file, weights=folder))


def test_mutated_files_decode_or_are_refused(folder):
    container = parse(SEM.encode(moving(2), rate=2, spatial=False, weights=folder))
    chance = random.Random(0)
    refused = 0
    for _ in range(100):
        name = chance.choice(list(container.sections))
        payload = bytearray(container.sections[name])
        for _ in range(chance.randrange(1, 4)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        if chance.random() < 0.3:
            del payload[chance.randrange(len(payload)) :]
        bad = Container(container.header, container.sections | {name: bytes(payload)}).to_bytes()
        try:
            assert next(SEM.decode(bad, [1], weights=folder)).shape == (3, 24, 40)
        except InputError:
            refused += 1
    assert refused > 60


def test_a_byte_that_changed_on_disk_is_named(file, folder):
    bad = bytearray(file)
    bad[-40] ^= 1
    with pytest.raises(InputError, match=r"section '.*' is damaged; its checksum does not match"):
        next(SEM.decode(bytes(bad), weights=folder))


@pytest.mark.parametrize(
    "change",
    [{"rate": 0.5}, {"rate": 4.0}, {"rate": float("nan")}, {"rate": 2}, {"spatial": 1}, {"temporal": None},
     {"tables": 1}, {"weights": 3}, {"weights": ""}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_hostile_headers_are_refused(change, file, folder):
    container = parse(file)
    header = replace(container.header, config=container.header.config | change)
    with pytest.raises(InputError):
        next(SEM.decode(Container(header, container.sections).to_bytes(), weights=folder))


def test_headers_that_promise_other_frames_are_refused(file, folder):
    container = parse(file)
    for change in ({"frames": 6}, {"frames": 1 << 20}, {"width": 4000, "height": 4000}, {"method": "hnerv"}):
        bad = Container(replace(container.header, **change), container.sections).to_bytes()
        with pytest.raises(InputError):
            list(SEM.decode(bad, weights=folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0}, r"--rate 0: these weights take 1 \(fewest bytes\) to 3"),
        ({"rate": 3.5}, "--rate 3.5"),
        ({"rate": 2, "size": 5000}, "--rate and --size"),
        ({"gop": 0}, "--gop 0: a group has 1 to"),
        ({"size": 10}, r"--size 10: sem takes at least \d+ bytes"),
        ({"weights": "nowhere"}, "--weights nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, folder):
    with pytest.raises(InputError, match=message):
        SEM.encode(moving(2), **({"weights": folder} | settings))


@pytest.mark.parametrize(
    ("rate", "gop", "spatial", "message"),
    [("high", 12, True, "--rate high"), (2, 2.5, True, r"--gop 2\.5"), (2, 12, "maybe", "--spatial maybe: true or")],
)
def test_settings_of_another_kind_are_refused(rate, gop, spatial, message):
    with pytest.raises(InputError, match=message):
        check_settings(6, rate, gop, spatial=spatial)


def test_frames_of_two_sizes_are_refused(folder):
    class Two(Source):
        info = moving().info

        def times(self):
            return [Fraction(0), Fraction(1, 25)]

        def frames(self, start=0, stop=None):
            for time, side in zip(self.times(), (24, 28), strict=True):
                yield Frame(time, self.info.colour, rgb=torch.zeros(3, side, 40))

    with pytest.raises(InputError, match="frame 1 is 40x28, not 40x24"):
        SEM.encode(Clip(Two()), weights=folder)


def test_no_more_than_a_frame_or_two_is_held(folder):
    alive: list[weakref.ref] = []
    most = 0

    class Watched(Source):
        info = moving().info

        def times(self):
            return [Fraction(k, 25) for k in range(30)]

        def frames(self, start=0, stop=None):
            nonlocal most
            for time in self.times()[start:stop]:
                picture = torch.rand(3, 24, 40)
                alive.append(weakref.ref(picture))
                most = max(most, sum(one() is not None for one in alive))
                yield Frame(time, self.info.colour, rgb=picture)
                del picture

    SEM.encode(Clip(Watched()), rate=1, spatial=False, weights=folder)
    assert most <= 2


def test_instants_without_a_constant_rate_are_kept(tmp_path):
    clip = moving(3)
    times = [Fraction(0), Fraction(1, 25), Fraction(1, 5)]

    class Uneven(Source):
        info = replace(clip.info, regular=False)

        def times(self):
            return times

        def frames(self, start=0, stop=None):
            yield from (frame.at(time) for frame, time in zip(clip.frames(start, stop), times[start:stop], strict=True))

    report = compress(Clip(Uneven()), tmp_path / "a.flm", "sem", rate=1)
    assert list(decompress(report.path).times) == times


def test_paper_size_has_the_published_widths():
    config = SEM.preset("paper")
    with torch.device("meta"):
        network = SEM(config)
    assert network.stride == 16
    assert len(config.weights) == 10
    convolutions = [(layer.conv.in_channels, layer.conv.out_channels) for layer in network.pictures.down]
    assert convolutions == [(3, 256), (256, 256), (256, 256), (256, 320)]
    assert [layer.conv.kernel_size for layer in network.pictures.down] == [(5, 4), (4, 5), (5, 4), (4, 5)]
    assert [layer.out_channels for layer in network.inter.temporal[::2]] == [426, 533, 640]
    assert network.inter.spatial.weight.shape == (640, 320, 5, 5)
    assert network.inter.join[0].in_features == 6 * 320
    assert [layer.out_features for layer in network.inter.join[::2]] == [4 * 320, 3 * 320, 2 * 320]


def test_the_masked_convolution_sees_what_came_before_and_not_the_centre():
    torch.manual_seed(0)
    conv = MaskedConv(3, 4)
    x = torch.randn(1, 3, 7, 8)
    changed = x.clone()
    changed[0, :, 3, 4] += 1
    moved = (conv(x) != conv(changed)).any(1)[0]
    expected = torch.zeros(7, 8, dtype=torch.bool)
    expected[3, 5:7] = expected[4:6, 2:7] = True
    assert torch.equal(moved, expected)
    windows = F.pad(x, [REACH] * 4)[0].unfold(1, 5, 1).unfold(2, 5, 1)
    at = torch.tensor([0, 3, 6]), torch.tensor([7, 4, 0])
    assert torch.allclose(conv.at(windows[:, *at].transpose(0, 1)), conv(x)[0][:, *at].T, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (9, 4), (5, 1), (1, 5)])
def test_wavefronts_hold_every_position_once_and_after_all_it_sees(size):
    when = torch.full(size, -1)
    groups = wavefronts(*size)
    for step, at in enumerate(groups):
        assert (when[at] == -1).all()
        when[at] = step
    assert (when >= 0).all()
    for row in range(size[0]):
        for column in range(size[1]):
            seen = [when[r, c] for r in range(max(row - 2, 0), row + 1) for c in range(max(column - 2, 0), column + 3)
                    if c < size[1] and (r < row or c < column)]  # fmt: skip
            assert all(step < when[row, column] for step in seen)
    if size == (4, 9):
        assert len(groups) == 9 + 3 * 3


def test_gdn_divides_by_a_root_that_is_never_zero_and_its_inverse_multiplies():
    torch.manual_seed(0)
    forward, inverse = GDN(4), GDN(4, inverse=True)
    x = torch.randn(2, 4, 3, 3)
    inverse.load_state_dict(forward.state_dict())
    # With norms of the same x, one undoes the other; the inverse takes norms of what it is given.
    root = inverse(x) / x
    assert torch.allclose(forward(x) * root, x, atol=1e-6)
    assert torch.allclose(inverse(forward(0.01 * x)), 0.01 * x, rtol=1e-3)
    for value in (-1e3, -20.0, 1e3):
        with torch.no_grad():
            forward.beta.fill_(value)
            forward.gamma.fill_(value)
        assert torch.isfinite(forward(x)).all()
        assert torch.isfinite(forward(torch.zeros_like(x))).all()


def test_gains_lie_on_a_line_between_the_points_of_rate():
    gained = Gained(2, 3, (5, 4), torch.tensor([1.0, 3.0, 10.0]))
    with torch.no_grad():
        gained.log_gain += torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    at = gained.gain(torch.tensor([0.0, 1.0, 2.0, 0.25, 1.5]))
    assert torch.allclose(at[:3], gained.log_gain.exp())
    assert torch.allclose(at[3], 0.75 * at[0] + 0.25 * at[1])
    assert torch.allclose(at[4], (at[1] + at[2]) / 2)
    assert (at > 0).all()
    assert gained(torch.zeros(1, 2, 8, 12), torch.tensor([0.5])).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(("progress", "still"), [(0.0, ["inter"]), (0.9, ["pictures", "intra"])])
def test_each_stage_moves_its_own_networks_and_no_other(progress, still):
    network = untrained().train()
    before = {name: digest_of(part) for name, part in network.named_children()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    pair = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        network.loss({"pair": pair, "progress": torch.full((2,), progress)}).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    after = {name: digest_of(part) for name, part in network.named_children()}
    assert sorted(name for name in before if before[name] == after[name]) == sorted(still)


def test_the_schedule_runs_once_for_each_stage():
    recipe = SEM.recipe("tiny")
    assert recipe.learned == SEM.preset("tiny").learned
    assert SEM.recipe("paper").learned == SEM.preset("paper").learned
    switch = round(recipe.learned * recipe.steps)
    assert recipe.lr_at(switch - 1) < 1.1 * recipe.final_lr
    assert recipe.lr_at(switch) == recipe.lr_at(0) < recipe.lr_at(switch + 200)
    assert recipe.lr_at(recipe.steps - 1) < 1.1 * recipe.final_lr


def test_training_pairs_are_the_same_for_a_number_and_only_for_it(monkeypatch):
    monkeypatch.setattr("frameloom.world.pool.Pool.video", lambda self, k: np.full((5, 3, 112, 160), k % 256, np.uint8))
    data = Pairs(64, 0)
    one, other = data.batch(list(range(12)), 0.5), data.batch([3, 40], 0.5)
    assert one["pair"].shape == (12, 2, 3, 64, 64)
    assert 0 <= one["pair"].min() < one["pair"].max() <= 1
    assert one["progress"].tolist() == [0.5] * 12
    assert torch.equal(one["pair"][3], other["pair"][0])
    assert not torch.equal(one["pair"][4], other["pair"][1])
    with pytest.raises(InputError, match="--data vimeo: codecs learn from world"):
        pairs("vimeo", 64, 0)


@pytest.fixture(scope="module")
def slow() -> Clip:
    """Eight frames of a slow flight."""
    return Clip.from_tensor(world_clip(5, frames=8, height=64, width=96, motion=0.5).bytes_tensor(), 24)


def test_shipped_rates_are_ordered_in_bytes_and_in_quality(slow):
    target = slow.tensor()
    files = [SEM.encode(slow, rate=rate, spatial=False) for rate in (1, 2.5, 4, 6)]
    quality = [float(psnr(torch.stack(list(SEM.decode(data))), target)) for data in files]
    assert [len(data) for data in files] == sorted({len(data) for data in files})
    assert quality == sorted(quality)


def test_a_shipped_file_is_as_long_as_its_integers_are_estimated_to_cost(slow):
    network = load("sem")
    latents = [network.integers(frame.rgb, 6.0) for frame in slow]
    with torch.inference_mode():
        bits = sum(float(network.bits(y, b)) for y, b in zip(latents, [None, *latents], strict=False))
    written = 8 * inspect(SEM.encode(slow, rate=6, spatial=True))["sections"]["stream"]["bytes"]
    assert written == pytest.approx(bits, rel=0.005, abs=64)


def test_the_frame_before_saves_bytes_and_a_cut_begins_a_group(slow):
    cut = Clip.from_tensor(torch.cat([slow.bytes_tensor()[:4], 255 - moving(4, 64, 96).bytes_tensor()]), 24)
    few, many = (SEM.encode(slow, rate=4, gop=gop, spatial=False) for gop in (12, 1))
    assert len(few) < 0.7 * len(many)
    data = SEM.encode(cut, rate=4, spatial=False)
    assert parse(data).section("index")[0] == 4


def test_a_size_is_reached_from_below(slow):
    data = SEM.encode(slow, size=4000, spatial=False)
    assert 3500 < len(data) <= 4000


def test_a_copy_of_the_network_makes_the_same_file(file, folder):
    assert SEM.encode(moving(), rate=2.5, gop=3, spatial=True, weights=folder) == file
    assert copy.deepcopy(load("sem", folder)).config == SMALL
