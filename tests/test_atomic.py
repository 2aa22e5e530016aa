"""What is written appears whole, under its name, and is readable by whom the umask says: files and folders alike."""

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import frameloom
from frameloom.atomic import aside, save_tensors
from frameloom.tasks.compression.base import compress
from frameloom.tasks.compression.fit import State
from frameloom.training import train
from frameloom.training.pretrained import load, save_pretrained
from frameloom.video.clip import Clip
from frameloom.world.captions import keep
from media import moving, tensor


def clip() -> Clip:
    return Clip.from_tensor(tensor(moving(4, 32, 48)).float() / 255)


def codec_state(folder: Path) -> None:
    weight = torch.nn.Linear(2, 2)
    State(folder / "state", "about").keep(0, 1, 1.0, weight, [torch.optim.Adam(weight.parameters())])


def quantised(folder: Path) -> None:
    from frameloom.scale.qmoe import quantize
    from test_qmoe import build

    model = folder / "model"
    build("mixtral").save_pretrained(model)
    quantize(model, folder / "small", "rtn")
    shutil.rmtree(model)  # what transformers wrote is not ours


WRITERS = {
    "train": lambda folder: train("cbb", folder / "run", steps=1, workers=0),
    "distill": lambda folder: frameloom.distill("reflow", "digits-16", folder / "run", pairs=3, steps=2, batch=2,
                                                sampling=2),
    "quantize": quantised,
    "save_pretrained": lambda folder: save_pretrained(load("world-words"), "world-words", folder / "weights"),
    "compress": lambda folder: compress(clip(), folder / "out.flm", "x264"),
    "the state of a fit": codec_state,
    "a world's cache": lambda folder: keep(folder / "cache" / "0.npy", np.zeros(3)),
    "flow": lambda folder: frameloom.flow(clip(), "dis").save(folder / "flow"),
    "a video": lambda folder: frameloom.interpolate(clip(), 48, "blend").save(folder / "out.mp4"),
}  # fmt: skip


@pytest.fixture(params=[0o022, 0o002, 0o027], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("writer", WRITERS)
def test_everything_that_is_written_has_the_permissions_of_new_files(tmp_path, mask, writer):
    WRITERS[writer](tmp_path)
    found = list(tmp_path.rglob("*"))
    assert any(path.is_file() for path in found)
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path} is {oct(path.stat().st_mode)}"
        assert not path.name.endswith(".partial")


def test_a_block_that_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(IsADirectoryError), aside(path) as partial:
        (partial.write_text("half"), tmp_path.read_text())
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_tensors_and_facts_come_back(tmp_path):
    save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    save_file({"a": torch.arange(3)}, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(3))
