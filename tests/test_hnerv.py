"""HNeRV and NeRV: published sizes, the fit, files that decode by themselves, and what is refused."""

import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from frameloom.bitstream.container import Container, parse
from frameloom.cards import card
from frameloom.errors import InputError, Interrupted
from frameloom.metrics import psnr
from frameloom.tasks.compression import fit as fit_module
from frameloom.tasks.compression import segments
from frameloom.tasks.compression.base import compress, decompress, describe, inspect
from frameloom.tasks.compression.fit import LOSSES, fit, learning_rate_factor
from frameloom.tasks.compression.hnerv import HNeRV, NeRV
from frameloom.tasks.compression.inpaint import inpaint
from frameloom.tasks.compression.nerv import Config, Encoder, Learner, solve_width
from frameloom.training.pretrained import load
from frameloom.video.clip import Clip, Frame

PAPER = HNeRV.preset("paper")
SMALL = Config(height=16, width=32, frames=6, strides=(2, 2, 2), channels=10, lowest=6, embedding=4)


def moving(frames: int = 6, height: int = 16, width: int = 32) -> Clip:
    """A smooth random texture that slides by."""
    noise = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(noise, size=(height + 8, width + 16), mode="bicubic").clamp(0, 1)[0]
    views = [texture[:, k : k + height, 2 * k : 2 * k + width] for k in range(frames)]
    return Clip.from_tensor((torch.stack(views) * 255).round().to(torch.uint8), 25)


