"""Static metadata of HDR10: the screen that a film was graded on and its brightest light."""

import struct
from dataclasses import dataclass
from fractions import Fraction

import av

from frameloom.video.orientation import side_data


@dataclass(frozen=True)
class Hdr:
    """`primaries` are chromaticities (x, y) of red, green, blue and white, `luminance` the screen's darkest and
    brightest in cd/m² (SMPTE ST 2086); `light` the MaxCLL and MaxFALL of CTA-861.3 in cd/m². None is unsaid."""

    primaries: tuple[tuple[Fraction, Fraction], ...] | None = None
    luminance: tuple[Fraction, Fraction] | None = None
    light: tuple[int, int] | None = None

    @staticmethod
    def of(frame: av.VideoFrame) -> "Hdr | None":
        """What the first frame carries, None if nothing."""
        screen = side_data(frame, "MASTERING_DISPLAY_METADATA")
        level = side_data(frame, "CONTENT_LIGHT_LEVEL")
        primaries = luminance = None
        if screen is not None and len(screen) >= 88:
            *numbers, has_primaries, has_luminance = struct.unpack("=22i", screen[:88])
            values = [Fraction(top, bottom or 1) for top, bottom in zip(numbers[::2], numbers[1::2], strict=True)]
            if has_primaries:
                primaries = tuple(zip(values[0:8:2], values[1:8:2], strict=True))
            if has_luminance:
                luminance = values[8], values[9]
        light = None if level is None else struct.unpack("=2I", level[:8])
        return Hdr(primaries, luminance, light) if primaries or luminance or light else None

    def screen(self, chromaticity: int, luminance: int) -> str | None:
        """`G(x,y)B(x,y)R(x,y)WP(x,y)L(max,min)` as encoders take it, in units of 1 / `chromaticity` and
        1 / `luminance`; None unless both parts are known."""
        if self.primaries is None or self.luminance is None:
            return None

        def number(value: Fraction, scale: int) -> str:
            return str(round(value * scale)) if scale > 1 else f"{float(value):.6f}"

        red, green, blue, white = (",".join(number(part, chromaticity) for part in point) for point in self.primaries)
        low, high = (number(value, luminance) for value in self.luminance)
        return f"G({green})B({blue})R({red})WP({white})L({high},{low})"
