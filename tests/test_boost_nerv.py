"""Boosted NeRV: published sizes, what the time does, the loss, Adan, and a file that costs what the fit thought."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from frameloom.bitstream.container import Container, parse
from frameloom.errors import InputError
from frameloom.metrics import ms_ssim, psnr
from frameloom.tasks.compression.base import compress, decompress, describe
from frameloom.tasks.compression.boost_nerv import FULL, Adan, BoostNeRV, Rated, boosted_loss
from frameloom.tasks.compression.hnerv import HNeRV
from frameloom.tasks.compression.nerv import Config, Learner, of_size
from test_hnerv import DECODE, moving

SMALL = Config(height=16, width=32, frames=6, strides=(2, 2, 2), channels=8, lowest=6, embedding=4, kernels=(1, 3),
               doubled=2, sine=True, time=(8, 4))  # fmt: skip


def untrained(config: Config = SMALL) -> BoostNeRV:
    torch.manual_seed(0)
    network = BoostNeRV(config)
    if not config.indexed:
        torch.nn.init.normal_(network.embeddings)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def fitted() -> bytes:
    return BoostNeRV.encode(moving(), size=12_000, strides=(2, 2, 2), epochs=12)


@pytest.mark.parametrize(("channels", "size"), [(50, 0.75e6), (86, 1.5e6), (134, 3e6)])
def test_boosted_hnerv_has_the_published_sizes(channels, size):
    config = Config(height=720, width=1280, frames=132, strides=(5, 2, 2, 2, 2), channels=channels,
                    **BoostNeRV.families["hnerv"])  # fmt: skip
    with torch.device("meta"):
        network = BoostNeRV(config)
    count = sum(value.numel() for value in network.parameters())
    assert count == config.parameters == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("base", ["hnerv", "nerv"])
def test_the_count_of_parameters_is_the_network_s(base):
    config = BoostNeRV.plan(64, 96, 8, size=60_000, base=base)
    assert sum(value.numel() for value in BoostNeRV(config).parameters()) == config.parameters
    assert config.parameters == pytest.approx(60_000, rel=0.08)


def test_tiny_is_no_larger_than_tiny_hnerv():
    most = HNeRV.preset("tiny").parameters
    assert 0.92 * most < BoostNeRV.preset("tiny").parameters <= most


def test_the_time_changes_a_frame_and_without_scales_and_shifts_it_does_not():
    network = untrained()
    code = torch.randn(1, 4, 2, 4)
    one, other = (network(torch.tensor([k]), code) for k in (1, 4))
    assert (one - other).abs().max() > 1e-4
    for conditional in network.conditions:
        for affine in (conditional.before, conditional.between):
            for part in (affine.scale, affine.shift):
                part[2].weight.zero_()
                part[2].bias.zero_()
    one, other = (network(torch.tensor([k]), code) for k in (1, 4))
    assert torch.equal(one, other)


def test_activations_are_sines_and_later_stages_have_two_blocks():
    network = untrained()
    assert [block.stride for block in network.blocks] == [2, 2, 2, 1]
    assert [block.conv.kernel_size[0] for block in network.blocks] == [1, 3, 3, 3]
    assert all(block.sine for block in network.blocks)
    x = torch.randn(1, 8, 4, 4)
    shuffled = torch.nn.functional.pixel_shuffle(network.blocks[0].conv(x), 2)
    assert torch.equal(network.blocks[0](x), shuffled.sin())


def test_the_loss_weighs_pixels_structure_and_spectrum_as_published():
    a, b = torch.full((1, 3, 32, 48), 0.2), torch.full((1, 3, 32, 48), 0.6)
    assert boosted_loss(a, a).abs() < 1e-5
    pixels = 0.7 * 0.4 + 0.3 * (1 - ms_ssim(a, b).item())
    # A flat difference has one coefficient, 0.4 h w, among 2 h w real and imaginary parts.
    assert boosted_loss(a, b).item() == pytest.approx(60 * math.sqrt(32 * 48 / FULL) * pixels + 0.2, rel=1e-4)


def test_adan_steps_as_its_equations_say():
    weight = torch.tensor([1.0], requires_grad=True)
    optimiser = Adan([weight], lr=0.1)
    w, m, v, n, last = 1.0, 0.0, 0.0, 0.0, None
    for k in range(1, 6):
        optimiser.zero_grad()
        (weight**3).sum().backward()
        optimiser.step()
        g = 3 * w * w
        d = 0.0 if last is None else g - last
        m, v = 0.98 * m + 0.02 * g, 0.92 * v + 0.08 * d
        n = 0.99 * n + 0.01 * (g + 0.92 * d) ** 2
        w -= 0.1 * (m / (1 - 0.98**k) + 0.92 * v / (1 - 0.92**k)) / (math.sqrt(n / (1 - 0.99**k)) + 1e-8)
        last = g
        assert weight.item() == pytest.approx(w, rel=1e-5)


def test_what_is_fitted_is_what_the_file_holds():
    pictures = moving().bytes_tensor()
    learner = Learner(BoostNeRV(SMALL))
    rated = Rated(learner, pictures)
    network = learner.network
    network.scales = {name: rated.scale(name).item() for name in rated.names}
    network.offset = rated.offset.item()
    learner.freeze(pictures)
    data = network.to_bytes(describe(moving(), "boost-nerv", {}))
    with torch.no_grad():
        used = torch.cat([rated(torch.tensor([k]), pictures[k : k + 1].float() / 255)[0] for k in range(6)])
    shown = torch.stack(list(BoostNeRV.decode(data)))
    torch.testing.assert_close(shown, used, atol=1e-4, rtol=0)


def test_the_estimated_bits_are_those_of_the_file():
    pictures = moving().bytes_tensor()
    torch.manual_seed(0)
    learner = Learner(BoostNeRV(of_size(SMALL, 60_000)))
    rated = Rated(learner, pictures)
    network = learner.network
    network.scales = {name: rated.scale(name).item() for name in rated.names}
    network.offset = rated.offset.item()
    with torch.no_grad():
        bits = np.mean([rated(torch.tensor([k]), pictures[k : k + 1].float() / 255)[1].item() for k in range(6)])
    sections = parse(network.to_bytes(describe(moving(), "boost-nerv", {}))).sections
    assert 8 * len(sections["weights"]) == pytest.approx(bits, rel=0.01)


def test_the_rate_stage_ends_below_the_size_and_costs_little(fitted):
    assert len(fitted) <= 12_000
    clip = moving()
    plain = HNeRV.encode(clip, size=24_000, strides=(2, 2, 2), epochs=12)
    assert psnr(decompress(fitted).tensor(), clip.tensor()) > psnr(decompress(plain).tensor(), clip.tensor())


def test_the_rate_has_no_gradient_once_the_file_is_small_enough(monkeypatch):
    pictures = moving().bytes_tensor()
    losses = {}
    from frameloom.tasks.compression import boost_nerv

    for target in (2_100, 10_000_000):

        def catch(rated, optimisers, loss_at, target=target, **_):
            loss_at(0).backward()
            losses[target] = rated.logarithms.grad.clone()

        monkeypatch.setattr(boost_nerv, "descend", catch)
        torch.manual_seed(0)
        learner = Learner(BoostNeRV(SMALL))
        BoostNeRV.finish(learner, pictures, target=target, epochs=3, minutes=None, batch=1, seen=None, seed=0,
                         measure=lambda out, _: 0 * out.sum(), mixed=False, state=None,
                         progress=lambda *_: None)  # fmt: skip
    assert (losses[10_000_000] == 0).all()
    assert losses[2_100].abs().sum() > 0


def test_any_frames_in_any_order_are_bitwise_those_of_the_whole(fitted):
    whole = decompress(fitted).tensor()
    for chosen in ([3], [5, 0, 0, 2]):
        assert torch.equal(decompress(fitted, chosen).tensor(), whole[chosen])


@pytest.mark.parametrize("base", ["hnerv", "nerv"])
def test_both_bases_go_to_a_file_and_back(tmp_path, base):
    clip = moving()
    compress(clip, tmp_path / "out.flm", "boost-nerv", size=14_000, base=base, strides=(2, 2, 2), epochs=2)
    assert decompress(tmp_path / "out.flm").tensor().shape == clip.tensor().shape


def test_a_killed_rate_stage_goes_on_to_the_same_file(tmp_path, monkeypatch):
    from frameloom.tasks.compression import fit as fit_module

    settings = {"method": "boost-nerv", "size": 12_000, "strides": (2, 2, 2), "epochs": 4}
    compress(moving(), tmp_path / "whole.flm", **settings)
    monkeypatch.setattr(fit_module, "KEEP_EVERY", 0.0)

    def kill(label, done, total):
        if label == "fitting the rate" and done == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        compress(moving(), tmp_path / "out.flm", **settings, progress=kill)
    labels = []
    compress(moving(), tmp_path / "out.flm", **settings, resume=True, progress=lambda *call: labels.append(call[:2]))
    assert labels[0] == ("fitting the rate", 4)
    assert (tmp_path / "out.flm").read_bytes() == (tmp_path / "whole.flm").read_bytes()


def test_an_unknown_base_is_refused():
    with pytest.raises(InputError, match="--base e-nerv: boost-nerv is built on hnerv or nerv"):
        BoostNeRV.encode(moving(), base="e-nerv")


def test_mutated_files_decode_or_are_refused(fitted):
    container = parse(fitted)
    chance = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        name = chance.choice(list(container.sections))
        payload = bytearray(container.sections[name])
        for _ in range(chance.integers(1, 4)):
            payload[chance.integers(len(payload))] = chance.integers(256)
        if chance.random() < 0.3:
            del payload[chance.integers(len(payload)) :]
        bad = Container(container.header, container.sections | {str(name): bytes(payload)}).to_bytes()
        try:
            assert next(BoostNeRV.decode(bad, [5])).shape == (3, 16, 32)
        except InputError:
            refused += 1
    assert refused > 20


def test_a_fresh_process_decodes_the_same_bytes(tmp_path, fitted):
    (tmp_path / "clip.flm").write_bytes(fitted)
    here = decompress(fitted).bytes_tensor()
    arguments = [sys.executable, "-c", DECODE, str(tmp_path / "clip.flm"), str(tmp_path / "frames.pt"), "5", "2"]
    subprocess.run(arguments, check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert torch.equal(torch.load(tmp_path / "frames.pt", weights_only=True), here[[5, 2]])


def test_fewer_levels_are_fewer_bytes_and_the_file_holds_just_those():
    network, header = untrained(), describe(moving(), "boost-nerv", {})
    files = {levels: network.to_bytes(header, levels=levels) for levels in (256, 64, 16)}
    assert len(files[256]) > len(files[64]) > len(files[16])
    for levels, data in files.items():
        back, kept = BoostNeRV.from_container(parse(data)).state_dict(), network.as_stored(levels)
        assert all(torch.equal(back[name], kept[name]) for name in kept)
