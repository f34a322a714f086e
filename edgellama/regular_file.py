"""Opening a file that strangers name: a regular one, or an error of ours.

Knows nothing about what files hold.
"""

import os
import stat
from io import FileIO
from pathlib import Path

from edgellama.errors import EdgeLlamaError, ModelFormatError, shown


def unreadable(path: Path, error: OSError, where: str | None = None) -> EdgeLlamaError:
    """The system's refusal, with its reason."""
    reason = error.strerror or str(error)
    return EdgeLlamaError(f"cannot be read: {reason}", path=path, where=where)


def open_regular(
    path: Path,
    kind: type[EdgeLlamaError] = ModelFormatError,
    *,
    wanted: str = "a file",
    hint: str | None = None,
) -> FileIO:
    """The file, open for reading and unbuffered.

    A folder (told what is `wanted`, and `hint`), a pipe or a device is refused without waiting, by
    an error of `kind`; EdgeLlamaError for what the system refuses and for names it cannot have.
    """

    def opener(name: str, flags: int) -> int:  # a pipe without a writer would block
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = FileIO(path, "r", opener=opener)
    except IsADirectoryError as error:
        raise kind(f"this is a folder, not {wanted}", path=path, hint=hint) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a null character in the name
        raise EdgeLlamaError(f"{shown(str(path))} is not a file name: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise kind("this is not a regular file", path=path)
    return file


def read_start(
    path: Path,
    n_bytes: int,
    kind: type[EdgeLlamaError] = ModelFormatError,
    *,
    wanted: str = "a file",
) -> bytes:
    """The first `n_bytes` of a file, or all it has; errors as `open_regular`."""
    with open_regular(path, kind, wanted=wanted) as file:
        try:
            size = os.fstat(file.fileno()).st_size  # a buffer for what is there, not for n_bytes
            return file.read(min(size + 1, n_bytes))  # it may have grown
        except OSError as error:
            raise unreadable(path, error) from error
