"""Every codec of `compress` on every kind of source: what is written is read back by another process, and close."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from frameloom.errors import InputError
from frameloom.metrics import psnr
from frameloom.tasks.compression import base
from frameloom.tasks.compression.base import compress
from frameloom.tasks.compression.conventional import X264
from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import Colour, native_from_rgb
from frameloom.video.pixels import layout_of, repack
from frameloom.video.reader import read

HEIGHT, WIDTH, FRAMES = 66, 98, 3  # sides that neither 4 nor a coding unit divides
# The least that the file must show of its source, in dB, a fit of one pass aside.
CLOSE = {"x264": 32, "x265": 32, "av1": 32, "sem": 22}
FITS = {
    "hnerv": {"epochs": 1, "strides": (2, 2, 2), "fit": "pad"},
    "nerv": {"epochs": 1, "strides": (2, 2, 2), "fit": "pad"},
    "boost-nerv": {"epochs": 3, "strides": (4, 2, 2), "fit": "pad"},
    "nirvana": {"iterations": 3, "later": 2, "hidden": 16},
    "sem": {"rate": 6},
}


def light(k: int) -> torch.Tensor:
    """A smooth picture in [0, 1], reddish, so that swapped channels and ranges show."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    waves = [0.5 + 0.35 * np.sin((x + 2 * k) / 17 + c) * np.cos(y / 13 + 2 * c) for c in range(3)]
    return torch.from_numpy(np.stack(waves)) * torch.tensor([1.0, 0.8, 0.6])[:, None, None]


class Recorded(Source):
    """Decoded frames, as a file gives them."""

    def __init__(self, pix_fmt: str, full: bool, matrix: int) -> None:
        layout = layout_of(pix_fmt)
        plain = replace(layout, alpha=False).name
        self.info = Info(WIDTH, HEIGHT, Fraction(25), Colour(matrix, full, depth=layout.depth), pix_fmt, name=pix_fmt)
        self.natives = []
        for k in range(FRAMES):
            native = native_from_rgb(light(k), plain, self.info.colour)
            self.natives.append(native if native.format.name == pix_fmt else repack(native, pix_fmt))

    def times(self):
        return [Fraction(k, 25) for k in range(FRAMES)]

    def frames(self, start=0, stop=None):
        for k in range(*slice(start, stop).indices(FRAMES)):
            yield Frame(Fraction(k, 25), self.info.colour, self.natives[k])

    def fingerprint(self) -> str:
        return f"recorded {id(self)}"


MATRICES = {"601": 6, "709": 1, "2020": 9}
RECORDED = {
    f"{pix_fmt}-{'full' if full else 'studio'}-{name}": (pix_fmt, full, matrix)
    for pix_fmt in ("yuv420p", "nv12", "yuv444p10le", "yuv422p12le", "gray", "gray10le")
    for full in (False, True)
    for name, matrix in MATRICES.items()
    if name == "709" or not pix_fmt.startswith("gray")
} | {"yuvj420p": ("yuvj420p", True, 6), "uyvy422": ("uyvy422", False, 1)}
FILES = ("phone.mp4", "mjpeg.avi", "grey.avi", "png", "jpg", "deep.mkv")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Files and folders as cameras and programs leave them."""
    folder = tmp_path_factory.mktemp("recordings")
    for name, encoder, pix_fmt, colour in (
        ("phone.mp4", "libx264", "yuvj420p", Colour(1, True)),
        ("mjpeg.avi", "mjpeg", "yuvj422p", Colour(6, True, siting="center")),
        ("grey.avi", "ffv1", "gray", Colour(1, True)),
        ("deep.mkv", "ffv1", "yuv422p10le", Colour(9, False, 9, 16, depth=10)),
    ):
        with av.open(str(folder / name), "w") as out:
            stream = out.add_stream(encoder, rate=25, options={"crf": "8"} if encoder == "libx264" else {})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
            context = stream.codec_context
            context.color_range, context.colorspace = 2 if colour.full_range else 1, colour.matrix
            for k in range(FRAMES):
                native = native_from_rgb(light(k), pix_fmt.replace("yuvj", "yuv"), colour)
                native = native if native.format.name == pix_fmt else repack(native, pix_fmt)
                native.pts = k
                out.mux(stream.encode(native))
            out.mux(stream.encode(None))
    for kind in ("png", "jpg"):
        (folder / kind).mkdir()
        for k in range(FRAMES):
            pixels = (light(k) * 255).round().byte().permute(1, 2, 0).numpy()
            cv2.imwrite(str(folder / kind / f"{k}.{kind}"), np.ascontiguousarray(pixels[..., ::-1]))
    return folder


def source(name: str, recordings: Path) -> Clip:
    return read(recordings / name) if name in FILES else Clip(Recorded(*RECORDED[name]))


READ = """
import json, sys, torch
from dataclasses import asdict
from pathlib import Path
from frameloom.tasks.compression.base import decompress
folder = Path(sys.argv[1])
said = {}
for file in sorted(folder.glob("*.flm")):
    clip = decompress(file)
    said[file.stem] = asdict(clip.info.colour) | {"rate": str(clip.rate)}
    torch.save(clip.tensor(), file.with_suffix(".pt"))
