"""Verbs about models."""

from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    method: Annotated[str, typer.Argument(help="a method that learns; see frameloom methods")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder of the run")],
    size: Annotated[str, typer.Option(help="tiny or paper")] = "tiny",
    data: Annotated[str, typer.Option(help="world, or KIND:DIR for data that the method knows")] = "world",
    steps: Annotated[int | None, typer.Option(help="another length than the recipe's")] = None,
    workers: Annotated[int, typer.Option(help="processes that prepare batches ahead")] = 1,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Train a method; the same command again goes on after a stop and ends in the same weights."""
    from frameloom.cli import terminal
    from frameloom.training import train as run

    terminal.listen()
    with terminal.bar("steps") as progress:
        folder = run(method, out, size=size, data=data, seed=seed, device=device, steps=steps, workers=workers,
                     progress=progress)  # fmt: skip
    if json:
        terminal.emit({"method": method, "out": str(folder), "weights": str(folder / "model.safetensors")})
    else:
        terminal.say(f"{folder}  trained; use it with --weights {folder}")
