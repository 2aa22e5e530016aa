"""Opening a media file, and its packets on one clock that never jumps."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.format

from frameloom.errors import InputError

MAX_PIXELS = 16384 * 16384  # of a picture; more cannot be meant

# Transport streams may start a new clock wherever they were joined. Forwards it takes ten seconds of nothing in all
# streams to call it that (as FFmpeg does), backwards more than a frame.
FORWARD, BACKWARD = Fraction(10), Fraction(1, 10)


def open_input(path: Path | str, **options) -> av.container.InputContainer:
    """Raises InputError: no such file, not allowed, empty, no video."""
    try:
        return av.open(str(path), metadata_errors="ignore", **options)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read (permission denied)") from None
    except (av.error.FFmpegError, ValueError, OSError, UnicodeError) as error:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        why = "the file is empty" if empty else f"not a video that can be read ({reason(error)})"
        raise InputError(f"{path}: {why}") from None


def reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split(":")[0].lower()


class Clock:
    """Moves the time stamps of a container's packets so that a clock that jumps goes on as if it had not."""

    def __init__(self) -> None:
        self.jumps = 0
        self._newest = Fraction(0)
        self._shifts: dict[int, Fraction] = {}
        self._reached: dict[int, Fraction] = {}

    def set(self, packet: av.Packet) -> None:
        """Put the packet's stamps on the steady clock. Packets must come in the order of the file."""
        if packet.dts is None:
            return
        tick, index = packet.time_base, packet.stream_index
        raw = packet.dts * tick
        # At a seam the streams change over one after the other: each keeps its own shift while that still fits.
        for shift in (self._shifts.get(index, self._newest), self._newest):
            if self._follows(index, raw + shift):
                break
        else:
            shift = self._newest = self._reached.get(index, max(self._reached.values())) - raw
            self.jumps += 1
        self._shifts[index] = shift
        end = raw + shift + (packet.duration or 0) * tick
        self._reached[index] = max(end, self._reached.get(index, end))
        if shift:
            packet.dts += round(shift / tick)
            if packet.pts is not None:
                packet.pts += round(shift / tick)

    def _follows(self, index: int, instant: Fraction) -> bool:
        if not self._reached:
            return True
        return self._reached.get(index, instant) - BACKWARD <= instant <= max(self._reached.values()) + FORWARD


def steady(
    container: av.container.InputContainer, wanted: Iterable[av.stream.Stream], clock: Clock
) -> Iterator[av.Packet]:
    """The packets of the `wanted` streams, from the beginning of the file, on a steady clock. Where a format allows
    jumps, sound and pictures are all looked at, so that everyone who asks for some of them sees the same clock."""
    indices = {stream.index for stream in wanted}
    if not container.format.flags & av.format.Flags.ts_discont.value:
        yield from container.demux([container.streams[index] for index in indices])
        return
    timed = {stream.index for stream in (*container.streams.video, *container.streams.audio)}
    for packet in container.demux([container.streams[index] for index in indices | timed]):
        if packet.size and packet.stream_index in timed:
            clock.set(packet)
        if packet.stream_index in indices:
            yield packet
