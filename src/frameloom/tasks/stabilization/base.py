"""The stabilisation task: its protocol, its driver and its public function.

The driver looks at the video twice. First it asks the method how every frame moved on from the one before and keeps
four numbers a frame; scene cuts divide that path into shots. Then it goes through the frames again and lets the method
draw each of them anew, with only so many neighbours at hand as the method reaches for: memory is that of a window.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import card, chosen
from frameloom.errors import InputError
from frameloom.motion.cuts import change
from frameloom.motion.dis import dis_flow, grey_pixels
from frameloom.motion.similarity import shift_of
from frameloom.progress import Progress, silent
from frameloom.tasks.stabilization.bars import InsideBars, picture_in_bars
from frameloom.training.pretrained import digest, load
from frameloom.video.clip import Clip, Frame, Source

log = logging.getLogger("frameloom")

# Seconds of the Gaussian window (its sigma) at smoothness 1.
SLOWEST = 0.5
# A shot in which no frame would move by more pixels than this is left as it is: there is nothing to steady.
STILL = 0.25
# Fewer frames than this have no path worth smoothing.
SHORTEST = 5

Flow = Callable[[Float[Tensor, "3 h w"], Float[Tensor, "3 h w"]], Float[Tensor, "2 h w"]]
Pictures = Callable[[int], Float[Tensor, "3 h w"]]


def dis(first: Float[Tensor, "3 h w"], second: Float[Tensor, "3 h w"]) -> Float[Tensor, "2 h w"]:
    """The flow between two pictures by dense inverse search, in pixels: what is used where nothing better is given."""
    found = dis_flow(grey_pixels(first), grey_pixels(second))
    return torch.from_numpy(found).permute(2, 0, 1).to(first.device)


@runtime_checkable
class Shot(Protocol):
    """Frames 0 to n - 1 between two cuts, ready to be drawn.

    `correction` `(n, 4)` is how far the camera is moved in every frame, as similarities (x, y, angle, log scale) in
    pixels; `residuals` the mean size of every round's correction, in pixels.
    """

    correction: Float[np.ndarray, "n 4"]
    residuals: list[float]

    def draw(self, k: int, pictures: Pictures) -> Float[Tensor, "3 h w"]:
        """Frame k, steady. `pictures(j)` is the recorded frame j, for j no further away than the method's `reach`."""
        ...


@runtime_checkable
class Stabilizer(Protocol):
    """A method that steadies shots; `reach` is how many frames to either side it looks at to draw one."""

    reach: int

    def motion(self, first: Float[Tensor, "3 h w"], second: Float[Tensor, "3 h w"]) -> np.ndarray | None:
        """How the scene moves between two frames as (x, y, angle, log scale); None where that cannot be told."""
        ...

    def shot(self, motions: Float[np.ndarray, "n 4"], sigma: float | int, height: int, width: int) -> Shot:
        """The shot with those motions, its path smoothed by a window of `sigma` frames."""
        ...


def stabilize(
    clip: Clip,
    method: str = "auto",
    smoothness: float | int = 0.5,
    *,
    flow: Flow | None = None,
    weights: str | None = None,
    device: str = "cpu",
) -> Clip:
    """The same video from a steady hand, lazily: the frames, their times, their size and the sound stay, and black bars
    around the picture (a few frames are looked at to find them).

    Args:
        method: a method of this task, or `"auto"`.
        smoothness: 0 (as recorded) to 1: the sigma of the window that smooths the camera's path, in units of half a
            second. Pans and zooms that are slower than the window stay.
        flow: for methods that follow every pixel, an estimator of optical flow: two pictures `(3, h, w)` to
            `(2, h, w)` in pixels; dense inverse search when None.
        weights: for methods that have them; see `frameloom.load`.

    Raises:
        InputError: a smoothness outside [0, 1], a camera, an unknown method, a flow for a method that needs none.
    """
    if not 0 <= smoothness <= 1:
        raise InputError(f"--smoothness {smoothness:g}: from 0 (as recorded) to 1 (as steady as it gets)")
    if clip.info.codec == "camera":
        raise InputError(f"{clip.info.name}: a camera cannot be seen twice, which steadying needs; record it first")
    name = chosen(method, "stabilize")
    card(name, "stabilize")
    made = load(name, weights, device=device)
    if flow is not None:
        if not hasattr(made, "flow"):
            raise InputError(f"flow: {name} follows points, not pixels; fast-stab takes a flow estimator")
        made.flow = flow
    if len(clip) < SHORTEST:
        log.warning("%s: %d frames are too few to steady; they stay as they are", clip.info.name, len(clip))
        return clip
    flows = getattr(getattr(made, "flow", None), "__qualname__", type(getattr(made, "flow", None)).__name__)
    label = f"stabilize {name} {smoothness:g} {flows} {digest(made)} {device}"

    def steadied(source: Source) -> StabilizedSource:
        return StabilizedSource(source, made, smoothness, label, device)

    box = picture_in_bars(clip)
    if box is None:
        return Clip(steadied(clip.source))
    rows, columns = box
    log.warning("%s: the black bars around %dx%d pixels of picture stay where they are", clip.info.name,
                columns.stop - columns.start, rows.stop - rows.start)  # fmt: skip
    return Clip(InsideBars(clip.source, box, steadied))


