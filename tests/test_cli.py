"""The command line as a user meets it, on real files, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import typer
from typer.testing import CliRunner

from frameloom.cli import options
from frameloom.cli.app import app
from frameloom.cli.chain import Step, parse, parse_size
from frameloom.errors import InputError
from frameloom.video.reader import read
from media import make, moving, packets

SRC = str(Path(__file__).parents[1] / "src")


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "frameloom", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": SRC})  # fmt: skip


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make(tmp_path_factory.mktemp("cli") / "video.mp4", moving(16, 64, 96), audio=True, rate=24)


def test_interpolate_with_json_prints_one_object_and_keeps_the_sound(video, tmp_path):
    out = tmp_path / "o.mp4"
    done = run("interpolate", video, out, "--fps", "60", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["frames"], facts["fps"], facts["method"]) == (40, "60", "dis")
    assert "video.mp4  96x64  24 fps" in done.stderr
    assert [p for p, _ in packets(out, "audio")[0]] == [p for p, _ in packets(video, "audio")[0]]
    assert len(read(out)) == 40


def test_compress_inspect_and_decompress_any_frames(video, tmp_path):
    packed, back = tmp_path / "o.flm", tmp_path / "b.mp4"
    assert run("compress", video, packed, "--method", "hnerv", "--epochs", "3").returncode == 0
    listed = run("inspect", packed, "--json")
    assert json.loads(listed.stdout)["bytes"] == packed.stat().st_size
    done = run("decompress", packed, back, "--frames", "3:7,0")
    assert done.returncode == 0, done.stderr
    assert len(read(back)) == 5


def test_a_chain_makes_a_video_or_a_compressed_file_and_keeps_the_sound(video, tmp_path):
    chain = "interpolate 36fps method=blend | compress x264 quality=30"
    done = run("run", video, tmp_path / "o.mp4", "--do", chain)
    assert done.returncode == 0, done.stderr
    made = read(tmp_path / "o.mp4")
    assert (made.rate, len(made)) == (36, 24)
    assert len(packets(tmp_path / "o.mp4", "audio")[0]) == len(packets(video, "audio")[0])
    assert run("run", video, tmp_path / "o.flm", "--do", chain).returncode == 0
    assert (tmp_path / "o.flm").stat().st_size < 20_000


def test_a_chain_is_parsed_word_by_word():
    assert parse("interpolate 60fps method=dis | compress hnerv size=60k") == [
        Step("interpolate", {"fps": "60fps", "method": "dis"}),
        Step("compress", {"method": "hnerv", "size": 60_000}),
    ]
    for text, message in (("interpolate | | compress", "empty step"), ("sharpen 3", "sharpen is no verb of a chain"),
                          ("interpolate speed=3", "interpolate cannot take speed=3"),
                          ("compress hnerv epochs=many", "epochs=many")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            parse(text)
    assert parse_size("1.5M") == 1_500_000


def test_the_table_of_methods_cards_and_citations():
    table = json.loads(run("methods", "--json").stdout)
    assert {"vfimamba", "hnerv", "dis", "x264"} <= {row["id"] for row in table}
    assert "HNeRV: A Hybrid Neural Representation for Videos" in run("card", "hnerv").stdout
    cited = run("cite", "hnerv", "vfimamba").stdout
    assert cited.count("@") == 2
    assert "2304.02633" in cited
    wrong = run("card", "hnrv")
    assert (wrong.returncode, wrong.stderr.strip()) == (
        2,
        "frameloom: --method hnrv: no such method; did you mean hnerv?",
    )


def test_doctor_finds_this_machine_fit():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"]


def test_train_goes_on_after_kill_nine_to_the_same_weights(tmp_path):
    import signal
    import time

    arguments = ["train", "vfimamba", "--steps", "6", "--workers", "0", "-o"]
    environment = os.environ | {"PYTHONPATH": SRC}
    assert run(*arguments, tmp_path / "a").returncode == 0
    victim = subprocess.Popen([sys.executable, "-m", "frameloom", *arguments, str(tmp_path / "b")], env=environment,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "b" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert run(*arguments, tmp_path / "b").returncode == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_group_of_flags_reaches_the_command_as_one(tmp_path):
    seen = []

    def command(name: str, *, reading: options.Reading, encoding: options.Encoding, json: options.Json = False) -> None:
        """Says what it was told."""
        seen.append((name, reading, encoding, json))

    toy = typer.Typer()
    toy.command()(options.grouped(command))
    given = ["--stream", "1", "--range", "1s:2s", "--rate", "12", "--deinterlace", "--keep-readable", "--codec", "ffv1",
             "--crf", "7", "--preset", "fast", "--json"]  # fmt: skip
    for flags in ([], given):
        assert CliRunner().invoke(toy, ["x", *flags]).exit_code == 0
    told = {"stream": 1, "range": "1s:2s", "rate": "12", "deinterlace": True, "keep_readable": True}
    told = options.Reading(**told), options.Encoding(codec="ffv1", crf=7, preset="fast")
    assert seen == [("x", options.Reading(), options.Encoding(), False), ("x", *told, True)]


def test_what_is_asked_of_the_encoder_is_in_the_file(tmp_path):
    make(tmp_path / "in.mp4", moving(4))
    asked = ["interpolate", str(tmp_path / "in.mp4"), str(tmp_path / "out.mkv"), "--fps", "24", "--codec", "ffv1"]
    assert CliRunner().invoke(app, [*asked, "-m", "blend"]).exit_code == 0
    with av.open(str(tmp_path / "out.mkv")) as file:
        assert file.streams.video[0].codec_context.name == "ffv1"
