"""Optical flow: the engine's exact properties, the policies', the driver's, and the verb."""

import itertools
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import nn
from typer.testing import CliRunner

import frameloom
from frameloom.cli.app import app
from frameloom.errors import InputError
from frameloom.memory import peak
from frameloom.motion.consistency import confidence
from frameloom.motion.correlation import CorrPyramid, LazyCorr
from frameloom.motion.dis import dis_flows
from frameloom.motion.flowio import encode_flow, read_flow
from frameloom.motion.mend import mended
from frameloom.motion.raft import sequence_loss
from frameloom.motion.twins import Twins
from frameloom.motion.update import Affinity, Aggregate
from frameloom.motion.warp import forward_splat
from frameloom.tasks.flow.base import estimate
from frameloom.tasks.flow.data import Files, FlowBatches, batches
from frameloom.tasks.flow.gma import GMA
from frameloom.tasks.flow.splatflow import SplatFlow, State, aligned
from frameloom.tasks.flow.streamflow import StreamFlow
from frameloom.tasks.flow.tiles import Tiled, spans
from frameloom.tasks.flow.videoflow import VideoFlow
from frameloom.tasks.interpolation.dis import DIS
from frameloom.training.pretrained import load, shipped
from frameloom.video.clip import Clip, TensorSource
from frameloom.world import WorldDataset
from media import make, moving


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def scene(frames, height, width):
    """A video (1, t, 3, h, w) of one picture that moves by a pixel a frame: no cut in it."""
    picture = torch.nn.functional.interpolate(rand(1, 3, 7, 9), (height, width + frames), mode="bicubic").clamp(0, 1)
    return torch.stack([picture[0, :, :, k : k + width] for k in range(frames)])[None]


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
    found = estimate(model, scene(frames, 34, 45), backward=True)
    assert found.fwd.shape == found.bwd.shape == (1, frames - 1, 2, 34, 45)
    assert found.valid.all()


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


class Local:
    """A flow that hangs on a pixel's own colours alone, of the frame and of the two after it."""

    multiple, least = 8, 16

    def stream(self, frames, backward=False):
        held = []
        for frame in itertools.chain(frames, [None, None]):
            held.append(frame)
            if len(held) > 3:
                held.pop(0)
            if len(held) == 3 and held[1] is not None:
                last = held[1] if held[2] is None else held[2]
                yield held[1][:2] - held[0][:2] + last[1:], held[0][:2] if backward else None


@pytest.mark.parametrize(("height", "width"), [(104, 240), (240, 104), (120, 112), (400, 304)])
def test_tiles_cover_a_picture_and_what_is_local_comes_out_as_without(height, width):
    video = rand(1, 5, 3, height, width)
    whole, parts = estimate(Local(), video, True), estimate(Tiled(Local(), 120), video, True)
    assert torch.allclose(whole.fwd, parts.fwd, atol=1e-6)
    assert torch.allclose(whole.bwd, parts.bwd, atol=1e-6)
    for length in (height, width):
        places = spans(length, 120, 8)
        assert places[0][0] == 0
        assert places[-1][1] == length
        assert all(start % 8 == 0 for start, _ in places)
        assert all(after[0] <= before[1] - 88 for before, after in itertools.pairwise(places))


def test_tiles_hold_no_more_frames_than_the_method_looks_at():
    alive = weakref.WeakSet()

    def frames(count):
        for _ in range(count):
            frame = rand(3, 104, 240)
            alive.add(frame)
            yield frame

    most = 0
    for _ in Tiled(Local(), 120).stream(frames(12)):
        most = max(most, len(alive))
    assert 1 <= most <= 2


def test_a_learned_method_in_tiles_sees_what_the_whole_picture_shows_in_less_memory():
    video, model = scene(3, 128, 192), load("gma")
    whole, parts = (estimate(one, video).fwd for one in (model, Tiled(model, 128)))
    assert float((whole - parts).norm(dim=2).mean()) < 0.1
    assert peak(lambda: estimate(Tiled(model, 128), video)) < 0.8 * peak(lambda: estimate(model, video))


def test_a_tile_that_is_too_small_is_refused():
    with pytest.raises(InputError, match="--tile 64: tiles share 96 pixels"):
        Tiled(Local(), 64)


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


