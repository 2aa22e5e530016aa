"""What goes wrong with files: one line, status 2, nothing half-written, work that can be taken up again."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from frameloom.errors import InputError, Interrupted
from frameloom.video import writer
from frameloom.video.reader import read
from frameloom.video.writer import write
from media import make, moving

SRC = str(Path(__file__).parents[1] / "src")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def video(folder):
    return make(folder / "video.mp4", moving(30), audio=True, options={"crf": "20", "g": "10"})


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "frameloom", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": SRC}, **options)  # fmt: skip


def leftovers(folder: Path, name: str) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(name)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.mp4", None, "no such file"),
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"this is not a video\n" * 50, "not a video that can be read"),
        ("zeros.mkv", bytes(5000), "not a video that can be read"),
    ],
)
def test_what_is_no_video_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        read(tmp_path / name)


def test_sound_alone_is_named(clips):
    with pytest.raises(InputError, match=r"speech\.flac: the file has sound but no picture"):
        read(clips / "speech.flac")


def test_a_file_that_ends_early_says_how_much_is_there_and_can_be_kept(video, tmp_path):
    whole = make(tmp_path / "w.mkv", moving(48, 96, 128), options={"crf": "5", "g": "8"})
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=r"ends early: \d+ of about 48 frames could be read \(use --keep-readable"):
        read(cut)
    kept = read(cut, keep_readable=True)
    made = read(write(kept, tmp_path / "o.mp4"))
    assert 10 < len(made) < 40


def test_a_truncated_index_is_named(video, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cut\.mp4: not a video that can be read"):
        read(cut)


def test_two_hundred_damaged_files_end_in_an_error_or_a_valid_file(video, tmp_path):
    """Bytes flipped, cut out and cut off in real containers: an InputError or a file that reads, nothing else."""
    sources = [video, make(tmp_path / "b.mkv", moving(12)), make(tmp_path / "c.webm", moving(6), codec="libvpx-vp9",
               options={"crf": "40", "b:v": "0", "deadline": "realtime"}),
               make(tmp_path / "d.avi", moving(6), codec="mpeg4", options={"b:v": "200k"})]  # fmt: skip
    rng = np.random.default_rng(7)
    outcomes = {"error": 0, "valid": 0}
    messages: list[str] = []
    for number in range(200):
        source = sources[number % len(sources)]
        data = bytearray(source.read_bytes())
        kind = number // len(sources) % 3
        if kind == 0:
            for at in rng.integers(0, len(data), rng.integers(1, 20)):
                data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            start = int(rng.integers(0, len(data)))
            del data[start : start + int(rng.integers(1, 400))]
        else:
            data = data[: int(rng.integers(0, len(data)))]
        broken = tmp_path / f"broken{source.suffix}"
        broken.write_bytes(bytes(data))
        out = tmp_path / "out.mp4"
        begun = time.monotonic()
        try:
            write(read(broken, keep_readable=number % 2 == 0), out, preset="ultrafast")
            assert len(read(out)) >= 1
            outcomes["valid"] += 1
            out.unlink()
        except InputError as error:
            outcomes["error"] += 1
            messages.append(str(error))
        assert time.monotonic() - begun < 20
        assert leftovers(tmp_path, "out") == []
    assert min(outcomes.values()) > 20, outcomes
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("missing/out.mp4", "the folder .*missing does not exist"),
        ("out.xyz", "the name of a video ends in"),
        ("taken.mp4", "there is a folder of that name"),
        ("video.mp4", "the output is the input"),
        ("link.mp4", "the output is the input"),
    ],
)
def test_an_impossible_output_is_refused_before_any_work(video, folder, output, message):
    (folder / "taken.mp4").mkdir(exist_ok=True)
    if not (folder / "link.mp4").exists():
        (folder / "link.mp4").symlink_to(video)
    before = video.read_bytes()
    with pytest.raises(InputError, match=message):
        write(read(video), folder / output)
    assert video.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "h266"}, "--codec h266: no such codec; there are h264"),
        ({"crf": 99}, "--crf 99: h264 takes 0 to 51"),
        ({"codec": "ffv1", "preset": "slow"}, "--preset slow: ffv1 has no presets"),
        ({"preset": "warp"}, "cannot be written as libx264 64x48 yuv420p crf=18 preset=warp"),
    ],
)
def test_impossible_settings_leave_nothing(video, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(read(video), tmp_path / "o.mp4", **options)
    with pytest.raises(InputError, match=r"libx264 cannot live in a \.webm file"):
        write(read(video), tmp_path / "o.webm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "0"], "--fps 0: a frame rate is a positive number such as 60, 23.976 or 30000/1001"),
        (["--fps", "1000000000"], "more than 100,000 frames a second"),
        (["--fps", "fast"], "--fps fast: a frame rate is a positive number"),
        (["--method", "bland"], "no such method for interpolate; did you mean blend?"),
        (["--method", "x264"], "x264 is a method for compress, not for interpolate"),
        (["--range", "9s:3s"], "the range is empty"),
        (["--range", "90s:99s"], "holds no frame"),
        (["--weights", "nowhere/at/all", "--method", "vfimamba"], "--weights nowhere/at/all: no such folder"),
        (["--method", "dis", "--weights", "x"], "dis has no weights to load"),
    ],
)
def test_the_command_line_says_one_line_and_leaves_with_two(video, tmp_path, arguments, message):
    done = run("interpolate", video, tmp_path / "o.mp4", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    assert "Traceback" in run("interpolate", "absent.mp4", "o.mp4", "--debug").stderr


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_said_and_nothing_is_kept(tmp_path):
    source = make(tmp_path / "in.mkv", np.random.default_rng(0).integers(0, 255, (24, 128, 128, 3), dtype=np.uint8))
    done = run("interpolate", source, tmp_path / "out.mp4", "--fps", "24.5", "--method", "blend",
               preexec_fn=_small_files)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "out.mp4: the disk is full" in done.stderr
    assert leftovers(tmp_path, "out") == []


def test_ctrl_c_keeps_what_is_done_and_resume_gives_the_undisturbed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SEGMENT", 8)
    clip = read(make(tmp_path / "in.mp4", moving(30)))
    undisturbed = write(clip, tmp_path / "a.mp4").read_bytes()

    def stop(label, done, total):
        if done == 21:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="--resume goes on"):
        write(clip, tmp_path / "b.mp4", progress=stop)
    assert not (tmp_path / "b.mp4").exists()
    seen = []
    write(clip, tmp_path / "b.mp4", resume=True, progress=lambda label, done, total: seen.append(done))
    assert seen[0] == 9, "the second segment is encoded again, the first is not"
    assert (tmp_path / "b.mp4").read_bytes() == undisturbed
    assert len(read(tmp_path / "b.mp4")) == 30
    assert leftovers(tmp_path, "b") == ["b.mp4"]


def test_resume_refuses_work_of_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SEGMENT", 8)
    clip = read(make(tmp_path / "in.mp4", moving(30)))

    def stop(label, done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        write(clip, tmp_path / "b.mp4", progress=stop)
    with pytest.raises(InputError, match="other settings"):
        write(clip, tmp_path / "b.mp4", crf=30, resume=True)


def test_after_kill_nine_the_same_command_with_resume_gives_the_same_file(tmp_path):
    source = make(tmp_path / "in.mkv", moving(700, 32, 48), options={"crf": "30", "preset": "ultrafast"})
    arguments = ["interpolate", str(source), None, "--fps", "2x", "--method", "blend", "--preset", "veryslow"]
    arguments[2] = str(tmp_path / "a.mp4")
    assert run(*arguments).returncode == 0
    arguments[2] = str(tmp_path / "b.mp4")
    victim = subprocess.Popen([sys.executable, "-m", "frameloom", *arguments], env=os.environ | {"PYTHONPATH": SRC},
                              stderr=subprocess.DEVNULL)  # fmt: skip
    partial = tmp_path / "b.mp4.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.nut"))) < 2 and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.005)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "b.mp4").exists()
    assert partial.is_dir()
    assert run(*arguments, "--resume").returncode == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert not partial.exists()


def test_unfinished_work_is_not_thrown_away_silently(tmp_path, monkeypatch, caplog):
    clip = read(make(tmp_path / "in.mp4", moving(5)))
    (tmp_path / "o.mp4.partial").mkdir()
    write(clip, tmp_path / "o.mp4")
    assert "--resume would go on with it" in caplog.text
