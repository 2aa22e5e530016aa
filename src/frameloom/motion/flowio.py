"""Flow on disk and flow to look at: `.flo`, KITTI's 16-bit PNG, `.npz`, `.pfm` to read, and the colour wheel.

A flow here is `(2, h, w)` in pixels, x first, with a validity `(h, w)`.
"""

import io
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from frameloom.errors import InputError

FORMATS = ("flo", "npz", "png")
_MAGIC = 202021.25
# Middlebury's mark for pixels whose flow is unknown.
_UNKNOWN = 1e9


def encode_flow(flow: Float[Tensor, "2 h w"], valid: Bool[Tensor, "h w"], kind: str) -> bytes:
    """The bytes of a file of `kind`: `flo` (Middlebury, float32, unknown pixels 1e10), `npz` (arrays `flow`
    `(2, h, w)` float32 and `valid`), `png` (KITTI, 16 bit, steps of 1/64 pixel, at most 512 pixels either way).
    """
    if kind == "flo":
        pixels = torch.where(valid, flow, 1e10).permute(1, 2, 0).float().cpu().numpy()
        size = np.array(flow.shape[:0:-1], np.int32)
        return np.float32(_MAGIC).tobytes() + size.tobytes() + pixels.astype("<f4").tobytes()
    if kind == "npz":
        out = io.BytesIO()
        np.savez_compressed(out, flow=flow.float().cpu().numpy(), valid=valid.cpu().numpy())
        return out.getvalue()
    if kind != "png":
        raise InputError(f"--format {kind}: a flow is written as {', '.join(FORMATS)}")
    coded = (flow.float().cpu().numpy() * 64 + 2**15).round()
    inside = valid.cpu().numpy() & ((coded >= 1) & (coded <= 2**16 - 1)).all(0)
    planes = [inside.astype(np.float64), *(np.where(inside, coded, 0)[::-1])]  # OpenCV writes blue, green, red
    return cv2.imencode(".png", np.stack(planes, -1).astype(np.uint16))[1].tobytes()


def read_flow(path: str | Path) -> tuple[Float[Tensor, "2 h w"], Bool[Tensor, "h w"]]:
    """A flow and its validity from `.flo`, `.npz`, `.pfm` or KITTI's `.png`.

    Raises InputError for a file that is none of these, or ends early.
    """
    path = Path(path)
    readers = {".flo": _read_flo, ".npz": _read_npz, ".png": read_kitti_png, ".pfm": _read_pfm}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: not a flow file; there are {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return readers[path.suffix.lower()](path)


def _read_flo(path: Path) -> tuple[Tensor, Tensor]:
    data = path.read_bytes()
    if len(data) < 12 or np.frombuffer(data[:4], "<f4")[0] != np.float32(_MAGIC):
        raise InputError(f"{path}: not a .flo file (it does not begin with PIEH)")
    width, height = (int(side) for side in np.frombuffer(data[4:12], "<i4"))
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise InputError(
            f"{path}: says {width}x{height}, which is {12 + 8 * width * height} bytes, and has {len(data)}"
        )
    flow = torch.from_numpy(np.frombuffer(data[12:], "<f4").reshape(height, width, 2).copy()).permute(2, 0, 1)
    valid = (flow.abs() < _UNKNOWN).all(0)
    return torch.where(valid, flow, 0.0), valid


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as held:
            flow = torch.from_numpy(held["flow"].astype(np.float32))
            valid = torch.from_numpy(held["valid"].astype(bool))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a flow file ({error}); arrays flow and valid are wanted") from None
    return flow, valid


def read_kitti_png(path: Path) -> tuple[Float[Tensor, "2 h w"], Bool[Tensor, "h w"]]:
    """KITTI's and HD1K's PNG: red and green are 64 flow + 2^15, blue tells whether there is a label."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise InputError(f"{path}: not a flow picture; KITTI's have three channels of 16 bit")
    valid = torch.from_numpy(pixels[..., 0] > 0)
    flow = torch.from_numpy((pixels[..., 2:0:-1].astype(np.float32) - 2**15) / 64).permute(2, 0, 1)
    return torch.where(valid, flow, 0.0), valid


def _read_pfm(path: Path) -> tuple[Tensor, Tensor]:
    with path.open("rb") as file:
        kind, size, scale = file.readline().strip(), file.readline().split(), file.readline().strip()
        if kind != b"PF" or len(size) != 2:
            raise InputError(f"{path}: not a colour .pfm file")
        width, height = int(size[0]), int(size[1])
        values = np.frombuffer(file.read(), "<f4" if float(scale) < 0 else ">f4")
    if values.size != 3 * width * height:
        raise InputError(f"{path}: ends early")
    # Rows run upwards in a PFM.
    pixels = values.reshape(height, width, 3)[::-1, :, :2].astype(np.float32)
    flow = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    valid = torch.isfinite(flow).all(0)
    return torch.where(valid, flow, 0.0), valid


def colours(flow: Float[Tensor, "*b 2 h w"], longest: float | int) -> Float[Tensor, "*b 3 h w"]:
    """Flow as colour in [0, 1]: hue is direction, saturation the length over `longest` pixels; white stands still.

    Hues as in an HSV wheel with right red, down yellow-green, left cyan, up violet.
    """
    x, y = flow.unbind(-3)
    hue = (torch.atan2(y, x) / (2 * torch.pi)) % 1
    strength = (torch.linalg.vector_norm(flow, dim=-3) / max(float(longest), 1e-6)).clamp(0, 1)
    offsets = flow.new_tensor([0.0, 2 / 3, 1 / 3]).view(3, 1, 1)
    wheel = (((hue.unsqueeze(-3) + offsets) % 1 * 6 - 3).abs() - 1).clamp(0, 1)
    return 1 - strength.unsqueeze(-3) * (1 - wheel)


def colour_bytes(flow: Float[Tensor, "2 h w"], longest: float | int) -> UInt8[np.ndarray, "h w 3"]:
    """The same as bytes, ready for an image file."""
    return (colours(flow, longest).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
