"""Writing a folder so that a reader sees the old one or the new one whole, never a part.

Knows nothing about what the folder holds, but for the one file that marks it as edgellama's.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from edgellama.errors import EdgeLlamaError, OutputError
from edgellama.folder_lock import locked
from edgellama.output import STALE, TOKEN, temporary_stem

MARK = "edgellama.json"  # a folder without it is somebody else's
UNFINISHED = ".edgellama-unfinished"  # marks those that are being written


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder; it takes the place of `target` when the block ends well.

    Only a folder that edgellama wrote is replaced; a link, a file or any other folder is refused.
    If the block raises, `target` stays as it was, and an OSError becomes OutputError. What a
    killed writer left behind is removed by the next one, or given its name back.
    """
    _check(target)
    stem = temporary_stem(target.name)
    try:
        _sweep(target, stem)
        temporary = target.with_name(f"{stem}{secrets.token_hex(6)}.tmp")
        temporary.mkdir()
        with locked(temporary):
            try:
                (temporary / UNFINISHED).touch()  # only now: what is locked is not swept
                yield temporary
                (temporary / UNFINISHED).unlink(missing_ok=True)
                _sync(temporary)
                _exchange(temporary, target)
                _sync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        problem = f"cannot be written: {error.strerror or error}"
        raise OutputError(problem, path=target, hint="Nothing was changed") from error


def _check(target: Path) -> None:
    if target.is_symlink():
        raise OutputError("is a link, and is left alone", path=target)
    if target.exists() and not (target / MARK).is_file():
        raise OutputError("is not a folder that edgellama wrote, and is left alone", path=target)


def _exchange(temporary: Path, target: Path) -> None:
    """The old folder makes room; should the new one not arrive, it comes back."""
    if not target.exists():
        os.rename(temporary, target)
        return
    old = temporary.with_suffix(".old")
    with locked(target):
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path, stem: str) -> None:
    """Clear up after killed writers of the same folder; a living one holds its folder's lock."""
    pattern = re.compile(f"{re.escape(stem)}{TOKEN}\\.(tmp|old)")
    for left in target.parent.iterdir():
        if pattern.fullmatch(left.name):
            with contextlib.suppress(OSError):
                _clear_up(left, target)


def _clear_up(left: Path, target: Path) -> None:
    """Remove an abandoned folder that edgellama made, or give it its name back."""
    if left.is_symlink() or not left.is_dir():
        return
    with locked(left) as held:
        if held is None:
            held = time.time() - left.stat().st_mtime > STALE
        whole = (left / MARK).is_file()
        if not held or not (whole or (left / UNFINISHED).is_file()):
            return
        if whole and left.suffix == ".old" and not target.exists():
            os.rename(left, target)  # it was killed between two renames
        else:
            shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make names last through a power cut, where folders can be opened at all."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems refuse; the files are safe
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
