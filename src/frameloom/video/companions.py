"""What else belongs to a video file, carried over: sound, subtitles, covers, chapters, title, dates, place, time
code, attached fonts, and which streams are the default or forced.

What a container can hold is not looked up but tried: a file of one frame with everything in it is written in
memory and read back, before any work, and whatever is missing there is named in one line.
"""

import io
import itertools
import logging
import mimetypes
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import torch

from frameloom.errors import InputError
from frameloom.video.clip import Passthrough
from frameloom.video.colour import UNSPECIFIED, Colour, native_from_rgb
from frameloom.video.demux import Clock, open_input, steady
from frameloom.video.encoding import Encoding
from frameloom.video.matroska import set_display_aspect
from frameloom.video.timecode import moved

log = logging.getLogger("frameloom")

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
_PACKETS, _LOOK = 4, 4000  # of each stream to try a container with, and how far to look for them

# Said by muxers of their own work, or true of the old pictures alone.
_TECHNICAL = re.compile(
    r"major_brand|minor_version|compatible_brands|(.*_)?encoder(_options)?|encoding_tool|software|duration|rotate|"
    r"timecode|handler_name|vendor_id|alpha_mode|bps.*|number_of_.*|_statistics_.*|source_id.*|stereo_mode|filename|mimetype",
    re.IGNORECASE,
)
# QuickTime's long names for what other containers call shorter.
_APPLE = {"com.apple.quicktime.location.ISO6709": "location", "com.apple.quicktime.make": "make",
          "com.apple.quicktime.model": "model", "com.apple.quicktime.creationdate": "date"}  # fmt: skip


def video_stream(container: av.container.OutputContainer, encoding: Encoding, suffix: str = ".nut") -> av.VideoStream:
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


@dataclass(frozen=True)
class Cargo:
    """What of a source goes into the new file beside the pictures."""

    streams: tuple[int, ...] = ()
    covers: tuple[int, ...] = ()
    attachments: tuple[int, ...] = ()
    chapters: tuple[dict, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)


def open_output(
    file: str | io.BytesIO, suffix: str, encoding: Encoding
) -> tuple[av.container.OutputContainer, av.VideoStream]:
    """A new file of the kind that `suffix` names, with its video stream set up for `encoding`."""
    kind = CONTAINERS[suffix]
    # Matroska would draw random identifiers: the same input must end in the same bytes.
    options = {"fflags": "+bitexact"}
    if kind in ("mp4", "mov") and isinstance(file, str):
        options["movflags"] = "+faststart"  # reads the file once more by its name
    container = av.open(file, "w", format=kind, options=options)
    return container, video_stream(container, encoding, suffix)


def load(
    cargo: Cargo,
    source: av.container.InputContainer,
    output: av.container.OutputContainer,
    video: av.VideoStream,
    stream: int,
) -> dict[int, av.stream.Stream]:
    """Set up everything of `cargo` but its packets; the new streams by the numbers of the old ones."""
    copies: dict[int, av.stream.Stream] = {}
    for index in (*cargo.streams, *cargo.covers):
        old = source.streams[index]
        if index in cargo.covers and output.format.name == "matroska":
            kind = {"mjpeg": "jpg"}.get(old.codec_context.name, old.codec_context.name)
            data = b"".join(bytes(packet) for packet in itertools.islice(_packets(source, [old]), 1))
            output.add_attachment(f"cover.{kind}", mimetypes.types_map.get(f".{kind}", f"image/{kind}"), data)
            continue
        new = copies[index] = output.add_stream_from_template(old, opaque=True)
        new.metadata.update(_said(old.metadata))
        new.disposition = old.disposition
    for index in cargo.attachments:
        old = source.streams[index]
        name = old.metadata.get("filename", f"attachment {index}")
        output.add_attachment(name, old.metadata.get("mimetype", "application/octet-stream"), old.data)
    old_video = _video(source, stream)
    video.metadata.update(_said(old_video.metadata))
    video.disposition = old_video.disposition
    output.metadata.update({key: text for key, text in cargo.tags.items() if key != "timecode"})
    if "timecode" in cargo.tags:
        (video.metadata if output.format.name in ("mp4", "mov") else output.metadata)["timecode"] = cargo.tags[
            "timecode"
        ]
    if cargo.chapters:
        output.set_chapters(list(cargo.chapters))
    return copies


