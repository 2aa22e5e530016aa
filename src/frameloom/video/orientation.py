"""Which way up a picture is: the display matrix of a video's track and the EXIF tag of a photograph."""

import struct
from dataclasses import dataclass
from pathlib import Path

import av
import PIL.Image
from jaxtyping import Shaped
from torch import Tensor

from frameloom.errors import InputError

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is laid upright: columns become rows if `swap`, then left and right change places if
    `flip_x`, then top and bottom if `flip_y`. The eight of them are those of EXIF."""

    swap: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def __bool__(self) -> bool:
        return self.swap or self.flip_x or self.flip_y

    def __call__(self, picture: Shaped[Tensor, "c h w"]) -> Shaped[Tensor, "c h2 w2"]:
        if self.swap:
            picture = picture.transpose(1, 2)
        return picture.flip([axis for axis, on in ((1, self.flip_y), (2, self.flip_x)) if on]).contiguous()

    @property
    def mirrored(self) -> bool:
        return self.swap ^ self.flip_x ^ self.flip_y

    @property
    def degrees(self) -> int:
        """Degrees counter-clockwise that the stored picture is turned by (after it is mirrored left to right)."""
        return (270 if self.flip_x else 90) if self.swap else (180 if self.flip_y else 0)

    def __str__(self) -> str:
        parts = [f"turned {self.degrees}°"] * bool(self.degrees) + ["mirrored"] * self.mirrored
        return ", ".join(parts)


UPRIGHT = Orientation()
_EXIF = {
    2: Orientation(flip_x=True),
    3: Orientation(flip_x=True, flip_y=True),
    4: Orientation(flip_y=True),
    5: Orientation(swap=True),
    6: Orientation(swap=True, flip_x=True),
    7: Orientation(swap=True, flip_x=True, flip_y=True),
    8: Orientation(swap=True, flip_y=True),
}
_TURNED = {0: UPRIGHT, 90: _EXIF[8], 180: _EXIF[3], 270: _EXIF[6]}


def side_data(frame: av.VideoFrame, kind: str) -> bytes | None:
    """A piece of a frame's side data by FFmpeg's name, None if it has none.

    PyAV 18.1 shows none at all where a frame carries a kind that it does not know by name, such as EXIF.
    """
    try:
        found = frame.side_data.get(kind)
    except ValueError:
        return None
    return None if found is None else bytes(found)


def of_video(frame: av.VideoFrame) -> Orientation:
    """What the display matrix of a decoded frame asks for.

    Raises InputError for a matrix that does more than turn by quarters and mirror.
    """
    matrix = side_data(frame, "DISPLAYMATRIX")
    if matrix is None:
        degrees = int(frame.rotation) % 360
        if degrees not in _TURNED:
            raise InputError(f"the video is rotated by {degrees} degrees; only quarter turns are handled")
        return _TURNED[degrees]
    # x' = a x + c y, y' = b x + d y, in 16.16 fixed point, y downwards.
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    small = max(map(abs, (a, b, c, d))) / 100
    if abs(a) <= small and abs(d) <= small and b and c:
        return Orientation(True, flip_x=c < 0, flip_y=b < 0)
    if abs(b) <= small and abs(c) <= small and a and d:
        return Orientation(False, flip_x=a < 0, flip_y=d < 0)
    raise InputError("the video is turned by an angle between the quarters; only quarter turns are handled")


def of_picture(path: Path) -> Orientation:
    """What a photograph's EXIF tag asks for; upright where there is none."""
    try:
        with PIL.Image.open(path) as picture:
            return _EXIF.get(picture.getexif().get(EXIF_ORIENTATION, 1), UPRIGHT)
    except (OSError, ValueError, SyntaxError):
        return UPRIGHT  # no picture that Pillow knows (EXR, DPX), or none at all, which the decoder will say
