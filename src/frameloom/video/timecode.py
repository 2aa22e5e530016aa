"""SMPTE ST 12-1 time codes at another frame rate and from another frame on."""

import re
from fractions import Fraction

_CODE = re.compile(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d)")


def moved(code: str, old: Fraction, new: Fraction, elapsed: Fraction) -> str | None:
    """The label, at `new` frames a second, of the frame `elapsed` seconds after the one that `code` labels at `old`.

    None if `code` is no time code, or if its rates have none (varying ones, fractions but for the NTSC family).
    """
    match = _CODE.fullmatch(code.strip())
    rates = round(old), round(new)
    if not match or any(not _usual(rate) for rate in (old, new)):
        return None
    hours, minutes, seconds, frames = (int(match[k]) for k in (1, 2, 3, 5))
    drop = match[4] != ":" and rates[0] % 30 == 0
    count = ((hours * 60 + minutes) * 60 + seconds) * rates[0] + frames
    if drop:
        whole = hours * 60 + minutes
        count -= rates[0] // 15 * (whole - whole // 10)
    # Time codes count frames: the real instant is frames over rate, whatever the label says.
    instant = Fraction(count) / old + elapsed
    drop = drop and rates[1] % 30 == 0 and new.denominator == 1001
    if drop:
        number = int(instant * new)
        skipped, minute = rates[1] // 15, rates[1] * 60 - rates[1] // 15
        tens, rest = divmod(number, minute * 10 + skipped)
        number += 9 * skipped * tens + (skipped * ((rest - skipped) // minute) if rest > skipped else 0)
    else:
        # Without dropped labels a label's seconds are those of the nominal rate.
        number = int(Fraction(count, rates[0]) * rates[1]) + int(elapsed * new)
    seconds, frames = divmod(number, rates[1])
    return f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{';' if drop else ':'}{frames:02d}"


def _usual(rate: Fraction) -> bool:
    return rate.denominator == 1 or (rate.denominator == 1001 and rate.numerator % 1000 == 0)
