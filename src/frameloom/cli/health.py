"""What `doctor` looks at."""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def examine() -> dict[str, Any]:
    """Rows of (name, ok, detail); the last one sends a small clip through an encoder and back."""
    import av
    import cv2
    import torch

    import frameloom
    from frameloom.cards import cards
    from frameloom.training.pretrained import load, shipped
    from frameloom.video.encoding import CODECS

    rows: list[dict[str, Any]] = []

    def row(name: str, ok: bool, detail: str) -> None:
        rows.append({"name": name, "ok": ok, "detail": detail})

    row("frameloom", True, frameloom.__version__)
    row("python", sys.version_info >= (3, 11), platform.python_version())
    row("torch", True, f"{torch.__version__}, {os.cpu_count()} cores, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}")  # fmt: skip
    row("pyav, opencv", True, f"{av.__version__}, {cv2.__version__}")
    for name, codec in CODECS.items():
        try:
            av.codec.Codec(codec.encoder, "w")
            row(f"encoder {name}", True, codec.encoder)
        except av.codec.codec.UnknownCodecError:
            row(f"encoder {name}", False, f"{codec.encoder} is missing from the installed PyAV")
    for card in cards().values():
        if shipped(card.id) is None:
            continue
        model = load(card.id)
        count = sum(parameter.numel() for parameter in model.parameters())
        row(
            f"weights {card.id}", card.weights is not None and count == card.weights.parameters, f"{count:,} parameters"
        )
    begun = time.perf_counter()
    error = _round_trip()
    row("round trip", error < 3, f"{error:.2f} of 255 mean error through h264, {time.perf_counter() - begun:.1f} s")
    return {"ok": all(found["ok"] for found in rows), "checks": rows}


def _round_trip() -> float:
    from frameloom.world import clip

    with tempfile.TemporaryDirectory() as folder:
        source = clip(frames=8, height=64, width=96)
        back = source.save(Path(folder) / "a.mp4", crf=8)
        return float((back.tensor() - source.tensor()).abs().mean() * 255)
