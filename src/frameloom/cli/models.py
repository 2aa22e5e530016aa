"""Verbs about models."""

from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import mixture, options


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(distill)


def train(
    method: Annotated[str, typer.Argument(help="a method that learns; see frameloom methods")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the folder of the run; runs/METHOD if absent")
    ] = None,
    size: Annotated[str, typer.Option(help="tiny or paper")] = "tiny",
    data: Annotated[
        str, typer.Option(help="world, for sem also a folder of clips, or KIND:DIR for data that the method knows")
    ] = "world",
    steps: Annotated[int | None, typer.Option(help="another length than the recipe's")] = None,
    moe: Annotated[str | None, typer.Option(help=mixture.HELP)] = None,
    begin: Annotated[Path | None, typer.Option(help="a run to begin from, at half the rates")] = None,
    workers: Annotated[int, typer.Option(help="processes that prepare batches ahead")] = 1,
    parallel: Annotated[
        str | None,
        typer.Option(help="over many ranks, under torchrun: pp=2,tp=1,dp=1,schedule=1f1b,microbatches=8,..."),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Train a method; the same command again goes on after a stop and ends in the same weights."""
    import os

    from frameloom.cli import terminal
    from frameloom.errors import InputError

    terminal.listen()
    out = out or Path("runs") / method
    settings = {"size": size, "data": data, "seed": seed, "device": device, "steps": steps}
    with terminal.bar("steps") as progress:
        if parallel is not None:
            from frameloom.scale.train import train as spread

            if begin is not None:
                raise InputError("--begin: goes without --parallel")
            config, r = (None, "auto") if moe is None else mixture.config(method, moe, ranks=True)
            folder = spread(method, out, parallel=parallel, config=config, r=r, progress=progress, **settings)
        else:
            from frameloom.training import train as run

            config = None if moe is None else mixture.config(method, moe)[0]
            folder = run(method, out, config=config, begin=begin, workers=workers, progress=progress, **settings)
    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        terminal.emit({"method": method, "out": str(folder), "weights": str(folder / "model.safetensors")})
    else:
        terminal.say(f"{folder}  trained; use it with --weights {folder}")


def distill(
    teacher: Annotated[str, typer.Option(help="a shipped model, a folder of a run, or a hub id")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder of the student")],
    recipe: Annotated[
        str, typer.Option(help="reflow (InstaFlow: one step), rfpp (one to five steps) or auto")
    ] = "auto",
    prompts: Annotated[Path | None, typer.Option(help="what the teacher is asked to draw, a sentence a line")] = None,
    pairs: Annotated[int | None, typer.Option(help="how many pairs of noise and video the teacher draws")] = None,
    steps: Annotated[int | None, typer.Option(help="updates of the student in all")] = None,
    guidance: Annotated[float | None, typer.Option(help="of the teacher; it ends up in the student's weights")] = None,
    solver: Annotated[str, typer.Option(help="the teacher's ODE solver: euler, heun, dpmpp2m or ab2")] = "euler",
    sampling: Annotated[int, typer.Option(help="steps of the teacher's solver")] = 50,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Make a student of one or a few steps; the same command goes on after a stop and ends in the same weights."""
    from frameloom.cli import terminal
    from frameloom.errors import InputError
    from frameloom.tasks.distillation import distill as run

    terminal.listen()
    sentences = None
    if prompts is not None:
        try:
            sentences = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {prompts}: cannot be read ({type(error).__name__}); "
                             "a text file with a sentence a line is wanted") from None  # fmt: skip
        if not sentences:
            raise InputError(f"--prompts {prompts}: holds no sentence; one a line is wanted")
    with terminal.bar("steps") as progress:
        folder = run(recipe, teacher, out, prompts=sentences, pairs=pairs, steps=steps, guidance=guidance,
                     solver=solver, sampling=sampling, seed=seed, device=device, progress=progress)  # fmt: skip
    if json:
        terminal.emit({"recipe": recipe, "teacher": teacher, "out": str(folder),
                       "weights": str(folder / "model.safetensors")})  # fmt: skip
    else:
        terminal.say(f"{folder}  distilled; use it with frameloom generate --weights {folder} --steps 1")
