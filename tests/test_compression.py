"""`compress`, `decompress` and `inspect`, and the conventional codecs under them."""

import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from frameloom.bitstream.container import Container, parse
from frameloom.bitstream.varint import unpack_numbers
from frameloom.errors import InputError
from frameloom.metrics import psnr
from frameloom.tasks.compression.base import compress, decompress, inspect, parse_frames
from frameloom.tasks.compression.conventional import AV1, X264, X265
from frameloom.tasks.compression.rd import against, page, rate_distortion
from frameloom.video.clip import Clip, TensorSource

CODECS = {"x264": X264, "x265": X265, "av1": AV1}


def moving(frames: int = 20, height: int = 64, width: int = 96) -> Clip:
    """A smooth random texture that slides by."""
    chance = torch.Generator().manual_seed(0)
    noise = 0.8 * torch.rand(1, 1, 24, 40, generator=chance) + 0.2 * torch.rand(1, 3, 6, 10, generator=chance).repeat(
        1, 1, 4, 4
    )
    texture = F.interpolate(noise, size=(height + 40, width + 80), mode="bicubic").clamp(0, 1)[0]
    views = [texture[:, k : k + height, 2 * k : 2 * k + width] for k in range(frames)]
    return Clip.from_tensor((torch.stack(views) * 255).round().to(torch.uint8), 25)


@pytest.fixture(scope="module", params=CODECS)
def coded(request):
    clip = moving()
    return request.param, clip, CODECS[request.param].encode(clip, keyint=6)


def test_a_clip_comes_back_close_and_of_its_size_and_rate(coded):
    _, clip, data = coded
    back = decompress(data)
    assert (back.info.width, back.info.height, back.rate, len(back)) == (96, 64, Fraction(25), 20)
    assert psnr(back.tensor(), clip.tensor()) > 28


def test_any_frames_in_any_order_are_those_of_the_whole(coded):
    _, _, data = coded
    whole = decompress(data).tensor()
    for chosen in ([17], [0, 5, 6, 19], [19, 3, 4, 3, 3, 0], range(7, 15, 3)):
        assert torch.equal(decompress(data, chosen).tensor(), whole[list(chosen)])
    assert torch.equal(decompress(data)[5:9].tensor(), whole[5:9])