@dataclass
class Report:
    """What the driver met.

    `lost` frames had nothing to follow and took their neighbours' motion. `residuals` are the mean corrections of
    every round of smoothing in pixels, of the longest shot. `filled` and `mirrored` count pixels outside the recorded
    frames, by where they came from: other frames, or (nothing else being there) the picture mirrored at its edge.
    """

    shots: int = 0
    cuts: int = 0
    lost: int = 0
    still: int = 0
    residuals: list[float] = field(default_factory=list)
    filled: int = 0
    mirrored: int = 0


@dataclass(frozen=True)
class _Span:
    """Frames `start` to `stop` of a clip; `shot` None: they stay as they are."""

    start: int
    stop: int
    shot: Shot | None


class StabilizedSource(Source):
    """Another source, steadied. Alive at once: the frames that the method reaches for, in the decoder's form."""

    def __init__(
        self, base: Source, method: Stabilizer, smoothness: float | int, label: str, device: str = "cpu"
    ) -> None:
        self.base, self.method, self.label, self.device = base, method, label, device
        self.sigma = float(SLOWEST * smoothness * base.info.rate)
        self.info, self.passthrough = base.info, base.passthrough
        self.report = Report()
        self._spans: list[_Span] | None = None

    def times(self) -> Sequence[Fraction]:
        return self.base.times()

    def end(self) -> Fraction:
        return self.base.end()

    def analyse(self, progress: Progress = silent) -> list[_Span]:
        """The shots and their paths: one pass over the video, made once and kept."""
        if self._spans is None:
            self._spans = [self._span(*part) for part in self._parts(progress)]
            self.report.shots = len(self._spans)
            self.report.cuts = max(0, len(self._spans) - 1)
            shots = [span.shot for span in self._spans if span.shot is not None]
            longest = max(shots, key=lambda shot: len(shot.correction), default=None)
            self.report.residuals = longest.residuals if longest else []
            if self.report.lost:
                log.warning("%d frames show nothing to follow; they move as their neighbours do", self.report.lost)
        return self._spans

    def _parts(self, progress: Progress) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, motions) of every shot."""
        begin, motions, first = 0, [], None
        count = len(self.times())
        number = -1
        for number, frame in enumerate(self.base.frames()):
            second = frame.rgb.to(self.device)
            if first is not None:
                if change(first, second).cut:
                    yield begin, number, self._known(motions)
                    begin, motions = number, []
                else:
                    motions.append(self.method.motion(first, second))
            first = second
            progress("looking", number + 1, count)
        if number >= 0:
            yield begin, number + 1, self._known(motions)

    def _known(self, motions: list[np.ndarray | None]) -> np.ndarray:
        """The motions, those that could not be told interpolated from the others."""
        there = np.array([motion is not None for motion in motions], dtype=bool)
        self.report.lost += int((~there).sum())
        if not there.any():
            return np.zeros((len(motions), 4))
        at, given = np.arange(len(motions)), np.array([motion for motion in motions if motion is not None])
        return np.stack([np.interp(at, at[there], column) for column in given.T], 1)

    def _span(self, start: int, stop: int, motions: np.ndarray) -> _Span:
        height, width = self.info.height, self.info.width
        shot = None
        if stop - start >= SHORTEST:
            shot = self.method.shot(motions, self.sigma, height, width)
            if float(shift_of(shot.correction, height, width).max()) < STILL:
                shot = None
        self.report.still += shot is None
        return _Span(start, stop, shot)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        start, stop, _ = slice(start, stop).indices(len(self.times()))
        for span in self.analyse():
            low, high = max(start, span.start), min(stop, span.stop)
            if low >= high:
                continue
            if span.shot is None:
                yield from self.base.frames(low, high)
            else:
                yield from self._drawn(span, low, high)

    def _drawn(self, span: _Span, low: int, high: int) -> Iterator[Frame]:
        reach = self.method.reach
        newest = max(span.start, low - reach)
        ahead = self.base.frames(newest, min(span.stop, high + reach))
        held: deque[tuple[int, Frame]] = deque()

        def picture(j: int) -> Tensor:
            frame = held[j + span.start - held[0][0]][1]
            # RGB is made anew each time: kept, a window would cost four times the memory and more.
            return frame.at(frame.time).rgb.to(self.device)

        for number in range(low, high):
            while newest <= min(number + reach, span.stop - 1):
                held.append((newest, next(ahead)))
                newest += 1
            while held[0][0] < number - reach:
                held.popleft()
            frame = held[number - held[0][0]][1]
            rgb = span.shot.draw(number - span.start, picture)
            counts = getattr(span.shot, "counts", Counter())
            self.report.filled, self.report.mirrored = (
                getattr(self.report, name) + counts.pop(name, 0) for name in ("filled", "mirrored")
            )
            yield Frame(frame.time, self.info.colour, rgb=rgb.clamp(0, 1).cpu())

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} | {self.label}"
