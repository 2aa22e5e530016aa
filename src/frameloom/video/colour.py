"""From the planes of a decoded picture to RGB in [0, 1] and back, exactly.

Written out in PyTorch, not left to swscale: swscale rounds 8-bit video twice and maps white to 65283 of 65535
when asked for 16-bit RGB. Here one formula serves every bit depth, and the tests compare it with values
computed by hand.

Matrix, primaries and transfer are kept as the integers of ITU-T H.273, the ones every codec writes.
"""

from dataclasses import dataclass, replace

import av
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.errors import InputError

UNSPECIFIED = 2
RGB, BT709, BT601, BT2020 = 0, 1, 6, 9

# (K_R, K_B) of Y' = K_R R' + (1 - K_R - K_B) G' + K_B B', by H.273 matrix code.
_LUMA = {
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}


@dataclass(frozen=True)
class Colour:
    """How the numbers of a picture mean light.

    `matrix`, `primaries` and `transfer` are H.273 codes. `full_range` is True when black and white are 0 and
    2^depth - 1, False for the studio range (16 and 235 at 8 bit). `depth` is bits per component.
    """

    matrix: int = BT709
    full_range: bool = False
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    depth: int = 8

    @staticmethod
    def of(frame: av.VideoFrame) -> "Colour":
        """What a decoded frame says of itself; an unsaid matrix follows the picture's size, as players do."""
        depth = max(component.bits for component in frame.format.components)
        if frame.format.is_rgb or frame.format.has_palette:
            depth = 8 if frame.format.has_palette else depth
            return Colour(RGB, True, int(frame.color_primaries), int(frame.color_trc), depth)
        matrix = int(frame.colorspace)
        if matrix in (UNSPECIFIED, RGB, 3):
            matrix = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
        if matrix not in _LUMA:
            raise InputError(f"the picture's colour matrix (H.273 code {matrix}) is not one of BT.601, 709, 2020")
        # "yuvj" is the old way to say full range; grey without a tag comes from still pictures.
        untagged_grey = len(frame.format.components) <= 2 and int(frame.color_range) == 0
        full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj") or untagged_grey
        return Colour(matrix, full, int(frame.color_primaries), int(frame.color_trc), depth)

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


def _plane(frame: av.VideoFrame, index: int, columns: int, dtype: type) -> np.ndarray:
    """One plane as an array (rows, columns), without the padding at the end of each line."""
    plane = frame.planes[index]
    lines = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
    return lines[: plane.height, :columns]


def _canonical(frame: av.VideoFrame) -> str:
    """The planar or packed-RGB format, losslessly reachable, in which `rgb_from_native` reads this frame."""
    fmt = frame.format
    depth = max(component.bits for component in fmt.components)
    alpha = any(component.is_alpha for component in fmt.components) or fmt.name in ("pal8", "bgra", "rgba")
    if fmt.has_palette or fmt.is_rgb:
        if alpha:
            return "rgba" if depth <= 8 else "rgba64le"
        return "rgb24" if depth <= 8 else "rgb48le"
    suffix = "" if depth <= 8 else f"{10 if depth <= 10 else 12 if depth <= 12 else 16}le"
    if len(fmt.components) <= 2:
        return ("ya8" if depth <= 8 else "ya16le") if alpha else f"gray{suffix}"
    right, down = fmt.components[1].width, fmt.components[1].height
    half_w, half_h = right < fmt.width, down < fmt.height
    layout = "420" if half_w and half_h else "422" if half_w else "444"
    return f"yuv{'a' if alpha else ''}{layout}p{suffix}"


def _upsample(chroma: Tensor, rows: int, columns: int, centred: bool) -> Tensor:
    """Halved chroma back to (rows, columns), linearly; samples sit left (video) or centred (JPEG), MPEG-2 rules."""
    if chroma.shape[0] < rows:
        before = torch.cat([chroma[:1], chroma[:-1]])
        after = torch.cat([chroma[1:], chroma[-1:]])
        chroma = torch.stack([0.75 * chroma + 0.25 * before, 0.75 * chroma + 0.25 * after], 1).flatten(0, 1)[:rows]
    if chroma.shape[1] < columns:
        before = torch.cat([chroma[:, :1], chroma[:, :-1]], 1)
        after = torch.cat([chroma[:, 1:], chroma[:, -1:]], 1)
        if centred:
            pair = [0.75 * chroma + 0.25 * before, 0.75 * chroma + 0.25 * after]
        else:
            pair = [chroma, 0.5 * (chroma + after)]
        chroma = torch.stack(pair, 2).flatten(1, 2)[:, :columns]
    return chroma


def _downsample(chroma: Tensor, half_rows: bool, half_columns: bool) -> Tensor:
    """The reverse: vertical mean of two, horizontal [1 2 1] / 4 at the left-sited sample."""
    if half_rows:
        if chroma.shape[0] % 2:
            chroma = torch.cat([chroma, chroma[-1:]])
        chroma = 0.5 * (chroma[0::2] + chroma[1::2])
    if half_columns:
        if chroma.shape[1] % 2:
            chroma = torch.cat([chroma, chroma[:, -1:]], 1)
        even, odd = chroma[:, 0::2], chroma[:, 1::2]
        left = torch.cat([even[:, :1], odd[:, :-1]], 1)
        chroma = 0.5 * even + 0.25 * (left + odd)
    return chroma


