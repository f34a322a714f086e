"""The end of the interpreter, while daemon threads are in calls of ONNX Runtime.

Python ends such a thread as it comes back from the call, and the process aborts if C++ is on the
thread's stack then. So calls are ended, and waited for, before. Knows nothing about what they do.
"""

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE = 5.0  # seconds to wait for calls to end; between two operators they look
_LOOK = 0.01  # seconds between two looks at them

_under_way: dict[object, tuple[int, Callable[[], None]]] = {}  # the process of each, and its end
_ending: list[int] = []  # the thread in which the interpreter ends, once it does


@contextlib.contextmanager
def under_way(end: Callable[[], None]) -> Iterator[None]:
    """Around a call that `end`, from another thread and more than once, makes end soon.

    Raises SystemExit, which ends a thread silently, in any other thread than the interpreter's
    last.
    """
    key = object()
    try:
        _under_way[key] = os.getpid(), end
        _leave()  # after that: either it is seen here, or the call there
        yield
    finally:
        _under_way.pop(key, None)
        _leave()


def _leave() -> None:
    if _ending and _ending[0] != threading.get_ident():
        raise SystemExit("the interpreter is ending")


@atexit.register
def _end_calls() -> None:
    """No lock, and nothing of another process: a fork inherits what was under way."""
    _ending.append(threading.get_ident())
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ends = [end for pid, end in list(_under_way.values()) if pid == os.getpid()]
        if not ends:
            return
        for end in ends:
            end()
        time.sleep(_LOOK)
