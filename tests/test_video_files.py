"""Reading and writing files: nothing lost, nothing invented."""

import itertools
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.video.clip import Clip
from frameloom.video.reader import read
from frameloom.video.writer import write
from media import make, moving, packets, patch_rotation, tensor


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """50 frames with B-frames and several keyframes, with sound."""
    return make(tmp_path_factory.mktemp("plain") / "plain.mp4", moving(50), rate=Fraction(30000, 1001), audio=True,
                options={"crf": "10", "g": "12", "bf": "3"})  # fmt: skip


def pictures(clip) -> torch.Tensor:
    return torch.stack([frame.rgb for frame in clip])


def test_description_length_and_times_are_exact(plain):
    clip = read(plain)
    assert (clip.info.width, clip.info.height, clip.rate, len(clip)) == (64, 48, Fraction(30000, 1001), 50)
    assert [frame.time for frame in clip] == [Fraction(k * 1001, 30000) for k in range(50)]
    assert clip.duration == Fraction(50 * 1001, 30000)


def test_decoding_matches_pyav_frame_for_frame(plain):
    with av.open(str(plain)) as file:
        reference = [frame.to_ndarray() for frame in file.decode(video=0)]
    ours = [frame.native.to_ndarray() for frame in read(plain)]
    assert all(np.array_equal(a, b) for a, b in zip(ours, reference, strict=True))


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 49), length=st.integers(1, 12))
def test_any_slice_equals_the_same_part_of_a_full_read(plain, start, length):
    clip = read(plain)
    part = clip[start : start + length]
    whole = list(clip)[start : start + length]
    assert len(part) == len(whole)
    for ours, reference in zip(part, whole, strict=True):
        assert torch.equal(ours.rgb, reference.rgb)
        assert ours.time == reference.time - whole[0].time


def test_slicing_by_seconds_and_steps(plain):
    clip = read(plain)
    assert len(clip[0.5:1.0]) == len([t for t in clip.times if 0.5 <= t < 1.0])
    assert [f.time for f in clip[::2]] == [Fraction(k * 1001, 15000) for k in range(25)]
    with pytest.raises(InputError, match="holds no frame"):
        clip[10.0:11.0]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 9), data=st.data())
def test_windows_cover_every_frame_in_order(count, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    clip = Clip.from_tensor(torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float() / 32)
    seen = [[round(float(x) * 32) for x in window[:, 0, 0, 0]] for window in clip.windows(size, overlap)]
    assert sorted({k for window in seen for k in window}) == list(range(count))
    for before, after in itertools.pairwise(seen):
        assert after[:overlap] == before[len(before) - overlap :] if overlap else after[0] == before[-1] + 1
    assert all(len(window) == size for window in seen[:-1])


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("h264", ".mp4"), ("h265", ".mkv"), ("av1", ".mp4"), ("vp9", ".webm"), ("ffv1", ".mkv"), ("h264", ".mov")],
)
def test_a_written_file_has_the_same_frames_times_and_colour(tmp_path, codec, suffix):
    video = moving(10, 64, 80)
    source = make(tmp_path / "in.mp4", video, rate=25, colour=(1, 1, 1, 1))
    clip = read(source)
    made = read(write(clip, tmp_path / f"out{suffix}", codec=codec, crf=None if codec == "ffv1" else 12))
    assert list(made.times) == list(clip.times)
    assert made.rate == clip.rate
    assert made.info.colour == clip.info.colour
    error = (pictures(made) - pictures(clip)).abs().mean() * 255
    assert error == 0 if codec == "ffv1" else error < 3


@pytest.mark.parametrize(
    ("codec", "suffix"), [("h264", ".mp4"), ("h265", ".mkv"), ("av1", ".mkv"), ("vp9", ".webm"), ("ffv1", ".mkv")]
)
def test_the_same_input_ends_in_the_same_bytes(tmp_path, codec, suffix):
    clip = read(make(tmp_path / "in.mp4", moving(8, 50, 84)))
    made = {write(clip, tmp_path / f"o{suffix}", codec=codec).read_bytes() for _ in range(3)}
    assert len(made) == 1


