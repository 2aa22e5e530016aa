"""Stabilisation: the path, its fixed point, warp fields, borders, the driver, the verb."""

import itertools
import json
import logging

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from frameloom.claims.fast_stab import followed, hand, removed, steadied, taken, view, warps
from frameloom.cli.app import app
from frameloom.errors import InputError
from frameloom.metrics import cropping_ratio, distortion, jitter, stability_score
from frameloom.motion.consistency import confidence, occlusion
from frameloom.motion.similarity import (
    fit_similarity,
    kernel,
    matrix,
    numbers,
    shift_of,
    similarity_flow,
    smooth,
)
from frameloom.tasks.stabilization import stabilize
from frameloom.tasks.stabilization.base import StabilizedSource
from frameloom.tasks.stabilization.fast_stab import FastStab, settle
from frameloom.tasks.stabilization.outpainting import Fields
from frameloom.tasks.stabilization.similarity import Similarity
from frameloom.tasks.stabilization.warps import solve_fields
from frameloom.training import load
from frameloom.video.clip import Clip
from frameloom.world import WorldDataset
from media import make, moving

SIZE = (96, 128)


def canvas(height: int = 160, width: int = 256, seed: int = 0) -> torch.Tensor:
    """A picture with something to follow everywhere."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.random((height // s, width // s, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
              for s in (4, 8, 16)]  # fmt: skip
    return torch.from_numpy(np.mean(layers, 0).clip(0, 1)).permute(2, 0, 1).float()


def footage(path: np.ndarray) -> torch.Tensor:
    """The canvas as a camera on that path sees it."""
    wide = canvas()
    return torch.stack([view(wide, place, SIZE) for place in path])


@pytest.fixture(scope="module")
def model():
    return load("fast-stab")


@pytest.fixture(scope="module")
def shaken():
    shake = hand(32, 24, SIZE[1], 3)
    return footage(shake), shake


@pytest.fixture(scope="module")
def steady(model, shaken):
    return steadied(shaken[0], model, 24)


def test_a_similarity_is_found_again_under_a_thing_that_covers_two_fifths():
    true = torch.tensor([[3.0, -2.0, 0.03, 0.02]], dtype=torch.float64)
    flow = similarity_flow(true, 60, 80)
    flow[..., :32] = torch.tensor([-6.0, 5.0], dtype=torch.float64)[:, None, None]
    everywhere = torch.ones(1, 1, 60, 80)
    assert torch.allclose(fit_similarity(flow, everywhere), true, atol=2e-2)
    plain = fit_similarity(flow, everywhere, robust=False)
    assert float((plain - true).abs()[0, :2].max()) > 1
    trusted = everywhere.clone()
    trusted[..., :32] = 0
    assert torch.allclose(fit_similarity(flow, trusted, robust=False), true, atol=1e-6)
    given = np.array([3.0, -2.0, 0.03, 0.02])
    np.testing.assert_allclose(numbers(matrix(given, 60, 80), 60, 80), given, atol=1e-12)


def test_smoothing_takes_from_each_frequency_what_the_window_says_and_nothing_from_a_pan():
    t = np.arange(400)
    pan = t[:, None] * np.array([[1.5, -0.5, 0.01, 0.0]])
    np.testing.assert_allclose(smooth(pan, 6), pan, atol=1e-9)
    taps = kernel(4.0)
    for frequency in (0.02, 0.05, 0.1):
        wave = np.sin(2 * np.pi * frequency * t)[:, None]
        transfer = float((taps * np.cos(2 * np.pi * frequency * (np.arange(len(taps)) - len(taps) // 2))).sum())
        np.testing.assert_allclose(smooth(wave, 4.0)[50:-50], transfer * wave[50:-50], atol=1e-9)


def test_the_path_comes_to_rest_and_stays_there():
    path = hand(120, 30, 640, 1)
    steady, residuals = settle(path, 5.0, 360, 640)
    assert len(residuals) >= 2
    assert residuals[-1] < 0.5
    assert all(after < 0.8 * before for before, after in itertools.pairwise(residuals))
    assert shift_of(smooth(steady, 5.0) - steady, 360, 640).mean() < residuals[-1]
    assert settle(path, 0.0, 360, 640)[1] == []


def test_warp_fields_contract_and_leave_an_even_pan_alone():
    tiny = FastStab.preset("tiny")
    nodes = {"grid": tiny.grid, "spread": tiny.spread, "hold": tiny.hold}
    rng = np.random.default_rng(0)
    points = rng.uniform((0, 0), (127, 95), (200, 2))
    trust = np.ones(200)
    even = [(points - 1.0, points, points + 1.0, trust)] * 10
    field, _ = solve_fields(even, SIZE, **nodes)
    assert np.abs(field).max() < 1e-9
    jitter = np.concatenate([[0], rng.normal(0, 1, 10), [0]])
    # The left half shakes, the right half does not: no similarity undoes that.
    left = (points[:, :1] < 64) * np.array([[1.0, 0.0]])
    tracks = [tuple(points + left * jitter[t + d] for d in (-1, 0, 1)) + (trust,) for t in range(1, 11)]
    field, changes = solve_fields(tracks, SIZE, **nodes, rounds=4)
    assert all(after < 0.8 * before for before, after in itertools.pairwise(changes))
    moved = field.reshape(12, 10, 10, 2)
    assert np.corrcoef(moved[:, 5, 1, 0], -jitter)[0, 1] > 0.9
    assert np.abs(moved[:, 5, 8]).max() < 0.25 * np.abs(moved[:, 5, 1]).max()
    assert np.all(field[[0, -1]] == 0)


def test_confidence_and_occlusion_know_what_the_world_hides():
    wanted = ("flow", "backward_flow", "occlusion")
    made = WorldDataset("motion", 2, 64, 64, seed=5, length=4, outputs=wanted, motion=6).batch(range(4))
    flow, back = made["flow"][:, 0], made["backward_flow"][:, 0]
    hidden, trust = made["occlusion"][:, 0] > 0.5, confidence(flow, back)
    assert float(trust[hidden].mean()) < 0.3
    assert float(trust[~hidden].mean()) > 0.9
    found = occlusion(flow, back)
    assert float((found == hidden).float().mean()) > 0.9
    assert torch.all(confidence(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)) == 1)
    assert torch.all(confidence(torch.full((1, 2, 8, 8), 20.0), torch.zeros(1, 2, 8, 8)) == 0)


def test_measures_of_stability_say_what_they_are_defined_to():
    t = np.arange(120.0)
    # Cosines about the middle: even, so that no straight line is in them.
    slow, fast = (np.cos(2 * np.pi * k * (t - 59.5) / 120) for k in (3, 20))
    assert stability_score(slow[:, None]) == pytest.approx(1)
    assert stability_score((slow + fast)[:, None]) == pytest.approx(0.5)
    assert stability_score(np.stack([slow, fast], 1)) == pytest.approx(0, abs=1e-9)
    assert stability_score(np.zeros((30, 2))) == 1
    # An even pan neither counts nor hides what shakes on top of it.
    assert stability_score(t[:, None]) == 1
    assert stability_score((5 * t + slow + fast)[:, None]) == pytest.approx(0.5)
    assert stability_score(t[:, None], drift=True) == pytest.approx(0.89, abs=0.002)
    assert stability_score((5 * t + slow + fast)[:, None], drift=True) > 0.88
    assert jitter(np.stack([5 * t, -t], 1)) == 0
    assert jitter(np.stack([t**2, 0 * t], 1)) == pytest.approx(2)
    zoomed = np.stack([np.diag([1.25, 1.25, 1]), np.eye(3)])
    assert cropping_ratio(zoomed) == pytest.approx(0.9)
    assert distortion(zoomed) == pytest.approx(1)
    assert distortion(np.diag([2.0, 1, 1])[None]) == pytest.approx(0.5)


def test_what_is_taken_out_is_the_shake_and_the_view_stays_whole(shaken, steady):
    video, shake = shaken
    made, source = steady
    assert made.shape == video.shape
    assert removed(taken(warps(video, made), tuple(video.shape[-2:])), shake) > 0.95
    assert _speed(followed(made)) < 0.25 * _speed(followed(video))
    assert source.report.filled > 0
    assert source.report.mirrored < 0.02 * video[:, 0].numel()


def test_filled_borders_show_what_was_there(shaken, steady):
    made, source = steady
    correction, wide = source.analyse()[0].shot.correction, canvas()
    ours, plain = [], []
    for k in range(len(made)):
        truth = view(wide, shaken[1][k] + correction[k], SIZE)
        warp = matrix(correction[k], *SIZE)[:2]
        outside = torch.from_numpy(cv2.warpAffine(np.ones(SIZE, np.float32), warp, SIZE[::-1]) < 0.5)
        mirrored = cv2.warpAffine(shaken[0][k].permute(1, 2, 0).contiguous().numpy(), warp, SIZE[::-1],
                                  borderMode=cv2.BORDER_REFLECT_101)  # fmt: skip
        ours.append((made[k] - truth).square()[:, outside].sum())
        plain.append((torch.from_numpy(mirrored).permute(2, 0, 1) - truth).square()[:, outside].sum())
    assert 10 * np.log10(float(sum(plain) / sum(ours))) > 6


def _speed(path: np.ndarray) -> float:
    return float(np.abs(np.diff(path[:, :2], n=2, axis=0)).mean())


def test_a_static_clip_with_noise_comes_back_untouched():
    noise = torch.Generator().manual_seed(0)
    video = (footage(np.zeros((8, 4))) + 0.01 * torch.randn(8, 3, *SIZE, generator=noise)).clamp(0, 1)
    for method in ("fast-stab", "similarity"):
        made = stabilize(Clip.from_tensor(video, 24), method)
        assert all(torch.equal(a.rgb, b) for a, b in zip(made, video, strict=True))
        assert made.source.report.still == 1


def test_any_part_equals_the_same_part_of_the_whole(model, shaken, steady):
    video, made = shaken[0], steady[0]
    again = StabilizedSource(Clip.from_tensor(video, 24).source, model, 0.5, "part")
    part = torch.stack([frame.rgb for frame in again.frames(22, 25)])
    assert torch.equal(part, made[22:25])


def test_a_cut_divides_the_path():
    first, second = footage(hand(10, 24, SIZE[1], 0)), 1 - footage(hand(10, 24, SIZE[1], 1)) ** 3
    made = stabilize(Clip.from_tensor(torch.cat([first, second * torch.tensor([1.0, 0.3, 0.1]).view(3, 1, 1)]), 24),
                     "similarity")  # fmt: skip
    spans = made.source.analyse()
    assert [(span.start, span.stop) for span in spans] == [(0, 10), (10, 20)]
    assert made.source.report.cuts == 1


def test_frames_without_anything_to_follow_move_as_their_neighbours_do(caplog):
    video = footage(hand(12, 24, SIZE[1], 2))
    video[6] = video[6].flip(-1, -2)  # the same colours, so no cut
    with caplog.at_level(logging.WARNING, "frameloom"):
        made = stabilize(Clip.from_tensor(video, 24))
        made.source.analyse()
    assert made.source.report.lost >= 1
    assert "nothing to follow" in caplog.text


def test_the_flow_is_whatever_is_given(shaken):
    calls = []

    def none(first, second):
        calls.append(first.shape)
        return torch.zeros(2, *first.shape[-2:])

    clip = Clip.from_tensor(shaken[0][:6], 24)
    made = stabilize(clip, flow=none)
    assert torch.equal(next(iter(made)).rgb, shaken[0][0])  # no motion seen: nothing to steady
    assert calls
    with pytest.raises(InputError, match="similarity follows points"):
        stabilize(clip, "similarity", flow=none)


def test_memory_is_that_of_a_window(model, shaken):
    clip = Clip.from_tensor(torch.cat([shaken[0], shaken[0].flip(0)]), 24)
    source = StabilizedSource(clip.source, model, 0.5, "held")
    shot = source.analyse()[0].shot
    for _ in source.frames(40, 46):
        assert len(shot._small) <= 2 * model.reach + 3
        assert len(shot._fields) <= 4


def test_similarity_crops_by_as_much_as_hides_the_border(shaken):
    source = StabilizedSource(Clip.from_tensor(shaken[0], 24).source, Similarity(), 0.5, "crop")
    shot = source.analyse()[0].shot
    assert 1 < shot.zoom <= 1.2
    assert shot._hidden(shot.zoom)
    assert not shot._hidden(shot.zoom - 0.006)


def test_outpainting_keeps_what_is_known_and_continues_a_similarity(model):
    flow = similarity_flow(torch.tensor([[2.0, 1.0, 0.05, 0.03]], dtype=torch.float64), 48, 64).float()
    known = torch.zeros(1, 1, 48, 64)
    known[..., 6:-6, 8:-8] = 1
    with torch.inference_mode():
        made = model.outpaint(flow * known, known)
    assert torch.equal(made * known, flow * known)
    assert float((made - flow).norm(dim=1).max()) < 0.5


def test_the_network_learns_and_beats_the_similarity_on_fields_it_never_saw(model):
    batch = Fields(900_001).batch(list(range(8)), 0.0)
    with torch.inference_mode():
        made = model.outpaint(batch["given"], batch["known"])
    outside = 1 - batch["known"]
    error = ((made - batch["flow"]).norm(dim=1, keepdim=True) * outside).sum()
    assert float(error) < 0.9 * float((batch["flow"].norm(dim=1, keepdim=True) * outside).sum())
    torch.manual_seed(0)
    fresh = FastStab(FastStab.preset("tiny"))
    optimiser = torch.optim.Adam(fresh.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = fresh.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_bad_input_is_one_line(caplog):
    clip = Clip.from_tensor(canvas()[None, :, :96, :128].repeat(6, 1, 1, 1), 24)
    with pytest.raises(InputError, match=r"--smoothness 1.5: from 0"):
        stabilize(clip, smoothness=1.5)
    with pytest.raises(InputError, match="dis is a method for interpolate, not for stabilize"):
        stabilize(clip, "dis")
    with pytest.raises(InputError, match="similarity has no weights"):
        stabilize(clip, "similarity", weights="tiny")
    with pytest.raises(InputError, match="--data sintel"):
        FastStab.dataset("sintel:x", "tiny", 0)
    with caplog.at_level(logging.WARNING, "frameloom"):
        assert stabilize(clip[:3])[:].info == clip.info
    assert "too few to steady" in caplog.text


def test_smoothness_nothing_changes_nothing(shaken):
    clip = Clip.from_tensor(shaken[0][:8], 24)
    assert all(torch.equal(a.rgb, b.rgb) for a, b in zip(stabilize(clip, smoothness=0), clip, strict=True))


def test_the_verb_writes_a_video_with_its_sound(tmp_path):
    source = make(tmp_path / "in.mp4", moving(12, 64, 96), audio=True)
    done = CliRunner().invoke(app, ["stabilize", str(source), str(tmp_path / "out.mp4"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["method"], facts["frames"], facts["shots"]) == ("fast-stab", 12, 1)
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_the_ends_of_a_path_are_smoothed_like_its_middle():
    t = np.arange(60.0)
    pan, shake = np.stack([3 * t, -t], 1), np.stack([np.cos(t), np.cos(1.3 * t)], 1)
    left = np.abs(smooth(pan + shake, 8.0) - pan)
    assert np.abs(smooth(pan, 8.0) - pan).max() < 1e-9
    assert left[[0, -1]].max() < 0.35
    assert left.max() < 0.35
    middle = np.convolve((pan + shake)[:, 0], kernel(6.0), "valid")
    assert smooth(pan + shake, 6.0)[18:42, 0] == pytest.approx(middle)
    assert smooth(pan[:1], 8.0) == pytest.approx(pan[:1])


@pytest.mark.parametrize("method", ["fast-stab", "similarity"])
@pytest.mark.parametrize("upright", [False, True])
def test_black_bars_stand_still_while_the_picture_inside_them_is_steadied(method, upright, caplog):
    rng = np.random.default_rng(0)
    large = cv2.resize(rng.random((20, 26, 3)).astype(np.float32), (96, 80), interpolation=cv2.INTER_CUBIC)
    shakes = rng.integers(0, 7, (14, 2))
    inner = np.stack([large[y : y + 48, x : x + 64].clip(0.15, 1) for x, y in shakes])
    framed = np.full((14, 96 if upright else 48, 64 if upright else 112, 3), 0.01, np.float32)
    rows, columns = (slice(24, 72), slice(0, 64)) if upright else (slice(0, 48), slice(24, 88))
    framed[:, rows, columns] = inner
    clip = Clip.from_tensor(torch.from_numpy(framed).permute(0, 3, 1, 2), 25)
    steady = stabilize(clip, method=method, smoothness=1.0)
    assert "black bars around 64x48 pixels" in caplog.text
    made, given = steady.tensor(), clip.tensor()
    bars = torch.ones(made.shape[2:], dtype=torch.bool)
    bars[rows, columns] = False
    assert torch.equal(made[..., bars], given[..., bars])
    assert not torch.equal(made, given)
    assert next(steady.frames(5)).rgb.equal(made[5])
