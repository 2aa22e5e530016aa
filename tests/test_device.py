"""A device that is not there, or is none, is one line of every command and verb that computes; nothing is written."""

import inspect

import pytest
import torch
import typer
from typer.testing import CliRunner

import frameloom
from frameloom.cli.app import app
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.video.clip import Clip
from media import make, moving

# The arguments of every command that takes a device; those in capitals are paths below.
COMMANDS = {
    "flow": ["CLIP", "OUT"],
    "interpolate": ["CLIP", "OUT.mp4", "--fps", "24"],
    "stabilize": ["CLIP", "OUT.mp4"],
    "live": ["CLIP", "OUT.mp4", "--prompt", "a ball"],
    "compress": ["CLIP", "OUT.flm"],
    "rd": ["CLIP", "-o", "OUT.html"],
    "generate": ["a ball", "-o", "OUT.mp4"],
    "predict": ["CLIP", "OUT.mp4"],
    "edit inpaint": ["CLIP", "OUT.mp4", "--mask", "MASK"],
    "train": ["cbb", "-o", "OUT"],
    "distill": ["--teacher", "stiv", "-o", "OUT"],
    "serve": ["--port", "0"],
    # A batch hands flags on to its verb.
    "batch": ["interpolate", "CLIP", "-o", "OUT", "--"],
}
ABSENT = ["foo", "cuda:99", "meta"] + ["cuda"] * (not torch.cuda.is_available())


def taking_device() -> set[str]:
    """Names of the commands with the flag `--device` that says where to compute."""
    found = set()

    def walk(group, path: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{path}{name} ")
            elif any(one.name == "device" and "where to compute" in (one.help or "") for one in command.params):
                found.add(path + name)

    walk(typer.main.get_command(app), "")
    return found


def test_every_command_that_takes_a_device_is_tried_here():
    assert taking_device() == set(COMMANDS) - {"batch"}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    make(folder / "clip.mp4", moving(3))
    make(folder / "mask.mp4", moving(3))
    return folder


@pytest.mark.parametrize("device", ABSENT)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_here_is_one_line_and_leaves_nothing(media, tmp_path, command, device):
    paths = {"CLIP": str(media / "clip.mp4"), "MASK": str(media / "mask.mp4")}
    words = [paths.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in COMMANDS[command]]
    done = CliRunner().invoke(app, [*command.split(), *words, "--device", device])
    assert isinstance(done.exception, InputError), done.exception
    assert str(done.exception).startswith(f"--device {device}: ")
    assert str(done.exception).count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["flow", "interpolate", "stabilize", "predict", "compress", "load", "generate"])
def test_the_python_verbs_say_the_same(tmp_path, verb):
    function = getattr(frameloom, verb)
    assert "device" in inspect.signature(function).parameters
    clip = Clip.from_tensor(torch.rand(3, 3, 16, 16))
    first = {"load": ["vfimamba"], "generate": ["a ball"], "compress": [clip, tmp_path / "out.flm"]}.get(verb, [clip])
    with pytest.raises(InputError, match=r"^--device foo: names no device; here there is cpu"):
        function(*first, device="foo")
    assert list(tmp_path.iterdir()) == []


def test_devices_that_are_here_pass(monkeypatch):
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        check_device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cuda:1", torch.device("cuda", 1)):
        check_device(device)
    with pytest.raises(InputError, match=r"--device cuda:2: this machine .* there is cpu, cuda:0, cuda:1$"):
        check_device("cuda:2")
