"""Every codec takes clips of every size from 1x1 and every length from 1; measures of pictures do too."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

import frameloom
from frameloom.cards import cards
from frameloom.errors import InputError
from frameloom.metrics import ms_ssim, ssim
from frameloom.tasks.compression import fit as fits
from frameloom.tasks.compression.base import compress, decompress
from frameloom.tasks.compression.fit import LOSSES, descend
from frameloom.tasks.compression.rd import measure
from frameloom.video.clip import Clip
from media import make, moving, tensor

# The quickest settings of every codec.
CODECS = {
    "hnerv": {"epochs": 1},
    "nerv": {"epochs": 1},
    "boost-nerv": {"epochs": 1},
    "nirvana": {"iterations": 2, "later": 1},
    "sem": {},
    "x264": {},
    "x265": {},
    "av1": {},
}
SIZES = [(1, 1), (2, 3), (7, 5), (320, 6), (16, 16)]


def small(frames: int, width: int, height: int) -> Clip:
    return Clip.from_tensor(tensor(moving(frames, height, width)).float() / 255)


def test_every_codec_is_tried_here():
    assert set(CODECS) == {card.id for card in cards().values() if "compress" in (card.verb, *card.also)}


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("method", CODECS)
def test_clips_of_any_size_and_length_go_to_a_file_and_back(tmp_path, method, width, height, frames):
    clip, path = small(frames, width, height), tmp_path / "out.flm"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compress(clip, path, method, **CODECS[method])
    shown = decompress(path).tensor()
    assert shown.shape == (frames, 3, height, width)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert [one.name for one in tmp_path.iterdir()] == ["out.flm"]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rate_stage_of_one_epoch_leaves_codes_that_the_coder_takes(tmp_path, frames, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compress(small(frames, 64, 48), tmp_path / "out.flm", "boost-nerv", epochs=1, base="nerv", seed=seed)
    assert decompress(tmp_path / "out.flm").tensor().isfinite().all()


@pytest.mark.parametrize("spread", [1e-9, 1e-3, 1.0, 1e3])
def test_scales_that_are_too_fine_for_their_tensor_are_made_coarser(spread):
    from frameloom.tasks.compression.boost_nerv import MAX_CODE, BoostNeRV

    network = BoostNeRV(BoostNeRV.preset("tiny"))
    network.scales = dict.fromkeys(network.state_dict(), 1e-7)
    for value in network.state_dict().values():
        value.copy_(spread * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    for levels in (16, 256):
        network.pack(levels)
        for name, value in network.state_dict().items():
            scale, runs = network.codes(name, value, levels)
            assert max(float(run.abs().max()) for run in runs) <= MAX_CODE
            assert scale > 0


@pytest.mark.parametrize("method", ["hnerv", "nerv", "boost-nerv"])
def test_the_learning_rate_that_an_error_advises_is_a_setting(tmp_path, method):
    clip = small(2, 16, 16)
    with pytest.raises(InputError, match=r"NaN or infinite at step \d; use a lower learning rate, such as --set learn"):
        compress(clip, tmp_path / "out.flm", method, epochs=4, learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []
    compress(clip, tmp_path / "out.flm", method, epochs=2, learning_rate=1e-5)
    for wrong in ({"learning_rate": 0}, {"learning_rate": -1.0}, {"batch": 0}):
        with pytest.raises(InputError, match=r"^--set (learning_rate|batch)="):
            compress(clip, tmp_path / "out.flm", method, **wrong)


# Measures


def noisy(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, height, width, generator=chance)
    return a, (a + 0.1 * torch.rand(a.shape, generator=chance)).clamp(0, 1)


@pytest.mark.parametrize("short", [1, 2, 5, 6, 10, 11, 12, 21, 22, 43, 44, 98, 99, 175, 176])
def test_structural_similarity_takes_every_size_and_has_a_gradient(short):
    for size in ((short, short), (short, 30), (200, short)):
        a, b = noisy(*size)
        for measured in (ssim, ms_ssim):
            b.requires_grad_(True)
            value = measured(b, a)
            assert 0 < value < 1
            assert torch.autograd.grad(value, b)[0].isfinite().all()
            assert measured(a, a).item() == pytest.approx(1, abs=1e-3)


def test_pictures_below_the_window_measure_as_those_with_their_edges_repeated():
    a, b = noisy(3, 8)
    wide = [F.pad(one, (0, 3, 0, 8), mode="replicate") for one in (a, b)]
    assert ssim(a, b) == ssim(*wide)
    assert ms_ssim(a, b) == ms_ssim(*wide) == pytest.approx(ssim(a, b).item(), abs=1e-6)


def test_a_scale_counts_from_the_side_on_that_the_docstring_names():
    for count, side in enumerate((22, 44, 99, 176), start=2):
        assert f" {side}" in ms_ssim.__doc__
        a, b = noisy(side, side)
        assert ms_ssim(a, b) != pytest.approx(ms_ssim(a[..., 1:, :], b[..., 1:, :]).item(), abs=1e-5), count


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_small_frames(tmp_path, loss):
    compress(small(2, 7, 5), tmp_path / "out.flm", "hnerv", epochs=1, loss=loss)


@pytest.mark.parametrize("method", ["x264", "boost-nerv"])
def test_rate_and_distortion_take_small_frames(method):
    point = measure(small(2, 7, 5), method, **CODECS[method])
    assert 0 < point.ms_ssim <= 1


# What is said


def test_sound_that_is_not_stored_is_said(tmp_path, caplog):
    make(tmp_path / "loud.mp4", moving(4), audio=True)
    make(tmp_path / "quiet.mp4", moving(4))
    for name, notes in (("loud", 1), ("quiet", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "frameloom"):
            compress(frameloom.read(tmp_path / f"{name}.mp4"), tmp_path / "out.flm", "x264")
        assert sum("sound or subtitles are not stored" in one.message for one in caplog.records) == notes


@pytest.mark.parametrize(("share", "notes"), [(0.35, 1), (0.95, 0), (1.9, 0)])
def test_minutes_are_those_of_the_clock_and_a_busy_machine_is_said(monkeypatch, caplog, share, notes):
    clock = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: clock[0])
        process_time = staticmethod(lambda: share * clock[0])

    monkeypatch.setattr(fits, "time", Clock)
    weight = torch.nn.Linear(1, 1)

    def loss_at(step):
        clock[0] += 1.0
        return weight.weight.square().sum()

    with caplog.at_level(logging.WARNING, "frameloom"):
        steps = descend(weight, [torch.optim.SGD(weight.parameters(), 0.1)], loss_at, steps=None, minutes=1.0)
    assert steps == 60
    assert sum("the machine was busy" in one.message for one in caplog.records) == notes
