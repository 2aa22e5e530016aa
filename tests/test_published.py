"""Checkpoints as authors publish them: what is read of a stranger's file, and that the authors' numbers come out."""

import re
import zipfile
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import frameloom
from frameloom.cards import card
from frameloom.cli.app import app
from frameloom.errors import InputError
from frameloom.tasks.flow.base import _border, _padded, gaps
from frameloom.tasks.flow.videoflow import VideoFlow
from frameloom.tasks.interpolation.vfimamba import Config, VFIMamba
from frameloom.training import published
from frameloom.training.pretrained import load
from frameloom.training.published import Placeholder, read, table
from seeded import video, weights

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()


class Scheduler:
    """What a scheduler of torch 1.13 keeps: a bound method of its own, and a set, a default and an array's scalar."""

    def __init__(self, optimizer):
        self.optimizer, self.anneal_func = optimizer, self.anneal

    def anneal(self):
        return 0.0


class Calls:
    """An object whose file says: call this."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def trained(model):
    """All that training leaves in one file."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return {"total_steps": 3, "names": {"a", "b"}, "scheduler": vars(Scheduler(optimizer)), "best": Path("run"),
            "optimizer": optimizer.state_dict(),
            "model": {f"module.{key}": value for key, value in model.state_dict().items()}}  # fmt: skip