def _said(metadata: dict[str, str]) -> dict[str, str]:
    return {_APPLE.get(key, key): text for key, text in metadata.items() if not _TECHNICAL.fullmatch(key)}


def _video(source: av.container.InputContainer, stream: int) -> av.VideoStream:
    return [s for s in source.streams.video if not _is_cover(s)][stream]


def _is_cover(stream: av.stream.Stream) -> bool:
    return stream.type == "video" and bool(stream.disposition & av.stream.Disposition.attached_pic)


def _packets(source: av.container.InputContainer, streams: Iterable[av.stream.Stream]) -> Iterator[av.Packet]:
    return (packet for packet in source.demux(list(streams)) if packet.size)


def everything(source: av.container.InputContainer, span: Passthrough, encoding: Encoding) -> Cargo:
    """All that the source has beside its pictures, on the clock of the new file."""
    tags = _said(source.metadata)
    old_video = _video(source, span.stream)
    code = next(
        (text for held in (old_video, source, *source.streams.data) if (text := held.metadata.get("timecode"))),
        source.metadata.get("TIMECODE"),
    )
    if code is not None:
        old = Fraction(old_video.average_rate or encoding.rate)
        label = moved(code, old, encoding.rate, span.origin - span.first if span.timed else Fraction(0))
        if label is None:
            log.warning("the time code %s has no meaning at %s frames a second and is left out", code, encoding.rate)
        else:
            tags["timecode"] = label
    covers = tuple(s.index for s in source.streams.video if _is_cover(s))
    attachments = tuple(s.index for s in source.streams.attachments)
    if not span.timed:
        return Cargo(covers=covers, attachments=attachments, tags=tags)
    return Cargo(
        streams=tuple(s.index for s in (*source.streams.audio, *source.streams.subtitles)),
        covers=covers,
        attachments=attachments,
        chapters=tuple(_chapters(source, span)),
        tags=tags,
    )


def _chapters(source: av.container.InputContainer, span: Passthrough) -> Iterator[dict]:
    for chapter in source.chapters():
        tick = chapter["time_base"]
        stop = chapter["end"] if span.stop is None else min(chapter["end"], round(span.stop / tick))
        shift = round(span.origin / tick)
        start, end = max(0, chapter["start"] - shift), stop - shift
        if start < end:
            yield chapter | {"start": start, "end": end}


def choose(span: Passthrough, encoding: Encoding, suffix: str) -> Cargo:
    """What of the source a container of this kind can hold; the rest is named in the log.

    Raises InputError when not even the pictures can be written.
    """
    with open_input(span.path) as source:
        cargo = everything(source, span, encoding)
    try:
        lost, said = _missing(cargo, span, encoding, suffix)
    except (av.error.FFmpegError, OSError, ValueError):
        # Something cannot even be tried; find out what, one after the other.
        lost, said = set(), []
        for index in (*cargo.streams, *cargo.covers, *cargo.attachments):
            try:
                _missing(_only(cargo, {index}), span, encoding, suffix)
            except (av.error.FFmpegError, OSError, ValueError):
                lost.add(index)
        rest, said = _missing(_only(cargo, set(_indices(cargo)) - lost), span, encoding, suffix)
        lost |= rest
    with open_input(span.path) as source:
        names = [_name(source.streams[index]) for index in sorted(lost)]
    for what in sorted({*names, *said}):
        log.warning("%s cannot live in a %s file and is left out", what, suffix)
    return _only(cargo, set(_indices(cargo)) - lost)


def _indices(cargo: Cargo) -> tuple[int, ...]:
    return (*cargo.streams, *cargo.covers, *cargo.attachments)


