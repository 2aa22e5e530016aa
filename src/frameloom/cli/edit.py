"""`frameloom edit`: verbs that change what a video shows."""

from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options

edit = typer.Typer(help="Change what a video shows: inpaint fills holes.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(edit, name="edit")


@edit.callback()
def group() -> None:
    """Change what a video shows."""


@edit.command()
@options.grouped
def inpaint(
    input: options.Input,
    output: options.Output,
    mask: Annotated[str, typer.Option(help="a picture, or a video of masks: white is the hole")],
    method: options.Method = "auto",
    parameters: Annotated[int | None, typer.Option(help="of the network; one for 72 pixels if absent")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the video; 300 if no minutes are given")] = None,
    minutes: Annotated[float | None, typer.Option(help="by the clock, for the fit")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    *,
    encoding: options.Encoding,
    reading: options.Reading,
    json: options.Json = False,
) -> None:
    """Fill holes by fitting a network to what is seen of the video."""
    from frameloom.cli import terminal
    from frameloom.cli.verbs import finish
    from frameloom.tasks.compression.inpaint import inpaint as verb
    from frameloom.video.reader import read
    from frameloom.video.writer import check_output

    terminal.listen()
    clip = reading.open(input)
    check_output(clip, output)
    terminal.say(terminal.describe(clip, Path(input).name))
    with terminal.bar("steps") as progress:
        made = verb(clip, read(mask), method, size=parameters, epochs=epochs, minutes=minutes, seed=seed,
                    device=device, progress=progress)  # fmt: skip
    finish(made, output, encoding, resume=False, json=json)
