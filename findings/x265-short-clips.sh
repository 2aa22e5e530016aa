#!/usr/bin/env bash
# x265 through FFmpeg 8.1 (PyAV): a stream of one or two frames gets chance numbers as its times of decoding, another
# number with every run, so that writing such a stream into MP4 fails now and then. From three frames on they are right.
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

def decoding_times(count):
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 160, 96, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), 25
    encoder.options = {"x265-params": "log-level=none"}
    packets = []
    for number in range(count):
        frame = av.VideoFrame(160, 96, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([100 + number]) * plane.buffer_size)
        frame.pts, frame.time_base = number, Fraction(1, 25)
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    return tuple(packet.dts for packet in packets)

print(f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}")
absurd = {}
for count in (1, 2, 3, 5):
    seen = {decoding_times(count) for _ in range(40)}
    absurd[count] = any(abs(time) > 1000 for times in seen for time in times)
    print(f"{count} frames: {len(seen)} different lists of decoding times in 40 runs, such as {sorted(seen)[0]}")
sys.exit(absurd != {1: True, 2: True, 3: False, 5: False})
PY
