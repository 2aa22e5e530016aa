"""Many files: every good one done exactly once, the bad ones named, whoever is killed; on processes, ranks and Ray."""

import contextlib
import glob
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import frameloom
from frameloom.cli.app import app
from frameloom.cli.batch import _preload, recipe
from frameloom.cli.batch import check as batch_check
from frameloom.errors import InputError
from frameloom.scale.farm import cluster, local, torchrun, worker
from frameloom.scale.farm.manifest import Unit, gather, matched, pending, read_list
from frameloom.scale.farm.run import farm
from frameloom.scale.farm.torchrun import SharedList
from frameloom.scale.farm.worker import Outcome, Worker
from media import make, moving

SRC = str(Path(__file__).parents[1] / "src")
BLEND = ("--fps", "36", "--method", "blend")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and its content."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def shout(unit: Unit, draft: Path) -> dict:
    """A verb without a video: the text in capitals, and the mischief that the text asks for."""
    text = Path(unit.input).read_text()
    draft.write_text(text.upper()[: len(text) // 2])
    mark = Path(unit.input).with_suffix(".seen")
    first, tries = not mark.exists(), mark.read_text() + "x" if mark.exists() else "x"
    mark.write_text(tries)
    if "poison" in text:
        raise InputError(f"{draft}: cannot be made of {unit.input}")
    if "bug" in text:
        raise ZeroDivisionError("division by zero")
    if "leave" in text:
        sys.exit(3)
    if "crash" in text or ("stumble" in text and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in text or ("slow" in text and first):
        time.sleep(60)
    draft.write_text(text.upper())
    return {"frames": len(text)}


def plan(folder: Path, out: Path, **texts: str) -> list[Unit]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return [Unit(str(folder / f"{name}.txt"), str(out / f"{name}.txt"), recipe={"verb": "shout"}) for name in texts]


@pytest.fixture(scope="module", autouse=True)
def server():
    """Whoever comes first decides what the server of processes has imported: let it be all that a verb needs."""
    modules = tuple(module for verb in ("interpolate", "compress", "flow") for module in _preload(verb))
    assert list(local.each(len, iter(["abc"]), 1, None, modules)) == [("abc", 3)]


def echo(path: Path) -> str:
    return path.name


# What is to be done


def test_a_glob_repeats_its_folders_below_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.mp4", "in/deep/b.mp4", "in/deep/b.mov"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    rows = gather(["in/**/*.mp4"], Path("out"), echo)
    assert [(row.input, str(row.output)) for row in rows] == [
        ("in/a.mp4", "out/a.mp4"), ("in/deep/b.mp4", "out/deep/b.mp4")]  # fmt: skip
    assert [str(row.output) for row in gather(["in/deep/b.mov"], Path("out"), echo)] == ["out/b.mov"]
    both = gather(["in/a.mp4", "in/deep/*.mov"], Path("out"), echo)  # as a shell leaves them
    assert [str(row.output) for row in both] == ["out/a.mp4", "out/b.mov"]


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        ("in/*.mkv", "out", r"in/\*\.mkv: no such file; a glob in quotes is wanted"),
        ("in", "out", r"in: is a folder; say which of its files, such as 'in/\*\.mp4'"),
        ("in/*.mp4", "in", r"in/a\.mp4: the output is an input"),
        ("in/**/*.mp4", "in/done", r"--out in/done: the glob of the inputs would find in/done/a\.mp4 in the next run"),
        ("in/*/x.*", "out", r"out/1/x\.txt: both in/1/x\.avi and in/1/x\.mov would be written there"),
        ("list.csv", "out", r"list\.csv, line 2: names no input"),
        ("none.jsonl", "out", r"none\.jsonl: cannot be read \(FileNotFoundError\)"),
        ("up.jsonl", "out", r"out/\.\./a\.mp4: lies outside of --out out"),
    ],
)
def test_what_cannot_be_a_batch_is_named(tmp_path, monkeypatch, inputs, out, message):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.mp4", "in/1/x.avi", "in/1/x.mov"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("list.csv").write_text("input,output\n,a.mp4\n")
    Path("up.jsonl").write_text('{"input": "in/a.mp4", "output": "../a.mp4"}\n')
    with pytest.raises(InputError, match=message):
        gather([inputs], Path(out), lambda path: "x.txt" if path.stem == "x" else path.name)


NAMES = st.sampled_from(["a", "b", "ab", "c.mp4", "d.mp4"])


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=6),
       st.lists(st.sampled_from(["*", "**", "a*", "?", "b"]), max_size=2),
       st.sampled_from(["*", "a*", "*.mp4", "b"]))  # fmt: skip
