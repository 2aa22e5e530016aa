"""Flags that mean the same in every verb, and two groups of them that a command takes as one parameter each."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from frameloom.video.clip import Clip

Input = Annotated[str, Argument(help="a video, a folder, glob or pattern (shot_%04d.png) of pictures, or a camera")]
Output = Annotated[Path, Argument(help="the video to make: .mp4, .mkv, .webm, .mov or .avi")]

Method = Annotated[str, Option("--method", "-m", help="which method; auto is the one that measures best here")]
Weights = Annotated[str | None, Option(help="a folder, a published checkpoint or a hub id; shipped weights if absent")]
Device = Annotated[str, Option(help="where to compute: cpu, cuda, cuda:1")]
Steps = Annotated[int | None, Option(help="steps of sampling; the model's own number if absent")]
FlowScale = Annotated[
    float | None, Option(help="seek motion at 0.5 or 0.25 of the size first (vfimamba; 2K and 4K pictures)")
]
Turned = Annotated[
    bool | None,
    Option("--turned/--no-turned", help="average with the answer for turned pictures (vfimamba; as its weights say)"),
]
Seed = Annotated[int, Option(help="seed of everything random")]
Json = Annotated[bool, Option("--json", help="print one JSON object on standard output, everything else on error")]

Codec = Annotated[str, Option(help="h264, h265, av1, vp9 or ffv1 (lossless)")]
Crf = Annotated[int | None, Option(help="quality of the encoder, lower is better; a good one for the codec if absent")]
Preset = Annotated[str | None, Option(help="speed of the encoder, in its own words")]
Resume = Annotated[bool, Option("--resume", help="go on with what a stopped run of the same command left")]

Stream = Annotated[int, Option(help="which of several video streams, counted from 0")]
Range = Annotated[str | None, Option("--range", help="a part of the input, such as 2.5s:10s or 0:30-1:10")]
Rate = Annotated[str | None, Option(help="frames a second of a folder of pictures (24 if absent)")]
Deinterlace = Annotated[bool, Option("--deinterlace", help="weave interlaced fields into whole frames")]
KeepReadable = Annotated[bool, Option("--keep-readable", help="go on with the readable frames of a damaged file")]
SameSize = Annotated[bool, Option("--same-size", help="scale to the first size where a video changes its size midway")]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How an input is read."""

    stream: Stream = 0
    range: Range = None
    rate: Rate = None
    deinterlace: Deinterlace = False
    keep_readable: KeepReadable = False
    same_size: SameSize = False

    def open(self, path: str) -> "Clip":
        """The input, read so."""
        from frameloom.video.reader import read

        return read(path, **vars(self))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a video is written."""

    codec: Codec = "h264"
    crf: Crf = None
    preset: Preset = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer: a parameter of type `Reading` or `Encoding` stands for the flags of its fields."""
    flags: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if parameter.annotation in (Reading, Encoding):
            groups[name] = parameter.annotation
            flags += inspect.signature(parameter.annotation, eval_str=True).parameters.values()
        else:
            flags.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**given) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{flag: given.pop(flag) for flag in inspect.signature(kind).parameters})
        command(**given)

    call.__signature__ = inspect.Signature(flags)
    call.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return call