@torch.no_grad()
@pytest.mark.parametrize("frames", [10, 13])
def test_centres_of_a_later_window_are_what_a_whole_clip_gives_within_reach(frames):
    model = made(VideoFlow)
    object.__setattr__(model.config, "refinements", 1)
    video = rand(1, frames, 3, 32, 48)
    found = [flow for flow, _ in model.stream(iter(video[0]))]
    whole = model(video, 1, last=True)[0][0][0]  # forward flows of frames 1 to t - 2
    assert len(found) == frames - 1
    for k in range(1, frames - 1):
        assert torch.allclose(found[k], whole[k - 1], atol=1e-4), k


def test_a_stream_of_another_resolution_begins_anew_with_a_note(caplog):
    model = made(SplatFlow)
    _, state = model.step(rand(1, 3, 32, 48), rand(1, 3, 32, 48, seed=1))
    small = rand(1, 3, 24, 40), rand(1, 3, 24, 40, seed=1)
    flow, _ = model.step(*small, state)
    assert torch.equal(flow, model.step(*small)[0])
    assert "resolution has changed" in caplog.text


def tree(root, files):
    """Pictures of 8x6 (grey by their number) and flows whose x is their number, at those paths."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value[0] == "picture":
            cv2.imwrite(str(path), np.full((6, 8, 3), value[1], np.uint8))
        elif path.suffix == ".pfm":
            rows = np.zeros((6, 8, 3), "<f4")
            rows[..., 0] = value[1]
            path.write_bytes(b"PF\n8 6\n-1.0\n" + rows.tobytes())
        else:
            flow = torch.zeros(2, 6, 8)
            flow[0] = value[1]
            path.write_bytes(encode_flow(flow, torch.ones(6, 8, dtype=torch.bool), path.suffix[1:]))
    return root


LAYOUT = {
    "chairs": {"data/00001_img1.ppm": ("picture", 1), "data/00001_img2.ppm": ("picture", 2),
               "data/00001_flow.flo": ("flow", 1)},
    "things": {f"frames_cleanpass/TRAIN/A/0000/left/{k:04}.png": ("picture", k) for k in (6, 7, 8)}
    | {f"optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_{k:04}_L.pfm": ("flow", k) for k in (6, 7)}
    | {f"optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_{k:04}_L.pfm": ("flow", -k) for k in (7, 8)},
    "sintel": {f"training/clean/alley/frame_{k:04}.png": ("picture", k) for k in (1, 2, 3)}
    | {f"training/flow/alley/frame_{k:04}.flo": ("flow", k) for k in (1, 2)},
    "kitti": {f"training/image_2/000003_{k:02}.png": ("picture", k) for k in (10, 11)}
    | {"training/flow_occ/000003_10.png": ("flow", 10)},
    "hd1k": {f"hd1k_input/image_2/000001_{k:04}.png": ("picture", k) for k in (1, 2, 3)}
    | {f"hd1k_flow_gt/flow_occ/000001_{k:04}.png": ("flow", k) for k in (1, 2)},
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUT)
@pytest.mark.parametrize("frames", [2, 3])
def test_published_data_sets_are_read_from_their_own_folders(tmp_path, kind, frames):
    folder = tree(tmp_path, LAYOUT[kind])
    if kind == "chairs" and frames > 2:
        with pytest.raises(InputError, match="FlyingChairs has pairs"):
            batches(f"chairs:{folder}", frames, (6, 8), 0)
        return
    clips = batches(f"{kind}:{folder}", frames, (6, 8), 0).clips
    assert len(clips) == {"chairs": 1, "kitti": 1}.get(kind, 4 - frames)
    clip = clips[0]
    assert clip["video"].shape == (frames, 3, 6, 8)
    for gap in range(frames - 1):
        if clip["valid"][gap].any():  # the flow into the next picture is named by the picture that it begins at
            assert torch.allclose(clip["flow"][gap, 0], torch.full((6, 8), float(clip["video"][gap].mean() * 255)),
                                  atol=0.02)  # fmt: skip
            assert not clip["flow"][gap, 1].any()
    assert clip["valid"][-1].all()
    if kind == "things":
        assert (clip["backward"][:, 0] == -(clip["video"][1:].mean((1, 2, 3)) * 255).round()[:, None, None]).all()


def test_a_folder_of_another_layout_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no clip of 3 frames"):
        batches(f"sintel:{tmp_path}", 3, (6, 8), 0)
    with pytest.raises(InputError, match="flow is learnt from world"):
        batches("vimeo:somewhere", 2, (6, 8), 0)


def test_the_command_says_what_is_wrong_and_leaves_nothing(tmp_path):
    path = tmp_path / "in.mp4"
    make(path, moving(6))
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("mine")
    for extra, said in ((["--method", "raft"], "weights"), (["--format", "jpg"], "--format jpg"),
                        (["--range", "0s:0.03s"], "at least 2 frames")):  # fmt: skip
        result = CliRunner().invoke(app, ["flow", str(path), str(tmp_path / "out"), *extra])
        assert isinstance(result.exception, InputError)
        assert said in str(result.exception)
        assert not (tmp_path / "out").exists()
    assert isinstance(CliRunner().invoke(app, ["flow", str(path), str(full)]).exception, InputError)
    assert [p.name for p in full.iterdir()] == ["kept.txt"]
    rest = ["--overwrite", "--format", "npz", "--bidirectional"]
    result = CliRunner().invoke(app, ["flow", str(path), str(full), *rest])
    assert result.exit_code == 0, result.output
    assert len(list(full.glob("*.npz"))) == 10
    assert (full / "flow.mp4").is_file()
    assert not (full / "kept.txt").exists()


def test_the_command_looks_in_tiles(tmp_path):
    path = tmp_path / "in.mp4"
    make(path, moving(2, 128, 304))
    for folder, extra in (("whole", []), ("tiles", ["--tile", "256"])):
        result = CliRunner().invoke(app, ["flow", str(path), str(tmp_path / folder), "-m", "dis", *extra])
        assert result.exit_code == 0, result.output
    whole, tiled = (read_flow(next((tmp_path / folder).glob("*.flo")))[0] for folder in ("whole", "tiles"))
    assert whole.shape == tiled.shape == (2, 128, 304)
    assert not torch.equal(whole, tiled)
    small = CliRunner().invoke(app, ["flow", str(path), str(tmp_path / "small"), "--tile", "64"])
    assert isinstance(small.exception, InputError)
    assert "--tile 64" in str(small.exception)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("way", ["verb", "python"])
def test_a_method_that_refines_can_be_told_how_often(tmp_path, way):
    path = tmp_path / "in.mp4"
    make(path, moving(2, 64, 96))
    found = {}
    for steps in (None, 1, 6):  # the shipped weights refine six times
        if way == "python":
            found[steps] = frameloom.flow(frameloom.read(path), "gma", steps=steps).tensor().fwd[0, 0]
            continue
        flags = [] if steps is None else ["--steps", str(steps)]
        result = CliRunner().invoke(app, ["flow", str(path), str(tmp_path / f"{steps}"), "-m", "gma", *flags])
        assert result.exit_code == 0, result.output
        found[steps] = read_flow(next((tmp_path / f"{steps}").glob("*.flo")))[0]
    assert torch.equal(found[None], found[6])
    assert not torch.equal(found[None], found[1])
    refused = (
        ("gma", 0, "--steps 0: a flow takes one step or more; gma takes 6 of itself"),
        ("gma", -3, "--steps -3: a flow takes"),
        ("dis", 3, "--steps 3: dis does not refine"),
    )
    for method, steps, said in refused:
        result = CliRunner().invoke(app, ["flow", str(path), str(tmp_path / "no"), "-m", method, "--steps", str(steps)])
        assert isinstance(result.exception, InputError)
        assert said in str(result.exception)
        assert not (tmp_path / "no").exists()


def test_pictures_of_a_flow_of_other_steps_are_other_pictures():
    clip = Clip.from_tensor(scene(2, 48, 64)[0], 8)
    made = [frameloom.flow(clip, "gma", steps=steps).to_rgb().source.fingerprint() for steps in (1, 2, 1)]
    assert made[0] == made[2] != made[1]


class Centred:
    """A method that looks at where it was put: its flow is the place of every pixel."""

    multiple, least = 32, 64

    def __init__(self, centred):
        self.centred = centred

    def stream(self, frames, backward=False):
        for _, after in itertools.pairwise(frames):
            assert after.shape[-2:] == (64, 96)
            x, y = torch.arange(96.0).expand(64, 96), torch.arange(64.0)[:, None].expand(64, 96)
            yield torch.stack([x, y]), None


@pytest.mark.parametrize(("centred", "corner"), [(True, (10, 5)), (False, (0, 0))])
def test_edges_are_repeated_where_the_method_says(centred, corner):
    flow = estimate(Centred(centred), scene(2, 53, 75)).fwd[0, 0]
    assert flow.shape == (2, 53, 75)
    assert flow[:, 0, 0].tolist() == [float(side) for side in corner]
    tiled = estimate(Tiled(Centred(centred), 128), scene(2, 53, 75)).fwd[0, 0]
    assert torch.equal(flow, tiled)


@torch.no_grad()
def test_without_a_chain_every_flow_of_splatflow_looks_back_one_pair():
    chained, single = made(SplatFlow), made(SplatFlow)
    single.config = replace(single.config, chained=False)
    frames = rand(5, 3, 32, 48)
    found = [[flow for flow, _ in model.stream(iter(frames))] for model in (chained, single)]
    for number in range(1, 4):  # as if the clip began two frames before
        triple = [flow for flow, _ in chained.stream(iter(frames[number - 1 : number + 2]))]
        assert torch.equal(found[1][number], triple[1])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.allclose(found[0][3], found[1][3], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "looks", "pairs"), [(StreamFlow, 8, 6), (SplatFlow, 7, 6), (GMA, 12, 6)])
def test_a_group_costs_one_estimate_a_flow_and_one_look_a_frame(kind, looks, pairs, monkeypatch):
    # Seven frames are two groups of four that share one: a window that slid by one frame would take 24 looks.
    model, seen, matched = made(kind), [], []
    features, correlate = model.features, model.correlate
    object.__setattr__(model.config, "refinements", 1)
    monkeypatch.setattr(model, "features", lambda video: (seen.append(video.shape[:2].numel()), features(video))[1])
    monkeypatch.setattr(model, "correlate", lambda a, b: (matched.append(len(a)), correlate(a, b))[1])
    assert len(list(model.stream(iter(rand(7, 3, 32, 48))))) == 6
    assert (sum(seen), sum(matched)) == (looks, pairs)


@torch.no_grad()
def test_a_lone_centre_hears_nothing_and_several_hear_each_other(monkeypatch):
    model, video = made(VideoFlow), rand(1, 5, 3, 32, 48)
    three, five = (model(clip, 3, last=True)[0][0] for clip in (video[:, :3], video))
    zeros = lambda state, flows, centres: (torch.zeros_like(state), torch.zeros_like(state))  # noqa: E731
    monkeypatch.setattr("frameloom.tasks.flow.videoflow._fetch", zeros)
    deaf = [model(clip, 3, last=True)[0][0] for clip in (video[:, :3], video)]
    assert torch.equal(deaf[0], three)
    assert not torch.equal(deaf[1], five)


@torch.no_grad()
def test_a_stream_of_splatflow_takes_the_same_memory_at_any_length():
    model = made(SplatFlow)
    object.__setattr__(model.config, "refinements", 1)
    frames = rand(4, 3, 32, 48)

    def most(count):
        return peak(lambda: [None for _ in model.stream(frames[k % 4] for k in range(count))])

    assert most(12) <= 1.01 * most(4)


PUBLISHED = {
    ("videoflow", "paper"): (VideoFlow, {".encoder.convf1.": ".encoder.convf1_.",
                                         ".init_hidden_state": ".encoder.init_hidden_state"}),
    ("videoflow", "paper-bof"): (VideoFlow, {".encoder.convf1.": ".encoder.convf1_."}),
    ("splatflow", "paper"): (SplatFlow, {"_sp.": "_tf.", "update.": "update_block."}),
    ("streamflow", "paper"): (StreamFlow, {}),
}  # fmt: skip


@pytest.mark.parametrize(("method", "size"), PUBLISHED)
def test_tensors_come_in_by_their_published_names(method, size, monkeypatch):
    kind, renamed = PUBLISHED[method, size]
    with torch.device("meta"):
        wanted = kind(kind.preset(size)).state_dict()
    state = {key: torch.empty_like(value, device="cpu").fill_(number) for number, (key, value)
             in enumerate(wanted.items())}  # fmt: skip
    published = {}
    for key, value in state.items():
        for here, there in renamed.items():
            key = key.replace(here, there)
        published[key] = value
    published |= {"att.pos_emb.rel_height.weight": torch.zeros(3), "fnet.svt.norm.weight": torch.zeros(3)}
    monkeypatch.setattr("frameloom.tasks.flow.published.table", lambda path: published)
    monkeypatch.setattr(f"frameloom.tasks.flow.{method}.table", lambda path: published, raising=False)
    model = kind.load_official(Path("a file"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Stuttering(TensorSource):
    """Frames at given instants."""

    def __init__(self, video, instants):
        super().__init__(video, Fraction(8), "clip")
        self.info, self.instants = replace(self.info, regular=False), instants

    def times(self):
        return self.instants


def test_steps_of_unlike_length_are_noted(caplog):
    video, name = rand(4, 3, 32, 48), "frames are 100 to 200 ms apart"
    for instants, noted in (((0, 1, 2, 4), True), ((0, 1, 2, 3), False)):
        caplog.clear()
        frameloom.flow(Clip(Stuttering(video, [Fraction(k, 10) for k in instants])), "dis")
        assert (name in caplog.text) == noted


@torch.no_grad()
def test_two_frames_are_too_few_for_videoflow_and_it_says_what_it_does(caplog):
    model = made(VideoFlow)
    object.__setattr__(model.config, "refinements", 1)
    assert estimate(model, scene(2, 32, 48)).fwd.shape == (1, 1, 2, 32, 48)
    assert "both are repeated" in caplog.text


class OneClip(Files):
    """A picture that moves by four pixels to the right, with its flows."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        flow = torch.zeros(1, 2, 16, 16)
        flow[:, 0] = 4
        known = torch.ones(1, 16, 16, dtype=torch.bool)
        return {"video": rand(2, 3, 16, 16), "flow": flow, "backward": -flow, "valid": known, "backward_valid": known}


