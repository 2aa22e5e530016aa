"""`write`: encode a clip to a file, whole or not at all, and able to go on after a kill.

Frames are encoded in closed segments of `SEGMENT` frames, each by a fresh encoder, kept in `NAME.partial/`
beside the result. At the end the segments are joined without re-encoding, the sound and subtitles of the
source are copied packet for packet, and the file takes its name in one step. A run that resumes skips the
segments that are there; because every segment starts from nothing, it ends in the same bytes as a run that
was never disturbed.
"""

import errno
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import torch

from frameloom.errors import InputError, Interrupted
from frameloom.progress import Progress, silent
from frameloom.video.clip import Clip, Frame, Info, Passthrough
from frameloom.video.colour import Colour, tag

log = logging.getLogger("frameloom")

SEGMENT = 240
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}


@dataclass(frozen=True)
class Codec:
    """An encoder: its FFmpeg name, the quality and preset it starts from, and what it can hold."""

    encoder: str
    crf: int | None
    crf_range: tuple[int, int]
    preset: str | None
    ten_bit: bool
    odd_420: bool = False
    options: tuple[tuple[str, str], ...] = ()


CODECS = {
    "h264": Codec("libx264", 18, (0, 51), "medium", ten_bit=False),
    "h265": Codec("libx265", 22, (0, 51), "medium", ten_bit=True, options=(("x265-params", "log-level=error"),)),
    "av1": Codec("libsvtav1", 30, (1, 63), "8", ten_bit=True),
    "vp9": Codec("libvpx-vp9", 31, (0, 63), "4", ten_bit=False, odd_420=True,
                 options=(("b:v", "0"), ("row-mt", "1"), ("deadline", "good"))),
    "ffv1": Codec("ffv1", None, (0, 0), None, ten_bit=True, odd_420=True, options=(("level", "3"),)),
}  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """Everything that decides the bytes of a segment, so that two runs can be compared."""

    encoder: str
    options: tuple[tuple[str, str], ...]
    pix_fmt: str
    colour: Colour
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    pixel_aspect: Fraction


