"""The kernels that an app brings along, so that its user compiles nothing: where they lie.

`EDGELLAMA_KERNELS` names a folder that `edgellama warmup --into` filled; an app sets it before it
loads its first model. It is only read. Knows nothing about what is in the files, but for one that
says which sources the kernels were made from: a frozen app has no sources to compare with.
"""

import os
import re
import stat
from functools import cache
from pathlib import Path

VARIABLE = "EDGELLAMA_KERNELS"
SOURCES = "sources.txt"

warnings: list[str] = []  # why the folder is not used; for `model.info`


@cache
def folder() -> Path | None:
    """The folder, or None where none is named, or where anybody could plant code in it."""
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        return None
    found = Path(chosen).absolute()
    problem = _problem(found)
    if problem:
        warnings.append(f"{VARIABLE}: {found} {problem}, and is not used")
        return None
    return found


def _problem(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"cannot be opened ({error.strerror or error})"
    if not stat.S_ISDIR(mode):
        return "is no folder"
    if os.name == "posix" and mode & stat.S_IWOTH:
        return "can be written by every user"
    return None


def sources() -> str | None:
    """The digest of the sources that the folder's kernels were made from; None without one."""
    place = folder()
    if place is None:
        return None
    try:
        text = (place / SOURCES).read_bytes()[:200].decode("ascii", "replace").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None
