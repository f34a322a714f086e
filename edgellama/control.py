"""Who may work now, and how to stop them: the cancel token, and a lock handed on in turns.

Knows nothing about the work. Compiled kernels poll the token's memory cell, so setting it
is seen in the middle of a matrix product, not only between calls.
"""

import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn
from weakref import ReferenceType, ref

from edgellama.errors import Cancelled, ParameterError, shown

Progress = Callable[[int, int, str], None]  # (done, total, what)
_LOOK = 0.02  # seconds between two looks at a token while waiting
_LINKING = threading.Lock()


class CancelToken:
    """Set once, from any thread; every call that was given the token stops within 100 ms."""

    __slots__ = ("__weakref__", "_cell", "_linked")

    def __init__(self) -> None:
        self._cell = array("q", [0])  # never resized, so its address stays
        self._linked: tuple[ReferenceType[CancelToken], ...] = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cancel token cannot be copied, nor sent to another process")

    def cancel(self) -> None:
        self._cell[0] = 1
        for reference in self._linked:
            if (token := reference()) is not None:
                token.cancel()

    def linked(self) -> "CancelToken":
        """A new token that is set together with this one, and can be set without it."""
        token = CancelToken()
        with _LINKING:
            alive = (reference for reference in self._linked if reference() is not None)
            self._linked = (*alive, ref(token))
        if self.cancelled:  # before or meanwhile
            token.cancel()
        return token

    @property
    def cancelled(self) -> bool:
        return self._cell[0] != 0

    @property
    def address(self) -> int:
        """Where compiled code reads the flag: an int64, 0 until cancelled."""
        return self._cell.buffer_info()[0]

    def check(self, what: str) -> None:
        """Raise Cancelled if the token is set."""
        if self.cancelled:
            raise Cancelled(what)


def require_token(cancel: object) -> None:
    """Raise ParameterError for what is neither a token nor None."""
    if not isinstance(cancel, CancelToken | None):
        problem = f"cancel is {shown(cancel)}; allowed: a CancelToken or None"
        raise ParameterError(problem, field="cancel")


class Turns:
    """A lock that is handed on in the order of asking, so that nobody who works in steps keeps it
    from the others; those who wait can be cancelled."""

    def __init__(self) -> None:
        self._mutex, self._taken = threading.Lock(), False
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def turn(self, cancel: CancelToken | None = None, what: str = "the call") -> Iterator[None]:
        """Hold the lock. Raises Cancelled if the token is set before the turn comes."""
        gate = threading.Lock()
        gate.acquire()
        with self._mutex:
            if self._taken:
                self._waiting.append(gate)
            else:
                self._taken = True
                gate.release()
        try:
            while not gate.acquire(timeout=_LOOK):
                if cancel:
                    cancel.check(what)
        except BaseException:  # a signal's exception too must not leave the gate in the line
            self._leave(gate)
            raise
        try:
            yield
        finally:
            self._pass_on()

    def _leave(self, gate: threading.Lock) -> None:
        with self._mutex:
            if gate in self._waiting:
                self._waiting.remove(gate)
                return
        self._pass_on()  # the turn had come meanwhile

    def _pass_on(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