def parameters(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def untrained(method=HNeRV, config: Config = SMALL) -> HNeRV:
    """A network with random weights and embeddings."""
    torch.manual_seed(0)
    network = method(config)
    if not config.indexed:
        torch.nn.init.normal_(network.embeddings)
    return network.requires_grad_(False).eval()


def file_of(network: HNeRV, clip: Clip) -> bytes:
    return network.to_bytes(describe(clip, network.method, {}))


@pytest.fixture(scope="module")
def fitted() -> bytes:
    return HNeRV.encode(moving(), size=12_000, strides=(2, 2, 2), epochs=40)


@pytest.mark.parametrize(
    ("size", "channels", "widths", "body", "head"),
    [
        (350_000, 32, [32, 27, 22, 18, 15, 12], 312_503, 327),
        (750_000, 48, [48, 40, 33, 28, 23, 19], 718_740, 516),
        (1_500_000, 68, [68, 57, 48, 40, 33, 28], 1_487_517, 759),
        (3_000_000, 97, [97, 81, 68, 57, 48, 40], 3_011_603, 1_083),
    ],
)
def test_hnerv_has_the_published_widths_and_sizes(size, channels, widths, body, head):
    assert solve_width(size, PAPER) == channels
    config = replace(PAPER, channels=channels)
    assert config.widths == widths
    with torch.device("meta"):
        network = HNeRV(config)
    assert network.embeddings.numel() == 16_896
    assert parameters(network.head) == head
    assert parameters(network.stem) + parameters(network.blocks) == body
    assert parameters(network) == config.parameters == body + head + 16_896


@pytest.mark.parametrize(
    ("size", "channels", "body"),
    [(350_000, 15, 381_312), (750_000, 30, 756_441), (1_500_000, 54, 1_507_541), (3_000_000, 91, 2_986_264)],
)
def test_nerv_has_the_published_widths_and_sizes(size, channels, body):
    plan = NeRV.preset("paper")
    assert solve_width(size, plan) == channels
    config = replace(plan, channels=channels)
    with torch.device("meta"):
        network = NeRV(config)
    assert parameters(network) - parameters(network.head) == body
    assert parameters(network) == config.parameters


@pytest.mark.parametrize(
    ("height", "width", "frames", "strides", "size", "channels"),
    [
        (480, 960, 300, (5, 4, 3, 2, 2), 3_000_000, 110),
        (960, 1920, 300, (5, 4, 4, 3, 2), 3_000_000, 92),
        (720, 1280, 132, (5, 2, 2, 2, 2), 770_000, 59),
        (720, 1280, 132, (5, 2, 2, 2, 2), 3_050_000, 145),
    ],
)
def test_other_published_widths(height, width, frames, strides, size, channels):
    config = replace(PAPER, height=height, width=width, frames=frames, strides=strides)
    assert solve_width(size, config) == channels


@pytest.mark.parametrize(("method", "size"), [("hnerv", "paper"), ("nerv", "paper"), ("hnerv", "tiny")])
def test_presets_build_on_the_meta_device(method, size):
    cls = card(method, "compress").load_class()
    with torch.device("meta"):
        network = cls(cls.preset(size))
    assert not (size == "paper" and parameters(network) != card(method).paper_parameters)


def test_tiny_hnerv_and_tiny_nerv_are_of_one_size():
    one, other = (method.preset("tiny").parameters for method in (HNeRV, NeRV))
    assert abs(one - other) < 0.01 * one


def test_strides_are_the_published_ones_where_there_are_published_ones():
    assert HNeRV.plan(640, 1280, 132).strides == (5, 4, 4, 2, 2)
    assert HNeRV.plan(480, 960, 132).strides == (5, 4, 3, 2, 2)
    assert HNeRV.plan(960, 1920, 132).strides == (5, 4, 4, 3, 2)
    assert HNeRV.plan(64, 128, 32).strides == (4, 2, 2, 2)


@pytest.mark.parametrize("size", [(256, 340), (360, 640), (1080, 1920), (1108, 692), (64, 64), (8, 8), (37, 451)])
@pytest.mark.parametrize("method", [HNeRV, NeRV])
def test_every_frame_size_has_a_plan_with_little_padding(size, method):
    config = method.plan(*size, 100)
    product = math.prod(config.strides)
    assert config.height % product == config.width % product == 0
    assert config.height >= size[0]
    assert config.width >= size[1]
    if min(size) >= 64:
        assert config.height * config.width < 1.15 * size[0] * size[1]


def test_a_plan_comes_near_the_size_asked_for():
    for size in (80_000, 350_000, 1_500_000):
        for method in (HNeRV, NeRV):
            assert method.plan(640, 1280, 32, size=size).parameters == pytest.approx(size, rel=0.08)
    assert HNeRV.plan(640, 1280, 132, size=1_500_000) == PAPER


def test_blocks_and_fold_have_the_published_form():
    network = NeRV(replace(NeRV.preset("tiny"), channels=4))
    assert [block.conv.kernel_size for block in network.blocks] == [(3, 3)] * 4
    assert [block.conv.kernel_size for block in HNeRV(HNeRV.preset("tiny")).blocks] == [
        (1, 1),
        (3, 3),
        (5, 5),
        (5, 5),
    ]
    # Channel c * rows * columns + y * columns + x of the first layer is pixel (y, x) of channel c.
    code = torch.randn(1, 160, 1, 1)
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.draw(code, torch.tensor([0]))
    assert torch.allclose(seen[0][0, 3, 1, 2], F.gelu(network.stem(code))[0, 3 * 8 + 1 * 4 + 2, 0, 0])


def test_a_frame_number_is_encoded_as_published():
    network = NeRV(NeRV.preset("tiny"))
    code = network.code(torch.tensor([0, 8]))[..., 0, 0]
    assert code.shape == (2, 160)
    assert torch.equal(code[0], torch.cat([torch.zeros(80), torch.ones(80)]))
    angle = torch.tensor(8 / 32 * torch.pi * 1.25**3)
    assert torch.allclose(code[1, [3, 83]], torch.stack([angle.sin(), angle.cos()]))


def test_the_encoder_has_the_published_form():
    torch.manual_seed(0)
    encoder = Encoder(PAPER)
    assert encoder(torch.rand(1, 3, 640, 1280)).shape == (1, 16, 2, 4)
    convolutions = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    downs = [(conv.in_channels, conv.out_channels, conv.stride[0]) for conv in convolutions if conv.groups == 1]
    assert downs == [(3, 64, 5), (64, 64, 4), (64, 64, 4), (64, 64, 2), (64, 16, 2)]
    assert all(conv.weight.std() < 0.03 and not conv.bias.any() for conv in convolutions)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    assert [round(learning_rate_factor(u), 6) for u in (0.0, 0.05, 0.1, 0.55, 1.0)] == [0.1, 0.55, 1, 0.5, 0]


def test_small_networks_learn_faster_and_published_sizes_at_the_published_rate():
    assert HNeRV.rate(PAPER) == pytest.approx(1e-3, rel=1e-2)
    assert HNeRV.rate(replace(PAPER, channels=200)) == 1e-3
    assert HNeRV.rate(HNeRV.preset("tiny")) == pytest.approx(7.4e-3, rel=1e-2)


def test_the_encoder_learns_at_a_tenth_of_the_rate_and_is_not_learnt_twice():
    made = []

    class Recorded(torch.optim.Adam):
        def __init__(self, weights, lr):
            super().__init__(weights, lr)
            made.append(self)

    learner = Learner(HNeRV(SMALL))
    fit(learner, moving().bytes_tensor(), epochs=1, learning_rate=0.02, optimiser=Recorded, slow=learner.encoder)
    fast, slow = made[0].param_groups
    assert slow["lr"] == pytest.approx(fast["lr"] / 10)
    assert {id(weight) for weight in slow["params"]} == {id(weight) for weight in learner.encoder.parameters()}
    assert sum(len(group["params"]) for group in (fast, slow)) == len(list(learner.parameters()))


@pytest.mark.parametrize("method", [HNeRV, NeRV])
def test_a_dark_clip_with_a_bright_mark_does_not_stay_black(method):
    pictures = torch.full((6, 3, 16, 32), 8, dtype=torch.uint8)
    pictures[:, :, 6:9, 10:18] = 240
    config = replace(SMALL, **method.families[method.method])
    black = float(psnr(torch.zeros(6, 3, 16, 32), pictures.float() / 255))
    assert method.fitted_to(pictures, config, epochs=60).measured(pictures) > black + 6


def test_losses_are_zero_for_equal_pictures_and_weigh_as_published():
    a = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert all(loss(a, a).abs() < 1e-5 for loss in LOSSES.values())
    flat, grey = torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.6)
    similarity = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert LOSSES["fusion6"](flat, grey).item() == pytest.approx(0.7 * 0.4 + 0.3 * (1 - similarity), abs=1e-4)