@FORMATS
def test_the_table_is_taken_out_of_what_training_leaves(tmp_path, zipped):
    model = network()
    content = trained(model)
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = table(tmp_path / "x.pth")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.items())
    whole = read(tmp_path / "x.pth")
    assert isinstance(whole["scheduler"]["anneal_func"], Placeholder)
    assert torch.equal(whole["optimizer"]["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])


@FORMATS
def test_nothing_that_a_file_names_is_called(tmp_path, zipped, capsys):
    state = network().state_dict()
    called = [Calls(print, "called"), Calls(getattr, "text", "upper"), Calls(exec, "raise SystemExit"),
              Calls(Path.touch, tmp_path / "made")]  # fmt: skip
    torch.save({"state_dict": state, "more": called}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert table(tmp_path / "x.pth").keys() == state.keys()
    assert all(isinstance(one, Placeholder) for one in read(tmp_path / "x.pth")["more"])
    for inside in (called[0], {"weight": called[0]}, {"model": {"weight": called[0]}}, [called[0]]):
        torch.save(inside, tmp_path / "y.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"y\.pth: holds no flat table of tensors"):
            table(tmp_path / "y.pth")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "made").exists()


KINDS = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@FORMATS
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_kind_and_view_of_numbers_comes_back(tmp_path, zipped, dtype):
    base = (torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    views = {"whole": base, "turned": base.permute(2, 0, 1), "part": base[1:3, ::2], "one": base[0, 0, 0],
             "again": base[2], "spread": base[:1, :, :1].expand(2, 6, 5), "none": base[:0]}  # fmt: skip
    torch.save(views, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found = table(tmp_path / "x.pth")
    assert all(found[name].dtype == dtype and torch.equal(found[name], view) for name, view in views.items())


def test_parameters_and_numbers_without_a_kind_of_storage_come_back(tmp_path):
    scales = nn.Parameter(torch.ones(3))
    scales.note = "an attribute"
    state = {"p": scales, "f8": torch.ones(2, 2).to(torch.float8_e4m3fn), "u16": torch.ones(3, dtype=torch.uint16)}
    torch.save(state, tmp_path / "x.pth")
    found = table(tmp_path / "x.pth")
    assert [found[name].dtype for name in state] == [torch.float32, torch.float8_e4m3fn, torch.uint16]
    assert torch.equal(found["p"], scales.data)


@FORMATS
def test_a_file_cut_anywhere_is_one_line(tmp_path, zipped):
    torch.save(trained(network()), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "x.pth").read_bytes()
    for length in [0, 1, 4, *range(7, len(data) - 64, len(data) // 40)]:
        (tmp_path / "cut.pth").write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut\.pth: not a file of tensors") as caught:
            read(tmp_path / "cut.pth")
        assert str(caught.value).isprintable()


def rewritten(path, change):
    """The file with the bytes of its pickle, and of every storage, as `change` gives them."""
    out = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def within(ending, old, new):
    """A change of the part of a file whose name ends so: other bytes for some, or for all of them (None)."""
    return lambda name, data: data if not name.endswith(ending) else new if old is None else data.replace(old, new)


# The tensor is (5, 4): PyTorch writes a small number as K and a byte, and J with four bytes may be negative.
LIES = {
    "a longer tensor than its storage": within("data.pkl", b"K\x05K\x04\x86", b"K\x50K\x04\x86"),
    "an offset beyond the storage": within("data.pkl", b"QK\x00K\x05K\x04\x86", b"QK\x63K\x05K\x04\x86"),
    "a tensor of a negative side": within("data.pkl", b"K\x05K\x04\x86", b"J\xff\xff\xff\xffK\x04\x86"),
    "a storage that is shorter": within("data/0", None, b"\x00" * 76),
    "room for more than there is": within("data.pkl", None, b"\x80\x05\x96" + b"\xff" * 5 + b"\x00" * 3 + b"."),
    "a memory of too many places": within("data.pkl", None, b"\x80\x02K\x01r\xff\xff\xff\x7f."),
    "another order of bytes": within("byteorder", None, b"big"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_about_its_numbers_is_refused(tmp_path, lie):
    torch.save({"w": torch.ones(5, 4), "b": torch.ones(3)}, tmp_path / "x.pth")
    changed = rewritten(tmp_path / "x.pth", LIES[lie])
    with pytest.raises(InputError, match=r"changed\.pth: (not a file of tensors|holds no flat table)"):
        table(changed)


@FORMATS
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, zipped):
    bomb = {"w": torch.ones(1).expand(2**20, 2**20)}  # a valid view of four bytes
    torch.save(bomb, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"x\.pth: not a file of tensors"):
        table(tmp_path / "x.pth")


def test_a_file_that_goes_in_circles_ends(tmp_path):
    circle = {"epoch": 1}
    circle["model"] = circle
    torch.save(circle, tmp_path / "x.pth")
    for reader in (table, read):
        with pytest.raises(InputError):
            reader(tmp_path / "x.pth")
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    torch.save(nested, tmp_path / "x.pth")
    assert len(read(tmp_path / "x.pth")) == 2


def test_names_out_of_a_file_are_fit_for_a_terminal(tmp_path):
    state = weights(
        {key: tuple(value.shape) for key, value in load("raft", "random", size="paper").state_dict().items()}
    )
    torch.save(state | {"\x1b[31mred\nline": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=re.escape(r"it has an unknown \x1b[31mred\nline")) as caught:
        load("raft", tmp_path / "x.pth")
    assert str(caught.value).isprintable()


def test_there_is_one_reader_of_published_files():
    source = Path(frameloom.__file__).parent
    loaders = [
        path for path in source.rglob("*.py") if "torch.load(" in path.read_text() and path.parent.name != "claims"
    ]
    assert [path.name for path in loaders] in ([], ["published.py"])


def test_what_does_not_fit_is_refused_before_anything_of_its_size_is_made(tmp_path):
    made = []

    def make():
        made.append(torch.empty(0).device.type)
        return nn.Linear(3, 2)

    with pytest.raises(InputError, match="weight is"):
        published.fill(make, "toy", tmp_path / "x.pth", {"weight": torch.ones(2, 4), "bias": torch.ones(2)})
    assert made == ["meta"]


# --- the authors' numbers --------------------------------------------------------------------------------------------

# Made by the authors' own networks, on a CPU, of the weights and pictures of `seeded`, written to a file in the layout
# of theirs; their refinements were told to be 3, their padding is that of their Sintel mode (SplatFlow: of its demo).
# Flow in pixels at the first, an inner and the last pixel of 131x145, x before y, gap by gap; VideoFlow's forward flows
# of the inner frames and then the backward ones. Sources: github.com/princeton-vl/RAFT 2888e15a, zacjiang/GMA 2f1fd294,
# littlespray/SKFlow 04aac82c, wwsource/SplatFlow 41c53ffa, littlespray/StreamFlow 6d8713dd, XiaoyuShi97/VideoFlow
# 51489304 (BOF of three frames, MOF of five).
FLOWS = {
    "raft": (2, 20, "0.4711 1.1098 -0.0490 0.5206 0.5770 -0.1195"),
    "gma": (2, 12, "0.1570 -0.6802 -0.2030 0.8399 3.1646 0.3955"),
    "skflow": (2, 15, "-0.2071 4.3130 1.0260 8.6659 33.6077 7.1109"),
    "splatflow": (4, 24, """0.2121 -0.6347 -0.2020 0.7709 3.1978 0.3741 0.1031 1.4359 0.3605 0.1130 -2.2569 0.0333
                            0.1081 1.3455 0.3757 0.1285 -2.5201 -0.0179"""),
    "streamflow": (4, 15, """0.1363 5.1937 0.0851 -0.4805 -6.1801 -0.4725 0.2196 1.3283 0.3230 0.1568 3.4894 0.1684
                             -0.4102 -7.0065 -1.0270 -0.3229 -5.9702 0.0352"""),
    "bof": (3, 32, "-0.1216 2.3182 0.1766 0.2869 4.1715 0.0895 0.2252 1.7054 -0.1412 -0.1670 -2.8885 -0.4982"),
    "mof": (5, 32, """-0.0196 -0.9280 -0.0024 0.0037 2.0806 0.0045 -0.1528 -0.2937 -0.4559 0.4772 1.8743 0.7199
                      0.2048 -0.3228 -0.3076 1.2916 3.1940 0.5246 -0.0471 1.0661 -0.0000 -0.3781 0.0833 -0.0000
                      0.0000 1.7675 0.0000 -0.0000 -0.6814 -0.0000 -0.0029 1.1092 0.6102 -0.0333 -0.7491 -1.0500"""),
}  # fmt: skip
RENAMED = {
    "splatflow": {"update.": "update_block.", "_sp.": "_tf."},
    "bof": {".encoder.convf1.": ".encoder.convf1_."},
    "mof": {".encoder.convf1.": ".encoder.convf1_.", ".init_hidden_state": ".encoder.init_hidden_state"},
}
LARGE = {"bof": ("videoflow", "paper-bof"), "mof": ("videoflow", "paper")}


def layout(model, renamed):
    """The shapes of a published file's tensors, by the names that they have there."""
    shapes = {}
    for key, value in model.state_dict().items():
        for here, there in renamed.items():
            key = key.replace(here, there)
        shapes[key] = tuple(value.shape)
    return shapes


def probes(result):
    height, width = result.shape[-2:]
    return result[..., [0, height // 3, height - 1], [0, width // 2, width - 1]].flatten()


def numbers(text):
    return torch.tensor([float(word) for word in text.split()])


@torch.no_grad()
@pytest.mark.parametrize("name", FLOWS)
def test_flows_of_published_weights_are_those_of_the_authors(tmp_path, name):
    frames, steps, wanted = FLOWS[name]
    method, size = LARGE.get(name, (name, "paper"))
    with torch.device("meta"):
        kind = card(method).load_class()
        shapes = layout(kind(kind.preset(size)), RENAMED.get(name, {}))
    state = {f"module.{key}": value for key, value in weights(shapes).items()}
    unused = {"module.att.pos_emb.rel_height.weight": torch.zeros(3), "module.fnet.svt.norm.weight": torch.zeros(3)}
    content = state | unused
    torch.save({"model": content, "scheduler": vars(Scheduler(None))} if name == "streamflow" else content,
               tmp_path / "theirs.pth")  # fmt: skip
    model = load(method, tmp_path / "theirs.pth")
    assert model.steps == steps
    model.steps = 3
    pictures = video(frames, 131, 145) / 255
    if isinstance(model, VideoFlow):
        left, _, top, _ = _border(131, 145, model)
        both = model(torch.stack([_padded(frame, model) for frame in pictures])[None], last=True)[0]
        found = torch.cat([flow[0] for flow in both])[..., top : top + 131, left : left + 145]
    else:
        found = torch.stack([gap.fwd for gap in gaps(model, pictures)])
    assert torch.allclose(probes(found), numbers(wanted), atol=1e-3)


# The same of github.com/MCG-NJU/VFIMamba 8df805eb with 8 channels and one block at each of the two coarse levels, blue
# first, of 61x83; the middle, in [0, 1], red first. By whether turned pictures are averaged in, and the flow's scale.
MIDDLES = {
    (False, 1): "0.46005 0.81864 0.84819 0.39080 0.82746 0.99680 0.49318 0.28821 0.71653",
    (True, 1): "0.35812 0.73555 0.87493 0.26496 0.86592 0.84072 0.52951 0.47093 0.68818",
    (False, 0.5): "0.33207 0.28104 0.69211 0.42974 0.49833 0.98888 0.48932 0.57312 0.67834",
    (True, 0.5): "0.31297 0.39307 0.77298 0.34241 0.63631 0.81741 0.37201 0.50472 0.72358",
}


@pytest.fixture(scope="module")
def vfimamba(tmp_path_factory):
    with torch.device("meta"):
        shapes = layout(VFIMamba(Config(width=8, depths=(2, 2, 2, 1, 1))), {})
    state = {f"module.{key}": value for key, value in weights(shapes).items()}
    path = tmp_path_factory.mktemp("vfimamba") / "VFIMamba.pkl"
    torch.save(state | {"module.feature_bone.block3.attn_mask": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize(("turned", "scale"), MIDDLES)
def test_pictures_of_published_weights_are_those_of_the_authors(vfimamba, turned, scale):
    first, second = video(2, 61, 83) / 255
    clip = frameloom.Clip.from_tensor(torch.stack([first, second]), 10)
    made = frameloom.interpolate(clip, "2x", "vfimamba", weights=str(vfimamba), flow_scale=scale, turned=turned)
    assert torch.allclose(probes(made.tensor()[1]), numbers(MIDDLES[turned, scale]), atol=2e-5)


def test_the_middle_is_told_how_to_look_and_other_methods_say_no(vfimamba, tmp_path):
    first, second = video(2, 61, 83) / 255
    for name, picture in (("a", first), ("b", second)):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        cv2.imwrite(str(tmp_path / f"{name}.png"), pixels[..., ::-1])
    pair = ["interpolate", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "-o", str(tmp_path / "mid.png")]
    flags = ["-m", "vfimamba", "--weights", str(vfimamba), "--flow-scale", "0.5", "--turned"]
    result = CliRunner().invoke(app, [*pair, *flags])
    assert result.exit_code == 0, result.output
    made = torch.from_numpy(cv2.imread(str(tmp_path / "mid.png"))[..., ::-1].copy()).permute(2, 0, 1) / 255
    assert torch.allclose(probes(made), numbers(MIDDLES[True, 0.5]), atol=0.6 / 255)
    (tmp_path / "mid.png").unlink()
    refused = (
        (["-m", "blend", "--turned"], "--turned: blend has no such setting"),
        (["-m", "dis", "--no-turned"], "--no-turned: dis has no such setting"),
        (["-m", "vfimamba", "--flow-scale", "0.3"], "--flow-scale 0.3: motion is sought at 1, 0.5"),
    )
    for flags, said in refused:
        result = CliRunner().invoke(app, [*pair, *flags])
        assert isinstance(result.exception, InputError)
        assert said in str(result.exception)
        assert not (tmp_path / "mid.png").exists()


def test_the_large_published_network_averages_with_turned_pictures_and_the_small_one_does_not(tmp_path):
    for width, turned in ((8, False), (32, True)):
        with torch.device("meta"):
            shapes = layout(VFIMamba(Config(width=width, depths=(1, 1, 1, 1, 1))), {})
        torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.pkl")
        assert VFIMamba.load_official(tmp_path / "x.pkl").config.turned == turned
