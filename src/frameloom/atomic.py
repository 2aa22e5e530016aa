"""Files that appear under their name when they are whole, readable by whom the umask says."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; when the block ends well, what is there takes the name in one step.

    It then has the permissions of any new file, whichever library wrote it: some make theirs private.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; `facts` are kept in its header."""
    from safetensors.torch import save_file

    with aside(path) as partial:
        save_file(dict(tensors), partial, metadata=None if facts is None else dict(facts))
