"""`write`: encode a clip to a file, whole or not at all, and able to go on after a kill.

Frames are encoded in closed segments of `SEGMENT` frames, each by a fresh encoder, kept in `NAME.partial/`
beside the result. At the end the segments are joined without re-encoding, the sound and subtitles of the
source are copied packet for packet, and the file takes its name in one step. A run that resumes skips the
segments that are there; because every segment starts from nothing, it ends in the same bytes as a run that
was never disturbed.
"""

import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path

import av

from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.video.clip import Clip, Frame, Passthrough
from frameloom.video.colour import tag
from frameloom.video.companions import (
    CONTAINERS,
    Cargo,
    choose,
    in_order,
    keep_shape,
    load,
    open_output,
    packets,
    say_what_changes,
    video_stream,
)
from frameloom.video.demux import open_input
from frameloom.video.encoding import Encoding, encoding_for
from frameloom.video.times import index_at

log = logging.getLogger("frameloom")

SEGMENT = 240


def write(
    clip: Clip,
    path: str | Path,
    *,
    codec: str = "h264",
    crf: int | None = None,
    preset: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Encode `clip` to `path` (.mp4, .mkv, .webm, .mov, .avi) and return the path.

    Args:
        codec: one of `CODECS`; `crf` and `preset` as that encoder understands them.
        resume: go on with the segments that an earlier, stopped run of the same work left.
        progress: told ("encoding", frames done, frames in all) after every frame.

    Raises:
        InputError: the output cannot be made; nothing is left behind.
        Interrupted: Ctrl-C; what is done is kept for `resume`.
    """
    path = Path(path)
    check_output(clip, path)
    times = clip.times
    if not len(times):
        raise InputError(f"{clip.info.name}: no frames to write")
    tick = 1 / clip.rate if clip.info.regular else _common_tick(times)
    suffix, travels = path.suffix.lower(), clip.source.passthrough
    encoding = encoding_for(clip.info, codec, crf, preset, tick, suffix)
    say_what_changes(encoding, suffix)
    cargo = choose(travels, encoding, suffix) if travels else Cargo()
    job = hashlib.sha256(f"{clip.source.fingerprint()}\n{encoding!r}\n{SEGMENT}".encode()).hexdigest()
    partial = path.with_name(path.name + ".partial")
    try:
        done = _prepare(partial, job, resume)
        frames = clip.frames(done * SEGMENT)
        with closing(frames):
            for number in itertools.count(done):
                count = _encode_segment(itertools.islice(frames, SEGMENT), partial / f"{number:06d}.nut", encoding,
                                        number * SEGMENT, len(times), progress)  # fmt: skip
                if count < SEGMENT:
                    break
        segments = sorted(partial.glob("*.nut"))
        if not segments:
            raise InputError(f"{clip.info.name}: no frame could be read")
        result = partial / f"result{path.suffix}"
        _join(segments, result, suffix, encoding, _durations(times, clip.duration), travels, cargo)
        keep_shape(result, suffix, encoding)
        os.replace(result, path)
        shutil.rmtree(partial)
    except KeyboardInterrupt:
        kept = len(list(partial.glob("*.nut"))) * SEGMENT
        raise Interrupted(f"{path}: stopped; {kept} frames are kept, the same command with --resume goes on") from None
    except (OSError, av.error.FFmpegError) as error:
        kept = len(list(partial.glob("*.nut"))) * SEGMENT
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        kept = f"{kept} frames are kept, --resume goes on, under another name too" if kept else "nothing was kept"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; {kept}") from None
        raise InputError(f"{path}: cannot be written as {encoding} ({error.strerror or error}); {kept}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def check_output(clip: Clip, path: Path) -> None:
    """Refuse, before any work, an output that cannot become a file."""
    if path.suffix.lower() not in CONTAINERS:
        raise InputError(f"{path}: the name of a video ends in {', '.join(CONTAINERS)}")
    check_target(path, clip.source.inputs())


def check_target(path: Path, inputs: list[Path]) -> None:
    """The folder must exist and take files, and the target must not be one of the inputs."""
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: the folder {folder} may not be written")
    if path.is_dir():
        raise InputError(f"{path}: there is a folder of that name")
    if path.exists() and any(path.samefile(given) for given in inputs if given.exists()):
        raise InputError(f"{path}: the output is the input; give another name")


def _common_tick(times) -> Fraction:
    """A clock that hits every instant of a variable frame rate exactly, or 1/90000 s if none coarse enough does."""
    denominator = math.lcm(*{time.denominator for time in times})
    return Fraction(1, denominator if denominator <= 1_000_000 else 90_000)


def _prepare(partial: Path, job: str, resume: bool) -> int:
    """Make or take over the folder of unfinished work; how many segments are already done."""
    note = partial / "job.json"
    if resume and not partial.exists():
        # The same work under another name: a container that took it not may be why it is resumed.
        for other in partial.parent.glob("*.partial/job.json"):
            if json.loads(other.read_text()).get("job") == job:
                os.replace(other.parent, partial)
                break
    if resume and note.is_file():
        if json.loads(note.read_text()).get("job") != job:
            raise InputError(f"{partial}: the unfinished work is of another input or other settings; delete it or "
                             "give the same command again")  # fmt: skip
        for leftover in (*partial.glob("*.tmp"), *partial.glob("result.*")):
            leftover.unlink()
        segments = sorted(partial.glob("*.nut"))
        # The last segment may be the short one at the end of the clip: then there is nothing left to encode,
        # but encoding it once more costs little and spares a special case.
        return max(0, len(segments) - 1)
    if partial.exists():
        log.warning("%s: unfinished work of an earlier run is thrown away (--resume would go on with it)", partial)
        shutil.rmtree(partial)
    partial.mkdir()
    note.write_text(json.dumps({"job": job}))
    return 0


def _encode_segment(
    frames: Iterator[Frame], target: Path, encoding: Encoding, first: int, total: int, progress: Progress
) -> int:
    """Encode frames to one NUT file (exact time stamps, any codec) under its name when whole; how many there were."""
    first_frame = next(frames, None)
    if first_frame is None:
        return 0
    temporary = target.with_suffix(".tmp")
    ordered = in_order if total - first <= 2 else list
    count = 0
    with av.open(str(temporary), "w", format="nut", options={"avoid_negative_ts": "disabled"}) as container:
        stream = video_stream(container, encoding)
        for frame in itertools.chain([first_frame], frames):
            picture = tag(frame.to_native(encoding.pix_fmt, encoding.colour), encoding.colour)
            picture.pts, picture.time_base = round(frame.time / encoding.time_base), encoding.time_base
            picture.pict_type = av.video.frame.PictureType.NONE
            container.mux(ordered(stream.encode(picture)))
            count += 1
            progress("encoding", first + count, total)
        container.mux(ordered(stream.encode(None)))
    os.replace(temporary, target)
    return count


def _durations(times: Sequence[Fraction], end: Fraction) -> Callable[[Fraction], Fraction]:
    """How long the frame that is shown from an instant on is shown, in seconds."""

    def duration(instant: Fraction) -> Fraction:
        following = index_at(times, instant) + 1
        return (times[following] if following < len(times) else end) - instant

    return duration


def _join(
    segments: list[Path], target: Path, suffix: str, encoding: Encoding, duration: Callable[[Fraction], Fraction],
    travels: Passthrough | None, cargo: Cargo,
) -> None:  # fmt: skip
    """Join the segments into the final container, interleaving the packets of sound and subtitles by time."""
    with ExitStack() as stack:
        output, video = open_output(str(target), suffix, encoding)
        stack.enter_context(output)
        companions: Iterator[tuple[Fraction, av.Packet]] = iter(())
        if travels is not None:
            with open_input(travels.path) as source:
                copies = load(cargo, source, output, video, travels.stream)
            companions = packets(cargo, stack.enter_context(open_input(travels.path)), copies, travels)
        waiting = next(companions, None)
        # NUT keeps when a frame is shown, not when it must be decoded. Decoding order is display order brought
        # forward by the deepest reordering that occurs, so that no frame is decoded after it is shown.
        shown = [_stamps(segment, encoding.time_base) for segment in segments]
        delay = max(early - stamp for piece in shown for early, stamp in zip(sorted(piece), piece, strict=True))
        final = max(stamp for piece in shown for stamp in piece)
        for segment, stamps in zip(segments, shown, strict=True):
            with av.open(str(segment)) as piece:
                frames = (packet for packet in piece.demux(video=0) if packet.size)
                for packet, stamp, early in zip(frames, stamps, sorted(stamps), strict=True):
                    packet.time_base, packet.pts, packet.dts = encoding.time_base, stamp, early - delay
                    # MP4 gives the last frame in the order of decoding what is left, whichever that is.
                    ending = final if early == final else stamp
                    packet.duration = round(duration(ending * encoding.time_base) / encoding.time_base)
                    while waiting is not None and waiting[0] <= packet.dts * encoding.time_base:
                        output.mux_one(waiting[1])
                        waiting = next(companions, None)
                    packet.stream = video
                    output.mux_one(packet)
        while waiting is not None:
            output.mux_one(waiting[1])
            waiting = next(companions, None)


def _stamps(segment: Path, tick: Fraction) -> list[int]:
    """When each packet's frame is shown, in ticks, in the order of decoding."""
    with av.open(str(segment)) as piece:
        packets = (packet for packet in piece.demux(video=0) if packet.size)
        return [round((p.dts if p.pts is None else p.pts) * p.time_base / tick) for p in packets]
