"""What is to be done: pairs of input and output from a glob or a list, and what earlier runs have left.

Beside every output stands a sidecar, `OUTPUT.batch.json`: the input (name, bytes, time, SHA-256), the recipe (verb,
options, version) and what came out. An output counts as done when its sidecar's recipe and input are those of today.
"""

import csv
import glob
import hashlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from frameloom.errors import InputError

LISTS = (".csv", ".jsonl")
COLUMNS = {"input", "output", "options", "error", "tries"}  # the last two are what a quarantine list adds
LARGEST_LIST = 256 << 20
DRAFT = ".batch-part"
Naming = Callable[[Path], str]


@dataclass(frozen=True)
class Row:
    """A line of a list, or a file that a glob found: `arguments` are its own, after those of all."""

    input: str
    output: Path
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One input, one output, and the recipe between them; plain text and numbers, to travel between machines."""

    input: str
    output: str
    arguments: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    cost: float = 0.0

    @property
    def sidecar(self) -> Path:
        return sidecar(self.output)


def sidecar(output: str | Path) -> Path:
    return Path(f"{output}.batch.json")


def gather(inputs: Sequence[str], out: Path, name: Naming) -> list[Row]:
    """The rows of lists (.csv, .jsonl), and one for every file that globs find, its folders repeated under `out`.

    Args:
        inputs: lists, globs, and files by name.
        name: what the output of an input is called, where no list says.

    Raises:
        InputError: nothing matches; a list that cannot be read; an output outside of `out`, given twice, or one that
            the same glob would take for an input.
    """
    rows: list[Row] = []
    matches = []
    for one in inputs:
        if Path(one).suffix.lower() in LISTS:
            rows += [Row(row.input, out / row.output, row.arguments) for row in read_list(Path(one), name)]
        else:
            found, match = _found(one, out, name)
            rows += found
            matches.append(match)
    _check(rows, out, lambda path: any(match(path) for match in matches))
    return rows


def _found(pattern: str, out: Path, name: Naming) -> tuple[list[Row], Callable[[Path], bool]]:
    parts = Path(pattern).parts
    fixed = next((k for k, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    base = Path(*parts[:fixed])
    if fixed == len(parts) - 1 and Path(pattern).is_dir() and not glob.has_magic(pattern):
        raise InputError(f"{pattern}: is a folder; say which of its files, such as '{Path(pattern) / '*.mp4'}'")
    files = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if not _ours(Path(path))]
    if not files:
        raise InputError(f"{pattern}: no such file; a glob in quotes is wanted, such as 'in/*.mp4', or a list "
                         "(.csv, .jsonl)")  # fmt: skip
    rows = [Row(str(path), out / path.relative_to(base).parent / name(path)) for path in files]
    whole = Path(os.path.abspath(pattern)).parts
    return rows, lambda path: glob.has_magic(pattern) and matched(path.parts, whole)


def _ours(path: Path) -> bool:
    return path.name.endswith(".batch.json") or path.name == "quarantine.jsonl"


def matched(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a glob, part by part, would find a path; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matched(parts, pattern[1:]) or (bool(parts) and matched(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matched(parts[1:], pattern[1:])


def _check(rows: list[Row], out: Path, matches: Callable[[Path], bool]) -> None:
    root = Path(os.path.abspath(out))
    inputs = {os.path.realpath(row.input) for row in rows}
    taken: dict[Path, str] = {}
    for row in rows:
        target = Path(os.path.abspath(row.output))
        if root not in target.parents:
            raise InputError(f"{row.output}: lies outside of --out {out}; an output is a path below it")
        if target in taken:
            raise InputError(f"{row.output}: both {taken[target]} and {row.input} would be written there; "
                             "a list with an output column can name them apart")  # fmt: skip
        if os.path.realpath(target) in inputs:
            raise InputError(f"{row.output}: the output is an input; give another --out")
        if matches(target):
            raise InputError(f"--out {out}: the glob of the inputs would find {row.output} in the next run; "
                             "give a folder that it does not reach")  # fmt: skip
        taken[target] = row.input


def read_list(path: Path, name: Naming) -> list[Row]:
    """The rows of a CSV with a header or of JSON lines: `input`, and if wanted `output` and `options`.

    Inputs are relative to the folder of the list. Options are the flags as one types them, or in JSON an object.
    Raises InputError with the line at fault.
    """
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes is no list of files; at most {LARGEST_LIST:,}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); a list of files is UTF-8 text") from None
    lines = _json_lines(path, text) if path.suffix.lower() == ".jsonl" else _csv_lines(path, text)
    rows = []
    for number, line in lines:
        where = f"{path}, line {number}"
        if unknown := set(line) - COLUMNS:
            raise InputError(f"{where}: there is no column {min(map(str, unknown))}; there are input, output, options")
        given = line.get("input")
        if not isinstance(given, str) or not given:
            raise InputError(f"{where}: names no input")
        output = line.get("output") or name(Path(given))
        if not isinstance(output, str):
            raise InputError(f"{where}: the output is a path, not {output!r}")
        rows.append(Row(str(path.parent / given), Path(output), _arguments(line.get("options"), where)))
    if not rows:
        raise InputError(f"{path}: lists no file")
    return rows


def _json_lines(path: Path, text: str) -> Iterable[tuple[int, dict]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {number}: an object is wanted, such as {{"input": "a.mp4"}}')
        yield number, row


def _csv_lines(path: Path, text: str) -> Iterable[tuple[int, dict]]:
    table = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if "input" not in (table.fieldnames or ()):
            raise InputError(f"{path}, line 1: the header names the columns: input, and if wanted output, options")
        for row in table:
            if None in row:
                raise InputError(f"{path}, line {table.line_num}: has more cells than the header")
            yield table.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: is not CSV ({error})") from None


def _arguments(options: Any, where: str) -> tuple[str, ...]:
    if options is None or options == "":
        return ()
    if isinstance(options, dict):
        return flags(options)
    try:
        return tuple(shlex.split(options))
    except (ValueError, AttributeError):
        raise InputError(f"{where}: options are flags such as --fps 60, or in JSON an object") from None


def flags(options: dict[str, Any]) -> tuple[str, ...]:
    """`{"fps": 60, "keep_readable": True}` as one types it: `--fps 60 --keep-readable`."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return tuple(words)


