"""`frameloom quantize`: models made small."""

from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options
from frameloom.units import in_bytes


def register(app: typer.Typer) -> None:
    app.command()(quantize)


def quantize(
    model: Annotated[Path, typer.Argument(help="a folder with a mixture of experts: config.json, safetensors")],
    out: Annotated[Path, typer.Argument(help="the folder to make")],
    method: options.Method = "auto",
    bits: Annotated[str, typer.Option(help="ternary (less than a bit a weight) or 2")] = "ternary",
    pack: Annotated[
        str, typer.Option(help="auto: multiplied without decoding; range: smaller on disk, decoded when loaded")
    ] = "auto",
    calib: Annotated[
        str, typer.Option(help="world (captions), a text file, or a safetensors file with input_ids")
    ] = "world",
    samples: Annotated[int, typer.Option(help="how many texts to calibrate on")] = 512,
    held_out: Annotated[int, typer.Option(help="how many further texts to measure with")] = 0,
    group: Annotated[int, typer.Option(help="experts in memory at a time")] = 16,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Compress the experts of a mixture of experts to less than a bit a weight, with a group of them in memory."""
    from frameloom.cli import terminal
    from frameloom.scale.qmoe import quantize as run

    terminal.listen()
    with terminal.bar("") as progress:
        report = run(model, out, method, bits=bits, pack=pack, calib=calib, samples=samples, held_out=held_out,
                     group=group, seed=seed, progress=progress)  # fmt: skip
    if json:
        terminal.emit(report.as_dict())
        return
    line = (f"{out}  {report.weights:,} expert weights in {in_bytes(report.bytes)}  {report.bits:.3f} bits a "
            f"weight  {report.ratio:.1f} times smaller than bfloat16  {report.zeros:.1%} zeros")  # fmt: skip
    terminal.say(line)
    if report.error:
        shown = ", ".join(f"{value:.3f}" for value in report.error)
        terminal.say(f"error of the experts' answers on held-out texts, layer by layer: {shown}")
