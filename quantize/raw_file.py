"""A regular file, read by position into the caller's buffers.

Reads with `read()`, never through a memory map: a file that is cut short underneath must not kill
the process. Knows nothing about what the files hold.
"""

import os
import stat
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from edgellama.errors import EdgeLlamaError, ModelFormatError, shown


def unreadable(path: Path, error: OSError, where: str | None = None) -> EdgeLlamaError:
    reason = error.strerror or str(error)
    return EdgeLlamaError(f"cannot be read: {reason}", path=path, where=where)


class RawFile:
    """An open regular file. Reading is safe from any thread; closing twice is harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size
        self._lock = Lock()

    def read_into(self, offset: int, buffer: Any, where: str | None = None) -> None:
        """Fill a writable contiguous buffer from byte `offset`.

        Raises ModelFormatError if the file has shrunk since it was opened, EdgeLlamaError with
        the system's reason if reading fails.
        """
        view = memoryview(buffer).cast("B")
        assert 0 <= offset <= self.size - len(view), (offset, len(view), self.size)
        done = 0
        while done < len(view):  # one read gives at most 2 GiB on Linux
            try:
                with self._lock:
                    self._file.seek(offset + done)
                    got = self._file.readinto(view[done:])
            except OSError as error:
                raise unreadable(self.path, error, where) from error
            if not got:
                problem = "the file ends too early: it changed since it was opened"
                raise ModelFormatError(problem, path=self.path, where=where)
            done += got

    def read(self, offset: int, count: int, where: str | None = None) -> bytes:
        """`count` bytes from `offset`; the caller has checked both against `size`."""
        data = bytearray(count)
        self.read_into(offset, data, where)
        return bytes(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular(path: Path) -> FileIO:
    """The file, open and unbuffered; a directory, pipe or device is refused without waiting."""

    def opener(name: str, flags: int) -> int:  # a pipe without a writer would block
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = FileIO(path, "r", opener=opener)
    except IsADirectoryError as error:
        raise ModelFormatError("this is a folder, not a file", path=path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a null character in the name
        raise EdgeLlamaError(f"{shown(str(path))} is not a file name: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ModelFormatError("this is not a regular file", path=path)
    return file
