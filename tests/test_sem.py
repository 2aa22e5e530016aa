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
from frameloom.errors import InputError, Interrupted
from frameloom.metrics import psnr
from frameloom.tasks.compression.base import compress, decompress, inspect
from frameloom.tasks.compression.pairs import Pairs, pairs
from frameloom.tasks.compression.sem import SEM, Config, check_settings
from frameloom.tasks.compression.sem_coder import LatentCoder
from frameloom.tasks.compression.sem_network import GDN, REACH, Gained, MaskedConv, wavefronts
from frameloom.training import train
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
        ({"rate": 2, "psnr": 30.0}, "--rate and --quality: give one of them"),
        ({"psnr": 79.0}, r"--quality 79dB: sem reaches \d+\.\d\d dB on this clip at most"),
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

        def fingerprint(self):
            return "uneven"

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
    with pytest.raises(InputError, match="--data vimeo: codecs learn from world or from a folder of clips"):
        pairs("vimeo", 64, 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder of two clips, one of them in a folder below, and what is no clip beside them."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "more").mkdir()
    moving(4, 64, 72).save(folder / "a.mp4", crf=1)
    moving(7, 80, 64).save(folder / "more" / "b.mkv", crf=1)
    (folder / "notes.txt").write_text("two clips")
    return folder


def test_a_folder_of_clips_gives_pairs_of_neighbours(recorded):
    data = pairs(str(recorded), 64, 0)
    assert [len(clip) for clip in data.clips] == [4, 7]
    made = data.batch(list(range(40)), 0.25)
    assert made["pair"].shape == (40, 2, 3, 64, 64)
    assert made["progress"].tolist() == [0.25] * 40
    again = pairs(str(recorded), 64, 0).batch([17, 3], 0.25)["pair"]
    assert torch.equal(again, made["pair"][[17, 3]])
    # The texture slides by a row and two columns a frame: neighbours are each other's shifted selves, either way round.
    for first, second in made["pair"]:
        shifts = [(first[:, max(r, 0) : 64 + min(r, 0), max(c, 0) : 64 + min(c, 0)]
                   - second[:, max(-r, 0) : 64 + min(-r, 0), max(-c, 0) : 64 + min(-c, 0)]).abs().mean()
                  for r in (-1, 1) for c in (-2, 2)]  # fmt: skip
        assert min(shifts) < 0.03


@pytest.mark.parametrize("what", ["nothing", "text", "damaged", "short", "small"])
def test_a_folder_without_good_clips_is_refused_in_one_line_and_nothing_is_written(what, tmp_path, recorded):
    folder = tmp_path / "in"
    folder.mkdir()
    if what == "text":
        (folder / "notes.txt").write_text("none here")
    elif what == "damaged":
        (folder / "a.mp4").write_bytes((recorded / "a.mp4").read_bytes())
        (folder / "b.mp4").write_bytes(bytes(5000))
    elif what in ("short", "small"):
        moving(1 if what == "short" else 3, 64, 72 if what == "short" else 40).save(folder / "b.mp4")
    why = {"nothing": r"no clips in this folder; their names end in \.mp4,", "text": "no clips in this folder",
           "damaged": r"b\.mp4.*; mend this clip or take it away", "short": r"b\.mp4 has 1 frame\(s\) of 72x64",
           "small": r"b\.mp4 has 3 frame\(s\) of 40x64; this size learns from .* 64 pixels a side or more"}  # fmt: skip
    with pytest.raises(InputError, match=rf"--data {folder}: [^\n]*{why[what]}[^\n]*$"):
        train("sem", tmp_path / "out", data=str(folder), steps=2)
    assert not (tmp_path / "out").exists()


def test_training_on_a_folder_goes_on_after_a_stop(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(SEM.presets, "tiny", SMALL)
    monkeypatch.setitem(SEM.recipes, "tiny", replace(SEM.recipe("tiny"), batch_size=2, warmup=1, hold=0.0, bf16=False))
    for folder in ("whole", "stopped"):

        def blow(label: str, done: int, total: int | None, folder: str = folder) -> None:
            if folder == "stopped" and done == 2:
                raise KeyboardInterrupt

        try:
            train("sem", tmp_path / folder, data=str(recorded), steps=4, workers=0, progress=blow)
        except Interrupted:
            train("sem", tmp_path / folder, data=str(recorded), steps=4, workers=0)
    one, other = (load("sem", tmp_path / folder) for folder in ("whole", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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


def test_a_quality_is_reached_by_the_lowest_rate_that_has_it(slow, tmp_path):
    target = slow.tensor()
    report = compress(slow, tmp_path / "a.flm", "sem", quality="31dB", spatial=False)
    rate = inspect(report.path.read_bytes())["config"]["rate"]
    assert 1 < rate < 6
    reached = [float(psnr(made[None], frame[None])) for made, frame in
               zip(decompress(report.path).tensor(), target, strict=True)]  # fmt: skip
    assert 31 <= sum(reached) / len(reached) < 31.2
    lower = SEM.encode(slow, rate=rate - 1 / 32, spatial=False)
    assert sum(float(psnr(made[None], frame[None])) for made, frame in
               zip(SEM.decode(lower), target, strict=True)) / len(target) < 31  # fmt: skip


@pytest.mark.parametrize(("wish", "stop"), [({"rate": 2.5}, 4), ({"quality": "11dB"}, 4), ({"size": 5200}, 4),
                                            ({"size": 5200}, 13)], ids=str)  # fmt: skip
def test_a_stopped_encode_goes_on_to_the_same_file(wish, stop, folder, tmp_path):
    clip = moving(9)
    settings = {"weights": folder, "gop": 2, "spatial": False} | wish
    coded: list[int] = []

    def counting(label: str, done: int, total: int | None) -> None:
        if label.startswith("encoding"):
            coded.append(done)
            if len(coded) == stop:
                raise KeyboardInterrupt

    path = tmp_path / "a.flm"
    with pytest.raises(Interrupted, match=r"the same command with --resume goes on from .*a\.flm\.state"):
        compress(clip, path, "sem", progress=counting, **settings)
    assert not path.exists()
    stop = -1
    compress(clip, path, "sem", resume=True, progress=counting, **settings)
    assert [one.name for one in tmp_path.iterdir()] == ["a.flm"]
    stopped = len(coded)
    assert (
        path.read_bytes() == compress(clip, tmp_path / "b.flm", "sem", progress=counting, **settings).path.read_bytes()
    )
    # What is made again is the group that was under way.
    assert stopped <= len(coded) - stopped + 2


def test_what_other_weights_left_is_not_gone_on_with(folder, tmp_path):
    save_pretrained(untrained(), "sem", tmp_path / "weights")
    clip, path = moving(5), tmp_path / "a.flm"
    settings = {"weights": tmp_path / "weights", "gop": 2, "spatial": False, "rate": 2}

    def stopping(label: str, done: int, total: int | None) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress(clip, path, "sem", progress=stopping, **settings)
    save_pretrained(untrained(1), "sem", tmp_path / "weights")
    compress(clip, path, "sem", resume=True, **settings)
    assert path.read_bytes() == SEM.encode(clip, **settings)


def test_a_copy_of_the_network_makes_the_same_file(file, folder):
    assert SEM.encode(moving(), rate=2.5, gop=3, spatial=True, weights=folder) == file
    assert copy.deepcopy(load("sem", folder)).config == SMALL
