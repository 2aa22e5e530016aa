"""The interpolation driver: instants, recorded frames, cuts, duplicates, halving, tiles."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.motion.cuts import change
from frameloom.tasks.interpolation import interpolate
from frameloom.tasks.interpolation.base import InterpolatedSource, Interpolator, _tiled
from frameloom.tasks.interpolation.blend import Blend
from frameloom.tasks.interpolation.dis import DIS
from frameloom.video.clip import Clip, View
from media import moving, tensor


def ramp(count: int, rate=10) -> Clip:
    """Frame k is k/64 everywhere: a blend at any instant shows its own time."""
    return Clip.from_tensor((torch.arange(count) / 64).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous(), rate)


def moved(count: int = 6, step: float = 3.0, height: int = 64, width: int = 96) -> torch.Tensor:
    """A smooth texture that moves `step` pixels a frame to the right, rendered exactly."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    shots = []
    for t in range(count):
        u = x - step * t
        shots.append([0.5 + 0.2 * np.sin(u / (5 + k) + y / 9) + 0.2 * np.sin(u / 11 - y / (6 + k)) for k in range(3)])
    return torch.from_numpy(np.array(shots)).float()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 12),
    source=st.sampled_from([Fraction(24), Fraction(30000, 1001), Fraction(16), Fraction(60)]),
    target=st.sampled_from([Fraction(60), Fraction(50), Fraction(24), Fraction(24000, 1001), Fraction(7)]),
)
def test_every_frame_is_at_its_instant_and_shows_it(count, source, target):
    clip = ramp(count, source)
    made = interpolate(clip, target, "blend")
    frames = list(made)
    assert len(frames) == len(made) == -(-count * target // source)
    for number, frame in enumerate(frames):
        assert frame.time == number / target
        position = min(float(frame.time * source), count - 1)
        assert float(frame.rgb[0, 0, 0]) * 64 == pytest.approx(position, abs=2e-3)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 24), length=st.integers(1, 8), dedupe=st.booleans())
def test_any_part_equals_the_same_part_of_the_whole(start, length, dedupe):
    clip = Clip.from_tensor(tensor(moving(8))[[0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7]], 24)
    made = interpolate(clip, 55, "dis", dedupe=dedupe)
    part = list(made.frames(start, start + length))
    whole = list(made)[start : start + length]
    assert len(part) == len(whole)
    assert all(torch.equal(a.rgb, b.rgb) and a.time == b.time for a, b in zip(part, whole, strict=True))


def test_recorded_frames_are_passed_on_untouched():
    clip = Clip.from_tensor(tensor(moving(5)), 25)
    recorded = [frame.rgb for frame in clip]
    made = list(interpolate(clip, 50, "dis"))
    assert all(torch.equal(made[2 * k].rgb, recorded[k]) for k in range(5))


def test_the_same_rate_is_the_same_clip_and_one_frame_is_refused():
    clip = ramp(4)
    assert interpolate(clip, 10) is clip
    with pytest.raises(InputError, match="one frame is not enough"):
        interpolate(ramp(1), 60)


def test_slow_motion_has_the_source_rate_and_more_frames():
    made = interpolate(ramp(6), slow=4, method="blend")
    assert (made.rate, len(made)) == (10, 24)
    assert float(next(made.frames(6)).rgb[0, 0, 0]) * 64 == pytest.approx(1.5, abs=1e-3)
    with pytest.raises(InputError, match="--slow 1"):
        interpolate(ramp(6), slow=1)


def test_nothing_is_mixed_across_a_cut():
    first, second = tensor(moving(4, 64, 96)).float() / 255, 1 - moved(4) ** 2
    clip = Clip.from_tensor(torch.cat([first, second]), 10)
    made = interpolate(clip, 40, "dis")
    frames = list(made)
    recorded = [frame.rgb for frame in clip]
    for number in (13, 14, 15):
        nearest = recorded[3] if number < 14 else recorded[4]
        assert torch.equal(frames[number].rgb, nearest)
    assert made.source.report.cuts == 1


@pytest.mark.parametrize("step", [0.0, 2.0, 6.0])
def test_motion_is_no_cut_and_only_stillness_is_a_duplicate(step):
    video = moved(2, step)
    found = change(video[0], video[1])
    assert not found.cut
    assert found.duplicate == (step == 0)


def test_a_small_thing_that_moves_is_no_duplicate():
    video = torch.full((2, 3, 256, 448), 0.5)
    video[0, :, 100:104, 100:104] = video[1, :, 100:104, 103:107] = 0.6
    assert not change(video[0], video[1]).duplicate


def test_a_flash_is_no_cut():
    video = moved(2, 2.0)
    assert not change(video[0], (video[1] * 0.5 + 0.5)).cut


