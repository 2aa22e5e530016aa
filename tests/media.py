"""Small media files with known content, written with PyAV alone so that they test our reader and writer."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch


def moving(frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth pattern that drifts: uint8 (t, h, w, 3)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    out = [
        np.stack([np.sin((x + 2 * t) / 9 + k) * np.cos((y - t) / 7 + 2 * k) for k in range(3)], -1)
        for t in range(frames)
    ]
    return ((np.stack(out) * 0.45 + 0.5) * 255).round().astype(np.uint8)


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def make(
    path: Path,
    pictures: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 24,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    options: dict | None = None,
    audio: bool = False,
    colour: tuple[int, int, int, int] | None = None,
) -> Path:
    """Encode pictures; `colour` is (matrix, range, primaries, transfer)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options=options or {"crf": "10"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = pix_fmt
        if time_base:
            stream.codec_context.time_base = time_base
        if colour:
            context = stream.codec_context
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = colour
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts = pts[k] if pts else k
            frame.time_base = time_base or Fraction(1) / rate
            if colour:
                frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = colour
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            seconds = float(len(pictures) / Fraction(rate))
            wave = np.sin(np.arange(int(16000 * seconds)) * 0.1).astype(np.float32)[None]
            for begin in range(0, wave.shape[1], 1024):
                piece = av.AudioFrame.from_ndarray(wave[:, begin : begin + 1024], format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 16000, begin, Fraction(1, 16000)
                out.mux(sound.encode(piece))
            out.mux(sound.encode(None))
    return path


def packets(path: Path, kind: str) -> list[list[tuple[bytes, Fraction]]]:
    """For every stream of a kind: (payload, instant relative to the first picture) of its packets."""
    with av.open(str(path)) as file:
        origin = min(p.pts * p.time_base for p in file.demux(video=0) if p.size and p.pts is not None)
    with av.open(str(path)) as file:
        found: dict[int, list] = {}
        for packet in file.demux([s for s in file.streams if s.type == kind]):
            if packet.size:
                found.setdefault(packet.stream_index, []).append(
                    (bytes(packet), packet.pts * packet.time_base - origin)
                )
        return [found[index] for index in sorted(found)]


def patch_rotation(path: Path, degrees: int) -> None:
    """Write a rotation into the track header of an .mp4, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4
    assert data[at] == 0, "a version 0 track header is expected"
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (value * 65536 for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[at + 40 : at + 76] = b"".join(int(v).to_bytes(4, "big", signed=True) for v in values)
    path.write_bytes(bytes(data))