def test_a_frame_needs_no_packet_before_its_keyframe(coded):
    method, _, data = coded
    whole = decompress(data).tensor()
    container = parse(data)
    numbers, _ = unpack_numbers(container.section("index"), 40)
    keys = [place for place in range(20) if numbers[2 * place] % 2]
    assert len(keys) >= 3
    spoilt = sum(numbers[2 * place] // 2 for place in range(keys[2]))
    stream = bytes(spoilt) + container.section("stream")[spoilt:]
    cut = Container(container.header, container.sections | {"stream": stream}).to_bytes()
    assert torch.equal(decompress(cut, range(keys[2], 20)).tensor(), whole[keys[2] :]), method


def test_the_same_clip_gives_the_same_file(coded):
    method, clip, data = coded
    assert CODECS[method].encode(clip, keyint=6) == data


@pytest.mark.parametrize("method", CODECS)
def test_a_size_is_met_from_below(method):
    for size in (3000, 8000):
        found = len(CODECS[method].encode(moving(), size=size))
        assert 0.85 * size < found <= size


@pytest.mark.parametrize("method", CODECS)
def test_a_size_that_cannot_be_met_is_refused_with_the_least(method):
    with pytest.raises(InputError, match=rf"--size 300: {method} takes at least \d+ bytes"):
        CODECS[method].encode(moving(4), size=300)


@pytest.mark.parametrize("method", ["x264", "av1"])
def test_a_psnr_is_met_by_the_smallest_file_that_has_it(tmp_path, method):
    clip = moving(6)
    report = compress(clip, tmp_path / "out.flm", method, quality="38dB")
    found = psnr(decompress(tmp_path / "out.flm").tensor(), clip.tensor())
    assert 38 <= found < 40
    better = compress(clip, tmp_path / "better.flm", method, quality="40 dB")
    assert better.bytes > report.bytes


@pytest.mark.parametrize("method", CODECS)
def test_odd_and_small_frames_keep_their_size(method):
    clip = moving(3, 37, 45)
    back = decompress(CODECS[method].encode(clip, quality=10)).tensor()
    assert back.shape == (3, 3, 37, 45)
    assert psnr(back, clip.tensor()) > 28


def test_more_than_8_bits_stay_more_than_8_bits():
    clip = moving(4)
    deep = Clip.from_tensor(clip.tensor())
    deep.source.info = type(clip.info)(96, 64, Fraction(25), type(clip.info.colour)(depth=10))
    for codec in CODECS.values():
        back = decompress(codec.encode(deep, quality=5))
        assert back.info.colour.depth == 10
        values = back.tensor()[0] * 255
        assert (values - values.round()).abs().max() > 0.2


def test_irregular_instants_are_kept():
    class Uneven(TensorSource):
        def times(self):
            return [Fraction(0), Fraction(1, 30), Fraction(1, 3), Fraction(1001, 1000)]

    source = Uneven(moving(4).bytes_tensor(), Fraction(4), "uneven")
    source.info = type(source.info)(96, 64, Fraction(4), source.info.colour, regular=False)
    back = decompress(X264.encode(Clip(source)))
    assert list(back.times) == source.times()
    assert not back.info.regular
    assert [frame.time for frame in back[1:3]] == [0, Fraction(1, 3) - Fraction(1, 30)]


def test_compress_writes_one_whole_file_and_reports_its_length(tmp_path):
    calls = []
    out = tmp_path / "out.flm"
    report = compress(moving(), out, "x264", quality=30, progress=lambda *call: calls.append(call))
    assert [path.name for path in tmp_path.iterdir()] == ["out.flm"]
    assert report.bytes == out.stat().st_size
    assert report.bits_per_pixel == pytest.approx(8 * out.stat().st_size / (20 * 64 * 96))
    assert calls[-1] == ("encoding x264", 20, 20)
    assert len(decompress(out)) == 20


def test_auto_is_a_conventional_codec_and_the_file_says_which(tmp_path):
    report = compress(moving(3), tmp_path / "out.flm")
    assert report.method in CODECS
    assert inspect(tmp_path / "out.flm")["method"] == report.method


def test_a_failed_compression_leaves_what_was_there(tmp_path):
    out = tmp_path / "out.flm"
    out.write_bytes(b"before")
    with pytest.raises(InputError):
        compress(moving(3), out, "x264", size=100)
    assert out.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.flm"
    out.write_bytes(b"before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"out\.flm: cannot be written \(No space left on device\)"):
        compress(moving(3), out, "x264")
    assert out.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_inspect_accounts_for_every_byte(coded):
    method, _, data = coded
    found = inspect(data)
    assert found["method"] == method
    assert sum(section["bytes"] for section in found["sections"].values()) == len(data) == found["bytes"]
    total = sum(section["bits_per_pixel"] for section in found["sections"].values())
    assert total == pytest.approx(found["bits_per_pixel"]) == pytest.approx(8 * len(data) / (20 * 64 * 96))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "x265", "epochs": 5},
            "--epochs: x265 has no such setting; it has keyint, preset, quality",
        ),
        ({"method": "x264", "quality": 60}, r"--quality 60: x264 takes 0 \(best\) to 51"),
        ({"method": "x264", "quality": 20, "size": 999}, "--quality and --size"),
        ({"method": "x264", "preset": "swift"}, "x264 cannot encode 96x64 with preset swift"),
        ({"method": "x264", "keyint": 0}, "--keyint 0"),
        ({"method": "x266"}, "--method x266: no such method"),
        ({"method": "x264", "size": 0}, "--size 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        compress(moving(3), tmp_path / "out.flm", **settings)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        compress(moving(3), tmp_path / "no" / "out.flm")
    with pytest.raises(InputError, match=r"gone\.flm"):
        decompress(tmp_path / "gone.flm")
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(InputError, match=r"film\.mp4: not a frameloom file"):
        decompress(tmp_path / "film.mp4")


def test_frames_that_are_not_there_are_refused(coded):
    _, _, data = coded
    for chosen in ([20], [-1], [0, 99]):
        with pytest.raises(InputError, match="has frames 0 to 19"):
            decompress(data, chosen)
    with pytest.raises(InputError, match="no frame is chosen"):
        decompress(data, [])


def test_frames_are_chosen_by_numbers_and_slices():
    assert parse_frames("17", 40) == [17]
    assert parse_frames("10:13", 40) == [10, 11, 12]
    assert parse_frames("0, 38:", 40) == [0, 38, 39]
    assert parse_frames("::20,-2:,3", 40) == [0, 20, 38, 39, 3]
    for text in ("", "40", "x", "1:2:3:4", "5:5", "1,,2", "-1", "::0"):
        with pytest.raises(InputError, match="--frames"):
            parse_frames(text, 40)


def test_mutated_files_decode_or_are_refused(coded):
    method, _, data = coded
    chance = random.Random(0)
    container = parse(data)
    for _ in range(60):
        name = chance.choice(["stream", "index"])
        payload = bytearray(container.sections[name])
        for _ in range(chance.randrange(1, 5)):
            payload[chance.randrange(len(payload))] = chance.randrange(256)
        if chance.random() < 0.3:
            del payload[chance.randrange(len(payload)) :]
        # With its checksum right: the damage that only the decoder can find.
        bad = Container(container.header, container.sections | {name: bytes(payload)}).to_bytes()
        try:
            frames = decompress(bad).tensor()
            assert frames.shape == (20, 3, 64, 96), method
        except InputError:
            pass


def test_a_region_is_a_crop_of_every_frame(coded):
    _, _, data = coded
    whole = decompress(data).tensor()
    part = decompress(data, [3, 1], (8, 4, 30, 20))
    assert (part.info.width, part.info.height) == (30, 20)
    assert torch.equal(part.tensor(), whole[[3, 1], :, 4:24, 8:38])


@pytest.mark.parametrize("region", [(0, 0, 97, 64), (-1, 0, 4, 4), (0, 0, 0, 4)])
def test_a_region_outside_the_frame_is_refused(coded, region):
    with pytest.raises(InputError, match="--region"):
        decompress(coded[2], region=region)


def test_weights_are_refused_for_files_that_need_none(coded):
    with pytest.raises(InputError, match=r"--weights: files of .* hold all that they need"):
        decompress(coded[2], weights="tiny").tensor()


def test_a_rate_may_be_given_in_bits_a_pixel(tmp_path):
    report = compress(moving(), tmp_path / "out.flm", "x264", bpp=0.5)
    assert 0.4 < report.bits_per_pixel <= 0.5
    with pytest.raises(InputError, match="--bpp and --size"):
        compress(moving(), tmp_path / "out.flm", "x264", bpp=0.5, size=900)


def test_resume_is_refused_where_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="--resume: x264 keeps nothing"):
        compress(moving(), tmp_path / "out.flm", "x264", resume=True)