def test_dedupe_spreads_motion_over_repeated_frames():
    positions = [0, 1, 1, 2, 2, 3]
    video = moved(4, 4.0)[positions]
    made = list(interpolate(Clip.from_tensor(video, 10), 10, "dis", dedupe=True))
    middle = moved(9, 2.0)
    gap_kept = (video[2] - middle[3]).abs().mean()
    gap_made = (made[2].rgb - middle[3]).abs()[:, 8:-8, 16:-16].mean()
    assert gap_made < 0.25 * gap_kept


def test_other_weights_are_other_work_for_resume(tmp_path):
    from frameloom.training.pretrained import load, save_pretrained

    clip = ramp(4)
    made = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        save_pretrained(load("vfimamba", "random"), "vfimamba", tmp_path)
        made.append(interpolate(clip, 20, "vfimamba", weights=str(tmp_path)).source.fingerprint())
    assert made[0] == made[2] != made[1]


class Halver:
    """Knows the middle only, like most published interpolators; counts its calls."""

    fixed_t, tile = True, None

    def __init__(self):
        self.calls = 0

    def between(self, frame0, frame1):
        def at(t):
            assert t == 0.5
            self.calls += 1
            return (frame0 + frame1) / 2

        return at


def test_a_method_that_knows_the_middle_is_halved_and_its_pictures_are_kept(caplog):
    method = Halver()
    assert isinstance(method, Interpolator)
    source = InterpolatedSource(ramp(3).source, method, Fraction(80), "halver")
    values = [float(frame.rgb[0, 0, 0]) * 64 for frame in source.frames()]
    assert values[:17] == pytest.approx([k / 8 for k in range(17)], abs=1e-5)
    assert method.calls == 14
    assert not caplog.records


def test_an_instant_that_halving_cannot_reach_is_rounded_with_a_note_or_refused(caplog):
    source = InterpolatedSource(ramp(3).source, Halver(), Fraction(25), "halver")
    values = [float(frame.rgb[0, 0, 0]) * 64 for frame in source.frames()]
    assert values[:5] == pytest.approx([0, 3 / 8, 6 / 8, 10 / 8, 13 / 8], abs=1e-5)
    assert len([r for r in caplog.records if "nearest eighth" in r.message]) == 1
    strict = InterpolatedSource(ramp(3).source, Halver(), Fraction(25), "halver", strict=True)
    with pytest.raises(InputError, match="the method only halves"):
        list(strict.frames())


@settings(max_examples=15, deadline=None)
@given(height=st.integers(20, 230), width=st.integers(20, 230), tile=st.integers(80, 160))
def test_tiles_of_a_local_method_equal_the_whole(height, width, tile):
    frames = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    whole = Blend().between(*frames)(0.3)
    assert torch.allclose(_tiled(Blend(), *frames, 0.3, tile, overlap=32), whole, atol=1e-6)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.7])
def test_dis_finds_the_picture_between_better_than_blending_by_far(t):
    video = moved(2, 6.0)
    y, x = np.mgrid[0:64, 0:96].astype(np.float64)
    u = x - 6.0 * t
    true = torch.from_numpy(
        np.array([0.5 + 0.2 * np.sin(u / (5 + k) + y / 9) + 0.2 * np.sin(u / 11 - y / (6 + k)) for k in range(3)])
    ).float()

    def error(picture):
        return (picture - true)[:, 8:-8, 12:-12].abs().mean()

    assert error(DIS().between(*video)(t)) < 0.2 * error(Blend().between(*video)(t))


def test_the_nearer_frame_weighs_more_in_dis():
    video = moved(2, 4.0)
    made = DIS().between(video[0], 0.9 * video[1])(0.25)
    even = DIS().between(video[0], video[1])(0.25)
    assert float((made / even)[:, 16:-16, 24:-24].mean()) == pytest.approx(0.975, abs=0.01)


def test_a_static_shot_stays_as_it_is():
    video = moved(1)[[0, 0]]
    assert torch.allclose(DIS().between(*video)(0.5), video[0], atol=1e-5)


@pytest.mark.parametrize("start", [0, 7, 13])
def test_minterpolate_keeps_the_instants_and_random_access(start):
    clip = Clip.from_tensor((moved(8, 3.0) * 255).round().byte(), 24)
    made = interpolate(clip, 48, "minterpolate")
    whole = list(made)
    assert [frame.time for frame in whole] == [Fraction(k, 48) for k in range(16)]
    part = next(made.frames(start))
    assert (part.rgb - whole[start].rgb).abs().mean() < 2 / 255
    error = (whole[7].rgb - moved(9, 1.5)[7]).abs()[:, 8:-8, 16:-16].mean()
    assert error < 0.05


def test_dis_is_no_worse_than_plain_dis_on_real_footage(clips):
    from frameloom.video.reader import read

    video = torch.nn.functional.interpolate(read(clips / "tea.mp4")[:5].tensor(), (128, 224), mode="area")
    hidden = video[1]
    made = DIS().between(video[0], video[2])(0.5)
    blended = (video[0] + video[2]) / 2
    assert (made - hidden).square().mean() < (blended - hidden).square().mean()
    assert isinstance(Clip(View(Clip.from_tensor(video).source, 0, 5, 2)), Clip)