def fingerprint(path: str | Path, full: bool = True) -> dict[str, Any]:
    """Name, bytes, newest time and (if `full`) SHA-256 of a file, or of all files in a folder."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        stats = [file.stat() for file in files]
        found = {"name": path.name, "bytes": sum(s.st_size for s in stats),
                 "modified": max((s.st_mtime_ns for s in stats), default=0)}  # fmt: skip
        if full:
            digest = hashlib.sha256()
            for file in files:
                if path.is_dir():
                    digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
            found["sha256"] = digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a file that may be read is wanted") from None
    return found


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def trouble(unit: Unit) -> str | None:
    """Why the output that is there cannot pass for the result of `unit`; None if it can."""
    output = Path(unit.output)
    try:
        note = json.loads(unit.sidecar.read_text())
        recipe, made_of, made = note["recipe"], note["input"], note["output"]
        bytes_in, modified, digest, bytes_out = made_of["bytes"], made_of["modified"], made_of["sha256"], made["bytes"]
    except FileNotFoundError:
        return "is there already, and no batch made it"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"has a sidecar that cannot be read ({unit.sidecar.name})"
    if recipe != unit.recipe:
        return f"was made {_difference(recipe, unit.recipe)}"
    if size(output) != bytes_out:
        return "has been changed since it was made"
    try:
        now = fingerprint(unit.input, full=False)
        # The same size and time is taken for the same content, as rsync does; a copy with a new time is read.
        if now["bytes"] == bytes_in and (now["modified"] == modified or fingerprint(unit.input)["sha256"] == digest):
            return None
    except InputError:
        pass
    return f"was made of another {unit.input}"


def _difference(then: Any, now: dict[str, Any]) -> str:
    if not isinstance(then, dict):
        return "in another way"
    for name, value in now.items():
        old = then.get(name)
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            key = next(key for key in [*value, *old] if old.get(key) != value.get(key))
            return f"with {key} {old.get(key)}, not {value.get(key)}"
        return f"by {name} {old}, not {value}"
    return "in another way"


def pending(units: list[Unit], resume: bool, overwrite: bool) -> tuple[list[Unit], list[Unit]]:
    """Units to do, and units that are done.

    Raises InputError for outputs that are in the way: without `resume` any, without `overwrite` those that are not
    what the units would make.
    """
    todo, done, blocked = [], [], []
    for unit in units:
        output = Path(unit.output)
        if not output.exists():
            todo.append(unit)
            continue
        problem = trouble(unit)
        if resume and problem is None:
            done.append(unit)
        elif overwrite and not (output.is_dir() and not unit.sidecar.is_file()):
            todo.append(unit)
        else:
            blocked.append((unit, problem))
    if blocked:
        unit, problem = blocked[0]
        more = f" (and {len(blocked) - 1} more)" if len(blocked) > 1 else ""
        if problem is None:
            raise InputError(f"{unit.output}: is there already{more}; --resume keeps what is done, --overwrite makes "
                             "it again")  # fmt: skip
        remedy = "give another --out" if overwrite else "--overwrite makes it again"
        raise InputError(f"{unit.output}: {problem}{more}; {remedy}")
    return todo, done


def sweep(units: list[Unit]) -> None:
    """Remove the drafts of workers that were killed, in every folder that takes an output."""
    import shutil

    for folder in {Path(unit.output).parent for unit in units}:
        for draft in folder.glob(f".*{DRAFT}"):
            shutil.rmtree(draft, ignore_errors=True)