def test_a_fit_learns_the_clip_and_a_longer_fit_learns_more(fitted):
    clip = moving()
    short = HNeRV.encode(clip, size=12_000, strides=(2, 2, 2), epochs=2)
    long = psnr(decompress(fitted).tensor(), clip.tensor())
    assert long > psnr(decompress(short).tensor(), clip.tensor()) + 3


def test_frames_come_from_their_own_embeddings(fitted):
    network = HNeRV.from_container(parse(fitted))
    truth = moving().tensor()
    with torch.inference_mode():
        good = psnr(network(torch.arange(6)), truth)
        bad = psnr(network(torch.tensor([3, 4, 5, 0, 1, 2])), truth)
    assert good > bad + 2


def test_embeddings_are_those_of_the_original_frames_in_order():
    clip = moving()
    learner = Learner(HNeRV(SMALL))
    learner.freeze(clip.bytes_tensor())
    with torch.inference_mode():
        assert torch.allclose(learner.network.embeddings, learner.encoder(clip.tensor()), atol=1e-5)


def test_the_same_seed_gives_the_same_file_and_leaves_the_chance_of_others_alone(fitted):
    torch.manual_seed(5)
    again = HNeRV.encode(moving(), size=12_000, strides=(2, 2, 2), epochs=40)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert again == fitted
    assert torch.equal(drawn, torch.rand(1))
    assert HNeRV.encode(moving(), size=12_000, strides=(2, 2, 2), epochs=2, seed=1) != fitted


