#!/usr/bin/env bash
# PyAV 18.1 with its FFmpeg 8.1: asking a decoded JPEG photograph for its side data raises ValueError when the file has
# an EXIF tag, since FFmpeg 8 hands EXIF over as a kind of side data that PyAV's list of names lacks. The display matrix
# beside it, which says how the photograph is mirrored, cannot be reached then; its angle alone can.
# Exits 0 while the behaviour is as stated, 1 when it differs.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check av==18.1.0 pillow==12.3.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import av
import PIL.Image

exif = PIL.Image.Exif()
exif[0x0112] = 5  # mirrored and turned
PIL.Image.new("RGB", (48, 32), (200, 30, 30)).save("photo.jpg", exif=exif)
PIL.Image.new("RGB", (48, 32), (200, 30, 30)).save("plain.jpg")
print(f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}")
raised = {}
for name in ("plain.jpg", "photo.jpg"):
    with av.open(name) as file:
        frame = next(file.decode(video=0))
        try:
            kinds = [one.type.name for one in frame.side_data]
            raised[name] = False
            print(f"{name}: side data {kinds}, rotation {frame.rotation}")
        except ValueError as error:
            raised[name] = True
            print(f"{name}: ValueError: {error}, rotation {frame.rotation}")
sys.exit(raised != {"plain.jpg": False, "photo.jpg": True})
PY