def test_a_batch_says_what_leaves_the_picture():
    batch = FlowBatches(OneClip([]), 2, (16, 16), 0).batch(list(range(8)), 0.0)
    moves = batch["flow"].flatten(1).any(1)
    assert moves.sum() >= 6  # now and then a clip stands still
    for name in ("hidden", "backward_hidden"):
        assert batch[name][moves].float().mean() == 0.25
        assert not batch[name][~moves].any()


def test_hidden_pixels_weigh_more_and_unlabelled_ones_nothing():
    config = GMA.preset("tiny")
    truth, valid, hidden = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2).bool(), torch.zeros(1, 1, 2, 2).bool()
    estimate_one = truth + 1
    plain = sequence_loss([estimate_one], truth, valid, hidden, config)
    hidden[..., 0, 0] = True
    stressed = sequence_loss([estimate_one], truth, valid, hidden, config)
    assert float(stressed / plain) == pytest.approx((3 + 1 + config.stress) / 4)
    valid[..., 0, 0] = False
    assert float(sequence_loss([estimate_one], truth, valid, hidden, config)) == pytest.approx(0.75)
    twice = sequence_loss([estimate_one, truth], truth, valid, hidden, config)
    assert float(twice) == pytest.approx(0.75 * config.gamma)


SHIPPED = [name for name in ("gma", "splatflow", "streamflow", "videoflow", "skflow", "raft") if shipped(name)]


