"""Instants, rates and ranges, as exact fractions: 29.97 is 30000/1001, and an hour later still is."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from frameloom.errors import InputError

MAX_RATE = 100_000
_NTSC = {"23.976": (24000, 1001), "23.98": (24000, 1001), "29.97": (30000, 1001), "47.95": (48000, 1001),
         "47.952": (48000, 1001), "59.94": (60000, 1001), "119.88": (120000, 1001)}  # fmt: skip


def parse_rate(value: str | float | int | Fraction, flag: str = "--fps") -> Fraction:
    """A frame rate in frames a second from `60`, `"23.976"`, `"30000/1001"` or a Fraction.

    The usual roundings of the NTSC family mean the exact fraction. Raises InputError outside (0, 100000].
    """
    text = str(value).strip().lower().removesuffix("fps").strip()
    try:
        rate = Fraction(*_NTSC[text]) if text in _NTSC else Fraction(text).limit_denominator(1_000_000)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise InputError(f"{flag} {value}: a frame rate is a positive number such as 60, 23.976 or 30000/1001")
    if rate > MAX_RATE:
        raise InputError(f"{flag} {value}: more than {MAX_RATE:,} frames a second cannot be meant")
    return rate


def parse_time(text: str, flag: str = "--range") -> Fraction:
    """Seconds from `2.5`, `2.5s`, `1:30`, `1:02:03.5` or `1500ms`."""
    body = text.strip().lower()
    try:
        if body.endswith("ms"):
            value = Fraction(body[:-2]) / 1000
        else:
            value = Fraction(0)
            for part in body.removesuffix("s").split(":"):
                value = value * 60 + Fraction(part)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{flag} {text}: a time is seconds (2.5s), milliseconds (40ms) or h:mm:ss") from None
    if value < 0:
        raise InputError(f"{flag} {text}: a time in a video is not negative")
    return value


def parse_range(text: str, flag: str = "--range") -> tuple[Fraction, Fraction | None]:
    """(start, stop) in seconds from `2.5s:10s`, `:10s`, `5s:` or `0:30-1:10`; stop is None for the end."""
    match = re.fullmatch(r"(?P<a>[\d.]*m?s?):(?P<b>[\d.]*m?s?)", text.strip()) or re.fullmatch(
        r"(?P<a>[\d.:]*m?s?)-(?P<b>[\d.:]*m?s?)", text.strip()
    )
    if not match:
        raise InputError(f"{flag} {text}: a range is START:STOP in seconds such as 2.5s:10s, or 0:30-1:10")
    start = parse_time(match["a"], flag) if match["a"] else Fraction(0)
    stop = parse_time(match["b"], flag) if match["b"] else None
    if stop is not None and stop <= start:
        raise InputError(f"{flag} {text}: the range is empty; the second time must be later than the first")
    return start, stop


class RegularTimes(Sequence[Fraction]):
    """The instants k / rate for k in [0, count), without storing them."""

    def __init__(self, rate: Fraction, count: int) -> None:
        self.rate, self.count = rate, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [Fraction(k) / self.rate for k in range(*index.indices(self.count))]
        if index < 0:
            index += self.count
        if not 0 <= index < self.count:
            raise IndexError(index)
        return Fraction(index) / self.rate


def index_at(times: Sequence[Fraction], instant: Fraction) -> int:
    """The first index whose time is not before `instant`."""
    return bisect_left(times, instant)


def show_rate(rate: Fraction) -> str:
    """`60`, `29.97`: how a person writes the rate."""
    return f"{float(rate):.3f}".rstrip("0").rstrip(".")


def show_duration(seconds: float) -> str:
    """`12.3 s`, `2 min 11 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# Rates that cameras, discs and screens have: whole numbers, halves of the small ones, and the NTSC family.
_STANDARD = sorted(
    {Fraction(n) for n in range(1, 241)}
    | {Fraction(n, 2) for n in range(1, 60)}
    | {Fraction(n * 1000, 1001) for n in (12, 15, 24, 30, 48, 60, 72, 90, 96, 120, 144, 240)}
)


def standard_rate(stamps: np.ndarray, tick: Fraction, nominal: list[Fraction]) -> tuple[Fraction, bool]:
    """The frame rate that time stamps stand for, and whether they keep to it.

    A container rounds instants to its tick, so a regular rate shows as at most one tick of jitter; within that the
    rate that cameras have is meant, not the fraction that the rounding made of it (19001/317 is 60000/1001).

    Args:
        stamps: rising whole numbers of `tick` seconds, the first 0.
        nominal: what the headers say, the most trustworthy first; not believed without the stamps' consent.

    Returns:
        (rate, True), or the average rate and False.
    """
    count = len(stamps)
    if count < 2:
        return (nominal[0] if nominal else Fraction(25)), True
    span = int(stamps[-1]) * tick
    mean = Fraction(count - 1) / span if span else Fraction(nominal[0] if nominal else 25)

    def fits(rate: Fraction) -> bool:
        return bool(np.abs(stamps - np.arange(count) / float(rate * tick)).max() <= 1.0)

    meant = next((rate for rate in nominal if fits(rate)), mean)
    for rate in sorted(_STANDARD, key=lambda rate: abs(rate - meant))[:3]:
        if abs(rate / meant - 1) < Fraction(1, 10_000 if meant is not mean else 100) and fits(rate):
            return rate, True
    return meant, fits(meant)
