"""Colour in and out, against values computed by hand from the standards."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.errors import InputError
from frameloom.video.colour import BT601, BT709, BT2020, Colour, native_from_rgb, rgb_from_native

# Pure red through each matrix: Y' = K_R; Cb = -K_R / (2 (1 - K_B)); Cr = 1/2; then scaled to code values.
RED = {
    (BT601, False, 8): (81, 90, 240),
    (BT709, False, 8): (63, 102, 240),
    (BT2020, False, 8): (74, 97, 240),
    (BT601, True, 8): (76, 85, 255),
    (BT709, True, 8): (54, 99, 255),
    (BT601, False, 10): (326, 361, 960),
    (BT709, False, 10): (250, 409, 960),
    (BT2020, False, 10): (294, 387, 960),
}


def flat(value, size=(6, 8)) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32).view(3, 1, 1).expand(3, *size).contiguous()


def planes(frame: av.VideoFrame) -> list[np.ndarray]:
    dtype = np.uint16 if max(c.bits for c in frame.format.components) > 8 else np.uint8
    return [
        np.frombuffer(p, dtype).reshape(-1, p.line_size // np.dtype(dtype).itemsize)[: p.height, : p.width]
        for p in frame.planes
    ]


@pytest.mark.parametrize(("key", "codes"), RED.items())
def test_red_has_the_code_values_of_its_standard(key, codes):
    matrix, full, depth = key
    colour = Colour(matrix, full, depth=depth)
    frame = native_from_rgb(flat([1, 0, 0]), "yuv420p" if depth == 8 else "yuv420p10le", colour)
    for plane, code in zip(planes(frame), codes, strict=True):
        assert abs(int(plane[0, 0]) - code) <= (1 if code not in (0, 255) else 0), (plane[0, 0], code)
        assert (plane == plane[0, 0]).all()
    assert torch.allclose(rgb_from_native(frame, colour), flat([1, 0, 0]), atol=2.5 / 2**depth)


@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("depth", "suffix"), [(8, ""), (10, "10le"), (12, "12le")])
def test_black_and_white_are_exact(matrix, full, depth, suffix):
    colour = Colour(matrix, full, depth=depth)
    unit = 2 ** (depth - 8)
    for value, luma in ((0.0, 0 if full else 16 * unit), (1.0, 2**depth - 1 if full else 235 * unit)):
        frame = native_from_rgb(flat([value] * 3), f"yuv444p{suffix}", colour)
        assert [int(p[0, 0]) for p in planes(frame)] == [luma, 128 * unit, 128 * unit]
        assert torch.allclose(rgb_from_native(frame, colour), flat([value] * 3), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    matrix=st.sampled_from([BT601, BT709, BT2020]),
    full=st.booleans(),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from(["420", "422", "444"]),
)
def test_code_values_survive_rgb_and_back(seed, matrix, full, height, width, layout):
    """A picture of constant chroma, decoded and encoded again, keeps its code values, whatever its size."""
    rng = np.random.default_rng(seed)
    colour = Colour(matrix, full)
    rgb = flat(rng.uniform(0.3, 0.7, 3).tolist(), (height, width)) * torch.from_numpy(
        rng.uniform(0.9, 1.1, (1, height, width)).astype(np.float32)
    )
    grey = rgb.mean(0, keepdim=True).expand(3, -1, -1)
    first = native_from_rgb(grey, f"yuv{layout}p", colour)
    second = native_from_rgb(rgb_from_native(first, colour), f"yuv{layout}p", colour)
    for a, b in zip(planes(first), planes(second), strict=True):
        assert np.array_equal(a, b)


def test_our_rgb_agrees_with_swscale_at_its_most_accurate():
    """A peer: libswscale with accurate rounding and full chroma, within its 8-bit rounding."""
    from av.video.reformatter import Colorspace, Interpolation

    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    rng = np.random.default_rng(0)
    rgb = torch.from_numpy(rng.uniform(0.1, 0.9, (3, 16, 16)).astype(np.float32))
    frame = native_from_rgb(rgb, "yuv444p", Colour(BT709, False))
    peer = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=1, dst_color_range=2,
                          interpolation=flags).to_ndarray()  # fmt: skip
    ours = rgb_from_native(frame, Colour(BT709, False)).permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - peer).max() <= 1.1


@pytest.mark.parametrize("fmt", ["nv12", "p010le", "uyvy422", "yuv440p", "bgr24", "gbrp", "rgb48le"])
def test_every_common_layout_reads_as_the_same_grey(fmt):
    colour = Colour(BT709, False)
    grey = flat([0.5] * 3, (16, 64))
    frame = native_from_rgb(grey, "yuv420p", colour).reformat(format=fmt)
    seen = Colour.of(frame)
    got = rgb_from_native(frame, replace(seen, matrix=BT709) if seen.matrix != 0 else seen)
    assert torch.allclose(got, grey, atol=1.5 / 255), (fmt, got[:, 0, 0])


def test_grey_is_luma_alone():
    frame = av.VideoFrame.from_ndarray(np.full((6, 8), 51, np.uint8), format="gray")
    assert torch.allclose(rgb_from_native(frame, Colour.of(frame)), flat([0.2] * 3))


def test_an_opaque_alpha_channel_is_dropped_and_a_transparent_one_refused():
    opaque = np.full((6, 8, 4), 255, np.uint8)
    frame = av.VideoFrame.from_ndarray(opaque, format="rgba")
    assert rgb_from_native(frame, Colour.of(frame)).min() == 1
    opaque[2, 3, 3] = 254
    with pytest.raises(InputError, match="transparency"):
        rgb_from_native(av.VideoFrame.from_ndarray(opaque, format="rgba"), Colour.of(frame))


def test_an_untagged_picture_takes_its_matrix_from_its_size():
    assert Colour.of(av.VideoFrame(720, 576, "yuv420p")).matrix == BT601
    assert Colour.of(av.VideoFrame(1280, 720, "yuv420p")).matrix == BT709
