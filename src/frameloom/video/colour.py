"""From the planes of a decoded picture to RGB in [0, 1] and back, exactly.

Written out in PyTorch, not left to swscale: swscale rounds 8-bit video twice and maps white to 65283 of 65535
when asked for 16-bit RGB. Here one formula serves every bit depth, and the tests compare it with values
computed by hand.

Matrix, primaries and transfer are kept as the integers of ITU-T H.273, the ones every codec writes. Where chroma
samples sit is kept too, by FFmpeg's names: H.26x puts them left of centre unless a stream says otherwise, JPEG in
the centre, UHD discs at the top left. The range has no part in that.
"""

from dataclasses import dataclass, replace

import av
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.errors import InputError
from frameloom.video.pixels import Layout, components, fill, frame_of, layout_of, plain, repack, same_numbers

UNSPECIFIED = 2
RGB, BT709, BT601, BT2020 = 0, 1, 6, 9
LINEAR, SRGB = 8, 13

# (K_R, K_B) of Y' = K_R R' + (1 - K_R - K_B) G' + K_B B', by H.273 matrix code.
_LUMA = {
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}

# Where a chroma sample sits among the pixels that share it, (across, down): 0 at the first, 1/2 midway, 1 at the last.
SITINGS = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}

_TAGS = ("colorspace", "color_range", "color_primaries", "color_trc")
# Bilinear, and SWS_STRICT: an error in place of a guess where something is unsaid.
_STRICT = 2 | 1 << 11


@dataclass(frozen=True)
class Colour:
    """How the numbers of a picture mean light.

    `matrix`, `primaries` and `transfer` are H.273 codes. `full_range` is True when black and white are 0 and
    2^depth - 1, False for the studio range (16 and 235 at 8 bit). `depth` is bits per component, `siting` one of
    `SITINGS` ("left" where no chroma is shared).
    """

    matrix: int = BT709
    full_range: bool = False
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    depth: int = 8
    siting: str = "left"

    @staticmethod
    def of(frame: av.VideoFrame, siting: str = "left") -> "Colour":
        """What a decoded frame says of itself; an unsaid matrix follows the picture's size, as players do, and
        chroma sits at `siting` where it does not say. Looks at its side data must come before."""
        layout = layout_of(frame.format.name)
        primaries, transfer = int(frame.color_primaries), int(frame.color_trc)
        if layout.model != "yuv" or layout.across == layout.down == 1:
            siting = "left"
        if layout.model == "rgb":
            return Colour(RGB, True, primaries, SRGB if _is_linear(frame) else transfer, layout.depth)
        matrix = int(frame.colorspace)
        if matrix in (UNSPECIFIED, RGB, 3):
            matrix = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
        if matrix not in _LUMA:
            raise InputError(f"the picture's colour matrix (H.273 code {matrix}) is not one of BT.601, 709, 2020")
        # "yuvj" is the old way to say full range; grey without a tag comes from still pictures.
        untagged_grey = layout.model == "gray" and int(frame.color_range) == 0
        full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj") or untagged_grey
        return Colour(matrix, full, primaries, transfer, layout.depth, _siting(frame) or siting)

    def as_video(self) -> "Colour":
        """The same light as Y'CbCr: what an RGB picture becomes when a video codec stores it (BT.709, studio)."""
        return replace(self, matrix=BT709, full_range=False) if self.matrix == RGB else self

    def levels(self) -> tuple[float, float, float, float]:
        """(black, luma span, chroma zero, chroma span) in code values at this depth."""
        if self.full_range:
            top = float(2**self.depth - 1)
            return 0.0, top, float(2 ** (self.depth - 1)), top
        unit = float(2 ** (self.depth - 8))
        return 16 * unit, 219 * unit, 128 * unit, 224 * unit


def _is_linear(frame: av.VideoFrame) -> bool:
    """RGB in proportion to light, as in OpenEXR; it is shown through the sRGB curve."""
    return layout_of(frame.format.name).model == "rgb" and int(frame.color_trc) == LINEAR


