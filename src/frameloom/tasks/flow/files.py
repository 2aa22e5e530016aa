"""A folder of flow files, written beside its name and renamed when it is whole."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from frameloom.errors import InputError
from frameloom.motion.flowio import FORMATS, encode_flow
from frameloom.progress import Progress
from frameloom.video.writer import write

if TYPE_CHECKING:
    from frameloom.tasks.flow.base import FlowClip, Gap


def check(folder: Path, kind: str, overwrite: bool) -> None:
    """Raises InputError where `save` would have to."""
    if kind not in FORMATS:
        raise InputError(f"--format {kind}: a flow is written as {', '.join(FORMATS)}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; flow is written into a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder}: is not empty; give another folder, or --overwrite to replace it")


def save(made: "FlowClip", folder: Path, kind: str, overwrite: bool, progress: Progress) -> Path:
    """Every gap as a file, and the forward flow as `flow.mp4`; `folder` appears when all of it is there."""
    check(folder, kind, overwrite)
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)

    def keep(number: int, gap: "Gap") -> None:
        valid = torch.full(gap.fwd.shape[1:], gap.valid)
        (scratch / f"forward_{number:05}.{kind}").write_bytes(encode_flow(gap.fwd, valid, kind))
        if gap.bwd is not None:
            (scratch / f"backward_{number + 1:05}.{kind}").write_bytes(encode_flow(gap.bwd, valid, kind))
        progress("flow", number + 1, len(made))

    try:
        write(made.to_rgb(seen=keep), scratch / "flow.mp4")
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
