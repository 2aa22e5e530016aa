"""How the numbers of a picture lie in memory, and moving them to another layout without changing one.

FFmpeg decodes into some two hundred pixel formats: planar, semi-planar, packed, either byte order, padded, with a
palette. Each holds the same numbers as one plain layout (`Layout.name`). The common ones are taken apart here; rare
ones by libswscale, where it moves bytes alone: FFmpeg 8.1's rounds some formats, reads 16-bit RGB in the wrong byte
order, and now and then gives other numbers for the same picture. A test tries them all; the rest is refused.
"""

from dataclasses import dataclass
from functools import cache

import av
import numpy as np

from frameloom.errors import InputError

# Components of packed formats in the order of memory, "-" for padding.
_PACKED = {
    "rgb24": "rgb", "bgr24": "bgr", "rgba": "rgba", "bgra": "bgra", "argb": "argb", "abgr": "abgr",
    "rgb0": "rgb-", "bgr0": "bgr-", "0rgb": "-rgb", "0bgr": "-bgr",
    "rgb48le": "rgb", "bgr48le": "bgr", "rgba64le": "rgba", "bgra64le": "bgra",
    "rgbf16le": "rgb", "rgbaf16le": "rgba", "rgbf32le": "rgb", "rgbaf32le": "rgba",
    "ayuv": "ayuv", "vuya": "vuya", "vuyx": "vuy-", "uyva": "uyva", "vyu444": "vyu",
    "ayuv64le": "ayuv", "xv36le": "uyv-", "xv48le": "uyv-",
    "ya8": "ya", "ya16le": "ya", "yaf16le": "ya", "yaf32le": "ya",
    # Two pixels that share their chroma.
    "yuyv422": "yuyv", "yvyu422": "yvyu", "uyvy422": "uyvy", "y210le": "yuyv", "y212le": "yuyv", "y216le": "yuyv",
}  # fmt: skip
# Formats whose numbers stand at the top of 16 bits.
_HIGH = ("p010", "p012", "p210", "p212", "p410", "p412", "y210", "y212", "xv36")

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
    frame = _little_endian(frame)
    name = layout_of(frame.format.name).name
    if frame.format.name.replace("yuvj", "yuv") == name:
        return frame
    try:
        # Without a range given for both sides libswscale takes the new format's usual one and stretches the codes.
        kept = int(frame.color_range)
        return frame.reformat(format=name, src_color_range=kept, dst_color_range=kept, threads=1)
    except (OSError, ValueError) as error:
        raise InputError(f"the pixel format {frame.format.name} cannot be read ({error})") from None


def _little_endian(frame: av.VideoFrame) -> av.VideoFrame:
    name = frame.format.name.removesuffix("be") + "le"
    if not frame.format.name.endswith("be"):
        return frame
    # What one number or one packed pixel takes, of which the bytes change places.
    size = 4 if any(part in name for part in ("f32", "x2rgb10", "x2bgr10", "v30x", "xv30")) else 2
    twin = av.VideoFrame(frame.width, frame.height, name)
    for plane, given in zip(twin.planes, frame.planes, strict=True):
        lines = np.frombuffer(given, f">u{size}").reshape(-1, given.line_size // size)
        fill(plane, lines[:, : plane.line_size // size].astype(f"<u{size}"))
    for field in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(twin, field, getattr(frame, field))
    return twin


def _lines(plane: av.video.plane.VideoPlane, height: int, columns: int, dtype: type) -> np.ndarray:
    """A plane as an array (height, columns), without the padding at the end of each line."""
    lines = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
    return lines[:height, :columns]


def components(frame: av.VideoFrame) -> list[np.ndarray]:
    """The numbers of a frame: [R, G, B], [Y, Cb, Cr] or [Y], then alpha where there is one; arrays (rows, columns).

    Raises InputError for a format that cannot be read.
    """
    frame = _little_endian(frame)
    name = frame.format.name
    layout, height, width = layout_of(name), frame.height, frame.width
    down = layout.dtype(16 - layout.depth if name.startswith(_HIGH) else 0)
    if name not in _PACKED and len(frame.planes) == 2 and layout.model == "yuv":  # semi-planar
        rows, columns = -(-height // layout.down), -(-width // layout.across)
        pairs = _lines(frame.planes[1], rows, 2 * columns, layout.dtype).reshape(rows, columns, 2)
        order = (1, 0) if name in ("nv21", "nv42") else (0, 1)
        found = [_lines(frame.planes[0], height, width, layout.dtype), *(pairs[..., place] for place in order)]
        return [part >> down for part in found] if down else found
    if name not in _PACKED:
        frame = plain(frame)
        name = frame.format.name
    if name not in _PACKED:
        sizes = [(component.height, component.width) for component in frame.format.components]
        found = [_lines(plane, *size, layout.dtype) for plane, size in zip(frame.planes, sizes, strict=True)]
        return [found[2], found[0], found[1], *found[3:]] if layout.model == "rgb" else found
    order, groups = _PACKED[name], -(-width // layout.across)
    packed = _lines(frame.planes[0], height, groups * len(order), layout.dtype).reshape(height, groups, len(order))
    found = []
    for letter in {"rgb": "rgb", "yuv": "yuv", "gray": "y"}[layout.model] + "a" * layout.alpha:
        places = [place for place, there in enumerate(order) if there == letter]
        part = packed[..., places].reshape(height, -1)
        found.append(part[:, :width] if letter == "y" else part)
    return [part >> down for part in found] if down else found


def frame_of(values: list[np.ndarray], pix_fmt: str, height: int, width: int) -> av.VideoFrame:
    """A frame of any format without alpha from its components in the order of `components`."""
    layout = layout_of(pix_fmt)
    frame = av.VideoFrame(width, height, pix_fmt)
    if pix_fmt.startswith(_HIGH):
        values = [part << layout.dtype(16 - layout.depth) for part in values]
    if pix_fmt in _PACKED:
        order, groups = _PACKED[pix_fmt], -(-width // layout.across)
        packed = np.zeros((height, groups, len(order)), layout.dtype)
        for letter, part in zip("rgb" if layout.model == "rgb" else "yuv", values, strict=False):
            places = [place for place, there in enumerate(order) if there == letter]
            part = np.pad(part, ((0, 0), (0, groups * len(places) - part.shape[1])), mode="edge")
            packed[..., places] = part.reshape(height, groups, len(places))
        fill(frame.planes[0], packed.reshape(height, -1))
    elif len(frame.planes) == 2 and layout.model == "yuv":  # semi-planar
        pairs = values[2:0:-1] if pix_fmt in ("nv21", "nv42") else values[1:]
        fill(frame.planes[0], values[0])
        fill(frame.planes[1], np.stack(pairs, -1).reshape(pairs[0].shape[0], -1))
    elif pix_fmt.replace("yuvj", "yuv") == layout.name:
        for plane, part in zip(frame.planes, values[1:] + values[:1] if layout.model == "rgb" else values, strict=True):
            fill(plane, part)
    else:
        frame = frame_of(values, layout.name, height, width)
        frame = frame.reformat(format=pix_fmt, threads=1)
    return frame


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
