#!/usr/bin/env bash
# PyAV 18.1: a sample aspect ratio set on an output stream reaches the encoder and MP4, but not Matroska, whose muxer
# reads it from a field of the stream that PyAV does not set. Anamorphic VP9, AV1 and FFV1, whose own streams do not say
# it, come back with square pixels.
# Exits 0 while the behaviour is as stated, 1 when it differs.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check av==18.1.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
from fractions import Fraction
import av

def written(name, codec):
    with av.open(name, "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        for number in range(3):
            frame = av.VideoFrame(160, 96, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([100]) * plane.buffer_size)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with av.open(name) as back:
        return back.streams.video[0].sample_aspect_ratio

print(f"PyAV {av.__version__}, libavformat {'.'.join(map(str, av.library_versions['libavformat']))}")
kept = {}
for name, codec in (("a.mp4", "libvpx-vp9"), ("a.mkv", "libvpx-vp9"), ("b.mp4", "libx264"), ("b.mkv", "libx264")):
    seen = written(name, codec)
    kept[name] = seen == Fraction(64, 45)
    print(f"{codec} in {name[-3:]}: {seen}")
sys.exit(kept != {"a.mp4": True, "a.mkv": False, "b.mp4": True, "b.mkv": True})
PY
