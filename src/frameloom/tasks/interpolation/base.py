"""The interpolation task: its protocol, its driver and its public function.

The driver owns everything that is not a paper: exact target instants, recorded frames kept as they are, cuts,
duplicates, halving for methods that only know the middle, tiles for pictures that do not fit.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.cards import card, chosen
from frameloom.device import check_device
from frameloom.errors import InputError
from frameloom.motion.cuts import Change, change
from frameloom.training.pretrained import digest, load
from frameloom.video.clip import Clip, Frame, Source
from frameloom.video.times import RegularTimes, index_at, parse_rate, show_rate

log = logging.getLogger("frameloom")

NEAR = Fraction(1, 1000)
DEPTH = 3
BACKTRACK = 8
SCALES = (1, 0.5, 0.25, 0.125)

Between = Callable[[float], Float[Tensor, "3 h w"]]


@runtime_checkable
class Interpolator(Protocol):
    """A method that makes pictures between two pictures.

    `between(frame0, frame1)` takes two `(3, h, w)` pictures in [0, 1] and returns a function of t in (0, 1) that
    gives the picture at that phase. `fixed_t` is True for a method that only knows t = 0.5; the driver halves.
    `tile` is the longest side, in pixels, that it should be given at once (None: any).
    """

    fixed_t: bool
    tile: int | None

    def between(self, frame0: Float[Tensor, "3 h w"], frame1: Float[Tensor, "3 h w"]) -> Between: ...


@runtime_checkable
class Sampling(Protocol):
    """An interpolator that draws its pictures: it takes a number of steps (None: its own) and a seed."""

    def sampling(self, steps: int | None, seed: int) -> None: ...


@runtime_checkable
class Tunable(Protocol):
    """An interpolator that can seek motion in pictures made smaller (`scale`), and average its answer with the one for
    pictures turned by 180 degrees; None: as its weights say."""

    def tune(self, scale: float | int | None, turned: bool | None) -> None: ...


def interpolate(
    clip: Clip,
    fps: str | float | int | Fraction = 60,
    method: str = "auto",
    *,
    slow: float | int | None = None,
    weights: str | None = None,
    device: str = "cpu",
    tile: int | None = None,
    dedupe: bool = False,
    strict: bool = False,
    steps: int | None = None,
    seed: int = 0,
    flow_scale: float | int | None = None,
    turned: bool | None = None,
) -> Clip:
    """The same video at another frame rate, lazily; recorded frames that fall on a wanted instant stay untouched.

    Args:
        fps: frames a second (`60`, `"23.976"`, `"30000/1001"`) or a multiple of the clip's own rate (`"2x"`).
        slow: slow motion instead of a smoother picture: so many times as many frames, shown at the clip's own rate,
            without sound. `fps` is then not used.
        method: a method of this task, or `"auto"` for the one that measures best on real footage.
        weights: for methods that have them; see `frameloom.load`.
        tile: longest side in pixels that the method is given at once; pictures beyond it are cut into
            overlapping tiles.
        dedupe: drop repeated frames and spread the motion over the gap, for footage that was padded.
        strict: stop instead of taking the nearest eighth, for methods that only know the middle.
        steps: of sampling, for methods that sample; their own number if absent. seed: of what they draw.
        flow_scale: seek motion first in pictures so much smaller (1, 0.5, 0.25, 0.125), for `vfimamba`: larger motion
            is found, at less cost. Its authors take 0.5 at 2K and 0.25 at 4K.
        turned: average with the answer for pictures turned by 180 degrees, for `vfimamba`; twice the time. If absent,
            as the weights say: the large published ones do.

    Raises:
        InputError: an impossible rate, a single frame, an unknown method, settings that the method does not take.
    """
    check_device(device)
    if slow is not None:
        if not 1 < slow <= 64:
            raise InputError(f"--slow {slow:g}: slow motion is more than 1 and at most 64 times slower")
        fps = f"{slow}x"
    text = str(fps).strip().lower()
    rate = clip.rate * parse_rate(text[:-1]) if text.endswith("x") else parse_rate(fps)
    name = chosen(method, "interpolate")
    card(name, "interpolate")
    if len(clip) < 2:
        raise InputError(f"{clip.info.name}: one frame is not enough to interpolate; two or more are needed")
    if rate == clip.rate and clip.info.regular and not dedupe:
        return clip
    made = tuned(sampling(load(name, weights, device=device), name, steps, seed), name, flow_scale, turned)
    label = f"interpolate {rate} {name} {digest(made)} {device} {tile=} {dedupe=} {strict=} {steps=} {seed=}"
    label += f" {flow_scale=} {turned=}"
    if hasattr(made, "resample"):
        smooth = Clip(made.resample(clip.source, rate))
    else:
        source = InterpolatedSource(clip.source, made, rate, label, tile or made.tile, dedupe, strict, device)
        smooth = Clip(source)
    return smooth if slow is None else smooth.retimed(clip.rate)


def sampling(method: Any, name: str, steps: int | None, seed: int) -> Any:
    """The method told how to sample, if it does. Raises InputError for steps that it does not take."""
    if isinstance(method, Sampling):
        method.sampling(steps, seed)
    elif steps is not None:
        raise InputError(f"--steps {steps}: {name} does not sample; leave it away, or take a method that does")
    return method


def tuned(method: Any, name: str, flow_scale: float | int | None, turned: bool | None) -> Any:
    """The method told how to look. Raises InputError for settings that it does not take."""
    wanted = {f"--flow-scale {flow_scale}": flow_scale, f"--{'' if turned else 'no-'}turned": turned}
    given = [flag for flag, value in wanted.items() if value is not None]
    if given and not isinstance(method, Tunable):
        raise InputError(f"{given[0]}: {name} has no such setting; leave it away, or take vfimamba")
    if flow_scale not in (None, *SCALES):
        raise InputError(f"{given[0]}: motion is sought at {', '.join(f'{scale:g}' for scale in SCALES)} of the size")
    if given:
        method.tune(flow_scale, turned)
    return method


@dataclass
class Report:
    """What the driver met, counted as frames are made."""

    cuts: int = 0
    duplicates: int = 0
    made: int = 0
    kept: int = 0


class _Pair:
    """Two neighbouring frames and what was found out about them, each thing once and only if asked."""

    def __init__(self, first: Frame, second: Frame, source: "InterpolatedSource") -> None:
        self.first, self.second, self.source = first, second, source
        self._halves: dict[Fraction, Tensor] = {Fraction(0): first.rgb, Fraction(1): second.rgb}

    @cached_property
    def change(self) -> Change:
        found = change(self.first.rgb, self.second.rgb)
        report = self.source.report
        report.cuts += found.cut
        report.duplicates += found.duplicate and not found.cut
        return found

    @cached_property
    def _between(self) -> Between:
        return self.source.between(self.first.rgb, self.second.rgb)

    def at(self, phase: Fraction) -> Tensor:
        if not self.source.method.fixed_t:
            return self._between(float(phase))
        return self._halved(self.source.dyadic(phase))

    def _halved(self, phase: Fraction) -> Tensor:
        """The picture at a dyadic phase: the middle of its two neighbours one level up."""
        if phase not in self._halves:
            step = Fraction(1, phase.denominator)
            before, after = self._halved(phase - step), self._halved(phase + step)
            self._halves[phase] = self.source.between(before, after)(0.5)
        return self._halves[phase]


class InterpolatedSource(Source):
    """Another source at the instants j / rate. Alive at once: two frames and the pictures between them."""

    def __init__(
        self, base: Source, method: Interpolator, rate: Fraction, label: str,
        tile: int | None = None, dedupe: bool = False, strict: bool = False, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.base, self.method, self.label, self.tile = base, method, label, tile
        self.dedupe, self.strict, self.device = dedupe, strict, device
        self.info = replace(base.info, rate=rate, regular=True)
        self.passthrough = base.passthrough
        self.report = Report()
        self._snapped = False

    def times(self) -> Sequence[Fraction]:
        return RegularTimes(self.info.rate, ceil(self.base.end() * self.info.rate))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        count = len(self.times())
        stop = count if stop is None else min(stop, count)
        number = start
        for first, second in self._pairs(Fraction(start) / self.info.rate):
            pair = _Pair(first, second, self) if second is not None else None
            while number < stop:
                instant = Fraction(number) / self.info.rate
                if second is not None and instant >= second.time:
                    break
                yield self._picture(first, pair, instant)
                number += 1
            if number >= stop:
                return

    def _pairs(self, instant: Fraction) -> Iterator[tuple[Frame, Frame | None]]:
        """Neighbouring frames from the pair around `instant` on; the last frame comes with None."""
        times = self.base.times()
        index = index_at(times, instant)
        if index == len(times) or times[index] > instant:
            index -= 1
        first: Frame | None = None
        for frame in self.base.frames(max(0, index - (BACKTRACK if self.dedupe else 0))):
            if first is None:
                first = frame
                continue
            if self.dedupe and change(first.rgb, frame.rgb).duplicate:
                self.report.duplicates += 1
                continue
            if frame.time > instant:
                yield first, frame
            first = frame
        if first is not None:
            yield first, None

    def _picture(self, first: Frame, pair: _Pair | None, instant: Fraction) -> Frame:
        """A recorded frame where one serves, a made one elsewhere."""
        phase = Fraction(0)
        if pair is not None:
            phase = (instant - first.time) / (pair.second.time - first.time)
        nearest = first if phase < Fraction(1, 2) else pair.second
        self.report.kept += 1
        if min(phase, 1 - phase) <= NEAR or pair is None or pair.change.cut or pair.change.duplicate:
            return nearest.at(instant)
        self.report.kept -= 1
        self.report.made += 1
        return Frame(instant, self.info.colour, rgb=pair.at(phase).clamp(0, 1))

    def dyadic(self, phase: Fraction) -> Fraction:
        """The nearest eighth; says once that it is not the wanted instant, or refuses when strict."""
        snapped = Fraction(round(phase * 2**DEPTH), 2**DEPTH)
        if snapped != phase and self.strict:
            raise InputError(
                f"--fps {self.info.rate}: from {show_rate(self.base.info.rate)} fps this needs phase "
                f"{float(phase):.3f}, and the method only halves; double the rate, or leave --strict away"
            )
        if snapped != phase and not self._snapped:
            self._snapped = True
            log.warning("the method only halves: instants are taken to the nearest eighth between two frames")
        return snapped

    def between(self, frame0: Tensor, frame1: Tensor) -> Between:
        """The method's pictures between two frames, through tiles where the frames are too large for it."""
        frame0, frame1 = frame0.to(self.device), frame1.to(self.device)
        _, height, width = frame0.shape
        if self.tile is None or max(height, width) <= self.tile:
            return self.method.between(frame0, frame1)
        return lambda t: _tiled(self.method, frame0, frame1, t, self.tile)

    def fingerprint(self) -> str:
        return f"{self.base.fingerprint()} | {self.label}"


def _tiled(method: Interpolator, frame0: Tensor, frame1: Tensor, t: float, tile: int, overlap: int = 64) -> Tensor:
    """The picture at t from overlapping tiles, blended by ramps that sum to one."""
    _, height, width = frame0.shape
    total = torch.zeros_like(frame0)
    weight = torch.zeros_like(frame0[:1])
    for rows in _spans(height, tile, overlap):
        for columns in _spans(width, tile, overlap):
            part = method.between(frame0[:, rows, columns], frame1[:, rows, columns])(t)
            ramp = _ramp(part.shape[1], overlap)[:, None] * _ramp(part.shape[2], overlap)[None]
            ramp = ramp.to(part.device)
            total[:, rows, columns] += part * ramp
            weight[:, rows, columns] += ramp
    return total / weight


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    if length <= tile:
        return [slice(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [slice(start, start + tile) for start in starts]


def _ramp(length: int, overlap: int) -> Tensor:
    rising = torch.arange(1, length + 1, dtype=torch.float32).clamp(max=overlap)
    return torch.minimum(rising, rising.flip(0)) / overlap