def _drop_alpha(opacity: np.ndarray, depth: int) -> None:
    if int(opacity.min()) < 2**depth - 1:
        raise InputError("the picture has transparency, which a video cannot keep; flatten it onto a background first")


def rgb_from_native(frame: av.VideoFrame, colour: Colour) -> Float[Tensor, "3 h w"]:
    """RGB in [0, 1], float32, of a decoded frame of any pixel format.

    Raises InputError when the frame has an alpha channel that is not opaque throughout.
    """
    name = _canonical(frame)
    if frame.format.name.replace("yuvj", "yuv") != name:
        frame = frame.reformat(format=name)
    height, width = frame.height, frame.width
    depth = max(component.bits for component in frame.format.components)
    dtype = np.uint8 if depth <= 8 else np.uint16

    if name.startswith("rgb"):
        channels = 4 if "a" in name else 3
        packed = _plane(frame, 0, width * channels, dtype).reshape(height, width, channels)
        if channels == 4:
            _drop_alpha(packed[..., 3], depth)
        rgb = torch.from_numpy(np.ascontiguousarray(packed[..., :3].transpose(2, 0, 1)).astype(np.float32))
        return rgb / float(2**depth - 1)

    black, luma_span, zero, chroma_span = replace(colour, depth=depth).levels()

    def read(index: int, columns: int) -> Tensor:
        return torch.from_numpy(_plane(frame, index, columns, dtype).astype(np.float32))

    if name.startswith(("gray", "ya")):
        if name.startswith("ya"):
            pair = _plane(frame, 0, width * 2, dtype).reshape(height, width, 2)
            _drop_alpha(pair[..., 1], depth)
            luma = torch.from_numpy(pair[..., 0].astype(np.float32))
        else:
            luma = read(0, width)
        return ((luma - black) / luma_span).clamp(0, 1).expand(3, -1, -1).contiguous()

    if name.startswith("yuva"):
        _drop_alpha(_plane(frame, 3, width, dtype), depth)
    k_r, k_b = _LUMA[colour.matrix]
    k_g = 1 - k_r - k_b
    columns = frame.format.components[1].width
    y = (read(0, width) - black) / luma_span
    centred = colour.full_range
    cb = _upsample((read(1, columns) - zero) / chroma_span, height, width, centred)
    cr = _upsample((read(2, columns) - zero) / chroma_span, height, width, centred)
    rgb = torch.empty(3, height, width)
    torch.add(y, cr, alpha=2 * (1 - k_r), out=rgb[0])
    torch.add(y, cb, alpha=-2 * k_b * (1 - k_b) / k_g, out=rgb[1]).add_(cr, alpha=-2 * k_r * (1 - k_r) / k_g)
    torch.add(y, cb, alpha=2 * (1 - k_b), out=rgb[2])
    return rgb.clamp_(0, 1)


def _fill(frame: av.VideoFrame, index: int, values: np.ndarray) -> None:
    """Write an array (rows, columns) into a plane, padding each line to the plane's own length."""
    plane = frame.planes[index]
    lines = np.zeros((values.shape[0], plane.line_size // values.itemsize), values.dtype)
    lines[:, : values.shape[1]] = values
    plane.update(lines)


def native_from_rgb(rgb: Float[Tensor, "3 h w"], pix_fmt: str, colour: Colour) -> av.VideoFrame:
    """A frame of `pix_fmt` (planar Y'CbCr of 8 to 12 bit, rgb24 or rgb48le) tagged with `colour`.

    `colour.depth` is taken from the format. Values outside [0, 1] are clamped.
    """
    _, height, width = rgb.shape
    frame = av.VideoFrame(width, height, pix_fmt)
    depth = max(component.bits for component in frame.format.components)
    dtype = np.uint8 if depth <= 8 else np.uint16
    rgb = rgb.detach().to("cpu", torch.float32).clamp(0, 1)
    if frame.format.is_rgb:
        top = 2**depth - 1
        _fill(frame, 0, (rgb * top).round().permute(1, 2, 0).reshape(height, -1).numpy().astype(dtype))
        return tag(frame, replace(colour, matrix=RGB, full_range=True))

    colour = replace(colour.as_video(), depth=depth)
    black, luma_span, zero, chroma_span = colour.levels()
    k_r, k_b = _LUMA[colour.matrix]
    r, g, b = rgb
    y = r * k_r + g * (1 - k_r - k_b) + b * k_b
    fmt = frame.format
    halves = fmt.components[1].height < height, fmt.components[1].width < width
    cb = _downsample((b - y) / (2 * (1 - k_b)), *halves)
    cr = _downsample((r - y) / (2 * (1 - k_r)), *halves)
    top = 2**depth - 1
    _fill(frame, 0, (y * luma_span + black).round().clamp(0, top).numpy().astype(dtype))
    _fill(frame, 1, (cb * chroma_span + zero).round().clamp(0, top).numpy().astype(dtype))
    _fill(frame, 2, (cr * chroma_span + zero).round().clamp(0, top).numpy().astype(dtype))
    return tag(frame, colour)


def tag(frame: av.VideoFrame, colour: Colour) -> av.VideoFrame:
    """Write the description into the frame's own fields, where the encoder reads it."""
    frame.colorspace = colour.matrix
    frame.color_range = 2 if colour.full_range else 1
    frame.color_primaries = colour.primaries
    frame.color_trc = colour.transfer
    return frame