def test_what_a_pattern_matches_is_what_glob_finds(tmp_path_factory, files, folders, last):
    pattern = [*folders, last]
    root = tmp_path_factory.mktemp("glob")
    for parts in files:
        with contextlib.suppress(OSError):  # one name for a file and a folder
            root.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
            root.joinpath(*parts).touch()
    found = {Path(path) for path in glob.glob(str(root.joinpath(*pattern)), recursive=True)}
    for path in root.rglob("*"):
        assert (path in found) == matched(path.relative_to(root).parts, tuple(pattern)), path


def test_lists_in_csv_and_json_lines_say_the_same(tmp_path):
    table, lines = tmp_path / "list.csv", tmp_path / "list.jsonl"
    table.write_text('input,output,options\na.mp4,"x/1,5.mp4",--fps 60 --dedupe\nb.mp4,,\n')
    lines.write_text('{"input": "a.mp4", "output": "x/1,5.mp4", "options": {"fps": 60, "dedupe": true, "tile": null}}'
                     '\n\n{"input": "b.mp4"}\n')  # fmt: skip
    rows = read_list(table, echo)
    assert rows == read_list(lines, echo)
    assert rows[0].arguments == ("--fps", "60", "--dedupe")
    assert [(row.input, str(row.output)) for row in rows] == [
        (str(tmp_path / "a.mp4"), "x/1,5.mp4"), (str(tmp_path / "b.mp4"), "b.mp4")]  # fmt: skip


@given(st.one_of(st.text(max_size=80), st.builds(lambda text: f"input,output\n{text}", st.text(max_size=60)),
                 st.builds(json.dumps, st.dictionaries(st.sampled_from(["input", "output", "options"]),
                           st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers()))))),
       st.sampled_from([".csv", ".jsonl"]))  # fmt: skip
def test_no_list_however_damaged_gives_more_than_one_line_of_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("lists") / f"list{suffix}"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        assert all(row.input for row in read_list(path, echo))