def test_sound_is_copied_packet_for_packet_and_in_step(plain, tmp_path):
    made = write(read(plain), tmp_path / "out.mp4")
    before, after = packets(plain, "audio")[0], packets(made, "audio")[0]
    assert [payload for payload, _ in before] == [payload for payload, _ in after]
    assert max(abs(a[1] - b[1]) for a, b in zip(before, after, strict=True)) < Fraction(1, 1000)


def test_a_range_keeps_the_sound_of_that_range(plain, tmp_path):
    made = write(read(plain, range="0.5s:1s"), tmp_path / "out.mkv")
    whole = dict(packets(plain, "audio")[0])
    part = packets(made, "audio")[0]
    first = next(t for t in read(plain).times if t >= Fraction(1, 2))
    assert 6 <= len(part) <= 9
    assert all(abs(instant - (whole[payload] - first)) < Fraction(2, 1000) for payload, instant in part)


def test_several_streams_are_found_and_companions_kept(clips, tmp_path):
    source = clips / "nasa.mp4"
    assert len(read(source, stream=1)) > 0
    with pytest.raises(InputError, match="video streams 0 to 1"):
        read(source, stream=2)
    made = write(read(source, range="0s:2s"), tmp_path / "out.mp4")
    with av.open(str(made)) as file:
        assert [len(file.streams.video), len(file.streams.audio), len(file.streams.subtitles)] == [1, 2, 2]


def test_variable_frame_rate_keeps_its_time_stamps(tmp_path):
    stamps = [0, 40, 90, 130, 230, 260, 300, 420]
    source = make(tmp_path / "vfr.mkv", moving(8), pts=stamps, time_base=Fraction(1, 1000), rate=25)
    clip = read(source)
    assert not clip.info.regular
    assert [round(float(t) * 1000) for t in clip.times] == stamps
    for suffix in (".mp4", ".mkv"):
        assert [round(float(t) * 1000) for t in read(write(clip, tmp_path / f"o{suffix}")).times] == stamps


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_once(tmp_path, degrees):
    path = make(tmp_path / "r.mp4", moving(4))
    upright = pictures(read(path))
    patch_rotation(path, degrees)
    clip = read(path)
    assert clip.info.orientation
    turned = pictures(clip)
    # The matrices written are the ones phones write for "turn the picture clockwise by so many degrees to show it".
    assert (turned - torch.rot90(upright, -degrees // 90, (2, 3))).abs().mean() < 2 / 255
    again = read(write(clip, tmp_path / "o.mp4", crf=5))
    assert not again.info.orientation
    assert (again.info.width, again.info.height) == (clip.info.width, clip.info.height)
    assert (pictures(again) - turned).abs().mean() < 2 / 255


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("h265", ".mp4"), ("vp9", ".webm"), ("ffv1", ".mkv")])
def test_odd_sizes_are_kept(tmp_path, codec, suffix):
    clip = Clip.from_tensor(tensor(moving(4, 45, 71)), 24)
    made = read(write(clip, tmp_path / f"o{suffix}", codec=codec))
    assert (made.info.width, made.info.height) == (71, 45)
    assert (pictures(made) - pictures(clip)).abs().mean() < 6 / 255


def test_ten_bits_stay_ten_bits_where_the_codec_can_and_it_is_said_where_not(tmp_path, caplog):
    source = make(tmp_path / "ten.mkv", moving(5, 64, 64), codec="libx265", pix_fmt="yuv420p10le",
                  options={"x265-params": "log-level=error:lossless=1"})  # fmt: skip
    clip = read(source)
    assert clip.info.colour.depth == 10
    lossless = read(write(clip, tmp_path / "o.mkv", codec="ffv1"))
    assert lossless.info.pix_fmt == "yuv420p10le"
    assert torch.equal(pictures(lossless), pictures(clip))
    assert read(write(clip, tmp_path / "o.mp4", codec="av1")).info.colour.depth == 10
    assert not caplog.records
    assert read(write(clip, tmp_path / "p.mp4", codec="h264")).info.colour.depth == 8
    assert "written at 8 bit" in caplog.text