def test_the_file_holds_decoder_and_embeddings_and_nothing_else(fitted):
    container = parse(fitted)
    assert list(container.sections) == ["weights", "weights_sides", "embeddings", "embeddings_sides"]
    config = Config.from_header(container.header)
    assert len(fitted) < 1.2 * config.parameters + 400
    assert sum(section["bytes"] for section in inspect(fitted)["sections"].values()) == len(fitted)


@pytest.mark.parametrize("method", [HNeRV, NeRV])
def test_quantisation_costs_little(method):
    config = replace(SMALL, **next(iter(method.families.values())))
    network = untrained(method, config)
    exact = network(torch.arange(6))
    stored = torch.stack(list(method.decode(file_of(network, moving()))))
    assert psnr(stored, exact) > 35


DECODE = """
import sys, torch
from frameloom.tasks.compression.base import decompress
chosen = [int(k) for k in sys.argv[3:]] or None
torch.save(decompress(sys.argv[1], chosen).bytes_tensor(), sys.argv[2])
"""


def test_fresh_processes_decode_the_same_bytes_whole_or_in_part(tmp_path, fitted):
    file = tmp_path / "clip.flm"
    file.write_bytes(fitted)
    here = decompress(file).bytes_tensor()
    for threads, chosen in (("1", []), ("2", [5, 0, 3])):
        out = tmp_path / "frames.pt"
        arguments = [sys.executable, "-c", DECODE, str(file), str(out), *map(str, chosen)]
        subprocess.run(arguments, check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": threads})
        assert torch.equal(torch.load(out, weights_only=True), here[chosen or slice(None)])


def test_any_frames_in_any_order_are_bitwise_those_of_the_whole():
    data = file_of(untrained(), moving())
    whole = decompress(data).tensor()
    for chosen in ([3], [5, 0, 0, 2], range(1, 6, 2)):
        assert torch.equal(decompress(data, chosen).tensor(), whole[list(chosen)])
    assert torch.equal(decompress(data)[2:5].tensor(), whole[2:5])


@pytest.mark.parametrize(("fit_as", "size"), [("pad", (19, 45)), ("crop", (16, 40)), (None, (19, 45))])
def test_frames_that_strides_do_not_divide_are_padded_or_cropped(fit_as, size):
    clip = moving(2, 19, 45)
    strides = None if fit_as is None else (2, 2, 2)
    back = decompress(HNeRV.encode(clip, size=20_000, strides=strides, fit=fit_as, epochs=1))
    assert back.tensor().shape == (2, 3, *size)


def test_the_loss_is_taken_on_the_frame_without_its_padding():
    learner = Learner(HNeRV(SMALL))
    assert learner(torch.tensor([0]), torch.rand(1, 3, 13, 27)).shape == (1, 3, 13, 27)


def test_compress_reports_steps_and_bytes(tmp_path):
    calls = []
    report = compress(moving(), tmp_path / "out.flm", "nerv", size=9000, epochs=2, strides=(2, 2, 2),
                      progress=lambda *call: calls.append(call))  # fmt: skip
    assert calls == [("fitting nerv", step, 6) for step in range(1, 7)]
    assert report.bytes == (tmp_path / "out.flm").stat().st_size
    assert inspect(tmp_path / "out.flm")["method"] == "nerv"


def variable_size() -> Clip:
    clip = moving(3)
    clip.source.frames = lambda start=0, stop=None: (
        Frame(Fraction(0), clip.info.colour, rgb=torch.zeros(3, 16, 32 + 2 * k)) for k in range(3)
    )
    return clip


@pytest.mark.parametrize(
    ("clip", "settings", "message"),
    [
        (
            moving(2, 20, 32),
            {"strides": (2, 2, 2)},
            r"product 8 does not divide 32x20; crop to 32x16 \(--fit crop\)",
        ),
        (
            moving(2, 20, 32),
            {"strides": (5, 5, 5), "fit": "crop"},
            "product 125 is larger than the frame of 32x20",
        ),
        (moving(), {"size": 1100, "strides": (2, 2, 2)}, "embeddings alone need"),
        (moving(), {"size": 2200, "strides": (2, 2, 2)}, r"smallest network for 32x16 .* has [\d,]+ parameters, not"),
        (moving(), {"size": 900}, "--size 900: the header and tables of hnerv take about"),
        (moving(), {"minutes": 0.0}, "--minutes 0"),
        (moving(), {"epochs": 0}, "--epochs 0"),
        (moving(), {"loss": "l3"}, "--loss l3: there are l2, fusion6, fusion10"),
        (moving(), {"fit": "stretch"}, "--fit stretch"),
        (variable_size(), {}, "frame 1 is 34x16 and frame 0 is 32x16"),
    ],
)
def test_what_cannot_be_fitted_is_refused(clip, settings, message):
    with pytest.raises(InputError, match=message):
        HNeRV.encode(clip, **settings)


def test_a_loss_that_is_not_finite_stops_with_its_step():
    class Diverging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.calls = 0

        def forward(self, index, pictures):
            self.calls += 1
            return pictures * self.scale / (0 if self.calls == 5 else 1)

    with pytest.raises(InputError, match="the loss is NaN or infinite at step 5"):
        fit(Diverging(), moving().bytes_tensor(), epochs=3)


def test_hostile_configurations_are_refused():
    container = parse(file_of(untrained(), moving()))
    for change in (
        {"channels": 4096},
        {"channels": 0},
        {"channels": 1.5},
        {"height": 1 << 15},
        {"frames": 7},
        {"strides": [2, 2, 2, 2, 2, 2]},
        {"strides": [0]},
        {"strides": []},
        {"strides": "222"},
        {"kernels": [2, 4]},
        {"kernels": [1, 1000]},
        {"reduction": 0.0},
        {"reduction": float("nan")},
        {"lowest": 4096},
        {"embedding": 4096},
        {"indexed": True},
        {"indexed": 0},
        {"more": 1},
        {"doubled": True},
        {"time": [8]},
    ):
        network = container.header.config["network"] | change
        header = replace(container.header, config=container.header.config | {"network": network})
        with pytest.raises(InputError):
            list(HNeRV.decode(Container(header, container.sections).to_bytes()))


@pytest.mark.parametrize("change", [{"channels": 4096}, {"lowest": 4096}, {"strides": [16] * 4, "height": 1 << 16}])
def test_a_network_that_cannot_be_meant_is_refused_before_anything_is_allocated(change):
    header = describe(moving(), "hnerv", {})
    config = asdict(SMALL) | {"strides": [2, 2, 2], "kernels": [1, 5]} | change
    if "height" in change:
        # One pixel of embedding for 65536x65536 pixels.
        config["width"] = config["height"]
        header = replace(header, width=1 << 16, height=1 << 16)
    header = replace(header, config={"network": config, "levels": 256})
    with pytest.raises(InputError, match="of this size cannot be meant"):
        Config.from_header(header)


def test_mutated_files_decode_or_are_refused():
    container = parse(file_of(untrained(), moving()))
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        name = chance.choice(list(container.sections))
        payload = bytearray(container.sections[name])
        for _ in range(chance.randrange(1, 4)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        if chance.random() < 0.3:
            del payload[chance.randrange(len(payload)) :]
        bad = Container(container.header, container.sections | {name: bytes(payload)}).to_bytes()
        try:
            assert next(HNeRV.decode(bad, [5])).shape == (3, 16, 32)
        except InputError:
            refused += 1
    assert refused > 60


@pytest.fixture
def official(tmp_path):
    """A file with the keys and shapes of the authors' `quant_vid.pth`, filled with noise."""
    chance = torch.Generator().manual_seed(0)

    def quantised(*shape: int, low: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
        return {
            "quant": torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance),
            "min": torch.full(low, -0.1),
            "scale": torch.full(low, 0.001),
        }

    model = {}
    shapes = {"decoder.0.conv.downconv": (68, 16, 1, 1), "head_layer": (3, 28, 3, 3)} | {
        f"decoder.{k}.conv.upconv.0": shape
        for k, shape in enumerate(
            [(1425, 68, 1, 1), (768, 57, 3, 3), (640, 48, 5, 5), (132, 40, 5, 5), (112, 33, 5, 5)], start=1
        )
    }
    for name, shape in shapes.items():
        model[f"{name}.weight"] = quantised(*shape, low=(1, *shape[1:]))
        model[f"{name}.bias"] = quantised(shape[0])
    stored = {"embed": quantised(132, 16, 2, 4, low=(1, 16, 2, 4)), "model": model}

    def save(change=lambda stored: None):
        change(stored)
        torch.save(stored, tmp_path / "quant_vid.pth")
        return tmp_path / "quant_vid.pth", stored

    return save


def test_the_authors_file_loads(official):
    path, stored = official()
    network = load("hnerv", path)
    assert parameters(network) == 1_505_172
    third = stored["model"]["decoder.3.conv.upconv.0.weight"]
    assert torch.allclose(network.blocks[2].conv.weight, -0.1 + 0.001 * third["quant"].float())
    assert torch.allclose(network.embeddings, -0.1 + 0.001 * stored["embed"]["quant"].float())
    again = HNeRV.from_container(parse(file_of(network, _paper_clip())))
    assert torch.allclose(again.blocks[2].conv.weight, network.blocks[2].conv.weight, atol=1e-3)


def _paper_clip() -> Clip:
    clip = Clip.from_tensor(torch.zeros(1, 3, 640, 1280, dtype=torch.uint8).expand(132, -1, -1, -1))
    assert len(clip) == 132
    return clip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["model"].pop("decoder.2.conv.upconv.0.bias"),
            r"key 'decoder\.2\.conv\.upconv\.0\.bias' is missing",
        ),
        (
            lambda s: s["model"]["head_layer.weight"].pop("scale"),
            "key 'head_layer.weight' is missing or is not",
        ),
        (lambda s: s.pop("embed"), "key 'embed' is missing"),
        (lambda s: s.pop("model"), "key 'model' is missing"),
        (
            lambda s: s["model"]["head_layer.bias"].update(quant=torch.zeros(4, dtype=torch.uint8)),
            r"key 'head_layer\.bias' has shape \(4,\); it must be \(3,\)",
        ),
        (lambda s: s["embed"].update(min=torch.zeros(7)), "key 'embed' has side numbers that do not fit"),
    ],
)
def test_another_checkpoint_is_refused_by_key(official, change, message):
    path, _ = official(change)
    with pytest.raises(InputError, match=message):
        HNeRV.load_official(path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "quant_vid.pth").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"quant_vid\.pth: not a file of tensors"):
        HNeRV.load_official(tmp_path / "quant_vid.pth")


