"""Optical flow: the engine's exact properties, the policies', the driver's, and the verb."""

import itertools

import pytest
import torch
from torch import nn

import frameloom
from frameloom.errors import InputError
from frameloom.motion.correlation import CorrPyramid, LazyCorr
from frameloom.motion.flowio import encode_flow, read_flow
from frameloom.motion.twins import Twins
from frameloom.motion.warp import forward_splat
from frameloom.tasks.flow.base import estimate
from frameloom.tasks.flow.gma import GMA
from frameloom.tasks.flow.splatflow import SplatFlow, State, aligned
from frameloom.tasks.flow.streamflow import StreamFlow
from frameloom.tasks.flow.videoflow import VideoFlow
from frameloom.tasks.interpolation.dis import DIS
from frameloom.video.clip import Clip


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind, size="tiny"):
    """A network whose every parameter matters: what starts at zero is moved a little."""
    torch.manual_seed(0)
    model = kind(kind.preset(size)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("size", [(9, 12), (8, 8), (5, 7)])
def test_lazy_correlations_equal_dense_ones(size):
    first, second = rand(2, 16, *size), rand(2, 16, *size, seed=1)
    places = rand(2, 2, *size, seed=2) * 16 - 3
    dense, lazy = CorrPyramid(first, second, 2, 3)(places), LazyCorr(first, second, 2, 3)(places)
    assert torch.allclose(dense, lazy, atol=2e-5)


def test_the_first_axis_of_the_window_moves_x():
    second = torch.zeros(1, 1, 5, 5)
    second[0, 0, 2, 3] = 1
    places = torch.full((1, 2, 5, 5), 2.0)
    window = CorrPyramid(torch.ones(1, 1, 5, 5), second, 1, 1)(places)[0, :, 2, 2].view(3, 3)
    assert window.argmax() == 7  # (dx, dy) = (1, 0)


def test_stacking_adds_no_parameters_and_one_frame_is_one_frame():
    torch.manual_seed(0)
    alone = Twins((8, 16), (1, 2))
    stacked = Twins((8, 16), (1, 2), stacked=True)
    stacked.load_state_dict(alone.state_dict())
    assert torch.equal(alone(rand(2, 1, 3, 64, 64)), stacked(rand(2, 1, 3, 64, 64)))


@torch.no_grad()
def test_gaps_of_a_group_know_of_each_other_and_clips_of_a_batch_do_not():
    model, video = made(StreamFlow), rand(2, 4, 3, 32, 48)
    together = model(video, 2)[-1]
    assert torch.allclose(together[:1], model(video[:1], 2)[-1], atol=1e-4)
    other = video.clone()
    other[:, 3] = rand(2, 3, 32, 48, seed=5)
    assert (model(other, 2)[-1][:, 0] - together[:, 0]).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_centre_hears_of_one_more_frame_either_side_at_every_iteration(iterations):
    model, video = made(VideoFlow), rand(1, 7, 3, 32, 48)
    before = model(video, iterations, last=True)[0][0][:, 2]  # centre 3
    for frame in range(7):
        other = video.clone()
        other[:, frame] = rand(1, 3, 32, 48, seed=9)
        changed = not torch.equal(model(other, iterations, last=True)[0][0][:, 2], before)
        assert changed == (abs(frame - 3) <= iterations), frame


@torch.no_grad()
def test_splatflow_without_a_history_is_gma_bit_for_bit():
    splat = made(SplatFlow)
    gma = GMA(GMA.preset("tiny")).eval()
    renamed = {key.replace("update.", "update_block."): value for key, value in splat.state_dict().items()}
    gma.load_state_dict({key: renamed[key] for key in gma.state_dict()})
    first, second = rand(1, 3, 32, 48), rand(1, 3, 32, 48, seed=1)
    assert torch.equal(splat(first, second, None, 3)[0][-1], gma(first, second, 3)[-1])


def test_a_motion_feature_moves_by_whole_cells_exactly():
    motion = rand(1, 4, 5, 6)
    flow = torch.zeros(1, 2, 5, 6)
    flow[:, 0] = 2
    assert torch.equal(aligned(State(motion, flow))[..., 2:], motion[..., :-2])


@torch.no_grad()
@pytest.mark.parametrize("method", [DIS, GMA, SplatFlow, StreamFlow, VideoFlow])
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7])
def test_every_gap_has_a_flow_each_way(method, frames):
    model = method() if method is DIS else made(method)
    if method is not DIS:
        object.__setattr__(model.config, "refinements", 1)
    found = estimate(model, rand(1, frames, 3, 34, 45), backward=True)
    assert found.fwd.shape == found.bwd.shape == (1, frames - 1, 2, 34, 45)


@torch.no_grad()
def test_a_stream_in_parts_with_its_state_is_the_stream_in_one():
    model, video = made(SplatFlow), rand(5, 1, 3, 32, 48)
    state, parts = None, []
    for first, second in itertools.pairwise(video):
        flow, state = model.step(first, second, State(*(part.clone() for part in state)) if state else None)
        parts.append(flow[0])
    whole = [flow for flow, _ in model.stream(iter(video[:, 0]))]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("kind", ["flo", "npz", "png"])
def test_a_flow_file_comes_back(tmp_path, kind):
    flow, valid = rand(2, 5, 7) * 40 - 20, rand(5, 7, seed=1) > 0.3
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encode_flow(flow, valid, kind))
    back, known = read_flow(path)
    assert torch.equal(known, valid)
    assert ((back - flow).abs() * valid).max() <= (1 / 128 if kind == "png" else 0)


def test_the_verb_writes_a_folder_once_and_knows_a_cut(tmp_path):
    scene = torch.nn.functional.interpolate(rand(2, 3, 9, 12), (48, 64), mode="bicubic").clamp(0, 1)
    video = torch.stack([scene[0].roll(k, 2) for k in range(3)] + [1 - scene[1] * 0.2] * 2)
    made_flow = frameloom.flow(Clip.from_tensor(video, 8), "dis", bidirectional=True)
    found = made_flow.tensor()
    assert not found.fwd[~found.valid].any()
    folder = made_flow.save(tmp_path / "flow")
    assert len(list(folder.glob("*.flo"))) == 8
    assert (folder / "flow.mp4").is_file()
    with pytest.raises(InputError, match="is not empty"):
        made_flow.save(folder)
    with pytest.raises(InputError, match="at least 2 frames"):
        frameloom.flow(Clip.from_tensor(video[:1], 8), "dis")


def test_pixels_without_a_finite_flow_are_not_splatted():
    flow = torch.zeros(1, 2, 4, 5)
    flow[0, 0, 1, 1], flow[0, 1, 2, 3] = float("nan"), float("inf")
    image = rand(1, 3, 4, 5) + 1
    out, weight = forward_splat(image, flow, "sum")
    assert out.isfinite().all()
    assert [int(n) for n in (weight == 0).nonzero()[:, 2:].flatten()] == [1, 1, 2, 3]
