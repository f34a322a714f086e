"""Writing a file so that a reader sees the old one or the new one whole, never a part.

Knows nothing about what is written.
"""

import contextlib
import glob
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgellama.errors import EdgeLlamaError, OutputError, shown

STALE = 24 * 3600  # seconds after which a temporary file that cannot be locked has no writer
TOKEN = "[0-9a-f]{12}"  # matches what makes a temporary file's name its own
_LONGEST_STEM = 100  # bytes of the name: with what is put around it, any file system has room
_TRIES = 10  # names tried before giving up: each try fails only if a sweep takes the file at once


@contextlib.contextmanager
def atomic_output(path: str | Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write into; it takes the place of `path` when the block ends well.

    The bytes are on the disk before the name changes hands. If the block raises, or writing fails
    (disk full, quota, no permission), `path` stays as it was, the temporary file beside it is
    removed, and an OSError becomes OutputError. A link is followed once: its target is replaced.
    Who may read and write a file that is replaced may do so again; a new one follows the process's
    umask, or is the owner's alone if it is `private`.
    A writer that is killed leaves its temporary file behind; the next one removes it.
    """
    target = _target(Path(path))
    stem = temporary_stem(target.name)
    _sweep(target.parent, stem)
    with told_as_output(path):
        with contextlib.ExitStack() as on_failure:
            file, temporary = _create(target, stem, private)
            on_failure.callback(_discard, file, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
            _rename(file, temporary, target)
            on_failure.pop_all()
        _sync_folder(target.parent)


@contextlib.contextmanager
def temporary_beside(path: str | Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new binary file in the folder of `path`, and its name; removed when the block ends.

    For large things that are only needed on the way to `path`: write within `told_as_output`. If
    the process is killed, the next writer of `path` removes it. Raises OutputError.
    """
    target = _target(Path(path))
    stem = temporary_stem(target.name)
    with told_as_output(path):
        _sweep(target.parent, stem)
        file, temporary = _create(target, stem)
    try:
        yield file, temporary
    finally:
        _discard(file, temporary)


@contextlib.contextmanager
def told_as_output(path: str | Path) -> Iterator[None]:
    """The system's refusals to write become OutputError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, EdgeLlamaError):
            raise
        reason = error.strerror or error
        if isinstance(error, FileNotFoundError) and not Path(path).parent.is_dir():
            reason = f"there is no folder {shown(str(Path(path).parent))}"
        hint = "Nothing was changed"
        raise OutputError(f"cannot be written: {reason}", path=path, hint=hint) from error


def temporary_stem(name: str) -> str:
    """How the temporary names of a file begin: with the file's own, as far as there is room."""
    stem = name[:_LONGEST_STEM]
    while len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = stem[:-1]
    return f".{stem}."


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


def _create(target: Path, stem: str, private: bool = False) -> tuple[BinaryIO, Path]:
    """A new file beside the target, locked as long as it is open: a lock ends with its process."""
    permissions = _permissions(target)
    closed = private or permissions is not None

    def opener(name: str, flags: int) -> int:  # what the target hides is hidden from the start
        return os.open(name, flags, 0o600 if closed else 0o666)

    for _ in range(_TRIES):
        temporary = target.with_name(f"{stem}{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb", opener=opener)  # noqa: SIM115 - the caller closes it
        try:
            _permit(file, permissions)
            if _lock(file) is not False and _same(file, temporary):
                return file, temporary
        except BaseException:
            _discard(file, temporary)
            raise
        file.close()  # a sweep came between the two steps, and has removed the file or will
    raise OutputError("another process keeps removing the temporary file", path=target)


def _permissions(target: Path) -> int | None:
    """What owner, group and others may do with a file; None if there is none."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def _permit(file: BinaryIO, permissions: int | None) -> None:
    if permissions is not None and sys.platform != "win32":
        with contextlib.suppress(OSError):  # some file systems have none
            os.fchmod(file.fileno(), permissions)


def _lock(file: BinaryIO) -> bool | None:
    """Whether this process now holds the file's lock; None where locks cannot be had."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have none
        return None
    return True


def _same(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _rename(file: BinaryIO, temporary: Path, target: Path) -> None:
    """Close the file and give it its name; where that is possible, locked until it has it."""
    if sys.platform == "win32":
        file.close()
    os.replace(temporary, target)
    file.close()


def sweep(folder: Path, stem: str) -> None:
    """Remove what killed writers of files whose names begin so left behind, and no living one's.

    `stem` is ".", and the beginning of the files' own names.
    """
    _sweep(folder, stem, rest=r"(?:.*\.)?")


def _sweep(folder: Path, stem: str, rest: str = r"(?:floats\.)?") -> None:
    """`rest` matches what may stand between the stem and what `_create` puts behind it.

    By default the mark of a conversion's temporary file of floats.
    """
    pattern = re.compile(f"{re.escape(stem)}{rest}{TOKEN}\\.tmp", re.DOTALL)
    for old in folder.glob(glob.escape(stem) + "*.tmp"):
        if pattern.fullmatch(old.name):
            with contextlib.suppress(OSError):
                _remove_abandoned(old)


def _remove_abandoned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return
    if sys.platform == "win32":  # a file that somebody has open cannot be removed
        path.unlink()
        return
    with open(path, "rb", opener=_without_waiting) as file:
        locked = _lock(file)
        if locked is None:
            locked = time.time() - status.st_mtime > STALE
        if locked and os.path.samestat(os.fstat(file.fileno()), status):
            path.unlink()  # before the lock is gone, else a writer could take it in between


def _without_waiting(name: str, flags: int) -> int:
    """Should the file have become a pipe meanwhile, or a link to one."""
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


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
