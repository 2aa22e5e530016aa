"""Everything that belongs to a file but its pictures: carried over, or named in one line."""

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.tasks.interpolation import interpolate
from frameloom.tasks.stabilization import stabilize
from frameloom.video.clip import Clip
from frameloom.video.reader import read
from frameloom.video.timecode import moved
from frameloom.video.writer import write
from media import make, moving, tensor

PLACE, DATE = "+48.1300-011.5600/", "2021-07-04T10:11:12.000000Z"


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """A video with all that Matroska holds: two sounds of which the second is the default, chapters, a font, tags."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        out.metadata.update({"title": "Film", "creation_time": DATE, "location": PLACE, "timecode": "01:02:03:04"})
        out.set_chapters([
            {"id": k + 1, "start": k * 1000, "end": (k + 1) * 1000, "time_base": Fraction(1, 1000),
             "metadata": {"title": name}} for k, name in enumerate(("One", "Two"))
        ])  # fmt: skip
        sounds = [out.add_stream("aac", rate=16000, layout="mono") for _ in range(2)]
        for sound, language in zip(sounds, ("ger", "eng"), strict=True):
            sound.metadata["language"] = language
        sounds[0].disposition = av.stream.Disposition.comment
        sounds[1].disposition = av.stream.Disposition.default
        out.add_attachment("font.ttf", "application/x-truetype-font", b"no real font")
        for k, picture in enumerate(moving(50)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for number, sound in enumerate(sounds):
            wave = np.sin(np.arange(32000) * (0.1 + 0.1 * number)).astype(np.float32)[None]
            for begin in range(0, 32000, 1024):
                piece = av.AudioFrame.from_ndarray(wave[:, begin : begin + 1024], format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 16000, begin, Fraction(1, 16000)
                out.mux(sound.encode(piece))
            out.mux(sound.encode(None))
    return path


def inside(path: Path) -> dict[str, object]:
    """What of it is in a file."""
    with av.open(str(path)) as file:
        tags = {key.lower(): text for held in (file, *file.streams.video, *file.streams.data)
                for key, text in held.metadata.items()}  # fmt: skip
        return {
            "sounds": [(s.metadata.get("language"), bool(s.disposition & av.stream.Disposition.default))
                       for s in file.streams.audio],
            "comment": any(s.disposition & av.stream.Disposition.comment for s in file.streams.audio),
            "chapters": [(c["metadata"].get("title"), float(c["start"] * c["time_base"])) for c in file.chapters()],
            "font": [s.data for s in file.streams.attachments],
            "title": tags.get("title"), "date": tags.get("creation_time"), "place": tags.get("location"),
            "timecode": tags.get("timecode"),
        }  # fmt: skip


# What a container holds; the rest must be named.
HELD = {
    ".mkv": {"sounds", "comment", "chapters", "font", "title", "date", "place", "timecode"},
    ".mp4": {"sounds", "comment", "chapters", "title", "date", "place", "timecode"},
    ".mov": {"sounds", "chapters", "title", "date", "place", "timecode"},
    ".avi": {"title", "timecode"},
    ".webm": {"chapters", "title", "date", "place", "timecode"},
}
NAMED = {"comment": "flag comment", "font": "font.ttf", "chapters": "chapters (2)", "date": "tag creation_time",
         "place": "tag location", "timecode": "time code", "sounds": "audio (aac)"}  # fmt: skip


@pytest.mark.parametrize("suffix", HELD)
def test_a_file_that_carries_everything_loses_nothing_without_a_word(film, suffix, tmp_path, caplog):
    whole = inside(film)
    assert all(whole.values())
    codec = "vp9" if suffix == ".webm" else "h264"
    made = inside(write(read(film), tmp_path / f"o{suffix}", codec=codec))
    for what, wanted in whole.items():
        if what in HELD[suffix]:
            found = made[what]
            if what == "sounds" and suffix in (".mp4", ".mov"):
                found = [(language or "und", default) for language, default in found]
            assert found == pytest.approx(wanted) if what == "place" and suffix != ".mp4" else found == wanted, what
        elif suffix == ".avi" and what == "sounds":
            assert len(made["sounds"]) == 2
            assert "flag default" in caplog.text
        elif suffix == ".webm" and what == "comment":
            continue  # its sound is left out altogether
        else:
            assert NAMED[what].lower() in caplog.text.lower(), what


@pytest.mark.parametrize("change", [
    lambda clip: interpolate(clip, "2x", "blend"),
    lambda clip: stabilize(clip, method="similarity"),
    lambda clip: clip.map(lambda rgb: rgb, "same"),
])  # fmt: skip
def test_every_verb_carries_it(film, change, tmp_path):
    made = inside(write(change(read(film)), tmp_path / "o.mkv"))
    whole = inside(film)
    assert made.pop("timecode") in (whole.pop("timecode"), "01:02:03:08")
    assert made == whole


def test_a_part_takes_its_own_chapters_and_time_code(film, tmp_path):
    made = inside(write(read(film, range="0.8s:1.6s"), tmp_path / "o.mkv"))
    assert made["chapters"] == [("One", 0.0), ("Two", pytest.approx(0.2, abs=0.001))]
    assert made["timecode"] == "01:02:03:24"


def test_slow_motion_keeps_what_does_not_run_beside_the_pictures(film, tmp_path):
    made = inside(write(interpolate(read(film), slow=2, method="blend"), tmp_path / "o.mkv"))
    assert (made["sounds"], made["chapters"]) == ([], [])
    assert (made["title"], made["place"], len(made["font"])) == ("Film", PLACE, 1)


def test_sound_that_a_container_cannot_hold_is_left_out_before_any_work(tmp_path, caplog):
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("flac", rate=16000, layout="mono", format="s16")
        for k, picture in enumerate(moving(5)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        piece = av.AudioFrame.from_ndarray(np.zeros((1, 3200), np.int16), format="s16", layout="mono")
        piece.sample_rate, piece.pts, piece.time_base = 16000, 0, Fraction(1, 16000)
        out.mux([*sound.encode(piece), *sound.encode(None)])
    for suffix, kept in ((".mkv", 1), (".mp4", 1), (".mov", 0), (".avi", 1)):
        caplog.clear()
        with av.open(str(write(read(source), tmp_path / f"o{suffix}"))) as made:
            assert len(made.streams.audio) == kept or "flac" in caplog.text
            assert len(made.streams.video) == 1


def test_finished_work_survives_what_goes_wrong_at_the_end_and_goes_on_under_another_name(tmp_path, monkeypatch):
    from frameloom.video import writer

    monkeypatch.setattr(writer, "SEGMENT", 8)
    clip = read(make(tmp_path / "in.mkv", moving(30)))
    join = writer._join

    def fail(*given) -> None:
        raise av.error.InvalidDataError(1, "Invalid data", "o.mp4")

    monkeypatch.setattr(writer, "_join", fail)
    with pytest.raises(InputError, match="32 frames are kept, --resume goes on, under another name too"):
        write(clip, tmp_path / "o.mp4")
    monkeypatch.setattr(writer, "_join", join)
    seen = []
    write(clip, tmp_path / "o.mkv", resume=True, progress=lambda label, done, total: seen.append(done))
    assert seen[0] == 25
    assert len(read(tmp_path / "o.mkv")) == 30
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("codec", ["h264", "h265", "av1", "vp9", "ffv1"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov", ".avi"])
@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(10, 11)])
def test_the_shape_of_pixels_is_kept_or_said(codec, suffix, aspect, tmp_path, caplog):
    from dataclasses import replace

    clip = Clip.from_tensor(tensor(moving(3, 48, 80)), 25)
    clip.source.info = replace(clip.info, pixel_aspect=aspect)
    try:
        back = read(write(clip, tmp_path / f"o{suffix}", codec=codec))
    except InputError as error:
        assert "cannot live in" in str(error)  # noqa: PT017
        return
    assert len(list(back)) == 3
    if back.info.pixel_aspect != aspect:
        assert suffix == ".avi"
        assert f"pixels are {aspect.numerator}:{aspect.denominator}" in caplog.text


@settings(max_examples=60, deadline=None)
@given(
    rates=st.tuples(*[st.sampled_from([24, 25, 30, 50, 60, Fraction(30000, 1001), Fraction(60000, 1001)])] * 2),
    start=st.integers(0, 24 * 3600 - 1),
)
def test_a_time_code_says_the_same_instant_at_another_rate(rates, start):
    old, new = map(Fraction, rates)
    code = f"{start // 3600:02d}:{start // 60 % 60:02d}:{start % 60:02d}:00"
    assert moved(code, old, new, Fraction(0)) == code
    assert moved(moved(code, old, new, Fraction(0)), new, old, Fraction(0)) == code


def test_dropped_labels_follow_the_clock():
    ntsc, double = Fraction(30000, 1001), Fraction(60000, 1001)
    assert moved("01:02:03;04", ntsc, double, Fraction(0)) == "01:02:03;08"
    assert moved("00:00:59;29", ntsc, ntsc, 1 / ntsc) == "00:01:00;02"
    assert moved("00:09:59;29", ntsc, ntsc, 1 / ntsc) == "00:10:00;00"
    assert moved("10:00:00;00", ntsc, ntsc, Fraction(3600)) in ("11:00:00;00", "10:59:59;29")
    assert moved("nonsense", ntsc, ntsc, Fraction(0)) is None
    assert moved("00:00:00:00", Fraction(7, 3), Fraction(25), Fraction(0)) is None


def quarters() -> np.ndarray:
    picture = np.full((32, 48, 3), 90, np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return picture


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_laid_upright_as_pillow_does(suffix, orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"p.{suffix}"
    PIL.Image.fromarray(quarters()).save(path, exif=exif, **options)
    upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB"))
    clip = read(path)
    assert (clip.info.height, clip.info.width) == upright.shape[:2]
    assert np.abs(clip.tensor()[0].permute(1, 2, 0).numpy() * 255 - upright).mean() < 3


MATRICES = {  # a, b, c, d of x' = a x + c y, y' = b x + d y
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("orientation", MATRICES)
def test_all_eight_display_matrices_are_those_of_exif(orientation, tmp_path):
    path = make(tmp_path / "o.mp4", np.stack([quarters()] * 3), options={"crf": "4"})
    data = bytearray(path.read_bytes())
    a, b, c, d = (value * 65536 for value in MATRICES[orientation])
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(bytes(data))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(quarters()).save(tmp_path / "p.png", exif=exif)
    clip = read(path)
    assert (clip.tensor()[0] - read(tmp_path / "p.png").tensor()[0]).abs().mean() < 0.03
    again = read(write(clip, tmp_path / "again.mp4"))
    assert not again.info.orientation
    assert (again.tensor()[0] - clip.tensor()[0]).abs().mean() < 0.03


def hdr(path: Path) -> Path:
    params = (
        "log-level=none:hdr10=1:repeat-headers=1:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:"
        "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
    )
    return make(path, moving(5, 64, 96), codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": params})


def test_the_screen_and_light_of_hdr_are_kept_or_said(tmp_path, caplog):
    clip = read(hdr(tmp_path / "in.mp4"))
    assert clip.info.hdr.light == (1000, 400)
    assert clip.info.hdr.luminance == (Fraction(1, 200), 1000)
    for codec, suffix in (("h265", ".mp4"), ("h265", ".mkv"), ("av1", ".mp4"), ("av1", ".mkv")):
        back = read(write(clip, tmp_path / f"o{suffix}", codec=codec)).info.hdr
        assert back.light == clip.info.hdr.light
        pairs = zip((*back.primaries, back.luminance), (*clip.info.hdr.primaries, clip.info.hdr.luminance), strict=True)
        for ours, theirs in pairs:
            assert [float(value) for value in ours] == pytest.approx([float(value) for value in theirs], abs=1e-3)
    assert "HDR10" not in caplog.text
    write(clip, tmp_path / "o.mkv", codec="ffv1")
    assert "light levels of HDR10 are not kept by ffv1" in caplog.text


def test_alpha_of_webm_is_seen_and_refused_like_any_other(tmp_path):
    for codec in ("libvpx-vp9",):
        for opacity, message in ((255, None), (40, "transparency")):
            path = tmp_path / f"{codec}{opacity}.webm"
            with av.open(str(path), "w") as out:
                stream = out.add_stream(codec, rate=25, options={"auto-alt-ref": "0"})
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
                stream.metadata["alpha_mode"] = "1"
                for k, picture in enumerate(moving(3)):
                    rgba = np.concatenate([picture, np.full((48, 64, 1), opacity, np.uint8)], 2)
                    frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva420p")
                    frame.pts, frame.time_base = k, Fraction(1, 25)
                    out.mux(stream.encode(frame))
                out.mux(stream.encode(None))
            if message is None:
                assert len(list(read(path))) == 3
            else:
                with pytest.raises(InputError, match=message):
                    read(path)


def test_pictures_come_by_pattern_and_a_missing_number_is_said(tmp_path, caplog):
    for number in (7, 8, 9, 10, 13, 14):
        PIL.Image.fromarray(np.full((8, 8, 3), number * 10, np.uint8)).save(tmp_path / f"shot_{number:04d}.png")
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "shot_end.png")
    clip = read(tmp_path / "shot_%04d.png")
    assert [round(float(frame.rgb[0, 0, 0]) * 25.5) for frame in clip] == [7, 8, 9, 10, 13, 14]
    assert "number 11 to 12 is missing" in caplog.text
    with pytest.raises(InputError, match="no file matches"):
        read(tmp_path / "other_%04d.png")
    caplog.clear()
    for number in range(6):
        PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"tenth_{number * 10:03d}.png")
    read(str(tmp_path / "tenth_*.png"))
    assert "missing" not in caplog.text


@pytest.mark.parametrize("suffix", ["exr", "dpx"])
def test_pictures_of_the_film_trade_are_read(suffix, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    light = torch.linspace(0, 1, 64).expand(3, 16, 64)
    with av.open(str(tmp_path / f"p.{suffix}"), "w", format="image2") as out:
        stream = out.add_stream(suffix, rate=24)
        stream.width, stream.height = 64, 16
        stream.pix_fmt = "gbrpf32le" if suffix == "exr" else "gbrp10le"
        frame = av.VideoFrame(64, 16, stream.pix_fmt)
        codes = (
            light.numpy().astype(np.float32) if suffix == "exr" else (light.numpy() * 1023).round().astype(np.uint16)
        )
        for plane, part in zip(frame.planes, codes, strict=True):
            lines = np.zeros((16, plane.line_size // part.itemsize), part.dtype)
            lines[:, :64] = part
            plane.update(lines)
        frame.pts = 0
        out.mux([*stream.encode(frame), *stream.encode(None)])
    seen = read(tmp_path / f"p.{suffix}").tensor()[0]
    if suffix == "dpx":
        assert (seen - light).abs().max() < 1e-3
        return
    assert seen[:, :, 32].mean() == pytest.approx(0.74, abs=0.02), "half the light is three quarters of the code"
    assert "linear light is shown through the sRGB curve" in caplog.text


def test_a_size_that_changes_midway_stops_or_is_fitted(tmp_path):
    def elementary(height: int, width: int) -> bytes:
        path = tmp_path / f"{height}.h264"
        make(path, moving(6, height, width), options={"crf": "10", "bf": "0"})
        return path.read_bytes()

    both = tmp_path / "both.h264"
    both.write_bytes(elementary(48, 64) + elementary(96, 128))
    with pytest.raises(InputError, match=r"changes size at frame 6, from 64x48 to 128x96; add --same-size"):
        list(read(both))
    clip = read(both, same_size=True)
    assert {frame.rgb.shape for frame in clip} == {(3, 48, 64)}
    assert len(clip) == 12
