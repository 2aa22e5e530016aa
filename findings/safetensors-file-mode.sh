#!/usr/bin/env bash
# safetensors: save_file makes files that only their owner can read, whatever the umask, and takes away the permissions
# of a file that it replaces. Neither is in the function's documentation; a folder of weights written by one user cannot
# be read by another, or by a server that runs as somebody else.
# Exits 0 while the behaviour is as stated, 1 when it differs.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$work"
umask 022
"$work/venv/bin/python" - <<'PY'
import os, stat, sys
import numpy as np, safetensors
from safetensors.numpy import save_file

def mode(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))

open("plain", "w").close()
save_file({"a": np.zeros(2)}, "new.safetensors")
open("old.safetensors", "w").close()
os.chmod("old.safetensors", 0o644)
save_file({"a": np.zeros(2)}, "old.safetensors")
seen = {name: mode(name) for name in ("plain", "new.safetensors", "old.safetensors")}
print(f"safetensors {safetensors.__version__}, umask 022")
print(f"a file by open():                     {seen['plain']}")
print(f"a new file by save_file():            {seen['new.safetensors']}")
print(f"a 0644 file replaced by save_file():  {seen['old.safetensors']}")
sys.exit(seen != {"plain": "0o644", "new.safetensors": "0o600", "old.safetensors": "0o600"})
PY
