"""A regular file, read by position into the caller's buffers.

Reads with `read()`, never through a memory map: a file that is cut short underneath must not kill
the process. Knows nothing about what the files hold.
"""

import os
from pathlib import Path
from threading import Lock
from typing import Any, Self

from edgellama.errors import ModelFormatError
from edgellama.regular_file import open_regular, unreadable


class RawFile:
    """An open regular file. Reading is safe from any thread; closing twice is harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
