"""The lock by which a process that fills a folder tells others that it is still alive.

Knows nothing about what the folders hold.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Whether this process holds the folder's lock meanwhile; None where there are none.

    A lock ends with its process, however that ends; children do not inherit it. Raises OSError for
    what is no folder.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held: bool | None = True
        except BlockingIOError:
            held = False
        except OSError:  # some network file systems have none
            held = None
        yield held
    finally:
        os.close(handle)