def _only(cargo: Cargo, indices: set[int]) -> Cargo:
    kept = {
        name: tuple(index for index in getattr(cargo, name) if index in indices)
        for name in ("streams", "covers", "attachments")
    }
    return replace(cargo, **kept)


def _name(stream: av.stream.Stream) -> str:
    if stream.type == "attachment":
        return f"attachment ({stream.metadata.get('filename', stream.index)})"
    name = stream.codec_context.name if stream.codec_context else "unknown"
    return f"{'cover' if _is_cover(stream) else stream.type} ({ {'mp3float': 'mp3'}.get(name, name) })".replace(
        "( ", "("
    )


def trial(encoding: Encoding, suffix: str, cargo: Cargo | None = None, span: Passthrough | None = None) -> bytes:
    """A file of one black frame and the first packets of everything in `cargo`."""
    file = io.BytesIO()
    black = native_from_rgb(torch.zeros(3, encoding.height, encoding.width), encoding.pix_fmt, encoding.colour)
    black.pts, black.time_base = 0, encoding.time_base
    output, video = open_output(file, suffix, encoding)
    with output:
        if cargo is None or span is None:
            output.mux(in_order([*video.encode(black), *video.encode(None)]))
        else:
            with open_input(span.path) as source:
                copies = load(cargo, source, output, video, span.stream)
            with open_input(span.path) as source:
                output.mux(in_order([*video.encode(black), *video.encode(None)]))
                for packet in _first_packets(source, copies):
                    packet.stream = copies[packet.stream_index]
                    output.mux_one(packet)
    return file.getvalue()


def in_order(packets: list[av.Packet]) -> list[av.Packet]:
    """Packets of one or two frames, decoded as they are shown: x265 4.1 leaves chance numbers as times of decoding."""
    for packet in packets:
        packet.dts = packet.pts
    return packets


def keep_shape(file: Path | io.BytesIO, suffix: str, encoding: Encoding) -> None:
    """See that a container that can say the shape of pixels does."""
    if CONTAINERS[suffix] in ("matroska", "webm") and encoding.pixel_aspect != 1:
        set_display_aspect(file, Fraction(encoding.width, encoding.height) * encoding.pixel_aspect)


