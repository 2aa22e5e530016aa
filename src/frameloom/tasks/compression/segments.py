"""A clip in segments, each fitted by itself: for clips longer than memory, which a fit must hold whole.

The file is a container of containers, one for each run of frames. A frame decodes from its own segment alone.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from frameloom.bitstream.container import MAX_SECTIONS, Container, Header, parse, whole
from frameloom.errors import InputError
from frameloom.tasks.compression.base import SectionedCodec, codec_of, describe, pack_times
from frameloom.tasks.compression.fit import State
from frameloom.video.clip import Clip

MEMORY = 1 << 30  # bytes of pictures that a fit holds; longer clips are cut
STAGES = 16  # of a fit, at most


def length(clip: Clip) -> int:
    """Frames of this size that a fit holds in `MEMORY`."""
    return max(2, MEMORY // (3 * clip.info.width * clip.info.height))


class Segments(SectionedCodec):
    """The codec of files that are made of segments."""

    method = "segments"

    @classmethod
    def encode(
        cls, codec: Any, clip: Clip, segment: int, *, size: int | None, state: State | None, **settings: Any
    ) -> bytes:
        """Every `segment` frames by `codec`; a size is shared by their numbers. A killed call loses one segment.

        Raises InputError for a segment below 2 frames and for more segments than a file holds.
        """
        count = len(clip)
        if segment < 2:
            raise InputError(f"--segment {segment}: a segment has 2 frames or more")
        starts = list(range(0, count, segment))
        if len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()  # a network for one frame alone would be waste
        if len(starts) >= MAX_SECTIONS:
            least = -(-count // (MAX_SECTIONS - 1))
            raise InputError(f"--segment {segment}: a file holds {MAX_SECTIONS - 1} segments; take {least} or more")
        parts: dict[str, bytes] = {}
        lengths = [stop - start for start, stop in zip(starts, [*starts[1:], count], strict=True)]
        for number, (start, frames) in enumerate(zip(starts, lengths, strict=True)):
            name, part = f"part{number}", clip[start : start + frames]
            if state is not None:
                state.base = STAGES * number
                if state.resume and state.stage >= state.base + STAGES:
                    parts[name] = state.more[name].numpy().tobytes()
                    continue
            share = None if size is None else (size - 200 - 40 * len(starts)) * frames // count
            parts[name] = codec.encode(part, size=share, state=state, **settings)
            if state is not None:
                state.more.pop("grown", None)
                state.more[name] = torch.from_numpy(np.frombuffer(parts[name], np.uint8).copy())
        first = parse(parts["part0"]).header
        header = replace(describe(clip, cls.method, {"frames": lengths}), width=first.width, height=first.height)
        return Container(header, parts | pack_times(clip)).to_bytes()

    @classmethod
    def decode(cls, data: bytes, frames: Sequence[int] | None = None) -> Iterator[Float[Tensor, "3 h w"]]:
        """The frames asked for, each from its own segment."""
        container = parse(data)
        lengths = _lengths(container.header)
        starts = [0, *accumulate(lengths)]
        wanted = cls.wanted(container.header, frames)
        for number, run in groupby(wanted, lambda frame: bisect_right(starts, frame) - 1):
            part = container.section(f"part{number}")
            inner = parse(part, f"segment {number}").header
            same = (inner.frames, inner.width, inner.height) == (
                lengths[number], container.header.width, container.header.height,
            )  # fmt: skip
            if not same or inner.method == cls.method:
                raise InputError(f"segment {number} is damaged; it holds another video")
            yield from codec_of(inner, f"segment {number}").decode(part, [frame - starts[number] for frame in run])


def _lengths(header: Header) -> list[int]:
    lengths = header.config.get("frames")
    if set(header.config) != {"frames"} or not isinstance(lengths, list) or not lengths:
        raise InputError("the header is damaged; its segments are not described")
    for one in lengths:
        whole(one, 1, header.frames, "the frames of a segment", "the file")
    whole(sum(lengths), header.frames, header.frames, "the frames of all segments", "the file")
    return lengths
