"""What quality costs: bits per pixel, and Bjontegaard's difference between two rate curves."""

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from frameloom.errors import InputError


def bits_per_pixel(size: int, frames: int, height: int, width: int) -> float:
    """8 * size / (frames * height * width) of a file of `size` bytes."""
    return 8 * size / (frames * height * width)


def bd_rate(
    anchor: Sequence[tuple[float, float]],
    test: Sequence[tuple[float, float]],
) -> float:
    """Mean difference in rate at equal quality, in percent; below 0 when `test` needs fewer bits.

    Each curve is (rate, quality in dB) points, any order, at least two. The logarithm of the rate is
    interpolated monotonically (PCHIP) as a function of quality and averaged over the qualities that both
    curves reach. G. Bjontegaard, Calculation of average PSNR differences between RD-curves, VCEG-M33, 2001.

    Raises InputError when the curves share no quality or one of them does not rise.
    """
    curves = []
    for name, points in (("anchor", anchor), ("test", test)):
        rate, quality = np.array(sorted(points, key=lambda point: point[1]), dtype=np.float64).T
        if len(rate) < 2 or (np.diff(quality) <= 0).any() or (rate <= 0).any():
            raise InputError(f"bd_rate: the {name} curve needs two or more points of different quality")
        curves.append(PchipInterpolator(quality, np.log(rate)))
    low = max(curve.x[0] for curve in curves)
    high = min(curve.x[-1] for curve in curves)
    if low >= high:
        raise InputError("bd_rate: the two curves reach no quality in common")
    before, after = (float(curve.integrate(low, high)) / (high - low) for curve in curves)
    return float(100 * np.expm1(after - before))
