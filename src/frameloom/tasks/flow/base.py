"""The flow task: its protocol, its driver and its public function.

A method sees runs of frames without a cut, of sides that suit it, one after the other, and gives the flow of each gap
as soon as it can; how many frames it holds meanwhile is its own affair. The driver reads the clip once, splits it
where the scene changes and pads and crops the pictures.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from frameloom.cards import card, chosen
from frameloom.errors import InputError
from frameloom.motion.cuts import change
from frameloom.motion.flowio import colours
from frameloom.progress import Progress, silent
from frameloom.tasks.flow.tiles import Tiled
from frameloom.training.pretrained import load
from frameloom.video.clip import Clip, Frame, Source

log = logging.getLogger("frameloom")


class Flow(NamedTuple):
    """Flow of a batch of videos in pixels, x first.

    `fwd` `(b, t-1, 2, h, w)` from frame k to k + 1, `bwd` from k + 1 to k or None; `valid` `(b, t-1)` is False where a
    cut lies between the frames, and the flow there is zero.
    """

    fwd: Float[Tensor, "b s 2 h w"]
    bwd: Float[Tensor, "b s 2 h w"] | None
    valid: Bool[Tensor, "b s"]


@runtime_checkable
class FlowEstimator(Protocol):
    """A method that finds the motion of every pixel from frame to frame.

    `stream(frames, backward)` takes pictures `(3, h, w)` in [0, 1], two or more of one scene, and yields for every
    gap the flow `(2, h, w)` to the next frame and, if `backward`, the one back (else None). `multiple`: what the sides
    must be divisible by; `least`: the shortest side that it can see anything in. Where there is a `centred` and it is
    true, edges are repeated on both sides to get there; a method with `steps` can be told how often it refines.
    """

    multiple: int
    least: int

    def stream(
        self, frames: Iterable[Float[Tensor, "3 h w"]], backward: bool = False
    ) -> Iterator[tuple[Float[Tensor, "2 h w"], Float[Tensor, "2 h w"] | None]]: ...


class Gap(NamedTuple):
    """The flow between two neighbouring frames; `valid` is False across a cut, where it is zero."""

    fwd: Float[Tensor, "2 h w"]
    bwd: Float[Tensor, "2 h w"] | None
    valid: bool


def gaps(
    method: FlowEstimator, frames: Iterable[Tensor], backward: bool = False, device: str = "cpu", name: str = "clip"
) -> Iterator[Gap]:
    """The flow of every gap of a run of frames `(3, h, w)`, one at a time.

    Raises InputError for a frame of another size than the first, naming it.
    """
    source = iter(frames)
    waiting: list[Tensor] = []
    count, size = 0, None

    def scene(first: Tensor) -> Iterator[Tensor]:
        """Frames up to the next cut; the one after it is left in `waiting`."""
        nonlocal count, size
        before = first
        yield _padded(first, method).to(device)
        for frame in source:
            count += 1
            if frame.shape != size:
                raise InputError(f"{name}: frame {count} is {frame.shape[2]}x{frame.shape[1]}, the first is "
                                 f"{size[2]}x{size[1]}; all must have one size")  # fmt: skip
            if change(before, frame).cut:
                waiting.append(frame)
                return
            before = frame
            yield _padded(frame, method).to(device)

    first = next(source, None)
    if first is None:
        return
    size = first.shape
    waiting.append(first)
    while waiting:
        height, width = size[-2:]
        left, _, top, _ = _border(height, width, method)
        window = (..., slice(top, top + height), slice(left, left + width))
        with torch.inference_mode():
            for fwd, bwd in method.stream(scene(waiting.pop()), backward):
                cropped = [None if flow is None else flow[window].float().cpu() for flow in (fwd, bwd)]
                yield Gap(*cropped, True)
        if waiting:
            zero = torch.zeros(2, height, width)
            yield Gap(zero, zero.clone() if backward else None, False)


def _padded(frame: Tensor, method: FlowEstimator) -> Tensor:
    """Edges repeated to sides that the method can take."""
    return F.pad(frame[None], _border(*frame.shape[-2:], method), mode="replicate")[0]


def _border(height: int, width: int, method: FlowEstimator) -> tuple[int, int, int, int]:
    """Pixels to repeat at the left, the right, above and below: all at the right and below, or half on each side."""
    missing = [max(side + -side % method.multiple, method.least) - side for side in (width, height)]
    first = [more // 2 if getattr(method, "centred", False) else 0 for more in missing]
    return first[0], missing[0] - first[0], first[1], missing[1] - first[1]


def estimate(method: FlowEstimator, video: Float[Tensor, "b t 3 h w"], backward: bool = False) -> Flow:
    """The flow of videos in memory, each on its own. Raises InputError for fewer than 2 frames."""
    if video.shape[1] < 2:
        raise InputError("flow needs at least 2 frames; this video has 1")
    made = [list(gaps(method, clip, backward)) for clip in video]
    return Flow(
        torch.stack([torch.stack([gap.fwd for gap in row]) for row in made]),
        torch.stack([torch.stack([gap.bwd for gap in row]) for row in made]) if backward else None,
        torch.tensor([[gap.valid for gap in row] for row in made]),
    )


def flow(
    clip: Clip,
    method: str = "auto",
    *,
    bidirectional: bool = False,
    weights: str | None = None,
    tile: int | None = None,
    steps: int | None = None,
    device: str = "cpu",
) -> "FlowClip":
    """The motion of every pixel of a clip from each frame to the next, lazily.

    Args:
        method: a method of this task, or `"auto"` for the one that measures best on real footage.
        bidirectional: also from each frame back to the one before.
        weights: for methods that have them; see `frameloom.load`.
        tile: look at squares of so many pixels, one after the other, and blend; None looks at whole pictures.
        steps: how often a method that refines does so; as the weights say if absent.

    Raises:
        InputError: a single frame, an unknown method, pictures that the method is too coarse for, a tile that is, steps
            that the method does not take.
    """
    name = chosen(method, "flow")
    card(name, "flow")
    if len(clip) < 2:
        raise InputError(f"{clip.info.name}: flow needs at least 2 frames, this clip has {len(clip)}")
    made = load(name, weights, device=device)
    if steps is not None:
        if not hasattr(made, "steps"):
            raise InputError(f"--steps {steps}: {name} does not refine step by step; leave it away, or take a method "
                             "that does, such as gma")  # fmt: skip
        if steps < 1:
            raise InputError(f"--steps {steps}: a flow takes one step or more; {name} takes {made.steps} of itself")
        made.steps = steps
    if isinstance(made, torch.nn.Module) and made.least > 2 * min(clip.info.width, clip.info.height):
        raise InputError(f"{clip.info.name}: {clip.info.width}x{clip.info.height} is too small for {name}; "
                         f"sides of {made.least} or more are wanted")  # fmt: skip
    gap = spread(clip)
    if gap is not None:
        log.warning("%s: frames are %d to %d ms apart; a flow is the motion of one such step, not of a fixed time",
                    clip.info.name, *(round(1000 * side) for side in gap))  # fmt: skip
    return FlowClip(clip, made if tile is None else Tiled(made, tile), bidirectional, device)


def spread(clip: Clip) -> tuple[float, float] | None:
    """The shortest and the longest step between frames in seconds where they differ by more than a twentieth and by
    more than the millisecond to which containers round; else None.
    """
    if clip.info.regular:
        return None
    steps = [float(after - before) for before, after in pairwise(clip.source.times())]
    uneven = max(steps) - min(steps) > max(0.05 * min(steps), 0.0011)
    return (min(steps), max(steps)) if uneven else None


@dataclass(frozen=True)
class FlowClip:
    """The flow of a clip, computed as it is asked for: iterate over it for one `Gap` after the other."""

    clip: Clip
    method: FlowEstimator
    bidirectional: bool = False
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.clip) - 1

    def __iter__(self) -> Iterator[Gap]:
        frames = (frame.rgb for frame in self.clip)
        return gaps(self.method, frames, self.bidirectional, self.device, self.clip.info.name)

    def tensor(self) -> Flow:
        """All of it in memory, with a batch of one."""
        made = list(self)
        return Flow(
            torch.stack([gap.fwd for gap in made])[None],
            torch.stack([gap.bwd for gap in made])[None] if self.bidirectional else None,
            torch.tensor([[gap.valid for gap in made]]),
        )

    def to_rgb(self, longest: float | int | None = None, seen: Callable[[int, Gap], None] | None = None) -> Clip:
        """The forward flow as a lazy clip of colours (see `frameloom.motion.flowio.colours`).

        `longest` is the length in pixels of full colour; None takes a tenth of the shorter side. `seen` is called with
        the number and the flow of every gap as it is drawn.
        """
        reach = longest or min(self.clip.info.width, self.clip.info.height) / 10
        return Clip(_Coloured(self, reach, seen))

    def save(self, folder: str | Path, kind: str = "flo", *, overwrite: bool = False, progress: Progress = silent):
        """Write `forward_00000.flo` (from frame 0 to 1) and so on, `backward_00001.flo` (from frame 1 to 0) and so on,
        and `flow.mp4`, the forward flow in colours; all at once when all is there.

        Raises InputError for an unknown format, and for a folder that is not empty without `overwrite`.
        """
        from frameloom.tasks.flow.files import save

        return save(self, Path(folder), kind, overwrite, progress)


class _Coloured(Source):
    """The colours of a flow, one picture a gap."""

    def __init__(self, made: FlowClip, longest: float | int, seen: Callable[[int, Gap], None] | None) -> None:
        self.made, self.longest, self.seen, self.base = made, longest, seen, made.clip.source
        self.info = replace(self.base.info, name=f"flow of {self.base.info.name}")

    def times(self):
        return self.base.times()[: len(self.made)]

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        times = self.times()
        part = replace(self.made, clip=self.made.clip[start:] if start else self.made.clip)
        for number, gap in zip(range(*slice(start, stop).indices(len(times))), part, strict=False):
            if self.seen is not None:
                self.seen(number, gap)
            yield Frame(times[number], self.info.colour, rgb=colours(gap.fwd, self.longest))

    def fingerprint(self) -> str:
        method = self.made.method
        parts = f" in {method.side}" if isinstance(method, Tiled) else ""
        whole = method.method if isinstance(method, Tiled) else method
        steps = f" of {whole.steps} steps" if hasattr(whole, "steps") else ""
        return f"{self.base.fingerprint()} | flow {type(whole).__name__}{steps}{parts}"