def test_an_unknown_verb_or_flag_is_named_before_any_work():
    for verb, arguments, message in (
        ("interpolat", (), "interpolat: no verb that takes one file and makes one; did you mean interpolate"),
        ("doctor", (), "doctor: no verb that takes one file"),
        ("interpolate", ("--fsp", "60"), "--fsp 60: No such option: --fsp"),
        ("interpolate", ("--method", "vfimaba"), "did you mean vfimamba"),
        ("interpolate", ("--resume",), "--resume: is for the batch as a whole"),
        ("compress", ("--size",), "requires an argument"),
        ("run", ("--do", "sharpen 3"), "sharpen is no verb of a chain"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(verb, arguments)
    assert recipe("interpolate", ()) == recipe("interpolate", ("--fps", "60"))  # the default, said aloud
    assert recipe("interpolate", ()) != recipe("interpolate", ("--fps", "50"))
    assert recipe("interpolate", ("--method", "vfimamba"))["version"].keys() == {"frameloom", "method", "weights"}


# One unit


def test_an_attempt_that_fails_leaves_no_trace_and_names_the_file_that_was_asked_for(tmp_path):
    [unit] = plan(tmp_path / "in", tmp_path / "out", a="poison")
    with pytest.raises(InputError) as caught:
        Worker(shout).attempt(unit)
    assert str(caught.value) == f"{unit.output}: cannot be made of {unit.input}"
    assert tree(tmp_path / "out") == {}
    assert hidden(tmp_path / "out") == []


def test_a_file_that_changes_while_it_is_read_is_a_failure(tmp_path):
    [unit] = plan(tmp_path / "in", tmp_path / "out", a="still")

    def meddling(unit: Unit, draft: Path) -> dict:
        Path(unit.input).write_text("moving")
        draft.touch()
        return {}

    with pytest.raises(InputError, match="was changed while it was read"):
        Worker(meddling).attempt(unit)
    assert tree(tmp_path / "out") == {}


def test_what_is_done_is_kept_and_what_differs_is_named(tmp_path):
    [unit] = plan(tmp_path / "in", tmp_path / "out", a="text")
    unit = replace(unit, recipe={"verb": "shout", "options": {"fps": 30}, "version": {"frameloom": "0.1.0"}})
    assert pending([unit], False, False) == ([unit], [])
    Worker(shout).attempt(unit)
    assert pending([unit], True, False) == ([], [unit])
    assert pending([unit], False, True) == ([unit], [])
    with pytest.raises(InputError, match=r"a\.txt: is there already; --resume keeps what is done"):
        pending([unit], False, False)

    os.utime(unit.input)  # a copy with a new time, and the same content
    assert pending([unit], True, False) == ([], [unit])
    newer = {"verb": "shout", "options": {"fps": 30}, "version": {"frameloom": "0.2.0"}}
    note, result = unit.sidecar.read_text(), Path(unit.output).read_text()

    def conflict(message: str, unit: Unit = unit) -> None:
        with pytest.raises(InputError, match=rf"a\.txt: {message}"):
            pending([unit], True, False)
        assert pending([unit], True, True) == ([unit], [])

    conflict("was made with fps 30, not 60; --overwrite", replace(unit, recipe=unit.recipe | {"options": {"fps": 60}}))
    conflict(r"was made with frameloom 0\.1\.0, not 0\.2\.0", replace(unit, recipe=newer))
    Path(unit.output).write_text(result[:-1])
    conflict("has been changed since it was made")
    Path(unit.output).write_text(result)
    for damage in ("{", "[]", '{"recipe": {}}', note.replace('"bytes"', '"byte"')):
        unit.sidecar.write_text(damage)
        conflict(r"has a sidecar that cannot be read \(a\.txt\.batch\.json\)")
    unit.sidecar.unlink()
    conflict("is there already, and no batch made it")
    unit.sidecar.write_text(note)
    Path(unit.input).write_text("TEXT")
    conflict("was made of another")


@pytest.mark.parametrize("folder", [False, True])
def test_wherever_publishing_is_cut_off_nothing_false_counts_as_done(tmp_path, monkeypatch, folder):
    """The old result is for other options; whatever step is the last one, a resume ends with the new one."""
    [unit] = plan(tmp_path / "in", tmp_path / "out", a="text")

    def write(unit: Unit, draft: Path) -> dict:
        content = str(unit.recipe["fps"])
        if folder:
            draft.mkdir()
            draft /= "inside"
        draft.write_text(content)  # of one length whatever the options: sizes do not tell them apart
        return {"frames": 1}

    class Killed(BaseException):
        pass

    old, new = (replace(unit, recipe={"verb": "write", "fps": fps}) for fps in (30, 60))
    for step in range(4):
        Worker(write).attempt(old)
        left = [step]

        def cut(function, left=left):
            def call(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(worker.os, "replace", cut(os.replace))
            patch.setattr(worker, "remove", cut(worker.remove))
            with contextlib.suppress(Killed):
                Worker(write).attempt(new)
        if pending([new], True, True)[1]:
            assert step == 3
        else:
            Worker(write).attempt(new)
        made = Path(new.output) / "inside" if folder else Path(new.output)
        assert made.read_text() == "60"
        assert pending([new], True, False) == ([], [new])


# Processes


def test_each_failure_takes_its_own_attempt_and_no_more(tmp_path):
    """Two processes: good files, poison, a bug, a crash, a hang, and two that are fine at the second try."""
    out = tmp_path / "out"
    units = plan(tmp_path / "in", out, good="good", poison="poison", bug="bug", crash="crash", stumble="stumble once",
                 hang="hang", also="also good")  # fmt: skip
    report = farm(lambda: units, Worker(shout, limit=2.0), out, workers=2)
    found = {Path(outcome.input).stem: outcome for outcome in report.outcomes}
    assert len(found) == len(report.outcomes) == len(units)
    made = {name for name, outcome in found.items() if outcome.status == "made"}
    assert made == {"good", "also", "stumble"}
    assert (found["good"].tries, found["stumble"].tries, found["good"].frames) == (1, 2, 4)
    assert found["crash"].error == "its process died: killed by signal 9 (SIGKILL)"
    assert found["hang"].error == "took longer than 2 s"
    assert found["bug"].error.startswith("ZeroDivisionError: division by zero (test_batch.py, line ")
    assert {outcome.tries for outcome in report.failures} == {2}
    assert (tmp_path / "in" / "poison.seen").read_text() == "xx"
    expected = {f"{name}.txt{kind}" for name in made for kind in ("", ".batch.json")} | {"quarantine.jsonl"}
    assert set(tree(out)) == expected
    assert (out / "stumble.txt").read_text() == "STUMBLE ONCE"
    assert hidden(out) == []
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {row["input"] for row in rows} == {outcome.input for outcome in report.failures}
    assert len(gather([str(out / "quarantine.jsonl")], out, echo)) == 4  # and it is a list again


def test_fail_fast_stops_what_is_running_and_a_second_batch_waits_its_turn(tmp_path):
    out = tmp_path / "out"
    units = plan(tmp_path / "in", out, poison="poison " * 9, hang="hang " * 5, later="later")
    begun = time.monotonic()
    report = farm(lambda: units, Worker(shout, tries=1), out, workers=2, fail_fast=True)
    assert time.monotonic() - begun < 30  # the other one hangs for a minute
    assert [outcome.status for outcome in report.outcomes] == ["failed"]
    assert hidden(out) == []
    assert multiprocessing.active_children() == []

    def busy(label: str, done: int, total: int | None) -> None:
        with pytest.raises(InputError, match="another batch is at work there"):
            farm(lambda: units, Worker(shout), out)

    farm(lambda: units[2:], Worker(shout), out, progress=busy)
    assert (out / "later.txt").read_text() == "LATER"
    assert not (out / "quarantine.jsonl").exists()


def which(item: int) -> str:
    time.sleep(0.2)
    return os.environ["LOCAL_RANK"]


def test_processes_have_numbers_of_their_own_and_share_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert {number for _, number in local.each(which, iter(range(1, 5)), 2)} == {"0", "1"}
    assert [worker.share("GPU-a,GPU-b", number) for number in range(3)] == ["GPU-a", "GPU-b", "GPU-a"]


def by_length(paths: list[str]) -> list[float]:
    if any("crash" in path for path in paths):
        os.kill(os.getpid(), signal.SIGSEGV)
    return [float(len(path)) for path in paths]


def test_a_header_that_crashes_its_reader_costs_only_its_own_estimate(tmp_path):
    assert local.costs(["a", "bb", "crash", "ccc"], look=by_length) == [1.0, 2.0, 0.0, 3.0]
    long = make(tmp_path / "long.mp4", moving(20, 32, 32))
    short = make(tmp_path / "short.mp4", moving(4, 32, 32))
    (tmp_path / "text").write_text("not a video")
    assert local.headers([str(long), str(short), str(tmp_path / "text"), str(tmp_path / "none")]) == [
        20 * 32 * 32, 4 * 32 * 32, 11, 0]  # fmt: skip


# Ranks


@pytest.fixture
def ranks():
    """Two ranks' views of one list, in this process."""
    store = dist.HashStore()
    views = [SharedList(store, rank, 2, lease=1.0) for rank in range(2)]
    views[0].publish([Unit(f"{k}", f"out/{k}", recipe={"verb": "x"}) for k in range(6)])
    assert views[1].receive()
    return views


def note(view: SharedList, unit: Unit) -> None:
    view.note(Outcome(unit.input, unit.output, "made", frames=1))


def test_ranks_share_a_list_without_overlap_and_all_learn_its_end(ranks):
    takers, taken = [view.take() for view in ranks], []
    for turn in range(6):
        unit = next(takers[turn % 2])
        taken.append(unit)
        note(ranks[turn % 2], unit)
    assert [unit.input for unit in taken] == list("012345")
    assert taken[0] == ranks[0].units[0]
    for taker in takers:
        assert next(taker, None) is None
    assert [outcome.input for outcome in ranks[0].outcomes()] == list("012345")


def test_a_list_longer_than_a_message_arrives_whole(ranks, monkeypatch):
    monkeypatch.setattr(torchrun, "PIECE", 4)
    units = [Unit(f"{k}", f"out/{k}", ("--fps", "60"), {"verb": "x", "fps": k % 2}) for k in range(9)]
    ranks[0].publish(units)
    assert ranks[1].receive()
    assert ranks[1].units == units
    for unit in units[:-1]:
        note(ranks[1], unit)
    assert ranks[0]._open() == [8]
    assert [outcome.input for outcome in ranks[0].outcomes()] == list("01234567")
    ranks[0].abandon()
    assert not ranks[1].receive()
    assert next(ranks[1].take(), None) is None


def test_a_silent_ranks_unit_passes_on_once_its_lease_is_over(ranks, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("frameloom.scale.farm.torchrun.time.monotonic", lambda: clock[0])
    alive, dead = ranks
    held = next(dead.take())
    alive.store.add("cursor", 1)  # and unit 1 was counted off by somebody who died before he put his name to it
    beats = [8]

    def beat(seconds: float) -> None:
        clock[0] += 0.1
        if clock[0] < 3.0:  # it still lives for three seconds, three leases
            beats[0] += 1
            alive.store.set("beat/1", str(beats[0]))

    monkeypatch.setattr("frameloom.scale.farm.torchrun.time.sleep", beat)
    taker, taken = alive.take(), []
    for unit in taker:
        taken.append((unit.input, clock[0]))
        note(alive, unit)
    assert [name for name, _ in taken] == [*"2345", "1", held.input]
    assert 1.0 < taken[-2][1] < 1.5
    assert 3.8 < taken[-1][1] < 4.5


def test_of_two_ranks_only_one_inherits_and_a_unit_that_kills_its_ranks_is_given_up(ranks):
    a, b = ranks
    a.store.set("holder/3", "7 1")
    held = a._holder(3)
    assert a._take_over(3)
    b._holder = lambda number: held  # b looked before a was faster
    assert not b._take_over(3)
    del b._holder
    assert not b._take_over(3)  # two ranks have died of it by then
    [outcome] = b.outcomes()
    assert (outcome.status, outcome.tries) == ("failed", 2)
    assert "died or fell silent, 2 times" in outcome.error


def test_a_rank_with_another_version_takes_nothing(ranks):
    unit = Unit("a.mp4", "a.mp4", BLEND, recipe("interpolate", BLEND))
    batch_check(unit)
    other = replace(unit, recipe=unit.recipe | {"version": {"frameloom": "0.0.9", "method": "blend"}})
    ranks[0].publish([other])
    with pytest.raises(InputError, match=r"frameloom is 0\.1\.0 on this machine and 0\.0\.9 on the one that planned"):
        torchrun.follow(Worker(shout, check=batch_check), ranks[1], False)
    assert next(ranks[0].take()) == other


# Real verbs


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((6, 14, 10, 4)):
        make(folder / f"{number}.mp4", moving(frames), audio=number == 1)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    return folder


@pytest.fixture(scope="module")
def sequential(videos, tmp_path_factory) -> Path:
    """The tree that one worker makes, one file after the other."""
    out = tmp_path_factory.mktemp("sequential")
    report = frameloom.batch("interpolate", videos / "*.mp4", out, BLEND, workers=1)
    assert (report.count("made"), report.count("failed")) == (4, 2)
    return out


def clean(folder: Path) -> dict[str, str]:
    """A tree without the list of failures, which names where the inputs lie and how often each was tried."""
    assert hidden(folder) == []
    return {name: digest for name, digest in tree(folder).items() if name != "quarantine.jsonl"}


def command(engine: str, videos: Path, out: Path, *flags: str) -> list[str]:
    return ["-m", "frameloom", "batch", "interpolate", f"{videos}/*.mp4", "--out", str(out), "--engine", engine,
            *flags, "--", *BLEND]  # fmt: skip


ENVIRONMENT = os.environ | {"PYTHONPATH": SRC}


def test_two_workers_make_the_bytes_of_one_and_a_resume_makes_nothing(videos, sequential, tmp_path):
    report = frameloom.batch("interpolate", videos / "*.mp4", tmp_path, fps=36, method="blend", workers=2)
    assert tree(tmp_path) == tree(sequential) | {"quarantine.jsonl": tree(tmp_path)["quarantine.jsonl"]}
    assert sorted(outcome.error for outcome in report.failures) == [
        f"{videos}/empty.mp4: the file is empty",
        f"{videos}/text.mp4: not a video that can be read (invalid data found when processing input)"]  # fmt: skip
    facts = json.loads((tmp_path / "1.mp4.batch.json").read_text())
    assert facts["output"]["frames"] == 21
    assert facts["recipe"]["options"]["fps"] == "36"
    assert facts["input"]["sha256"] == tree(videos)["1.mp4"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4*")}
    words = command("local", videos, tmp_path, "--resume", "--json")[2:]
    done = CliRunner().invoke(app, [*words[:2], *sorted(map(str, videos.glob("*.mp4"))), *words[3:]])  # by a shell
    assert done.exit_code == 3, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["made"], facts["kept"], facts["failed"]) == (0, 4, 2)
    assert "failed: " in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4*")}


def test_verbs_that_write_other_things_and_rows_with_options_of_their_own(videos, tmp_path):
    rows = [{"input": "0.mp4"}, {"input": "3.mp4", "output": "named.flm", "options": {"quality": "40"}}]
    (videos / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = frameloom.batch("compress", videos / "list.jsonl", tmp_path, method="x264")
    assert {Path(outcome.output).name: outcome.frames for outcome in report.outcomes} == {"0.flm": 6, "named.flm": 4}
    assert frameloom.decompress(tmp_path / "named.flm").info.width == 64
    report = frameloom.batch("flow", videos / "[03].mp4", tmp_path / "flow", method="dis")
    assert [outcome.status for outcome in report.outcomes] == ["made", "made"]
    assert {path.name for path in (tmp_path / "flow").iterdir()} == {"0", "3", "0.batch.json", "3.batch.json"}
    report = frameloom.batch("flow", videos / "[03].mp4", tmp_path / "flow", method="dis", resume=True)
    assert [outcome.status for outcome in report.outcomes] == ["kept", "kept"]


def test_a_script_without_a_guard_is_not_run_again_in_every_process(videos, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""import frameloom
report = frameloom.batch("interpolate", "{videos}/3.mp4", "{tmp_path}/out", {BLEND}, workers=1)
print([outcome.error or outcome.status for outcome in report.outcomes])
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.stdout == "['made']\n", done.stderr


def wait_for(condition, seconds: float = 90.0):
    """What `condition` gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def children(pid: int) -> list[int]:
    """Of a process, and of its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.parent.name), *children(int(path.parent.name))]
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_of_a_file_a_resume_ends_in_the_same_tree(videos, sequential, tmp_path, blow):
    # A shell starts what it puts in the background deaf to Ctrl-C, and so are its children: not this one.
    process = subprocess.Popen([sys.executable, *command("local", videos, tmp_path)], env=ENVIRONMENT,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    wait_for(lambda: hidden(tmp_path))
    family = children(process.pid)
    process.send_signal(blow)
    _, said = process.communicate(timeout=60)
    wait_for(lambda: not any(running(pid) for pid in family), 20)  # nobody is left to work for the dead
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped; what is made is kept, the same command with --resume goes on" in said
        assert hidden(tmp_path) == []
    assert all(name in clean(sequential) for name in tree(tmp_path) if ".batch-part" not in name)
    done = subprocess.run([sys.executable, *command("local", videos, tmp_path, "--resume")], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert clean(tmp_path) == clean(sequential)


def rank_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                return variable.decode()
    return ""


def test_torchrun_starts_killed_ranks_again_and_loses_no_unit(videos, sequential, tmp_path):
    good = tmp_path / "good.csv"
    good.write_text("input\n" + "".join(f"{videos}/{number}.mp4\n" for number in range(4)))
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
              *command("torchrun", videos, out)]  # fmt: skip
    launch[launch.index(f"{videos}/*.mp4")] = str(good)
    process = subprocess.Popen([sys.executable, *launch], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: out.is_dir() and hidden(out))
    ranks = [pid for pid in children(process.pid) if rank_of(pid) == "RANK=1"]
    os.kill(min(ranks), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert clean(out) == clean(sequential)


def lull(unit: Unit, draft: Path) -> dict:
    """Rank 1 never ends its first unit; rank 0 ends none before that has begun."""
    sign = Path(unit.input).parent / "lull"
    if os.environ["RANK"] == "1":
        sign.touch()
        time.sleep(60)
    wait_for(sign.exists)
    return shout(unit, draft)


def ranked(folder: str) -> None:
    units = plan(Path(folder) / "in", Path(folder) / "out", a="one", b="two", c="three")
    report = farm(lambda: units, Worker(lull), Path(folder) / "out", engine="torchrun", lease=1.5)
    if report is not None:
        print(sorted(outcome.status for outcome in report.outcomes))


def test_a_dead_ranks_unit_passes_on_where_the_others_live(tmp_path):
    """Two ranks that were started by hand have nobody who stops them all; one is killed in the middle of a unit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    call = [sys.executable, "-c", f"import test_batch; test_batch.ranked({str(tmp_path)!r})"]
    common = {"PYTHONPATH": f"{SRC}:{Path(__file__).parent}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}  # fmt: skip
    ranks = [subprocess.Popen(call, env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
             for rank in range(2)]  # fmt: skip
    try:
        wait_for((tmp_path / "in" / "lull").exists)
        family = children(ranks[1].pid)
        ranks[1].kill()
        wait_for(lambda: not any(running(pid) for pid in family), 20)  # nor does what it was at go on for a minute
        printed, _ = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert printed.strip() == "['made', 'made', 'made']"
    assert [(tmp_path / "out" / f"{name}.txt").read_text() for name in "abc"] == ["ONE", "TWO", "THREE"]
    assert hidden(tmp_path / "out") == []


def test_torchrun_and_ray_that_are_not_there_say_what_to_do(videos, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(InputError, match=r"MASTER_PORT not set; start it as torchrun --nproc-per-node 2 -m frameloom"):
        frameloom.batch("interpolate", videos / "*.mp4", tmp_path, engine="torchrun")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'Ray is not installed; pip install "frameloom\[cluster\]"'):
        frameloom.batch("interpolate", videos / "*.mp4", tmp_path, engine="ray")
    for settings, message in (({"engine": "slurm"}, "--engine slurm: there are local, torchrun, ray"),
                           ({"workers": 0}, "--workers 0: how many files at once"),
                           ({"engine": "torchrun", "workers": 2}, "torchrun's --nproc-per-node says how many"),
                           ({"suffix": "mkv"}, r"--suffix mkv: begins with a dot"),
                           ({"threads": 0}, "--threads 0")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            frameloom.batch("interpolate", videos / "*.mp4", tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


# Ray


def test_ray_makes_the_same_tree_and_survives_a_worker_that_dies(videos, sequential, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", f"{SRC}:{Path(__file__).parent}")
    report = frameloom.batch("interpolate", videos / "*.mp4", tmp_path / "videos", BLEND, engine="ray")
    assert report.count("failed") == 2
    assert clean(tmp_path / "videos") == clean(sequential)
    out = tmp_path / "out"
    units = plan(tmp_path / "in", out, good="good", crash="crash", stumble="stumble once", bug="bug",
                 leave="leave")  # fmt: skip
    report = farm(lambda: units, Worker(shout), out, engine="ray")
    found = {Path(outcome.input).stem: outcome for outcome in report.outcomes}
    assert {name for name, outcome in found.items() if outcome.status == "made"} == {"good", "stumble"}
    assert "process died" in found["crash"].error
    assert (found["bug"].tries, found["bug"].error[:17]) == (2, "ZeroDivisionError")
    assert (found["leave"].tries, found["leave"].error[:13]) == (2, "SystemExit: 3")
    assert (tmp_path / "in" / "leave.seen").read_text() == "xx"
    assert hidden(out) == []
    # What a cluster of the engine's own has to say goes to standard error, and has been said when it is shut down.
    assert capsys.readouterr().out == ""


@pytest.fixture
def silent_port() -> Iterator[str]:
    """Somebody listens there who is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "SILENT", "nonsense"])
def test_a_ray_address_that_leads_nowhere_is_one_line_in_time(videos, tmp_path, monkeypatch, silent_port, address):
    pytest.importorskip("ray")
    assert cluster.PATIENCE < 25  # and Python's own start comes to it
    monkeypatch.setattr(cluster, "PATIENCE", 3.0)
    address = address.replace("SILENT", silent_port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^RAY_ADDRESS=\S+: no Ray cluster can be joined there \(.+\); .*"
                                         r"RAY_AUTH_MODE=token$") as caught:  # fmt: skip
        frameloom.batch("interpolate", videos / "*.mp4", tmp_path / "out", BLEND, engine="ray")
    assert address in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert time.monotonic() - begun < 15
    assert list(tmp_path.iterdir()) == []


def test_a_ray_address_that_leads_to_a_cluster_passes(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = ray.init(num_cpus=1, object_store_memory=cluster.STORE, include_dashboard=False, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", found.address_info["gcs_address"])
        assert cluster._unusable() == ""
    finally:
        ray.shutdown()
