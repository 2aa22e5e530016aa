#!/usr/bin/env bash
# libswscale 9.5 (FFmpeg 8.1, PyAV 18.1): 16-bit RGB in big-endian order (rgb565be, rgb555be, what QuickTime's Animation
# codec decodes to) is converted to 24-bit RGB as if it were little-endian: other colours, no error. The little-endian
# twin of the same picture comes out right.
# Exits 0 while the behaviour is as stated, 1 when it differs.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check av==18.1.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import av, numpy as np

print(f"PyAV {av.__version__}, libswscale {'.'.join(map(str, av.library_versions['libswscale']))}")
wrong = {}
for name, code, colour in (("rgb565", 0xF800, (255, 0, 0)), ("rgb555", 0x7C00, (255, 0, 0))):
    for order, kind in (("le", "<u2"), ("be", ">u2")):
        frame = av.VideoFrame(64, 16, name + order)
        plane = frame.planes[0]
        plane.update(np.full(plane.buffer_size // 2, code, kind))
        seen = tuple(int(value) for value in frame.reformat(format="rgb24").to_ndarray()[4, 4])
        wrong[name + order] = seen != colour
        print(f"red in {name}{order}: {seen} in rgb24")
sys.exit(wrong != {"rgb565le": False, "rgb565be": True, "rgb555le": False, "rgb555be": True})
PY