@torch.no_grad()
@pytest.mark.parametrize("method", SHIPPED)
def test_what_stands_still_and_what_moves_evenly_is_seen_so(method):
    photo = torch.from_numpy(astronaut()[100:228, 100:300].copy()).permute(2, 0, 1).float() / 255
    model = load(method)
    still = estimate(model, torch.stack([photo[..., 9:137]] * 4)[None], backward=True)
    moved = estimate(model, torch.stack([photo[..., 20 - 3 * k : 148 - 3 * k] for k in range(5)])[None], backward=True)
    way = torch.tensor([3.0, 0.0])[:, None, None]
    for flow, truth, allowed in ((still.fwd, 0 * way, 0.05), (still.bwd, 0 * way, 0.05), (moved.fwd, way, 0.15),
                                 (moved.bwd, -way, 0.15)):  # fmt: skip
        # videoflow has no third frame at the ends of a clip.
        inner = flow[:, 1:-1] if method == "videoflow" else flow
        assert torch.linalg.vector_norm(inner - truth, dim=2).mean() < allowed


@torch.no_grad()
def test_in_use_what_dis_finds_both_ways_is_kept_and_in_training_it_is_not():
    photo = torch.from_numpy(astronaut()[100:164, 100:220].copy()).permute(2, 0, 1).float() / 255
    first, second = photo[None, ..., 5:101], photo[None, ..., 2:98]
    model, there, back = made(GMA), dis_flows(first, second), dis_flows(second, first)
    sure = confidence(there, back, model.config.trust).expand_as(there) > 0.999
    assert 0.3 < float(sure.float().mean()) < 1
    kept = model(first, second, last=True)[0]
    assert float((kept - there)[sure].abs().max()) < 0.01
    assert float((kept - there)[~sure].abs().max()) > 0.1
    guess = model.guess(first, second)
    assert torch.equal(guess.fine, mended(there, back, first, second))
    assert not torch.equal(guess.fine, there)
    assert guess.keep is not None
    guess = model.train().guess(first, second)
    assert torch.equal(guess.fine, there)
    assert guess.keep is None


