"""Flags that mean the same in every verb."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Input = Annotated[str, Argument(help="a video, a folder or glob of pictures, or a camera (/dev/video0)")]
Output = Annotated[Path, Argument(help="the video to make: .mp4, .mkv, .webm, .mov or .avi")]

Method = Annotated[str, Option("--method", "-m", help="which method; auto is the one that measures best here")]
Weights = Annotated[str | None, Option(help="a folder, a published checkpoint or a hub id; shipped weights if absent")]
Device = Annotated[str, Option(help="where to compute: cpu, cuda, cuda:1")]
Steps = Annotated[int | None, Option(help="steps of sampling; the model's own number if absent")]
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
