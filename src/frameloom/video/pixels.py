"""How the numbers of a picture lie in memory, and moving them to another layout without changing one.

FFmpeg decodes into some two hundred pixel formats: planar, semi-planar, packed, either byte order, padded, with a
palette. Each holds the same numbers as one plain layout (`Layout.name`), which libswscale reaches by moving bytes
alone; every pair was tried on random codes, and a test tries them again. What it cannot reach that way is refused.
"""

from dataclasses import dataclass
from functools import cache

import av
import numpy as np

from frameloom.errors import InputError

_SUBSAMPLING = {(1, 1): "444", (2, 1): "422", (4, 1): "411", (1, 2): "440", (2, 2): "420", (4, 4): "410"}


@dataclass(frozen=True)
class Layout:
    """What a pixel format holds, whatever the order of its bytes.

    `model` is "rgb", "yuv" or "gray"; `depth` the bits of a component; `floating` whether they are a float; `across`
    and `down` how many pixels share one chroma sample in a row and in a column (2, 2 for 4:2:0).
    """

    model: str
    depth: int
    floating: bool = False
    alpha: bool = False
    across: int = 1
    down: int = 1

    @property
    def name(self) -> str:
        """The plain format with these components: planes of native integers or floats (8-bit RGB packed)."""
        suffix = f"f{self.depth}le" if self.floating else "" if self.depth <= 8 else f"{self.depth}le"
        if self.model == "gray":
            return f"ya{suffix or 8}" if self.alpha else f"gray{suffix}"
        if self.model == "yuv":
            return f"yuv{'a' * self.alpha}{_SUBSAMPLING[self.across, self.down]}p{suffix}"
        if self.depth <= 8:
            return "rgba" if self.alpha else "rgb24"
        return f"gbr{'a' * self.alpha}p{suffix}"

    @property
    def dtype(self) -> type:
        if self.floating:
            return np.float16 if self.depth == 16 else np.float32
        return np.uint8 if self.depth <= 8 else np.uint16

    @property
    def top(self) -> float:
        """The number of a component that is full."""
        return 1.0 if self.floating else float(2**self.depth - 1)

    @property
    def sampling(self) -> str:
        """`4:2:0`, as people write it."""
        return ":".join(_SUBSAMPLING[self.across, self.down])


@cache
def layout_of(pix_fmt: str) -> Layout:
    """The layout of a pixel format by FFmpeg's name.

    Raises InputError for a format whose numbers cannot be had (hardware surfaces, 32-bit integers).
    """
    fmt = av.VideoFormat(pix_fmt, 64, 64)
    floating = "f16" in pix_fmt or "f32" in pix_fmt
    bits = max((component.bits for component in fmt.components), default=0)
    if bits == 0 or (bits > 16 and not floating):
        raise InputError(f"the pixel format {pix_fmt} cannot be read")
    alpha = any(component.is_alpha for component in fmt.components) or fmt.has_palette
    if fmt.has_palette:
        return Layout("rgb", 8, alpha=True)
    if fmt.is_bayer:
        return Layout("rgb", 16 if "16" in pix_fmt else 8)
    if pix_fmt.startswith("xyz"):
        return Layout("rgb", 16)
    if fmt.is_rgb:
        return Layout("rgb", max(8, bits), floating, alpha)
    if len(fmt.components) <= 2:
        return Layout("gray", max(8, bits), floating, alpha)
    chroma = fmt.components[1]
    return Layout("yuv", bits, floating, alpha, 64 // chroma.width, 64 // chroma.height)


def plain(frame: av.VideoFrame) -> av.VideoFrame:
    """The same numbers in the plain format of their layout; the frame itself when it lies so already.

    "yuvj" formats are the plain ones by another name and are given back as they are.
    """
    name = layout_of(frame.format.name).name
    if frame.format.name.replace("yuvj", "yuv") == name:
        return frame
    return _reformat(frame, name)


def _reformat(frame: av.VideoFrame, name: str) -> av.VideoFrame:
    try:
        # Without a range given for both sides libswscale takes the new format's usual one and stretches the codes.
        kept = int(frame.color_range)
        return frame.reformat(format=name, src_color_range=kept, dst_color_range=kept)
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"the pixel format {frame.format.name} cannot be read ({error})") from None