def passing(height=64, width=96, step=6, alike=False):
    """A textured square that passes over a plain of another colour: both pictures, the flow, and what gets hidden."""
    plain = torch.nn.functional.interpolate(rand(1, 3, height // 2, width // 2), (height, width), mode="bicubic")
    square = torch.nn.functional.interpolate(rand(1, 3, 8, 8, seed=1), (24, 24), mode="bicubic")
    plain, square = 0.5 * plain.clamp(0, 1), square.clamp(0, 1)
    square = 0.5 * square if alike else 0.6 + 0.4 * square
    first, second = plain.clone(), plain.clone()
    first[..., 20:44, 30:54], second[..., 20:44, 30 + step : 54 + step] = square, square
    flow = torch.zeros(1, 2, height, width)
    flow[:, 0, 20:44, 30:54] = step
    hidden = torch.zeros(height, width, dtype=torch.bool)
    hidden[20:44, 54 : 54 + step] = True
    return first, second, flow, hidden


@pytest.mark.parametrize("crop", [(64, 96), (61, 95)])
def test_what_is_hidden_is_mended_from_what_looks_alike_and_what_is_found_stays(crop):
    first, second, flow, hidden = (part[..., : crop[0], : crop[1]] for part in passing())
    wrong = flow.clone()
    wrong[:, 0, hidden] = 6.0  # as if it moved with the square
    back = -torch.stack([forward_splat(flow[:, k : k + 1], flow, "average")[0][:, 0] for k in range(2)], 1)
    made = mended(wrong, back, first, second)
    error = torch.linalg.vector_norm(made - flow, dim=1)[0]
    assert float(error[hidden].mean()) < 1.5  # it was 6
    far = torch.ones(crop, dtype=torch.bool)
    far[16:48, 26:66] = False
    assert float(error[far].max()) < 1e-3
    assert float(error[24:40, 36:46].max()) < 0.05


def test_a_flow_that_explains_the_picture_stays_though_nothing_confirms_it():
    first, second, flow, _ = passing(alike=True)
    back = torch.zeros_like(flow)  # right for the plain; the square is on no way back
    kept = mended(flow, back, first, second)
    assert float((kept - flow)[..., 24:40, 34:50].abs().mean()) < 0.5
    lost = mended(flow / 2, back, first, second)  # confirmed no better, and explains nothing
    assert float(lost[..., 24:40, 34:50].abs().mean()) < 0.5 * 1.5


def test_the_way_back_is_the_way_there_of_pictures_in_turn():
    first, second, _, _ = passing()
    there = estimate(DIS(), torch.stack([first, second], 1), backward=True)
    turned = estimate(DIS(), torch.stack([second, first], 1), backward=True)
    assert torch.equal(there.bwd, turned.fwd)
    assert torch.equal(there.fwd, turned.bwd)


@torch.no_grad()
def test_on_scenes_of_the_world_mending_takes_error_away():
    clip = WorldDataset("motion", 2, 96, 128, seed=78, length=8, motion=8.0, outputs=("rgb", "flow")).batch(range(8))
    first, second = clip["rgb"].unbind(1)
    there, back = dis_flows(first, second), dis_flows(second, first)
    plain, better = (float(torch.linalg.vector_norm(flow - clip["flow"][:, 0], dim=1).mean())
                     for flow in (there, mended(there, back, first, second)))  # fmt: skip
    assert better < 0.95 * plain


@torch.no_grad()
def test_what_is_kept_of_a_frame_is_what_reading_it_again_gives():
    model, video = made(SplatFlow), rand(3, 1, 3, 32, 48)
    _, state = model.step(video[0], video[1])
    kept, read = (model.step(video[1], video[2], one)[0] for one in (state, state._replace(features=None)))
    assert torch.allclose(kept, read, atol=1e-4)


@torch.no_grad()
def test_attention_over_cells_keeps_no_square_of_them():
    cells, block = 48 * 64, Aggregate(32)
    look = Affinity(32)(rand(1, 32, 48, 64))
    assert peak(lambda: block(look, rand(1, 32, 48, 64))) < cells**2 * 4 / 4