@pytest.mark.parametrize("method", [HNeRV, NeRV])
def test_a_size_is_met_from_below_and_nearly_used(method):
    for size in (12_000, 16_000):
        data = method.encode(moving(), size=size, strides=(2, 2, 2), epochs=3)
        assert 0.85 * size < len(data) <= size


def test_a_quality_ends_the_fit_and_the_file_has_it_and_no_more():
    clip, steps = moving(), []
    data = HNeRV.encode(clip, psnr=27.0, strides=(2, 2, 2), epochs=200, progress=lambda *call: steps.append(call))
    assert len(steps) < 600
    assert 27.0 <= psnr(decompress(data).tensor(), clip.tensor()) < 29.5
    assert parse(data).header.config["levels"] < 256


def test_a_quality_that_is_not_reached_is_refused_with_what_was(tmp_path):
    message = r"--quality 70dB: [\d,]+ parameters and this fit reach \d+\.\d+ dB"
    with pytest.raises(InputError, match=message):
        compress(moving(), tmp_path / "out.flm", "hnerv", quality="70dB", size=12_000, strides=(2, 2, 2), epochs=2)
    assert not (tmp_path / "out.flm").exists()


def test_a_killed_fit_goes_on_to_the_same_file(tmp_path, monkeypatch):
    settings = {"method": "hnerv", "size": 12_000, "strides": (2, 2, 2), "epochs": 10}
    compress(moving(), tmp_path / "whole.flm", **settings)
    monkeypatch.setattr(fit_module, "KEEP_EVERY", 0.0)

    def kill(label, done, total):
        if done == 17:
            raise RuntimeError("killed")

    target = tmp_path / "out.flm"
    with pytest.raises(RuntimeError, match="killed"):
        compress(moving(), target, **settings, progress=kill)
    assert not target.exists()
    with pytest.raises(InputError, match=r"--resume: .* is of another video or"):
        compress(moving(), target, **settings | {"epochs": 11}, resume=True)
    steps = []
    compress(moving(), target, **settings, resume=True, progress=lambda *call: steps.append(call[1]))
    assert steps[0] == 17
    assert target.read_bytes() == (tmp_path / "whole.flm").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.flm", "whole.flm"]


