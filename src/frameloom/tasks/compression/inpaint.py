"""Holes in a video, filled by fitting a network to what is seen and drawing what is not.

The network never learns the hole: its loss counts seen pixels only, and its encoder is shown grey there. What it draws
in the hole is what its few parameters make of the same place in other frames and of the surroundings.

H. Chen et al., HNeRV, CVPR 2023, arXiv 2304.02633, section 4.5.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import card
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.progress import Progress, silent
from frameloom.tasks.compression.fitted import Fitted
from frameloom.tasks.compression.framing import load_pictures
from frameloom.video.clip import Clip, Frame, MappedSource

GREY = 128


def inpaint(
    clip: Clip,
    mask: Clip | Float[Tensor, "t 1 h w"],
    method: str = "auto",
    *,
    size: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Clip:
    """The clip with its holes filled; seen pixels are the clip's own. Times and sound stay.

    Args:
        mask: white (or 1) where the hole is: one picture for all frames, or as many as the clip has.
        method: a codec that fits a network: `hnerv` (auto), `boost-nerv`.
        size: parameters of the network; by default about one for 72 pixels.

    Raises InputError for a mask of another size or length, an empty one, one that hides all, and other methods.
    """
    check_device(device)
    kind = card("hnerv" if method == "auto" else method, "compress").load_class()
    if not (isinstance(kind, type) and issubclass(kind, Fitted)) or "hnerv" not in kind.families:
        raise InputError(f"--method {method}: inpaint fits hnerv or boost-nerv; other codecs do not fill holes")
    pictures = load_pictures(clip)
    hidden = _hidden(mask, pictures.shape, clip.info.name)
    shown = torch.where(hidden, torch.tensor(GREY, dtype=torch.uint8), pictures)
    count, _, height, width = pictures.shape
    config = kind.plan(height, width, count, size=size)
    network = kind.fitted_to(shown, config, epochs=epochs, minutes=minutes, seen=(~hidden).float(), seed=seed,
                             device=device, progress=progress)  # fmt: skip
    return Clip(_Filled(clip, network, hidden))


class _Filled(MappedSource):
    """Frames drawn by the network where they are hidden."""

    def __init__(self, clip: Clip, network: Fitted, hidden: Tensor) -> None:
        super().__init__(clip.source, lambda picture: picture, "inpainted")
        self.network, self.hidden = network, hidden

    def frames(self, start: int = 0, stop: int | None = None):
        for number, frame in enumerate(self.base.frames(start, stop), start):
            height, width = frame.rgb.shape[-2:]
            with torch.inference_mode():
                drawn = self.network(torch.tensor([number]))[0, :, :height, :width].clone()
            yield Frame(frame.time, self.info.colour, rgb=torch.where(self.hidden[number], drawn, frame.rgb))


def _hidden(mask: Clip | Tensor, shape: torch.Size, name: str) -> Tensor:
    """True where a pixel is hidden, (t, 1, h, w)."""
    hidden = mask.tensor().mean(1, keepdim=True) if isinstance(mask, Clip) else mask
    label = mask.info.name if isinstance(mask, Clip) else "the mask"
    count, _, height, width = shape
    if hidden.shape[-2:] != shape[-2:]:
        raise InputError(f"--mask: {label} is {hidden.shape[-1]}x{hidden.shape[-2]} and {name} is {width}x{height}")
    if len(hidden) not in (1, count):
        raise InputError(f"--mask: {label} has {len(hidden)} pictures; give 1 for all frames of {name}, or {count}")
    hidden = (hidden > 0.5).expand(count, 1, height, width)
    if not hidden.any() or hidden.all():
        raise InputError(f"--mask: {label} {'hides nothing' if not hidden.any() else 'hides everything'}; "
                         "white is the hole, black is seen")  # fmt: skip
    return hidden