def _siting(frame: av.VideoFrame) -> str | None:
    """Where the decoder says that chroma sits, None if it does not. PyAV has no field for it, but libswscale heeds
    it: enlarge a step of chroma and look how far the pixel behind the step is on its way."""
    layout = layout_of(frame.format.name)
    if layout.across == layout.down == 1:
        return None
    probe = plain(frame)
    probe.make_writable()  # a decoder may still predict from this frame
    planes = [bytes(plane) for plane in probe.planes]
    said = {name: getattr(probe, name) for name in _TAGS}
    for index, edge in ((1, (slice(None), slice(1))), (2, (slice(1), slice(None)))):
        step = np.full((probe.planes[index].height, probe.planes[index].width), layout.top, layout.dtype)
        step[edge] = 0
        fill(probe.planes[index], step)
    for name in _TAGS:  # the one thing that may be unsaid is the place of chroma
        setattr(probe, name, BT709)
    try:
        larger = replace(layout, across=1, down=1).name
        wanted = {f"dst_{name}": BT709 for name in _TAGS}
        large = probe.reformat(format=larger, interpolation=_STRICT, **wanted)
    except (av.error.FFmpegError, ValueError):
        return None
    finally:
        for name, value in said.items():
            setattr(probe, name, value)
        for plane, content in zip(probe.planes, planes, strict=True):
            plane.update(content)
    _, cb, cr, *_ = components(large)

    def place(line: np.ndarray, shared: int) -> float | None:
        # The second pixel is (1 - s) / shared of the way to the second sample, s being the place of the first one.
        if shared == 1 or len(line) <= shared:
            return None
        away = 1 - shared * float(line[1]) / float(line[-1] or 1)
        return round(2 * min(1.0, away / (shared - 1))) / 2

    seen = place(cb[0], layout.across), place(cr[:, 0], layout.down)
    for name, site in SITINGS.items():
        if all(is_at is None or is_at == at for is_at, at in zip(seen, site, strict=True)):
            return name
    return None


def _upsample(chroma: Tensor, axis: int, shared: int, site: float, length: int) -> Tensor:
    """Chroma samples, each shared by `shared` pixels along `axis`, back to `length` of them, linearly."""
    if shared == 1:
        return chroma
    count = chroma.shape[axis]
    first, last = chroma.narrow(axis, 0, 1), chroma.narrow(axis, count - 1, 1)
    before = torch.cat([first, chroma.narrow(axis, 0, count - 1)], axis)
    after = torch.cat([chroma.narrow(axis, 1, count - 1), last], axis)
    phases = []
    for pixel in range(shared):
        away = (pixel - site * (shared - 1)) / shared
        neighbour = before if away < 0 else after
        phases.append(chroma if away == 0 else torch.lerp(chroma, neighbour, abs(away)))
    return torch.stack(phases, axis + 1).flatten(axis, axis + 1).narrow(axis, 0, length)


