"""Every frame's number and time, from the start and from any start, in every container that makes them hard to tell.

A frame's number is drawn into its picture as eight black or white squares, so that it survives any codec.
"""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.video.clip import Clip
from frameloom.video.extent import cut_short
from frameloom.video.reader import read
from frameloom.video.times import standard_rate
from frameloom.video.writer import write
from media import packets, tensor

COUNT = 40


def numbered(count: int = COUNT) -> np.ndarray:
    """(t, 64, 128, 3) uint8; eight squares tell the number, the lowest bit first."""
    out = np.zeros((count, 64, 128, 3), np.uint8)
    for number in range(count):
        for bit in range(8):
            out[number, 16:48, 16 * bit : 16 * bit + 16] = 235 if number >> bit & 1 else 20
    return out


def number_of(frame) -> int:
    squares = frame.rgb[0, 24:40].reshape(16, 8, 16)[:, :, 4:12].mean((0, 2))
    return sum(1 << bit for bit in range(8) if squares[bit] > 0.5)


def encode(
    path: Path,
    codec: str,
    options: dict[str, str],
    count: int = COUNT,
    *,
    format: str | None = None,
    stamps: list[int] | None = None,
    tick: Fraction | None = None,
    pix_fmt: str = "yuv420p",
    sound: bool = False,
    rate: int = 25,
) -> Path:
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 64, pix_fmt
        if tick:
            stream.codec_context.time_base = tick
        audio = out.add_stream("mp2", rate=16000, layout="mono") if sound else None
        for k, picture in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = stamps[k] if stamps else k, tick or Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if audio is not None:
            for begin in range(0, 16000 * count // rate, 576):
                noise = np.random.default_rng(begin).integers(-9000, 9000, (1, 576)).astype(np.int16)
                piece = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = 16000, begin, Fraction(1, 16000)
                out.mux(audio.encode(piece))
            out.mux(audio.encode(None))
    return path


X264 = {"crf": "18", "g": "12", "bf": "3", "preset": "veryfast"}
X265 = {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=1", "crf": "18"}
B2 = {"b": "3M", "bf": "2", "g": "12"}
FILES = {
    "h264.avi": ("libx264", X264),
    "mpeg4.avi": ("mpeg4", B2),
    "msmpeg4.avi": ("msmpeg4", {"b": "3M", "g": "12"}),
    "mjpeg.avi": ("mjpeg", {}),
    "ffv1.avi": ("ffv1", {}),
    "h264.asf": ("libx264", X264),
    "wmv2.wmv": ("wmv2", {"b": "3M", "g": "12"}),
    "h264.mp4": ("libx264", X264),
    "h265.mp4": ("libx265", X265),
    "mpeg4.mp4": ("mpeg4", B2),
    "h264.mov": ("libx264", X264),
    "h264.mkv": ("libx264", X264),
    "h265.mkv": ("libx265", X265),
    "mpeg2.mkv": ("mpeg2video", B2),
    "vp8.webm": ("libvpx", {"b": "2M", "g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp9.webm": ("libvpx-vp9", {"crf": "20", "b": "0", "g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1.mkv": ("libsvtav1", {"crf": "8", "preset": "8", "g": "12"}),
    "h264.ts": ("libx264", X264),
    "h265.ts": ("libx265", X265),
    "mpeg2.ts": ("mpeg2video", B2),
    "mpeg2.mpg": ("mpeg2video", B2),
    "mpeg1.mpg": ("mpeg1video", B2),
    "mpeg2.vob": ("mpeg2video", B2),
    "h264.flv": ("libx264", X264),
    "flv.flv": ("flv", {"b": "3M", "g": "12"}),
    "h264.nut": ("libx264", X264),
    "h264.h264": ("libx264", X264),
    "mpeg2.m2v": ("mpeg2video", B2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("times")


def check(clip: Clip, numbers: list[int], times: list[Fraction] | None = None) -> None:
    """The frames are these, at these times, from every start."""
    assert len(clip) == len(numbers)
    whole = list(clip)
    assert [number_of(frame) for frame in whole] == numbers
    assert [frame.time for frame in whole] == list(clip.times)
    if times is not None:
        assert list(clip.times) == times
    for start in range(len(numbers)):
        frame = next(clip.frames(start))
        assert (number_of(frame), frame.time) == (numbers[start], clip.times[start]), start


@pytest.mark.parametrize("name", FILES)
def test_every_frame_has_its_number_and_time_from_every_start(name, folder):
    codec, options = FILES[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    clip = read(encode(folder / name, codec, options, pix_fmt=pix_fmt))
    check(clip, list(range(COUNT)), [Fraction(k, 25) for k in range(COUNT)])
    assert clip.duration == Fraction(COUNT, 25)


@pytest.mark.parametrize("name", ["h264.avi", "h264.mp4", "h265.mkv", "h264.ts", "mpeg2.mpg", "vp8.webm"])
def test_what_is_written_from_them_has_the_same_frames(name, folder, tmp_path):
    codec, options = FILES[name]
    clip = read(encode(folder / name, codec, options))
    check(read(write(clip, tmp_path / "o.mkv")), list(range(COUNT)))


def copied(source: Path, target: Path, change, keep=lambda packet: True, **options) -> Path:
    """The packets of a file in another, each changed and kept or not."""
    with av.open(str(source)) as given, av.open(str(target), "w", **options) as out:
        copies = {s.index: out.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.size and keep(packet):
                change(packet)
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return target


def later(seconds: Fraction | int):
    def change(packet: av.Packet) -> None:
        ticks = round(Fraction(seconds) / packet.time_base)
        packet.pts += ticks
        packet.dts = None if packet.dts is None else packet.dts + ticks

    return change


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts", ".nut"])
def test_a_video_that_begins_after_its_sound_stays_in_step(suffix, folder, tmp_path):
    source = encode(folder / f"late-source{suffix}", "libx264", X264, sound=True)
    delayed = copied(source, tmp_path / f"late{suffix}",
                     lambda packet: later(2)(packet) if packet.stream.type == "video" else None)  # fmt: skip
    clip = read(delayed)
    check(clip, list(range(COUNT)), [Fraction(k, 25) for k in range(COUNT)])
    made = write(clip, tmp_path / "o.mkv")
    before, after = packets(delayed, "audio")[0], packets(made, "audio")[0]
    kept = dict(after)
    assert kept
    assert all(abs(kept[payload] - instant) < Fraction(3, 1000) for payload, instant in before if payload in kept)


def test_a_lossless_trim_shows_what_its_edit_list_shows(folder, tmp_path):
    source = encode(folder / "trim-source.mp4", "libx264", X264 | {"g": "100"})
    trim = copied(source, tmp_path / "trim.mp4", later(-Fraction(15, 25)))
    check(read(trim), list(range(15, COUNT)))


@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts", "h265.ts"])
def test_a_recording_that_begins_inside_a_group_begins_at_its_first_picture(name, folder, tmp_path):
    codec, options = FILES[name]
    whole = encode(folder / f"whole-{name}", codec, options, sound=True).read_bytes()
    cut = tmp_path / "cut.ts"
    start = len(whole) // 188 // 5 * 188
    cut.write_bytes(whole[start:])
    clip = read(cut)
    numbers = [number_of(frame) for frame in clip]
    assert numbers == list(range(numbers[0], COUNT))
    assert 0 < numbers[0] < 30
    check(clip, numbers)
    assert len(read(write(clip, tmp_path / "o.mp4"))) == len(numbers)


def test_a_cut_at_an_open_group_leaves_its_leading_pictures_away(folder, tmp_path):
    source = encode(folder / "open.mkv", "libx265", X265)
    with av.open(str(source)) as file:
        keys = [p.pts for p in file.demux(video=0) if p.size and p.is_keyframe]
    state = {"begun": False}

    def keep(packet: av.Packet) -> bool:
        state["begun"] |= packet.pts == keys[1]
        return state["begun"]

    clip = read(copied(source, tmp_path / "cut.mkv", lambda packet: None, keep))
    numbers = [number_of(frame) for frame in clip]
    assert numbers == list(range(numbers[0], COUNT))
    check(clip, numbers)


def test_two_pictures_on_one_tick_keep_all_times(tmp_path):
    stamps = [33 * k + 1000 * (k > 20) for k in range(COUNT)]
    path = encode(tmp_path / "single.mkv", "mjpeg", {}, stamps=stamps, tick=Fraction(1, 1000), pix_fmt="yuvj420p")

    def meet(packet: av.Packet) -> None:
        if packet.pts == stamps[30]:
            packet.pts = packet.dts = stamps[29]

    clip = read(copied(path, tmp_path / "twin.mkv", meet))
    stamps[30] = stamps[29]
    assert not clip.info.regular
    check(clip, list(range(COUNT)))
    assert all(early < late for early, late in pairwise(clip.times))
    assert [abs(time - Fraction(stamp, 1000)) < Fraction(1, 1000) for time, stamp in
            zip(clip.times, stamps, strict=True)] == [True] * COUNT  # fmt: skip


def test_joined_recordings_follow_one_another(folder, tmp_path, caplog):
    one = encode(folder / "one.ts", "libx264", X264, sound=True)
    two = copied(one, tmp_path / "two.ts", later(5000))
    for name, parts in (("later.ts", (one, two)), ("again.ts", (one, one)), ("back.ts", (two, one))):
        joined = tmp_path / name
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        caplog.clear()
        clip = read(joined)
        assert "clock jumps once" in caplog.text
        check(clip, [*range(COUNT), *range(COUNT)])
        assert abs(clip.duration - Fraction(2 * COUNT, 25)) < Fraction(1, 10)
        made = write(clip, tmp_path / "o.mkv")
        sound = [instant for _, instant in packets(made, "audio")[0]]
        assert sound[-1] < Fraction(2 * COUNT, 25) + Fraction(1, 10)
        assert max(late - early for early, late in pairwise(sound)) < Fraction(1, 5)


def gif(path: Path, durations: list[int]) -> Path:
    frames = [PIL.Image.fromarray(picture) for picture in numbered(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


@pytest.mark.parametrize("durations", [[100] * 11 + [3000], [50, 100, 150, 200, 450], [40, 40, 120]])
def test_the_last_frame_of_a_gif_is_held_as_long_as_it_says(durations, tmp_path):
    clip = read(gif(tmp_path / "hold.gif", durations))
    assert clip.duration == Fraction(sum(durations), 1000)
    assert [round(float(time) * 1000) for time in clip.times] == [sum(durations[:k]) for k in range(len(durations))]
    assert clip[2:].duration == Fraction(sum(durations[2:]), 1000)
    assert clip[:2].duration == Fraction(sum(durations[:2]), 1000)
    for suffix in (".mp4", ".mkv", ".mov"):
        back = read(write(clip, tmp_path / f"o{suffix}"))
        assert abs(back.duration - clip.duration) <= Fraction(2, 1000)
        check(back, list(range(len(durations))))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".webm"])
@pytest.mark.parametrize("rate", [1, Fraction(1, 4), Fraction(60000, 1001), 1000])
def test_slides_and_slow_motion_can_be_read_again(suffix, rate, tmp_path):
    clip = Clip.from_tensor(tensor(numbered(10)), rate)
    back = clip.save(tmp_path / f"o{suffix}", codec="vp9" if suffix == ".webm" else "h264")
    check(back, list(range(10)))
    assert abs(back.duration - clip.duration) <= Fraction(2, 1000)
    if rate != 1000 or suffix not in (".mkv", ".webm"):
        assert back.rate == rate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_a_variable_rate_survives_every_container(suffix, tmp_path):
    stamps = [0, 40, 90, 130, 230, 260, 300, 420]
    source = encode(tmp_path / "vfr.mkv", "ffv1", {}, 8, stamps=stamps, tick=Fraction(1, 1000))
    back = read(write(read(source), tmp_path / f"o{suffix}"))
    check(back, list(range(8)))
    assert [round(float(time) * 1000) for time in back.times] == stamps


def test_frames_that_a_recorder_dropped_are_gaps(tmp_path):
    stamps = [k + 20 * (k > 9) for k in range(30)]
    path = encode(tmp_path / "drop.avi", "mjpeg", {}, 30, stamps=stamps, tick=Fraction(1, 25), pix_fmt="yuvj420p")
    check(read(path), list(range(30)), [Fraction(stamp, 25) for stamp in stamps])


@settings(max_examples=150, deadline=None)
@given(
    rate=st.sampled_from([Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 48, 50, Fraction(60000, 1001), 60,
                          Fraction(120000, 1001), 120, 12, 15, Fraction(25, 2), 1]),
    tick=st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 600), Fraction(1, 16000)]),
    count=st.integers(300, 2000),
    rounding=st.sampled_from([round, int]),
)  # fmt: skip
def test_a_rounded_rate_is_named_as_the_rate_it_was(rate, tick, count, rounding):
    stamps = np.array([rounding(Fraction(k) / rate / tick) for k in range(count)], np.int64)
    if (tick == Fraction(1, 600) and rate > 100) or len(set(stamps.tolist())) < count:
        return
    assert standard_rate(stamps, tick, []) == (rate, True)
    # A header that is wrong is not believed, one that is rounded is understood.
    assert standard_rate(stamps, tick, [Fraction(1000)]) == (rate, True)
    rounded = Fraction(round(10**9 / Fraction(rate)), 10**9)
    assert standard_rate(stamps, tick, [1 / rounded]) == (rate, True)


def test_a_file_that_is_shorter_than_it_says_is_known_by_its_own_headers(folder, tmp_path):
    for name in ("h264.mp4", "h264.mov", "h264.mkv", "vp9.webm", "h264.avi", "mjpeg.avi"):
        codec, options = FILES[name]
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        whole = encode(folder / f"x-{name}", codec, options, pix_fmt=pix_fmt)
        assert not cut_short(whole)
        longer = tmp_path / f"longer-{name}"
        longer.write_bytes(whole.read_bytes() + b"trailing note\n" * 9)
        assert not cut_short(longer)
        shorter = tmp_path / f"shorter-{name}"
        shorter.write_bytes(whole.read_bytes()[:-200])
        assert cut_short(shorter)


def test_interlacing_that_begins_later_is_named_and_only_it_is_woven(tmp_path):
    progressive = encode(tmp_path / "p.m2v", "mpeg2video", {"b": "3M", "bf": "0", "g": "12"}, 20).read_bytes()
    fields = encode(tmp_path / "i.m2v", "mpeg2video",
                    {"b": "3M", "bf": "0", "g": "12", "flags": "+ildct+ilme", "alternate_scan": "1"}, 20)  # fmt: skip
    mixed = tmp_path / "mixed.m2v"
    mixed.write_bytes(progressive + fields.read_bytes())
    with pytest.raises(InputError, match="interlaced from frame 20 on; add --deinterlace"):
        read(mixed)
    woven = list(read(mixed, deinterlace=True))
    assert len(woven) == 40
    for ours, plain in zip(woven[:19], read(tmp_path / "p.m2v"), strict=False):
        assert (ours.rgb - plain.rgb).abs().max() == 0, "a whole frame is not filtered"