def test_minutes_end_a_fit_that_would_last_longer():
    calls = []
    begun = time.monotonic()
    HNeRV.encode(moving(), size=12_000, strides=(2, 2, 2), minutes=0.02, progress=lambda *call: calls.append(call))
    assert time.monotonic() - begun < 20
    assert calls[-1][2] is None


def test_holes_are_filled_from_what_is_seen_and_the_rest_is_untouched():
    clip = moving(8)
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 5:11, 12:20] = 1
    black = torch.where(mask.bool(), 0.0, clip.tensor())
    steps = []
    made = inpaint(Clip.from_tensor(black), mask, epochs=60, seed=1, progress=lambda *call: steps.append(call))
    video = made.tensor()
    assert steps
    assert torch.equal(video[..., :5, :], (black[..., :5, :] * 255).round() / 255)
    hole = (slice(None), slice(None), slice(5, 11), slice(12, 20))
    assert psnr(video[hole], clip.tensor()[hole]) > psnr(black[hole], clip.tensor()[hole]) + 6


def test_what_hides_in_the_hole_does_not_matter():
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 5:11, 12:20] = 1
    one, other = (torch.where(mask.bool(), value, moving().tensor()) for value in (0.0, 1.0))
    filled = [inpaint(Clip.from_tensor(video), mask, epochs=2).tensor() for video in (one, other)]
    assert torch.equal(*filled)


