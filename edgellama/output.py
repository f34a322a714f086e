"""Writing a file so that a reader sees the old one or the new one whole, never a part.

Knows nothing about what is written.
"""

import contextlib
import glob
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgellama.errors import EdgeLlamaError, OutputError

STALE = 24 * 3600  # seconds after which a temporary file has no writer any more


@contextlib.contextmanager
def atomic_output(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write into; it takes the place of `path` when the block ends well.

    The bytes are on the disk before the name changes hands. If the block raises, or writing fails
    (disk full, quota, no permission), `path` stays as it was, the temporary file beside it is
    removed, and an OSError becomes OutputError. A link is followed once: its target is replaced.
    """
    target = _target(Path(path))
    stem = f".{target.name[:100]}."
    _sweep(target.parent, stem)
    temporary = target.with_name(f"{stem}{secrets.token_hex(6)}.tmp")
    try:
        with contextlib.ExitStack() as on_failure:
            file = open(temporary, "xb")  # noqa: SIM115 - closed below, before the renaming
            on_failure.callback(_discard, file, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, target)
            on_failure.pop_all()
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        raise OutputError(
            f"cannot be written: {error.strerror or error}", path=path, hint="Nothing was changed"
        ) from error


def _target(path: Path) -> Path:
    try:
        target = path.resolve()
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise OutputError(f"cannot be written: {error}", path=path) from error
    if not stat.S_ISREG(mode):
        raise OutputError("is not a regular file, and is left alone", path=path)
    return target


def _discard(file: BinaryIO, temporary: Path) -> None:
    with contextlib.suppress(OSError):
        file.close()  # flushes, and may find the disk full once more
    with contextlib.suppress(OSError):
        temporary.unlink()


def _sweep(folder: Path, stem: str) -> None:
    """Remove what a killed writer of the same file left behind."""
    for old in folder.glob(glob.escape(stem) + "*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where folders can be opened at all."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems refuse; the file itself is safe
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