def _rows(plane: av.video.plane.VideoPlane, height: int, columns: int, dtype: type) -> np.ndarray:
    """One plane as an array (rows, columns), without the padding at the end of each line."""
    lines = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
    return lines[:height, :columns]


def components(frame: av.VideoFrame) -> list[np.ndarray]:
    """The numbers of a frame: [R, G, B], [Y, Cb, Cr] or [Y], then alpha where there is one; arrays (rows, columns)."""
    layout = layout_of(frame.format.name)
    frame = plain(frame)
    height, width, dtype = frame.height, frame.width, layout.dtype
    if layout.name in ("rgb24", "rgba") or (layout.model == "gray" and layout.alpha):
        channels = {"rgb24": 3, "rgba": 4}.get(layout.name, 2)
        packed = _rows(frame.planes[0], height, width * channels, dtype).reshape(height, width, channels)
        return [packed[..., channel] for channel in range(channels)]
    sizes = [(component.height, component.width) for component in frame.format.components]
    if layout.model == "rgb":
        sizes = [(height, width)] * len(sizes)
    found = [_rows(plane, *size, dtype) for plane, size in zip(frame.planes, sizes, strict=True)]
    return [found[2], found[0], found[1], *found[3:]] if layout.model == "rgb" else found


def frame_of(values: list[np.ndarray], pix_fmt: str, height: int, width: int) -> av.VideoFrame:
    """A frame of any format without alpha from its components in the order of `components`."""
    layout = layout_of(pix_fmt)
    frame = av.VideoFrame(width, height, layout.name)
    if layout.name == "rgb24":
        fill(frame.planes[0], np.stack(values, -1).reshape(height, -1))
    else:
        for plane, part in zip(frame.planes, values[1:] + values[:1] if layout.model == "rgb" else values, strict=True):
            fill(plane, part)
    return frame if layout.name == pix_fmt else _reformat(frame, pix_fmt)


def fill(plane: av.video.plane.VideoPlane, values: np.ndarray) -> None:
    """Write an array (rows, columns) into a plane, padding each line to the plane's own length."""
    lines = np.zeros((plane.buffer_size // plane.line_size, plane.line_size // values.itemsize), values.dtype)
    lines[: values.shape[0], : values.shape[1]] = values
    plane.update(lines)


def same_numbers(given: str, wanted: str) -> bool:
    """Whether a frame of format `given` can be written as `wanted` without changing a number (alpha aside)."""
    one, other = layout_of(given), layout_of(wanted)
    return (one.model, one.depth, one.floating, one.across, one.down) == (
        other.model, other.depth, other.floating, other.across, other.down)  # fmt: skip


def repack(frame: av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
    """The same numbers in another format of the same layout, without alpha; see `same_numbers`."""
    if frame.format.name == pix_fmt:
        return frame
    values = components(frame)
    if layout_of(frame.format.name).alpha:
        values = values[:-1]
    return frame_of(values, pix_fmt, frame.height, frame.width)


def lossless_format(pix_fmt: str) -> str:
    """The format in which FFV1 keeps the numbers of `pix_fmt`: it takes 8-bit RGB only as B, G, R, 0 bytes, deeper
    RGB only in planes. Grey becomes 4:4:4, since pictures made from grey ones may have colour; floats 16 bit."""
    layout = layout_of(pix_fmt)
    depth = 16 if layout.floating else layout.depth
    if layout.model == "rgb":
        return "bgr0" if depth <= 8 else f"gbrp{depth}le"
    across, down = (layout.across, layout.down) if layout.model == "yuv" else (1, 1)
    return Layout("yuv", depth, across=across, down=down).name