def say_what_changes(encoding: Encoding, suffix: str) -> None:
    """Write a frame and read it back: what a file of this kind cannot say of its pictures is named in the log.

    Raises InputError when the pictures cannot be written.
    """
    try:
        file = io.BytesIO(trial(encoding, suffix))
        keep_shape(file, suffix, encoding)
        file.seek(0)
        with av.open(file) as back:
            stream = back.streams.video[0]
            frame = next(back.decode(stream))
            aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
            found, wanted = replace(Colour.of(frame), depth=encoding.colour.depth), encoding.colour
    except (OSError, ValueError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        why = getattr(error, "strerror", None) or error
        if suffix == ".mkv":
            raise InputError(f"the pictures cannot be written as {encoding} ({why})") from None
        say_what_changes(encoding, ".mkv")  # is it the codec or the container?
        raise InputError(f"{encoding} cannot live in a {suffix} file ({why}); .mkv takes every --codec") from None
    parts = {
        "matrix": found.matrix != wanted.matrix,
        "range": found.full_range != wanted.full_range,
        "primaries": wanted.primaries not in (found.primaries, UNSPECIFIED),
        "transfer": wanted.transfer not in (found.transfer, UNSPECIFIED),
        "place of chroma": found.siting != wanted.siting,
    }
    if changed := [name for name, differs in parts.items() if differs]:
        log.warning("a %s file of %s cannot say the colour's %s; players will guess", suffix, encoding.encoder,
                    ", ".join(changed))  # fmt: skip
    if aspect != encoding.pixel_aspect:
        log.warning("a %s file of %s cannot say that pixels are %s:%s; it will look narrower or wider", suffix,
                    encoding.encoder, encoding.pixel_aspect.numerator, encoding.pixel_aspect.denominator)  # fmt: skip


def _first_packets(source: av.container.InputContainer, copies: dict[int, av.stream.Stream]) -> Iterator[av.Packet]:
    """The first few packets of every stream, each stream's beginning at 0."""
    begun: dict[int, int] = {}
    counts = dict.fromkeys(copies, _PACKETS)
    if not copies:
        return
    for packet in itertools.islice(_packets(source, [source.streams[index] for index in copies]), _LOOK):
        index = packet.stream_index
        if not counts[index] or packet.dts is None:
            continue
        counts[index] -= 1
        shift = begun.setdefault(index, packet.dts)
        packet.dts -= shift
        if packet.pts is not None:
            packet.pts -= shift
        yield packet
        if not any(counts.values()):
            return


def _missing(cargo: Cargo, span: Passthrough, encoding: Encoding, suffix: str) -> tuple[set[int], list[str]]:
    """Which streams of `cargo` a trial file does not give back, and what else it does not, in words."""
    file = io.BytesIO(trial(encoding, suffix, cargo, span))
    with open_input(span.path) as source, av.open(file) as back:
        found = [s for s in back.streams if s.type in ("audio", "subtitle")]
        lost: set[int] = set()
        said = []
        if len(found) == len(cargo.streams):
            for index, new in zip(cargo.streams, found, strict=True):
                old = source.streams[index]
                heard = old.type != "audio" or _decodes(file, new.index) or not _decodes(span.path, index)
                if not heard:
                    lost.add(index)
                flags = old.disposition & ~new.disposition & _FLAGS
                said += [f"the flag {flag.name} of {_name(old)}" for flag in flags]
        else:
            lost = set(cargo.streams)
        held = {s.metadata.get("filename") for s in back.streams.attachments}
        lost |= {index for index in cargo.attachments if source.streams[index].metadata.get("filename") not in held}
        if len([s for s in back.streams.video if _is_cover(s)]) < len(cargo.covers):
            lost |= set(cargo.covers)
        if len(back.chapters()) < len(cargo.chapters):
            said.append(f"chapters ({len(cargo.chapters)})")
        kept = {key.lower() for held in (back, *back.streams.video, *back.streams.data) for key in held.metadata}
        said += [f"the tag {key}" for key in cargo.tags if key.lower() not in kept]
    return lost, said


_FLAGS = (
    av.stream.Disposition.default | av.stream.Disposition.forced | av.stream.Disposition.comment
    | av.stream.Disposition.hearing_impaired | av.stream.Disposition.visual_impaired
)  # fmt: skip


def _decodes(file: Path | io.BytesIO, index: int) -> bool:
    """Whether the first packets of a stream are sound to its decoder."""
    with av.open(io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else str(file)) as container:
        try:
            for packet in itertools.islice(_packets(container, [container.streams[index]]), _PACKETS):
                packet.decode()
        except av.error.FFmpegError:
            return False
    return True


def packets(
    cargo: Cargo, source: av.container.InputContainer, copies: dict[int, av.stream.Stream], span: Passthrough
) -> Iterator[tuple[Fraction, av.Packet]]:
    """(instant, packet) of the source's sound, subtitles and covers within `span`, on the clock of the new file."""
    if not copies:
        return
    for packet in steady(source, [source.streams[index] for index in copies], Clock()):
        if packet.size == 0 or packet.dts is None:
            continue
        tick, index = packet.time_base, packet.stream_index
        if index in cargo.covers:
            packet.pts = packet.dts = 0
        else:
            instant = (packet.pts if packet.pts is not None else packet.dts) * tick
            if span.start is not None and instant < span.start:
                continue
            if span.stop is not None and instant >= span.stop:
                continue
            shift = round(span.origin / tick)
            packet.dts -= shift
            if packet.pts is not None:
                packet.pts -= shift
        moment = packet.dts * tick
        packet.stream = copies[index]
        yield moment, packet