def encoding_for(info: Info, codec: str, crf: int | None, preset: str | None, tick: Fraction) -> Encoding:
    """Choose pixel format and options for one of `CODECS`; says (once, in the log) what cannot be kept.

    Raises InputError for an unknown codec, a crf out of its range, or a size that the codec cannot hold.
    """
    if codec not in CODECS:
        raise InputError(f"--codec {codec}: no such codec; there are {', '.join(CODECS)}")
    spec = CODECS[codec]
    if crf is not None and not spec.crf_range[0] <= crf <= spec.crf_range[1]:
        low, high = spec.crf_range
        raise InputError(f"--crf {crf}: {codec} takes {f'{low} to {high}' if high else 'no crf, it is lossless'}")
    depth = info.colour.depth
    if depth > 8 and not spec.ten_bit:
        keepers = ", ".join(name for name, other in CODECS.items() if other.ten_bit)
        log.warning("%d-bit input is written at 8 bit by %s; --codec %s keeps more", depth, codec, keepers)
    depth = min(depth, 10 if codec != "ffv1" else 16) if spec.ten_bit else 8
    suffix = "" if depth <= 8 else "10le" if depth <= 10 else "12le" if depth <= 12 else "16le"
    colour = replace(info.colour.as_video(), depth=8 if not suffix else int(suffix[:2]))
    odd = info.width % 2 or info.height % 2
    if codec == "ffv1" and info.colour.as_video() != info.colour:
        pix_fmt, colour = (
            ("bgr0" if depth <= 8 else "gbrp16le"),
            replace(info.colour, depth=8 if depth <= 8 else 16),
        )
    elif codec == "ffv1" and info.pix_fmt.removeprefix("yuvj").startswith(("yuv422p", "yuv444p")):
        pix_fmt = f"{info.pix_fmt[:7]}{suffix}"
    elif odd and codec == "av1":
        raise InputError(f"--codec av1: SVT-AV1 needs even sizes, this is {info.width}x{info.height}; use h265 or vp9")
    else:
        pix_fmt = f"yuv{'444' if odd and not spec.odd_420 else '420'}p{suffix}"
    options = dict(spec.options)
    if spec.crf is not None:
        options["crf"] = str(spec.crf if crf is None else crf)
    if codec == "h264" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # x264's AVX-512 code reads beyond the picture when its width is no multiple of 64: the same input then
        # encodes to different bytes from run to run, and a resumed file would not equal an undisturbed one.
        options["x264-params"] = "asm=AVX2"
    if codec == "h265" and min(info.width, info.height) < 64:
        # x265's assembly writes past its buffers when a side is below one coding tree unit.
        options["x265-params"] += ":no-asm=1"
    if spec.preset is not None:
        options["cpu-used" if codec == "vp9" else "preset"] = preset or spec.preset
    elif preset:
        raise InputError(f"--preset {preset}: {codec} has no presets")
    return Encoding(
        spec.encoder, tuple(sorted(options.items())), pix_fmt, colour, info.width, info.height, info.rate, tick,
        info.pixel_aspect,
    )  # fmt: skip


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
    encoding = encoding_for(clip.info, codec, crf, preset, tick)
    suffix = path.suffix.lower()
    with av.open(io.BytesIO(), "w", format=CONTAINERS[suffix]) as trial:
        _video_stream(trial, encoding, suffix)
    job = hashlib.sha256(f"{clip.source.fingerprint()}\n{encoding}\n{SEGMENT}".encode()).hexdigest()
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
        _join(segments, result, path.suffix, encoding, clip.source.passthrough)
        os.replace(result, path)
        shutil.rmtree(partial)
    except KeyboardInterrupt:
        kept = len(list(partial.glob("*.nut"))) * SEGMENT
        raise Interrupted(f"{path}: stopped; {kept} frames are kept, the same command with --resume goes on") from None
    except (OSError, av.error.FFmpegError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; nothing was kept") from None
        raise InputError(f"{path}: cannot be written as {_name(encoding)} ({error.strerror or error})") from None
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
    count = 0
    with av.open(str(temporary), "w", format="nut", options={"avoid_negative_ts": "disabled"}) as container:
        stream = _video_stream(container, encoding)
        for frame in itertools.chain([first_frame], frames):
            picture = tag(frame.to_native(encoding.pix_fmt, encoding.colour), encoding.colour)
            picture.pts, picture.time_base = round(frame.time / encoding.time_base), encoding.time_base
            picture.pict_type = av.video.frame.PictureType.NONE
            container.mux(stream.encode(picture))
            count += 1
            progress("encoding", first + count, total)
        container.mux(stream.encode(None))
    os.replace(temporary, target)
    return count


def _video_stream(container: av.container.OutputContainer, encoding: Encoding, suffix: str = ".nut") -> av.VideoStream:
    """A video stream set up for `encoding`: to encode into, or to join what was encoded the same way."""
    try:
        stream = container.add_stream(encoding.encoder, rate=encoding.rate, options=dict(encoding.options))
    except ValueError:
        raise InputError(f"{encoding.encoder} cannot live in a {suffix} file; .mkv takes every --codec") from None
    stream.width, stream.height, stream.pix_fmt = encoding.width, encoding.height, encoding.pix_fmt
    context, colour = stream.codec_context, encoding.colour
    context.time_base = encoding.time_base
    context.sample_aspect_ratio = encoding.pixel_aspect
    context.thread_type = "AUTO"
    context.colorspace, context.color_range = colour.matrix, 2 if colour.full_range else 1
    context.color_primaries, context.color_trc = colour.primaries, colour.transfer
    context.flags |= av.codec.context.Flags.global_header
    return stream


def _name(encoding: Encoding) -> str:
    settings = " ".join(f"{key}={value}" for key, value in encoding.options if "params" not in key)
    return f"{encoding.encoder} {encoding.width}x{encoding.height} {encoding.pix_fmt} {settings}".strip()


def _join(segments: list[Path], target: Path, suffix: str, encoding: Encoding, passthrough: Passthrough | None) -> None:
    """Join the segments into the final container, interleaving the packets of sound and subtitles by time."""
    kind = CONTAINERS[suffix.lower()]
    # Matroska would draw random identifiers: the same input must end in the same bytes.
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if kind in ("mp4", "mov") else {})
    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(target), "w", format=kind, options=options))
        video = _video_stream(output, encoding, suffix)
        companions = iter(())
        if passthrough is not None:
            source = stack.enter_context(av.open(str(passthrough.path), metadata_errors="ignore"))
            companions = _companions(source, output, passthrough, suffix)
        waiting = next(companions, None)
        # NUT keeps when a frame is shown, not when it must be decoded. Decoding order is display order brought
        # forward by the deepest reordering that occurs, so that no frame is decoded after it is shown.
        shown = [_stamps(segment, encoding.time_base) for segment in segments]
        delay = max(early - stamp for piece in shown for early, stamp in zip(sorted(piece), piece, strict=True))
        for segment, stamps in zip(segments, shown, strict=True):
            with av.open(str(segment)) as piece:
                packets = (packet for packet in piece.demux(video=0) if packet.size)
                for packet, stamp, early in zip(packets, stamps, sorted(stamps), strict=True):
                    packet.time_base, packet.pts, packet.dts = encoding.time_base, stamp, early - delay
                    packet.duration = round(1 / (encoding.rate * encoding.time_base))
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


def _companions(
    source: av.container.InputContainer, output: av.container.OutputContainer, span: Passthrough, suffix: str
) -> Iterator[tuple[Fraction, av.Packet]]:
    """(instant, packet) of the source's sound and subtitles within `span`, on the clock of the new file."""
    copies = {}
    lost = set()
    for stream in (*source.streams.audio, *source.streams.subtitles):
        name = stream.codec_context.name if stream.codec_context else "unknown"
        name = {"mp3float": "mp3"}.get(name, name)
        if name not in output.supported_codecs:
            lost.add(f"{stream.type} ({name})")
            continue
        copies[stream.index] = output.add_stream_from_template(stream, opaque=True)
        copies[stream.index].metadata.update(stream.metadata)
    for what in sorted(lost):
        log.warning("%s cannot live in a %s file and is left out", what, suffix)

    def packets() -> Iterator[tuple[Fraction, av.Packet]]:
        if not copies:
            return
        for packet in source.demux([source.streams[index] for index in copies]):
            if packet.size == 0 or packet.dts is None:
                continue
            base = packet.time_base
            instant = (packet.pts if packet.pts is not None else packet.dts) * base
            if span.start is not None and instant < span.start:
                continue
            if span.stop is not None and instant >= span.stop:
                continue
            shift = round(span.origin / base)
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
            moment = packet.dts * base
            packet.stream = copies[packet.stream.index]
            yield moment, packet

    return packets()