@pytest.mark.parametrize(
    ("mask", "method", "message"),
    [
        (torch.ones(1, 1, 8, 32), "auto", "--mask: the mask is 32x8 and clip is 32x16"),
        (torch.ones(4, 1, 16, 32), "auto", "has 4 pictures; give 1 for all frames of clip, or 6"),
        (torch.ones(1, 1, 16, 32), "auto", "hides everything"),
        (torch.zeros(1, 1, 16, 32), "auto", "hides nothing"),
        (torch.ones(1, 1, 16, 32), "x264", "--method x264: inpaint fits hnerv or boost-nerv"),
    ],
)
def test_masks_that_cannot_be_are_refused(mask, method, message):
    with pytest.raises(InputError, match=message):
        inpaint(moving(), mask, method)


def test_segments_decode_alone_and_in_any_order(tmp_path):
    clip = moving(7)
    settings = {"strides": (2, 2, 2), "epochs": 2}
    report = compress(clip, tmp_path / "out.flm", "hnerv", segment=3, size=40_000, **settings)
    assert report.bytes <= 40_000
    whole = decompress(tmp_path / "out.flm").tensor()
    assert whole.shape == clip.tensor().shape
    second = HNeRV.encode(clip[3:7], size=(40_000 - 280) * 4 // 7, **settings)
    assert torch.equal(whole[3:], decompress(second).tensor())
    assert torch.equal(decompress(tmp_path / "out.flm", [6, 0, 3, 2]).tensor(), whole[[6, 0, 3, 2]])
    assert inspect(tmp_path / "out.flm")["method"] == "segments"


def test_a_clip_longer_than_memory_is_cut_and_said_to_be(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(segments, "MEMORY", 3 * 16 * 32 * 4)
    compress(moving(9), tmp_path / "out.flm", "hnerv", strides=(2, 2, 2), epochs=1)
    assert parse((tmp_path / "out.flm").read_bytes()).header.config == {"frames": [4, 5]}
    assert "9 frames are more than a fit holds" in caplog.text


def test_a_kill_loses_no_finished_segment(tmp_path, monkeypatch):
    settings = {"method": "hnerv", "segment": 3, "strides": (2, 2, 2), "epochs": 3}
    compress(moving(), tmp_path / "whole.flm", **settings)
    monkeypatch.setattr(fit_module, "KEEP_EVERY", 0.0)
    calls = []

    def kill(*call):
        calls.append(call)
        if len(calls) == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        compress(moving(), tmp_path / "out.flm", **settings, progress=kill)
    assert len(calls) == 5
    with pytest.raises(InputError, match=r"--resume: .* is of another video or"):
        compress(moving(), tmp_path / "out.flm", **settings | {"segment": 4}, resume=True)
    compress(moving(), tmp_path / "out.flm", **settings, resume=True, progress=lambda *call: calls.append(call))
    assert len(calls) == 7
    assert (tmp_path / "out.flm").read_bytes() == (tmp_path / "whole.flm").read_bytes()


@pytest.mark.parametrize(
    ("method", "segment", "message"),
    [("x264", 9, "--segment: x264 never holds the whole clip"), ("hnerv", 1, "--segment 1: a segment has 2 frames")],
)
def test_segments_that_cannot_be_are_refused(tmp_path, method, segment, message):
    with pytest.raises(InputError, match=message):
        compress(moving(), tmp_path / "out.flm", method, segment=segment)


def test_a_segment_of_another_video_is_refused():
    parts = {f"part{k}": file_of(untrained(), moving()) for k in range(2)}
    header = replace(describe(moving(8), "segments", {"frames": [2, 6]}))
    with pytest.raises(InputError, match="segment 0 is damaged; it holds another video"):
        list(decompress(Container(header, parts).to_bytes()))
    for lengths in ([6], [0, 8], [5.5, 2.5], "26", None, [9, -1]):
        bad = Container(replace(header, config={"frames": lengths}), parts).to_bytes()
        with pytest.raises(InputError, match="the header is damaged"):
            list(decompress(bad))


def test_every_step_draws_its_own_chance_whatever_came_before():
    def drawn(steps: int, disturb: bool) -> list[float]:
        layer, seen = torch.nn.Linear(1, 1), []

        def loss_at(step: int) -> torch.Tensor:
            seen.append(torch.rand(1).item())
            if disturb:
                torch.rand(step)
            return layer.weight.square().sum()

        fit_module.descend(layer, [torch.optim.SGD(layer.parameters(), 0.1)], loss_at, steps=steps, seed=3)
        return seen

    assert len(set(drawn(5, False))) == 5
    assert drawn(5, True) == drawn(5, False)


def test_bits_that_a_fit_does_not_see_are_said(caplog):
    deep = moving(2)
    deep.source.info = replace(deep.info, colour=replace(deep.info.colour, depth=10))
    HNeRV.encode(deep, size=20_000, strides=(2, 2, 2), epochs=1)
    assert "clip has 10 bits; the fit sees 8" in caplog.text
    HNeRV.encode(moving(2), size=20_000, strides=(2, 2, 2), epochs=1)
    assert caplog.text.count("bits; the fit sees") == 1


def test_a_stopped_fit_promises_a_resume_only_where_a_state_was_kept(tmp_path, monkeypatch):
    def stop(label, done, total):
        if done == 3:
            raise KeyboardInterrupt

    settings = {"method": "hnerv", "strides": (2, 2, 2), "epochs": 2, "progress": stop}
    with pytest.raises(Interrupted, match="stopped; nothing was written"):
        compress(moving(), tmp_path / "out.flm", **settings)
    monkeypatch.setattr(fit_module, "KEEP_EVERY", 0.0)
    with pytest.raises(Interrupted, match="--resume goes on from"):
        compress(moving(), tmp_path / "out.flm", **settings)
