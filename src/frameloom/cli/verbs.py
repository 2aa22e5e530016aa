"""Verbs that take a video."""

import time
from pathlib import Path
from typing import Annotated

import typer

from frameloom.cli import options


def register(app: typer.Typer) -> None:
    for command in (interpolate,):
        app.command()(command)


def finish(clip, output: Path, *, codec: str, crf, preset, resume: bool, json: bool, extra: dict | None = None) -> None:
    """Encode a lazy clip under a bar and say what came out."""
    from frameloom.cli import terminal
    from frameloom.video.writer import write

    begun = time.perf_counter()
    with terminal.bar() as progress:
        write(clip, output, codec=codec, crf=crf, preset=preset, resume=resume, progress=progress)
    seconds = time.perf_counter() - begun
    report = getattr(clip.source, "report", None)
    facts = {"output": str(output), "frames": len(clip), "fps": str(clip.rate), "bytes": output.stat().st_size,
             "seconds": round(seconds, 2)} | (extra or {}) | (vars(report) if report else {})  # fmt: skip
    if json:
        terminal.emit(facts)
        return
    if report and (report.cuts or report.duplicates):
        terminal.say(f"{report.cuts} scene cuts held, {report.duplicates} repeated frames kept")
    terminal.say(terminal.describe_result(output, len(clip), clip.rate, seconds, float(clip.duration)))


def interpolate(
    input: options.Input,
    output: options.Output,
    fps: Annotated[str, typer.Option(help="the new rate: 60, 23.976, 30000/1001, or 2x for twice the source's")] = "60",
    method: options.Method = "auto",
    weights: options.Weights = None,
    device: options.Device = "cpu",
    tile: Annotated[int | None, typer.Option(help="longest side in pixels that a method is given at once")] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="drop repeated frames and re-time the motion")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="stop rather than round an instant")] = False,
    codec: options.Codec = "h264",
    crf: options.Crf = None,
    preset: options.Preset = None,
    resume: options.Resume = False,
    stream: options.Stream = 0,
    range: options.Range = None,
    rate: options.Rate = None,
    deinterlace: options.Deinterlace = False,
    keep_readable: options.KeepReadable = False,
    json: options.Json = False,
) -> None:
    """Change the frame rate: pictures at instants nobody recorded, sound untouched."""
    from frameloom.cli import terminal
    from frameloom.tasks.interpolation import interpolate as verb
    from frameloom.tasks.interpolation.base import AUTO
    from frameloom.video.reader import read

    terminal.listen()
    clip = read(input, stream=stream, range=range, rate=rate, deinterlace=deinterlace, keep_readable=keep_readable)
    terminal.say(terminal.describe(clip, Path(input).name))
    chosen = AUTO if method == "auto" else method
    made = verb(clip, fps, chosen, weights=weights, device=device, tile=tile, dedupe=dedupe, strict=strict)
    terminal.say(f"{chosen} on {device}, {len(clip):,} frames to {len(made):,}")
    finish(made, output, codec=codec, crf=crf, preset=preset, resume=resume, json=json, extra={"method": chosen})