(folder / "said.json").write_text(json.dumps(said))
"""


def read_elsewhere(folder: Path) -> dict[str, dict]:
    """All files of a folder as tensors beside them, by one process that has only the files; what they say of colour."""
    subprocess.run([sys.executable, "-c", READ, str(folder)], check=True, timeout=300)
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize("method", ["x264", "x265", "av1"])
def test_conventional_codecs_keep_every_kind_of_source(method, recordings, tmp_path):
    names = [*RECORDED, *FILES]
    clips = {name: source(name, recordings) for name in names}
    for name, clip in clips.items():
        report = compress(clip, tmp_path / f"{name}.flm", method, quality=8)
        assert report.frames == FRAMES
    said = read_elsewhere(tmp_path)
    for name, clip in clips.items():
        colour = clip.info.colour.as_video()
        deep = colour.depth > 8
        back = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert said[name] == asdict(colour) | {"rate": str(clip.rate)}, name
        assert psnr(back, clip.tensor()) > CLOSE[method] + 4 * deep, name
        # Colours as a whole: another matrix or range moves them by more.
        assert ((back - clip.tensor()).mean((0, 2, 3)).abs() < 0.006).all(), name


@pytest.mark.parametrize("method", FITS)
def test_learned_codecs_read_back_what_they_wrote_of_every_kind_of_source(method, recordings, tmp_path):
    names = ["gray10le-studio-709", "yuv422p12le-full-2020", "phone.mp4", "mjpeg.avi", "png", "jpg"]
    clips = {name: source(name, recordings) for name in names}
    for name, clip in clips.items():
        compress(clip, tmp_path / f"{name}.flm", method, **FITS[method])
    said = read_elsewhere(tmp_path)
    for name, clip in clips.items():
        back = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert back.shape == (FRAMES, 3, HEIGHT, WIDTH), name
        assert said[name] == asdict(clip.info.colour.as_video()) | {"rate": str(clip.rate)}, name
        assert psnr(back, clip.tensor()) > CLOSE.get(method, 6), name


def test_no_success_is_reported_of_a_file_that_cannot_be_read(monkeypatch, tmp_path):
    """Whichever part the reader and the writer fall out over: the stream, one of its ends, the index, the times."""
    clip = Clip(Recorded("yuv420p", True, 6))

    def refuses(*args):
        raise InputError("section 'stream' is damaged; it holds another video")

    def only_the_end(container, packets, key):
        yield from list(play(container, packets, key))[:-1]

    play = X264._play
    for name, fault in (("_play", refuses), ("_play", only_the_end)):
        with monkeypatch.context() as patch:
            patch.setattr(X264, name, staticmethod(fault))
            with pytest.raises(InputError, match=r"out.flm: not written, for it could not be read back \(.*damaged"):
                compress(clip, tmp_path / "out.flm", "x264")
        assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(base, "unpack_times", refuses)
        with pytest.raises(InputError, match="not written"):
            compress(clip, tmp_path / "out.flm", "x264")
    with monkeypatch.context() as patch:
        patch.setattr(X264, "decode", lambda data, frames: (torch.zeros(3, 8, 8) for _ in frames))
        with pytest.raises(InputError, match="a frame of another size"):
            compress(clip, tmp_path / "out.flm", "x264")
    assert list(tmp_path.iterdir()) == []
    compress(clip, tmp_path / "out.flm", "x264")