def _downsample(values: Tensor, axis: int, shared: int, site: float) -> Tensor:
    """The reverse: the mean of the sharing pixels where the sample sits midway, a triangle around it elsewhere
    (1 2 1 for two)."""
    if shared == 1:
        return values
    count = -(-values.shape[axis] // shared)
    if site == 0.5:
        weights, begin = [1.0] * shared, 0
    else:
        weights = [float(shared - abs(j)) for j in range(1 - shared, shared)]
        begin = round(site * (shared - 1)) - (shared - 1)
    edge = torch.arange(begin, begin + (count - 1) * shared + len(weights)).clamp(0, values.shape[axis] - 1)
    padded = values.index_select(axis, edge)
    total = torch.zeros_like(padded.narrow(axis, 0, count))
    for offset, weight in enumerate(weights):
        taken = [slice(None)] * values.ndim
        taken[axis] = slice(offset, offset + (count - 1) * shared + 1, shared)
        total += weight * padded[tuple(taken)]
    return total / sum(weights)


def _check_opaque(opacity: np.ndarray, layout: Layout) -> None:
    if float(opacity.min()) < layout.top:
        raise InputError("the picture has transparency, which a video cannot keep; flatten it onto a background first")


def rgb_from_native(frame: av.VideoFrame, colour: Colour) -> Float[Tensor, "3 h w"]:
    """RGB in [0, 1], float32, of a decoded frame of any pixel format. Linear light is given the sRGB curve.

    Raises InputError when the frame has an alpha channel that is not opaque throughout.
    """
    layout = layout_of(frame.format.name)
    values = components(frame)
    if layout.alpha:
        _check_opaque(values.pop(), layout)
    height, width = frame.height, frame.width
    first, *others = (torch.from_numpy(np.ascontiguousarray(part).astype(np.float32)) for part in values)

    if layout.model == "rgb":
        rgb = torch.stack([first, *others]).div_(layout.top).clamp_(0, 1)
        return _srgb(rgb) if _is_linear(frame) else rgb

    black, luma_span, zero, chroma_span = replace(colour, depth=layout.depth).levels()
    if layout.floating:
        black, luma_span = 0.0, 1.0
    y = (first - black) / luma_span
    if layout.model == "gray":
        return y.clamp(0, 1).expand(3, -1, -1).contiguous()

    k_r, k_b = _LUMA[colour.matrix]
    k_g = 1 - k_r - k_b
    across, down = SITINGS[colour.siting]

    def full_size(chroma: Tensor) -> Tensor:
        chroma = _upsample((chroma - zero) / chroma_span, 0, layout.down, down, height)
        return _upsample(chroma, 1, layout.across, across, width)

    cb, cr = map(full_size, others)
    rgb = torch.empty(3, height, width)
    torch.add(y, cr, alpha=2 * (1 - k_r), out=rgb[0])
    torch.add(y, cb, alpha=-2 * k_b * (1 - k_b) / k_g, out=rgb[1]).add_(cr, alpha=-2 * k_r * (1 - k_r) / k_g)
    torch.add(y, cb, alpha=2 * (1 - k_b), out=rgb[2])
    return rgb.clamp_(0, 1)


def _srgb(light: Tensor) -> Tensor:
    """The sRGB curve (IEC 61966-2-1) of linear light in [0, 1]."""
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(1e-8) ** (1 / 2.4) - 0.055)


def native_from_rgb(rgb: Float[Tensor, "3 h w"], pix_fmt: str, colour: Colour) -> av.VideoFrame:
    """A frame of any integer format without alpha, tagged with `colour`.

    `colour.depth` is taken from the format. Values outside [0, 1] are clamped.
    """
    _, height, width = rgb.shape
    layout = layout_of(pix_fmt)
    rgb = rgb.detach().to("cpu", torch.float32).clamp(0, 1)

    def codes(values: Tensor) -> np.ndarray:
        return values.round().clamp(0, layout.top).numpy().astype(layout.dtype)

    if layout.model == "rgb":
        colour = replace(colour, matrix=RGB, full_range=True)
        return tag(frame_of([codes(channel * layout.top) for channel in rgb], pix_fmt, height, width), colour)

    colour = replace(colour.as_video(), depth=layout.depth)
    black, luma_span, zero, chroma_span = colour.levels()
    k_r, k_b = _LUMA[colour.matrix]
    r, g, b = rgb
    y = r * k_r + g * (1 - k_r - k_b) + b * k_b
    values = [codes(y * luma_span + black)]
    if layout.model == "yuv":
        across, down = SITINGS[colour.siting]
        for difference in ((b - y) / (2 * (1 - k_b)), (r - y) / (2 * (1 - k_r))):
            chroma = _downsample(_downsample(difference, 0, layout.down, down), 1, layout.across, across)
            values.append(codes(chroma * chroma_span + zero))
    return tag(frame_of(values, pix_fmt, height, width), colour)


def as_native(frame: av.VideoFrame, given: Colour, pix_fmt: str, wanted: Colour) -> av.VideoFrame | None:
    """A decoded frame as `pix_fmt` with not a number changed; None where that cannot be.

    Raises InputError for a frame with transparency.
    """
    if given != wanted or not same_numbers(frame.format.name, pix_fmt) or _is_linear(frame):
        return None
    layout = layout_of(frame.format.name)
    if layout.alpha:
        _check_opaque(components(frame)[-1], layout)
    return repack(frame, pix_fmt)


def tag(frame: av.VideoFrame, colour: Colour) -> av.VideoFrame:
    """Write the description into the frame's own fields, where the encoder reads it."""
    frame.colorspace = colour.matrix
    frame.color_range = 2 if colour.full_range else 1
    frame.color_primaries = colour.primaries
    frame.color_trc = colour.transfer
    return frame