@pytest.mark.parametrize(
    ("quality", "message"),
    [("35db", None), ("thirty", "a quality is a PSNR such as 35dB"), ("3dB", "5 to 80 dB"),
     ("99dB", "5 to 80 dB"), ("79dB", "x264 reaches .* at most")],
)  # fmt: skip
def test_qualities_are_read_or_refused(tmp_path, quality, message):
    if message is None:
        compress(moving(3), tmp_path / "out.flm", "x264", quality=quality)
        return
    with pytest.raises(InputError, match=message):
        compress(moving(3), tmp_path / "out.flm", "x264", quality=quality)


def test_rate_and_distortion_are_those_of_files_and_the_page_stands_alone():
    clip = moving(6)
    # No network that hnerv could fit is so small.
    points = rate_distortion(clip, ["hnerv"], [0.25, 0.5], epochs=1)
    assert [point.method for point in points] == [name for name in ("x264", "x265", "av1") for _ in range(2)]
    for point in points:
        assert point.bytes <= 0.5 * 6 * 64 * 96 / 8
        assert point.bits_per_pixel == pytest.approx(8 * point.bytes / (6 * 64 * 96))
    assert set(against(points)) == {"x265", "av1"}
    text = page(points, clip)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("<svg") == 2
    assert all(f"<td>{point.method}<td>{point.bytes:,}" in text for point in points)


def test_rate_and_distortion_of_a_fitted_network_stand_beside_the_others():
    points = rate_distortion(moving(6, 32, 64), ["hnerv"], [12.0], epochs=1)
    assert {point.method for point in points} == {"x264", "x265", "av1", "hnerv"}