def test_pictures_are_read_in_the_order_of_their_numbers(tmp_path):
    video = moving(12, 16, 16)
    for k, picture in enumerate(video):
        av.VideoFrame.from_ndarray(picture, format="rgb24").save(tmp_path / f"p{k}.png")
    for name in (tmp_path, tmp_path / "p*.png"):
        clip = read(str(name), rate="12")
        assert (len(clip), clip.rate) == (12, 12)
        assert torch.equal((pictures(clip) * 255).round().byte(), tensor(video))
    av.VideoFrame.from_ndarray(moving(1, 18, 16)[0], format="rgb24").save(tmp_path / "p99.png")
    with pytest.raises(InputError, match=r"p99\.png: this picture is 16x18, the first one is 16x16"):
        list(read(tmp_path))


def test_a_gif_is_a_video_and_a_transparent_picture_is_refused(tmp_path):
    video = moving(5, 16, 16)
    with av.open(str(tmp_path / "a.gif"), "w") as out:
        stream = out.add_stream("gif", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb8"
        for k, picture in enumerate(video):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="rgb8")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    clip = read(tmp_path / "a.gif")
    assert len(clip) == 5
    assert (pictures(clip) - tensor(video) / 255).abs().mean() < 0.1
    cv2.imwrite(str(tmp_path / "t.png"), np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(InputError, match=r"t\.png: .*transparency"):
        read(tmp_path / "t.png")


def test_interlaced_video_is_named_and_can_be_woven(tmp_path):
    source = make(tmp_path / "i.mkv", moving(10), options={"crf": "10", "x264-params": "tff=1"})
    with pytest.raises(InputError, match="interlaced; add --deinterlace"):
        read(source)
    clip = read(source, deinterlace=True)
    whole = list(clip)
    assert [f.time for f in whole] == list(clip.times)
    for start in (1, 5, 9):
        assert torch.equal(next(clip.frames(start)).rgb, whole[start].rgb)


def test_a_file_that_starts_late_begins_at_zero_with_its_sound_in_step(plain, tmp_path):
    shifted = tmp_path / "late.mkv"
    with av.open(str(plain)) as given, av.open(str(shifted), "w") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.size:
                delay = round(Fraction(7) / packet.time_base)
                packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    clip = read(shifted)
    assert clip.times[0] == 0
    made = write(clip, tmp_path / "o.mp4")
    before, after = packets(shifted, "audio")[0], packets(made, "audio")[0]
    assert max(abs(a[1] - b[1]) for a, b in zip(before, after, strict=True)) < Fraction(2, 1000)


def test_a_pixel_aspect_ratio_is_kept(tmp_path):
    source = tmp_path / "wide.mp4"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)
        for k, picture in enumerate(moving(3)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert read(source).info.pixel_aspect == Fraction(16, 15)
    assert read(write(read(source), tmp_path / "o.mp4")).info.pixel_aspect == Fraction(16, 15)


@pytest.mark.parametrize("codec", ["h264", "h265", "av1", "vp9", "ffv1"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clips_of_one_and_two_frames_are_written_every_time(codec, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("frameloom.video.writer.SEGMENT", 4)
    for count in (1, 2, 5, 6):  # the last segment holds one or two
        clip = Clip.from_tensor(tensor(moving(count)), 25)
        for _ in range(3):
            back = read(write(clip, tmp_path / f"o{suffix}", codec=codec))
            assert list(back.times) == list(clip.times)
            assert len(pictures(back)) == count
