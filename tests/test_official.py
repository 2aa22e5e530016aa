"""Checkpoints of HNeRV's authors: the same numbers as their own code, and from file to video on the command line."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import seeded
from frameloom.bitstream.container import parse
from frameloom.cli.app import app
from frameloom.errors import InputError
from frameloom.tasks.compression.base import compress, decompress, inspect
from frameloom.tasks.compression.boost_nerv import BoostNeRV
from frameloom.tasks.compression.hnerv import HNeRV, NeRV
from frameloom.tasks.compression.nerv import Config, encoded
from frameloom.tasks.compression.official import Official
from frameloom.training.pretrained import load
from frameloom.video.clip import Clip
from frameloom.video.reader import read

FRAMES = 5
STRIDES = (4, 3, 2)


def layers(first: int, inside: int, widths: list[int], kernels: list[int]) -> dict[str, tuple[int, ...]]:
    """The decoder's shapes by the authors' names."""
    shapes = {"decoder.0.conv.downconv": (first, inside, 1, 1), "head_layer": (3, widths[-1], 3, 3)}
    for k, (stride, kernel) in enumerate(zip(STRIDES, kernels, strict=True), start=1):
        shapes[f"decoder.{k}.conv.upconv.0"] = (widths[k] * stride**2, widths[k - 1], kernel, kernel)
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in shapes.items() for kind in ("weight", "bias")}  # fmt: skip


def encoder() -> dict[str, tuple[int, ...]]:
    shapes, widths = {}, [3, 64, 64, 16]
    for stage, stride in enumerate(STRIDES):
        before, after = widths[stage : stage + 2]
        norm, down = (1, 0) if stage == 0 else (0, 1)
        shapes[f"downsample_layers.{stage}.{down}.weight"] = (after, before, stride, stride)
        shapes[f"downsample_layers.{stage}.{down}.bias"] = (after,)
        kinds = {"dwconv": (after, 1, 7, 7), "pwconv1": (4 * after, after), "pwconv2": (after, 4 * after)}
        for name, shape in kinds.items():
            shapes[f"stages.{stage}.0.{name}.weight"], shapes[f"stages.{stage}.0.{name}.bias"] = shape, shape[:1]
        shapes[f"stages.{stage}.0.gamma"] = (after,)
        for name, width in ((f"downsample_layers.{stage}.{norm}", after if stage == 0 else before),
                            (f"stages.{stage}.0.norm", after)):  # fmt: skip
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return {f"encoder.{name}": shape for name, shape in shapes.items()}


HNERV = layers(25, 16, [25, 21, 18, 15], [1, 3, 5])
NERV = layers(30 * 6, 160, [30, 15, 12, 12], [3, 3, 3])


def quantised(value: torch.Tensor, bits: int, axis: int | None) -> dict[str, torch.Tensor]:
    """Their form: one pair of side numbers is float32, pairs along an axis are float16."""
    low, high = (value.min(), value.max()) if axis is None else (value.amin(axis, True), value.amax(axis, True))
    scale = (high - low) / (2**bits - 1)
    if axis is not None:
        low, scale = low.half(), scale.half()
    symbols = ((value - low) / scale).round().clamp(0, 2**bits - 1)
    return {"quant": symbols.to(torch.uint8), "min": low, "scale": scale}


@pytest.fixture
def video() -> Clip:
    return Clip.from_tensor(seeded.video(FRAMES, 48, 72) / 255, 25)


@pytest.fixture
def files(tmp_path):
    """Their quantised file, their training state, and that of their NeRV."""
    table = seeded.weights(HNERV)
    along = {name for name, shape in HNERV.items() if name.startswith("decoder.") and math.prod(shape) > 2000}
    model = {name: quantised(value, 8, 0 if name in along else None) for name, value in table.items()}
    embed = torch.from_numpy(seeded.uniform("embed", FRAMES, 16, 2, 3)).float()
    torch.save({"embed": quantised(embed, 6, None), "model": model}, tmp_path / "quant_vid.pth")
    state = {f"module.{name}": value for name, value in (table | seeded.weights(encoder())).items()}
    torch.save({"epoch": 300, "state_dict": state, "optimizer": {"param_groups": [{"lr": 1e-3}]}},
               tmp_path / "state.pth")  # fmt: skip
    torch.save({"epoch": 300, "state_dict": seeded.weights(NERV)}, tmp_path / "nerv.pth")
    return tmp_path


# Made by the authors' own code on a CPU, of the weights and pictures of `seeded` in files of these layouts: strides
# 4, 3, 2, 48x72, five frames; of the first picture and the last (NeRV: the second and the last), in [0, 1], red first,
# at three rows and columns. Source: github.com/haochen-rye/HNeRV at 4872129.
QUANTISED = """0.50462 0.50564 0.50594 0.50168 0.49784 0.50667 0.50781 0.50441 0.50096
               0.50176 0.54269 0.50653 0.49883 0.47706 0.49855 0.50805 0.54257 0.50474"""
STATE = """0.49795 0.55018 0.50674 0.51452 0.41045 0.50221 0.50314 0.59542 0.50324
           0.49855 0.52768 0.51092 0.51506 0.44973 0.50359 0.50611 0.57035 0.50319"""
TIMED = """0.50112 0.47354 0.50928 0.49181 0.50546 0.49935 0.50890 0.49726 0.50714
           0.50173 0.50191 0.50609 0.49828 0.50186 0.50587 0.50254 0.52294 0.50354"""


def probes(pictures: torch.Tensor) -> torch.Tensor:
    height, width = pictures.shape[-2:]
    return pictures[..., [0, height // 3, height - 1], [0, width // 2, width - 1]].flatten()


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()])


def test_the_quantised_file_shows_what_the_authors_code_shows(files):
    clip = decompress(files / "quant_vid.pth")
    assert (clip.info.width, clip.info.height, len(clip), clip.rate) == (72, 48, FRAMES, 24)
    assert torch.allclose(probes(clip.tensor()[[0, -1]]), numbers(QUANTISED), atol=1.1e-5)


@torch.inference_mode()
def test_the_training_state_shows_what_the_authors_code_shows(files, video):
    network, _ = Official(HNeRV, files / "state.pth").with_clip(video)
    assert torch.allclose(probes(network(torch.tensor([0, 4]))), numbers(STATE), atol=1.1e-5)


@torch.inference_mode()
def test_their_nerv_shows_what_it_shows_there_with_its_own_frequencies(files, video):
    network, header = Official(NeRV, files / "nerv.pth").with_clip(video)
    assert network.config.single
    assert torch.allclose(probes(network(torch.tensor([1, 4]))), numbers(TIMED), atol=1.1e-5)
    again = NeRV.from_container(parse(network.to_bytes(header)))
    assert again.config.single
    again.config = Config(**vars(again.config) | {"single": False})
    assert (again(torch.arange(5)) - network(torch.arange(5))).abs().max() > 0.01


def test_frequencies_of_published_networks_are_rounded_as_there_and_ours_are_not():
    index = torch.tensor([1, 77, 131])
    rounded, exact = encoded(index, 132, single=True)[..., 0, 0], encoded(index, 132)[..., 0, 0]
    turns = (1.25 ** torch.arange(80) * math.pi).double() * (index.double() / 132)[:, None]
    assert torch.equal(rounded, torch.cat([turns.sin(), turns.cos()], 1).float())
    assert (rounded - exact).abs()[:, :20].max() < 1e-4
    assert (rounded - exact).abs().max() > 0.1


def test_a_network_of_ours_says_nothing_of_frequencies_in_its_file():
    config = NeRV.preset("tiny")
    assert "single" not in config.to_header()
    assert Config(**vars(config) | {"single": True}).to_header()["single"] is True


@pytest.mark.parametrize("how", ["as it is", "beside its video"])
def test_a_file_made_of_the_quantised_one_holds_the_same_numbers(files, video, tmp_path, how):
    network = load("hnerv", files / "quant_vid.pth")
    if how == "as it is":
        data = Official(HNeRV, files / "quant_vid.pth").as_file()
    else:
        compress(video, tmp_path / "out.flm", "hnerv", weights=files / "quant_vid.pth")
        data = (tmp_path / "out.flm").read_bytes()
        assert decompress(data).rate == 25
    again = HNeRV.from_container(parse(data))
    assert again.config == network.config
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert parse(data).header.reader == 2
    assert data[8:10] == b"\2\0", "readers of the first format say that it is newer"
    assert torch.equal(decompress(data).tensor(), decompress(files / "quant_vid.pth").tensor())


@pytest.mark.parametrize(("name", "method"), [("state.pth", "hnerv"), ("nerv.pth", "nerv")])
@pytest.mark.parametrize("frames", [2, 5])
def test_a_training_state_becomes_a_file_beside_a_video_of_any_length(files, video, tmp_path, name, method, frames):
    kind = {"hnerv": HNeRV, "nerv": NeRV}[method]
    compress(video[:frames], tmp_path / "out.flm", method, weights=files / name)
    back = decompress(tmp_path / "out.flm").tensor()
    assert parse((tmp_path / "out.flm").read_bytes()).header.reader == 1
    network, _ = Official(kind, files / name).with_clip(video[:frames])
    with torch.inference_mode():
        exact = network(torch.arange(frames))
    assert (back - exact).abs().max() < 0.03  # 8 bits a weight, 6 an embedding's number
    assert (back - exact).abs().mean() < 0.003


def test_a_network_of_a_cropped_video_takes_the_middle_of_the_frames(files, tmp_path):
    wide = seeded.video(FRAMES, 60, 90) / 255
    middle = Clip.from_tensor(wide[..., 6:54, 9:81].clone(), 25)
    compress(middle, tmp_path / "middle.flm", "hnerv", weights=files / "state.pth")
    compress(Clip.from_tensor(wide, 25), tmp_path / "cropped.flm", "hnerv", weights=files / "state.pth", fit="crop")
    whole = (decompress(tmp_path / name).tensor() for name in ("middle.flm", "cropped.flm"))
    assert torch.equal(*whole)


def test_files_play_from_the_command_line(files, video, tmp_path):
    run = CliRunner().invoke
    result = run(app, ["decompress", str(files / "quant_vid.pth"), str(tmp_path / "out.mkv"), "--codec", "ffv1"])
    assert result.exit_code == 0, result.output
    shown = read(tmp_path / "out.mkv")
    assert len(shown) == FRAMES
    assert (shown.tensor() - decompress(files / "quant_vid.pth").tensor()).abs().mean() < 0.02
    result = run(app, ["inspect", str(files / "quant_vid.pth"), "--json"])
    assert json.loads(result.output)["frames"] == FRAMES
    result = run(app, ["inspect", str(files / "state.pth")])
    assert "strides 4,3,2, channels 25,21,18,15; needs the video" in result.output
    assert inspect(files / "state.pth")["parameters"] == sum(map(math.prod, HNERV.values()))
    result = run(app, ["compress", str(tmp_path / "out.mkv"), str(tmp_path / "out.flm"), "-m", "hnerv",
                       "--weights", str(files / "state.pth")])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(decompress(tmp_path / "out.flm")) == FRAMES


@pytest.mark.parametrize(
    ("method", "name", "settings", "message"),
    [
        ("hnerv", "quant_vid.pth", {"size": 9000}, "--size: the network in --weights is fitted already"),
        ("hnerv", "quant_vid.pth", {"segment": 2}, "--segment: the network in --weights is fitted to the whole clip"),
        ("hnerv", "quant_vid.pth", {"fit": "stretch"}, "--fit stretch"),
        ("hnerv", "nerv.pth", {}, "not a checkpoint of hnerv; of nerv"),
        ("nerv", "state.pth", {}, "not a checkpoint of nerv: its layers do not follow"),
        ("boost-nerv", "state.pth", {}, "boost-nerv has no reader of published networks"),
        ("x264", "state.pth", {}, "--weights: x264 has no such setting"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(files, video, tmp_path, method, name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        compress(video, tmp_path / "out.flm", method, weights=files / name, **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.flm").exists()


@pytest.mark.parametrize(
    ("name", "frames", "height", "width", "message"),
    [
        ("quant_vid.pth", 4, 48, 72, "of a video of 5 frames; clip has 4"),
        ("quant_vid.pth", 5, 96, 72, "draws 72x48; clip is 72x96; --fit crop takes the middle"),
        ("quant_vid.pth", 5, 20, 72, "draws 72x48; clip is 72x20$"),
        ("nerv.pth", 5, 72, 72, "its first layer draws 6 pixels and would have to draw 9"),
    ],
)
def test_a_video_of_another_shape_is_refused(files, name, frames, height, width, message):
    clip = Clip.from_tensor(torch.zeros(frames, 3, height, width, dtype=torch.uint8), 25)
    with pytest.raises(InputError, match=message):
        Official(NeRV if name == "nerv.pth" else HNeRV, files / name).with_clip(clip)


def test_a_training_state_alone_says_what_it_needs(files):
    with pytest.raises(InputError, match="holds no embeddings, which are made of its video; give that too: frameloom"):
        decompress(files / "state.pth")


def test_a_layer_that_does_not_belong_is_named(files):
    stored = torch.load(files / "state.pth", weights_only=False)
    stored["state_dict"]["module.decoder.1.norm.weight"] = torch.ones(21)
    torch.save(stored, files / "state.pth")
    with pytest.raises(InputError, match=r"it has an unknown decoder\.1\.norm\.weight"):
        Official(HNeRV, files / "state.pth")


# The same of github.com/Xinjie-Q/Boosting-NeRV at d59ca91, its boosted HNeRV with embeddings of `seeded`: the second
# picture and the last.
BOOSTED = """0.43099 0.21355 0.42346 0.66659 0.90652 0.52193 0.57103 0.84101 0.66440
             0.45871 0.55098 0.50945 0.53007 0.60092 0.48856 0.54130 0.45272 0.56981"""


def boosted(single: bool) -> BoostNeRV:
    """The boosted network with seeded weights by the authors' names."""
    time = (32, 16)
    family = BoostNeRV.families["hnerv"] | {"time": time, "doubled": 2}
    network = BoostNeRV(
        Config(height=48, width=72, frames=FRAMES, strides=STRIDES, channels=25, single=single, **family)
    )
    affine = {f"{part}.{k}": f"SFT_{part}_conv{k // 2}" for part in ("scale", "shift") for k in (0, 2)}
    state = {"embeddings": torch.from_numpy(seeded.uniform("embed", FRAMES, 16, 2, 3)).float()}
    for name, value in network.state_dict().items():
        if name == "embeddings":
            continue
        kind, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if kind == "conditions":
            for ours, theirs in ({"before": "sft0", "between": "sft1"} | affine).items():
                inner = inner.replace(ours, theirs)
            theirs = f"decoder.{number}.sft_block.{inner}"
        elif kind == "blocks":
            theirs = f"decoder.{int(number) + 1}.conv.upconv.0.{inner.removeprefix('conv.')}"
        else:
            theirs = {"stem": f"decoder.0.conv.downconv.{rest}", "head": f"head_layer.{rest}",
                      "time": f"stem_t.{2 * int(number) if kind == 'time' else 0}.{inner}"}[kind]  # fmt: skip
        state[name] = seeded.tensor(theirs, *value.shape)
    network.load_state_dict(state)
    return network.eval()


@torch.inference_mode()
def test_the_boosted_network_shows_what_the_authors_shows_with_its_own_frequencies():
    there = boosted(single=True)(torch.tensor([1, 4]))
    assert torch.allclose(probes(there), numbers(BOOSTED), atol=1.1e-5)
    assert (boosted(single=False)(torch.tensor([1, 4])) - there).abs().max() > 0.01
