"""`frameloom batch`: any verb of the shape VERB INPUT OUTPUT, over many files.

A unit of a batch is the verb's own command, run in the process of a worker: the flags after `--` mean what they mean
without a batch, are checked by the verb's own parser before any work, and a verb that is added is one that a batch can
run. The machinery that does not know about verbs is `frameloom.scale.farm`.
"""

import difflib
import hashlib
import importlib.resources
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frameloom.cli import options
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.progress import Progress, silent

if TYPE_CHECKING:
    from frameloom.scale.farm.manifest import Unit
    from frameloom.scale.farm.run import Report

# What a batch decides for all of its files, and what makes no sense for one file of many.
RESERVED = ("json", "resume", "overwrite", "out")


def register(app: typer.Typer) -> None:
    app.command("batch")(command)


def command(
    verb: Annotated[str, typer.Argument(help='such as interpolate, compress, run, or "edit inpaint"')],
    inputs: Annotated[
        list[str],
        typer.Argument(help="files, globs such as 'in/**/*.mp4', lists (.csv, .jsonl); after -- flags of the verb"),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the folder of the results; named by the verb if absent")
    ] = None,
    engine: Annotated[str, typer.Option(help="local processes, torchrun's ranks, or a ray cluster")] = "local",
    workers: Annotated[int | None, typer.Option(help="files at once; 2 if absent")] = None,
    threads: Annotated[int, typer.Option(help="threads of PyTorch for each file")] = 1,
    suffix: Annotated[str | None, typer.Option(help="of the results, such as .mkv; the input's if absent")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what is done and was made the same way")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="make again what is there")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="stop at the first file that fails for good")] = False,
    limit: Annotated[float | None, typer.Option(help="seconds that one file may take")] = None,
    lease: Annotated[float, typer.Option(help="seconds of silence after which a rank's file goes to another")] = 30.0,
    json: options.Json = False,
) -> None:
    """Run a verb over many files: frameloom batch interpolate 'in/*.mp4' --out out -- --fps 60.

    What comes after -- are the verb's own flags. A file that fails twice is put on a list, out/quarantine.jsonl, which
    is one that a batch takes; the exit status is then 3.
    """
    from frameloom.cli import terminal

    terminal.listen()
    end = next((k for k, word in enumerate(inputs) if word.startswith("-")), len(inputs))
    if not end:
        raise InputError(f"{inputs[0]}: an input is wanted before the verb's flags, such as 'in/*.mp4'")
    out = out or Path(verb.replace(" ", "-"))
    with terminal.bar("files") as progress:
        report = batch(verb, inputs[:end], out, inputs[end:], engine=engine, workers=workers, threads=threads,
                       suffix=suffix, resume=resume, overwrite=overwrite, fail_fast=fail_fast, limit=limit, lease=lease,
                       progress=progress)  # fmt: skip
    if report is None:  # another rank than the one that reports
        return
    for outcome in report.failures:
        terminal.say(f"failed: {outcome.error}")
    if json:
        terminal.emit(report.as_dict())
    else:
        from frameloom.video.times import show_duration

        counts = ", ".join(f"{count:,} {name}" for name in ("made", "kept", "failed") if (count := report.count(name)))
        terminal.say(f"{out}  {counts or 'nothing to do'}  {show_duration(report.seconds)}")
    if report.failures:
        terminal.say(f"{report.quarantine}  lists what failed; a batch takes it for its inputs")
        raise typer.Exit(3)


def batch(
    verb: str,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    arguments: list[str] | tuple[str, ...] = (),
    *,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    suffix: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fail_fast: bool = False,
    limit: float | None = None,
    lease: float = 30.0,
    progress: Progress = silent,
    **settings: Any,
) -> "Report | None":
    """Run a verb over many files, several at once, each in a process of its own.

    >>> frameloom.batch("interpolate", "in/*.mp4", "out", fps=60, method="dis").failures

    Args:
        verb: a command of the shape VERB INPUT OUTPUT: `"interpolate"`, `"compress"`, `"run"`, `"edit inpaint"`.
        inputs: a file, a glob, or a list (.csv with a header, .jsonl) of `input`, and if wanted `output` and
            `options`; or several of them.
        out: the folder of the results; folders below the glob's fixed part are repeated in it.
        arguments: flags of the verb as one types them; `settings` are the same as keywords.
        suffix: of the results; the input's if absent, where it is one of a video.
        threads: of PyTorch for each file; results are the same for any number of `workers`, but not of threads.
        engine, workers, resume, overwrite, fail_fast, lease: see `frameloom.scale.farm.run.farm`.
        limit: seconds that one attempt at a file may take.

    Returns what became of every file; None on torchrun's ranks other than the first.

    Raises:
        InputError: nothing has been done; an unknown verb or flag, no such files, results in the way.
        Interrupted: Ctrl-C; the same call with `resume` goes on.
    """
    from frameloom.scale.farm.manifest import Unit, flags, gather
    from frameloom.scale.farm.run import farm
    from frameloom.scale.farm.worker import Worker

    out = Path(out)
    common = (*arguments, *flags(settings))
    device = recipe(verb, common)["options"].get("device")
    if engine == "local" and device is not None:  # other engines' workers may have what this machine lacks
        check_device(device)
    if threads < 1 or (limit is not None and limit <= 0):
        raise InputError(f"--threads {threads}, --limit {limit}: both are above 0")

    def plan() -> list[Unit]:
        several = [inputs] if isinstance(inputs, str | Path) else inputs
        rows = gather([str(one) for one in several], out, naming(verb, suffix))
        return [Unit(row.input, str(row.output), (*common, *row.arguments), recipe(verb, (*common, *row.arguments)))
                for row in rows]  # fmt: skip

    worker = Worker(perform, threads, limit=limit, gpu=device == "cuda", preload=_preload(verb), check=check)
    return farm(plan, worker, out, engine=engine, workers=workers, resume=resume, overwrite=overwrite,
                fail_fast=fail_fast, lease=lease, progress=progress)  # fmt: skip


def perform(unit: "Unit", draft: Path) -> dict[str, Any]:
    """Run the verb's command on one file in this process; how many frames there are, and what it had to note."""
    verb = unit.recipe["verb"]
    command = _command(verb)
    printed, said = io.StringIO(), io.StringIO()
    # A name that begins with a dash would be read as a flag.
    paths = [f"./{path}" if path.startswith("-") else path for path in (unit.input, str(draft))]
    words = [*paths, "--json", *unit.arguments]
    with redirect_stdout(printed), redirect_stderr(said), command.make_context(verb, words) as context:
        command.invoke(context)
    facts = loads(printed.getvalue())
    notes = [line.removeprefix("note: ") for line in said.getvalue().splitlines() if line.startswith("note: ")]
    return {"frames": facts.get("frames"), "notes": notes}


def check(unit: "Unit") -> None:
    """Raises InputError where this machine has another version than the one that planned the batch."""
    here, planned = _version(unit.recipe["verb"], unit.recipe["options"]), unit.recipe["version"]
    for part in here | planned:
        if here.get(part) != planned.get(part):
            raise InputError(f"{unit.output}: {part} is {here.get(part)} on this machine and {planned.get(part)} on "
                             "the one that planned the batch; install the same on both")  # fmt: skip


@cache
def recipe(verb: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """All that decides a result besides its input: the verb, its options in full, and the version that runs them.

    Raises InputError for a verb that no batch can run, and for flags that the verb does not take.
    """
    command = _command(verb)
    try:
        given = command.make_context(verb, ["input", "output", *arguments]).params
    except typer.TyperException as error:
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        raise InputError(f"{' '.join(arguments)}: {said}; frameloom {verb} --help lists the flags") from None
    for name in RESERVED:
        if given.get(name):
            raise InputError(f"--{name}: is for the batch as a whole; it goes before the --")
    if "do" in given:
        from frameloom.cli.chain import parse

        parse(given["do"])
    positional = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
    # Through JSON and back, so that it compares with what a sidecar says.
    chosen = loads(dumps({name: value for name, value in given.items() if value is not None and
                                    name not in (*positional, *RESERVED)}, default=str))  # fmt: skip
    return {"verb": verb, "options": chosen, "version": _version(verb, chosen)}


def _command(verb: str) -> Any:
    found = _commands().get(verb)
    if found is None:
        near = difflib.get_close_matches(verb, _commands(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(_commands()))}"
        raise InputError(f"{verb}: no verb that takes one file and makes one; {hint}")
    return found


@cache
def _commands() -> dict[str, Any]:
    """Commands with two positional arguments of which the first is `input`, by name."""
    from frameloom.cli.app import app

    found = {}

    def walk(group: Any, path: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{path}{name} ")
                continue
            positional = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
            if positional[:1] == ["input"] and len(positional) == 2:
                found[path + name] = command

    walk(typer.main.get_command(app), "")
    return found


def _version(verb: str, options: dict[str, Any]) -> dict[str, str]:
    """The toolkit's version, the method that a verb would use, and a digest of its weights."""
    import frameloom
    from frameloom.cards import card, cards
    from frameloom.cards import chosen as resolve

    version = {"frameloom": frameloom.__version__}
    if not any(verb in (card.verb, *card.also) for card in cards().values()):
        return version
    method = card(resolve(options["method"], verb), verb).id
    weights = options.get("weights")
    shipped = Path(str(importlib.resources.files("frameloom") / "weights" / method / "model.safetensors"))
    path = Path(weights) if weights else shipped
    return version | {"method": method} | ({"weights": _glimpse(path)} if path.exists() else {})


@cache
def _glimpse(path: Path) -> str:
    """A digest of sizes, first and last megabytes: enough to tell trained weights apart, at once for large ones too."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{size}\0".encode() + stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def naming(verb: str, suffix: str | None) -> Callable[[Path], str]:
    """What the result of an input is called."""
    from frameloom.video.writer import CONTAINERS

    if suffix is not None and not suffix.startswith("."):
        raise InputError(f"--suffix {suffix}: begins with a dot, such as .mkv")

    def name(path: Path) -> str:
        if verb == "flow":
            return path.stem
        own = path.suffix if path.suffix.lower() in CONTAINERS else ".mp4"
        return f"{path.stem}{suffix or ('.flm' if verb == 'compress' else own)}"

    return name


def _preload(verb: str) -> tuple[str, ...]:
    """What the server imports that the workers are forked from."""
    import frameloom

    homes = {name: home for name, home in frameloom._HOMES.items() if name in verb.split()}
    # Typer imports pydantic, where there is one, with the first command that it reads.
    return ("pydantic", "frameloom.cli.app", "frameloom.video.reader", "frameloom.video.writer", *homes.values())
