"""Every pixel format in, every codec and container out: recorded pictures keep their numbers, made ones are what the
method returned."""

import itertools
from dataclasses import replace
from fractions import Fraction

import av
import av.video.format
import numpy as np
import pytest
import torch

from frameloom.errors import InputError
from frameloom.video.clip import Clip, Frame, Info, Source
from frameloom.video.colour import SITINGS, Colour, as_native, native_from_rgb, rgb_from_native
from frameloom.video.encoding import CODECS
from frameloom.video.pixels import components, fill, frame_of, layout_of, lossless_format, plain, repack
from frameloom.video.reader import read
from frameloom.video.writer import CONTAINERS, write
from media import moving, tensor


def readable() -> list[str]:
    """Every pixel format whose numbers can be had: all that PyAV knows but hardware surfaces and what libswscale cannot
    unpack."""
    found = []
    for name in sorted(av.video.format.names):
        try:
            frame = av.VideoFrame(16, 8, name)
            layout_of(name)
            plain(frame)
            picture(name)
        except (InputError, OSError, ValueError):
            continue
        found.append(name)
    return found


def picture(pix_fmt: str, height: int = 24, width: int = 40, shift: int = 0) -> av.VideoFrame:
    """A decoded frame of this format: slow waves, opaque, in whatever numbers the format holds."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [0.5 + 0.3 * np.sin((x + shift) / 17 + k) * np.cos(y / 13 + 2 * k) for k in range(3)]
    rgb = torch.from_numpy(np.stack(waves))
    layout = layout_of(pix_fmt)
    if pix_fmt == "pal8":
        frame = av.VideoFrame(width, height, pix_fmt)
        cube = np.array([[b * 51, g * 51, r * 51, 255] for r in range(6) for g in range(6) for b in range(6)], np.uint8)
        r, g, b = (rgb * 5).round().numpy().astype(np.uint8)
        fill(frame.planes[0], r * 36 + g * 6 + b)
        frame.planes[1].update(np.concatenate([cube, np.zeros((40, 4), np.uint8)]))
        return frame
    if pix_fmt.startswith(("bayer", "mono", "xyz")):
        return native_from_rgb(rgb, "rgb24", Colour()).reformat(format=pix_fmt)
    if pix_fmt.endswith("be"):  # the same bytes, the other way round
        return swapped(picture(pix_fmt.removesuffix("be") + "le", height, width, shift))
    if layout.floating:
        values = list(rgb) if layout.model == "rgb" else [rgb.mean(0)]
        return filled([part.numpy().astype(layout.dtype) for part in values], pix_fmt)
    full = pix_fmt.startswith("yuvj") or layout.model == "gray"
    basis = replace(layout, alpha=False)
    frame = native_from_rgb(rgb, basis.name, Colour(full_range=full, depth=basis.depth))
    return frame if frame.format.name == pix_fmt else filled(components(frame), pix_fmt)


def filled(values: list[np.ndarray], pix_fmt: str) -> av.VideoFrame:
    """An opaque frame of these numbers, by way of the plain format."""
    layout = layout_of(pix_fmt)
    height, width = values[0].shape
    if layout.alpha:
        values = [*values, np.full((height, width), layout.top, layout.dtype)]
    frame = av.VideoFrame(width, height, layout.name)
    if layout.name in ("rgb24", "rgba") or (layout.model == "gray" and layout.alpha):
        values = [np.stack(values, -1).reshape(height, -1)]
    elif layout.model == "rgb":
        values = [values[1], values[2], values[0], *values[3:]]
    for plane, part in zip(frame.planes, values, strict=True):
        fill(plane, part)
    if layout.model == "yuv":
        frame.colorspace, frame.color_range = 1, 2 if pix_fmt.startswith("yuvj") else 1
    if pix_fmt == layout.name:
        return frame
    if pix_fmt == layout.name.replace("yuv", "yuvj"):
        twin = av.VideoFrame(width, height, pix_fmt)
        for plane, given in zip(twin.planes, frame.planes, strict=True):
            plane.update(bytes(given))
        return twin
    kept = int(frame.color_range)
    return frame.reformat(format=pix_fmt, src_color_range=kept, dst_color_range=kept, threads=1)


def swapped(frame: av.VideoFrame) -> av.VideoFrame:
    name = frame.format.name.removesuffix("le") + "be"
    size = 4 if any(part in name for part in ("f32", "x2rgb10", "x2bgr10", "v30x", "xv30")) else 2
    twin = av.VideoFrame(frame.width, frame.height, name)
    for plane, given in zip(twin.planes, frame.planes, strict=True):
        plane.update(np.frombuffer(given, f"u{size}").byteswap().tobytes())
    twin.colorspace, twin.color_range = frame.colorspace, frame.color_range
    return twin


class Recorded(Source):
    """Decoded frames, as a file gives them."""

    def __init__(self, natives: list[av.VideoFrame], rate: Fraction = Fraction(25)) -> None:
        self.natives = natives
        first = natives[0]
        self.info = Info(first.width, first.height, rate, Colour.of(first), first.format.name, name="recorded")

    def times(self):
        return [Fraction(k) / self.info.rate for k in range(len(self.natives))]

    def frames(self, start=0, stop=None):
        for k in range(*slice(start, stop).indices(len(self.natives))):
            yield Frame(Fraction(k) / self.info.rate, self.info.colour, self.natives[k])

    def fingerprint(self) -> str:
        return f"recorded {id(self)}"


def recorded(pix_fmt: str, **size) -> Clip:
    return Clip(Recorded([picture(pix_fmt, shift=k, **size) for k in range(2)]))


def made(clip: Clip) -> Clip:
    """The same pictures as a method hands them over: RGB, no recorded frame behind them."""
    return clip.map(lambda rgb: rgb.clone(), "made")


@pytest.mark.parametrize("pix_fmt", [
    "nv12", "nv21", "nv16", "nv24", "p010le", "p216le", "p412le", "uyvy422", "yuyv422", "yvyu422", "y210le", "y212le",
    "xv36le", "vyu444", "bgr0", "bgr48le", "yuvj420p",
])  # fmt: skip
@pytest.mark.parametrize("size", [(8, 16), (7, 9), (1, 1)])
def test_a_frame_is_put_together_as_it_is_taken_apart(pix_fmt, size):
    height, width = size
    layout = layout_of(pix_fmt)
    rng = np.random.default_rng(0)
    shapes = [(height, width)] + [(-(-height // layout.down), -(-width // layout.across))] * 2
    values = [rng.integers(0, int(layout.top) + 1, shape).astype(layout.dtype) for shape in shapes]
    for before, after in zip(values, components(frame_of(values, pix_fmt, height, width)), strict=True):
        assert np.array_equal(before, after)


def numbers(frame: av.VideoFrame) -> list[np.ndarray]:
    found = components(frame)
    return found[:-1] if layout_of(frame.format.name).alpha else found


FORMATS = readable()
# Few enough to go through every codec and container: each way of lying in memory, of sharing chroma and of depth.
KINDS = ["yuv420p", "yuvj420p", "nv12", "uyvy422", "yuv411p", "yuv410p", "yuv440p", "yuvj444p", "yuv422p10le",
         "yuv444p12le", "p010le", "yuv420p9le", "gray", "gray10le", "monob", "pal8", "rgb24", "bgr0", "rgb565le",
         "gbrp", "gbrp10le", "gbrp12le", "x2rgb10le", "rgb48be", "rgba", "yuva444p10le", "ya8"]  # fmt: skip


def test_every_format_is_covered():
    assert len(FORMATS) > 190
    assert set(KINDS) <= set(FORMATS)


@pytest.mark.parametrize("pix_fmt", FORMATS)
def test_a_format_gives_its_numbers_unchanged_to_the_lossless_one(pix_fmt):
    frame = picture(pix_fmt)
    layout, wanted = layout_of(pix_fmt), lossless_format(pix_fmt)
    assert wanted in {fmt.name for fmt in av.Codec("ffv1", "w").video_formats}
    if layout.floating or layout.model == "gray":
        return  # rounded, or given chroma
    copy = repack(frame, wanted)
    assert copy.format.name == wanted
    for before, after in zip(numbers(frame), numbers(copy), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("pix_fmt", [name for name in FORMATS if not name.startswith(("bayer", "mono", "xyz", "pal8"))])
def test_a_picture_looks_the_same_in_every_format(pix_fmt):
    """Against the 16-bit picture of the same light: no stripes, no swapped channels, no lost half."""
    layout = layout_of(pix_fmt)
    frame = picture(pix_fmt)
    colour = Colour.of(frame)
    if layout.model == "yuv":  # repacking tells the bytes, the stream tells the matrix
        colour = replace(colour, matrix=1, full_range=pix_fmt.startswith("yuvj"))
    seen = rgb_from_native(frame, colour)
    wanted = rgb_from_native(picture("gbrp16le"), Colour(0, True, depth=16))
    bits = min(8 if layout.floating else component.bits for component in av.VideoFormat(pix_fmt, 8, 8).components)
    if layout.model == "gray":
        wanted = wanted.mean(0, keepdim=True).expand(3, -1, -1)
        assert (seen - wanted).abs().mean() < 0.2, "luma is no mean, but close"
        return
    # Dithering in place of rounding, and chroma that is shared by up to sixteen pixels.
    assert (seen - wanted).abs().mean() < 1.2 / 2**bits + 0.004 * (layout.across * layout.down > 1), pix_fmt


@pytest.mark.parametrize("pix_fmt", FORMATS)
def test_recorded_pictures_pass_through_ffv1_bit_for_bit(pix_fmt, tmp_path):
    clip = recorded(pix_fmt)
    back = read(write(clip, tmp_path / "o.mkv", codec="ffv1"))
    for before, after in zip(clip, back, strict=True):
        if layout_of(pix_fmt).floating:
            assert (before.rgb - after.rgb).abs().max() <= 0.51 / 65535
        elif layout_of(pix_fmt).model == "gray":
            assert np.array_equal(numbers(before.native)[0], numbers(after.native)[0])
            middle = 2 ** (layout_of(pix_fmt).depth - 1)
            assert all((chroma == middle).all() for chroma in numbers(after.native)[1:])
        else:
            for one, other in zip(numbers(before.native), numbers(after.native), strict=True):
                assert np.array_equal(one, other)
        assert (before.rgb - after.rgb).abs().max() < 1e-5


@pytest.mark.parametrize("pix_fmt", KINDS)
def test_made_pictures_are_written_by_ffv1_as_the_method_returned_them(pix_fmt, tmp_path):
    clip = made(recorded(pix_fmt))
    layout = layout_of(lossless_format(pix_fmt))
    for before, after in zip(clip, read(write(clip, tmp_path / "o.mkv", codec="ffv1")), strict=True):
        error = (before.rgb - after.rgb).abs()
        if layout.across == layout.down == 1:
            assert error.max() < 1.5 / (2**layout.depth - 1)  # half a code each of luma and chroma
        else:
            assert error.max() < 0.02


CONTAINING = {
    "h264": {".mp4", ".mov", ".mkv", ".avi"},
    "h265": {".mp4", ".mov", ".mkv"},
    "av1": {".mp4", ".mkv", ".webm", ".avi"},
    "vp9": {".mp4", ".mkv", ".webm", ".avi"},
    "ffv1": {".mp4", ".mkv", ".avi"},
}


@pytest.mark.parametrize(("codec", "suffix"), list(itertools.product(CODECS, sorted(set(CONTAINERS) - {".m4v"}))))
def test_a_container_holds_a_codec_or_it_is_said_before_any_work(codec, suffix, tmp_path):
    for make in (lambda clip: clip, made):
        clip = make(recorded("yuv420p", height=64, width=64))
        if suffix not in CONTAINING[codec]:
            with pytest.raises(InputError, match=rf"cannot live in a \{suffix} file"):
                write(clip, tmp_path / f"o{suffix}", codec=codec)
            assert list(tmp_path.iterdir()) == []
            continue
        for before, after in zip(clip, read(write(clip, tmp_path / f"o{suffix}", codec=codec)), strict=True):
            assert (before.rgb - after.rgb).square().mean() < 10**-3.0


@pytest.mark.parametrize("codec", ["h264", "h265", "av1", "vp9"])
@pytest.mark.parametrize("pix_fmt", KINDS)
def test_lossy_codecs_keep_the_picture_whatever_its_format(codec, pix_fmt, tmp_path):
    for make in (lambda clip: clip, made):
        clip = make(recorded(pix_fmt, height=64, width=64))
        for before, after in zip(clip, read(write(clip, tmp_path / "o.mkv", codec=codec, crf=8)), strict=True):
            error = (before.rgb - after.rgb).square().mean()
            assert error < 10**-3.0, -10 * float(error.log10())


SIZES = [(1, 1), (1, 7), (5, 3), (2, 2), (17, 31), (33, 130)]


@pytest.mark.parametrize(("codec", "size"), list(itertools.product(CODECS, SIZES)))
def test_every_size_goes_through_every_codec_or_is_refused_in_one_line(codec, size, tmp_path):
    height, width = size
    refused = (codec == "av1" and min(size) < 4) or (codec == "h265" and min(size) < 16)
    for pix_fmt in ("yuv420p", "rgb24", "yuv422p10le"):
        clip = recorded(pix_fmt, height=height, width=width)
        if refused:
            with pytest.raises(InputError, match=f"{width}x{height}"):
                write(clip, tmp_path / "o.mkv", codec=codec)
            assert list(tmp_path.iterdir()) == []
            continue
        back = read(write(clip, tmp_path / "o.mkv", codec=codec))
        assert (back.info.height, back.info.width) == size
        for before, after in zip(clip, back, strict=True):
            assert (before.rgb - after.rgb).abs().mean() < (1e-6 if codec == "ffv1" else 0.04)


def shifted_edge(siting: str) -> torch.Tensor:
    """A red and a green bar whose edges tell where chroma sits."""
    rgb = torch.full((3, 32, 64), 0.4)
    rgb[0, 8:24, 20:40] = 0.8
    rgb[1, 8:24, 20:40] = 0.2
    return rgb


def centre(rgb: torch.Tensor) -> tuple[float, float]:
    red = (rgb[0] - rgb[1]).clamp_min(0)
    rows, columns = torch.arange(32.0), torch.arange(64.0)
    return float((red.sum(0) * columns).sum() / red.sum()), float((red.sum(1) * rows).sum() / red.sum())


@pytest.mark.parametrize("siting", SITINGS)
@pytest.mark.parametrize("layout", ["420", "422", "411", "440", "410"])
@pytest.mark.parametrize("full", [False, True])
def test_colour_stays_where_it_is_over_many_passes(siting, layout, full):
    """Chroma read at one place and written at another moves by half a pixel with every pass."""
    colour = Colour(full_range=full, siting=siting)
    first = rgb = shifted_edge(siting)
    for _ in range(6):
        rgb = rgb_from_native(native_from_rgb(rgb, f"yuv{layout}p", colour), colour)
    for before, after in zip(centre(first), centre(rgb), strict=True):
        assert abs(before - after) < (0.5 if layout in ("410", "411") else 0.06)  # it was 3


@pytest.mark.parametrize("siting", ["left", "center", "topleft", "bottomleft"])
@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("h264", ".mkv"), ("h265", ".mp4"), ("ffv1", ".mkv")])
@pytest.mark.parametrize("full", [False, True])
def test_the_place_of_chroma_is_written_and_read_back(siting, codec, suffix, full, tmp_path, caplog):
    colour = Colour(full_range=full, siting=siting)
    natives = [native_from_rgb(shifted_edge(siting), "yuv420p", colour) for _ in range(2)]
    source = Recorded(natives)
    source.info = replace(source.info, colour=colour)
    once = read(write(Clip(source), tmp_path / f"a{suffix}", codec=codec, crf=None if codec == "ffv1" else 4))
    if "place of chroma" in caplog.text:  # Matroska has no word for the bottom
        assert (suffix, siting, codec) == (".mkv", "bottomleft", "ffv1")
        return
    assert once.info.colour.siting == siting
    assert once.info.colour.full_range == full
    twice = read(write(made(once), tmp_path / f"b{suffix}", codec=codec, crf=None if codec == "ffv1" else 4))
    for clip in (once, twice):
        for before, after in zip(centre(shifted_edge(siting)), centre(next(iter(clip)).rgb), strict=True):
            assert abs(before - after) < 0.15


def test_the_range_says_nothing_of_where_chroma_sits(tmp_path):
    """Phones write full-range H.264 with chroma on the left; MJPEG has it in the centre whatever its range."""
    with av.open(str(tmp_path / "j.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
        frame = native_from_rgb(shifted_edge("center"), "yuv420p", Colour(full_range=True, siting="center"))
        frame = filled(components(frame), "yuvj420p")
        frame.pts = 0
        out.mux([*stream.encode(frame), *stream.encode(None)])
    clip = read(tmp_path / "j.avi")
    assert (clip.info.colour.full_range, clip.info.colour.siting) == (True, "center")
    phone = Clip(Recorded([native_from_rgb(shifted_edge("left"), "yuv420p", Colour(full_range=True))] * 2))
    seen = read(write(phone, tmp_path / "p.mp4")).info
    assert (seen.colour.full_range, seen.colour.siting, seen.pix_fmt) == (True, "left", "yuvj420p")


def test_reading_the_place_of_chroma_leaves_the_picture_alone():
    for pix_fmt in ("yuv420p", "nv12", "yuv422p10le", "yuv411p"):
        frame = picture(pix_fmt)
        before = [part.copy() for part in components(frame)]
        tags = frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc
        Colour.of(frame)
        assert all(np.array_equal(a, b) for a, b in zip(before, components(frame), strict=True))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == tags


@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv422p10le"])
@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_lossless_files_keep_matrix_and_range_or_say_so(matrix, full, pix_fmt, suffix, tmp_path, caplog):
    colour = Colour(matrix, full, depth=layout_of(pix_fmt).depth)
    natives = [native_from_rgb(tensor(moving(1))[0] / 255, pix_fmt, colour) for _ in range(2)]
    source = Recorded(natives)
    source.info = replace(source.info, colour=colour)
    seen = read(write(Clip(source), tmp_path / f"o{suffix}", codec="ffv1")).info.colour
    assert (seen.matrix, seen.full_range) == (matrix, full) or "colour" in caplog.text


def test_a_note_says_what_becomes_of_finer_colour(tmp_path, caplog):
    for pix_fmt, said in (("yuv444p", "4:4:4"), ("yuv422p", "4:2:2"), ("yuv420p", None), ("yuyv422", "4:2:2")):
        caplog.clear()
        write(recorded(pix_fmt), tmp_path / "o.mp4")
        assert (f"{said} colour is written as 4:2:0 by h264" in caplog.text) == (said is not None)


@pytest.mark.parametrize("pix_fmt", [name for name in FORMATS if layout_of(name).alpha and name != "pal8"])
def test_transparency_is_refused_and_an_opaque_channel_dropped_in_every_format(pix_fmt):
    frame = picture(pix_fmt)
    assert as_native(frame, Colour.of(frame), pix_fmt, Colour.of(frame)) is not None
    rgb_from_native(frame, Colour.of(frame))
    layout = layout_of(pix_fmt)
    values = [part.copy() for part in components(frame)]
    values[-1][3, 5] = 0
    holed = av.VideoFrame(frame.width, frame.height, "rgba")
    holed.planes[0].update(np.zeros(holed.planes[0].buffer_size, np.uint8))
    with pytest.raises(InputError, match="transparency"):
        rgb_from_native(holed, Colour.of(holed))
    if not layout.floating:
        clear = holed.reformat(format=pix_fmt)
        with pytest.raises(InputError, match="transparency"):
            rgb_from_native(clear, Colour.of(clear))
        with pytest.raises(InputError, match="transparency"):
            as_native(clear, Colour.of(clear), pix_fmt, Colour.of(clear))
