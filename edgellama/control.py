"""Who may work now, and how to stop them: the cancel token, and a lock handed on in turns.

Knows nothing about the work. Compiled kernels poll the token's memory cell, so setting it
is seen in the middle of a matrix product, not only between calls.
"""

import contextlib
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn
from weakref import ReferenceType, ref

from edgellama.errors import Cancelled, ParameterError, shown

Progress = Callable[[int, int, str], None]  # (done, total, what)
_LOOK = 0.02  # seconds between two looks at a token while waiting
_LINKING = threading.Lock()
CO_GENERATOR = 0x20  # of a code object's flags
_MANAGERS = (contextlib.__file__,)


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
        allowed = "a CancelToken or None"
        problem = f"cancel is {shown(cancel)}; allowed: {allowed}"
        raise ParameterError(problem, field="cancel", value=cancel, allowed=allowed)


def require_progress(progress: object) -> None:
    """Raise ParameterError for what is neither None nor can be called."""
    if progress is not None and not callable(progress):
        allowed = "a function or None"
        problem = f"progress is {shown(progress)}, which cannot be called; allowed: {allowed}"
        raise ParameterError(problem, field="progress", value=progress, allowed=allowed)


class Turns:
    """A lock that is handed on in the order of asking, so that nobody who works in steps keeps it
    from the others; those who wait can be cancelled.

    It stands exceptions of signals, which Python may raise between any two steps here: a turn is
    over when it says so, or when the call that took it is no longer under way in its thread.
    """

    def __init__(self) -> None:
        self._line: deque[_Turn] = deque()  # the first has the turn; all it does here is atomic

    def turn(self, cancel: CancelToken | None = None, what: str = "the call") -> "_Turn":
        """A context manager: hold the lock.

        Raises Cancelled if the token is set before the turn comes; ParameterError where this very
        thread is amid a turn, as in a callback or a signal handler, which could only wait for ever.
        """
        return _Turn(self._line, cancel, what)

    def finally_do(self, action: Callable[[], None]) -> None:
        """Do it in a turn; where this thread is amid one, at that one's end, without waiting."""
        mine = _of_this_thread(self._line)
        if mine is not None:
            mine.actions.append(action)
            return
        with self.turn():
            action()


class _Turn:
    """One who waits in line or, as its first, has the turn."""

    def __init__(self, line: "deque[_Turn]", cancel: CancelToken | None, what: str) -> None:
        self.line, self.cancel, self.what = line, cancel, what
        self.gate = threading.Lock()
        self.actions: list[Callable[[], None]] = []
        self.thread, self.call = threading.get_ident(), _call_under_way()

    def __enter__(self) -> None:
        if _of_this_thread(self.line) is not None:
            raise ParameterError(
                f"{self.what}: this thread is amid another call on the same session or model",
                hint="Let that call return first; to end it, cancel it",
            )
        self.gate.acquire()
        try:
            self.line.append(self)
            while (first := self.line[0]) is not self:
                if not self.gate.acquire(timeout=_LOOK) and first.is_over():
                    first.leave()
                if self.cancel:
                    self.cancel.check(self.what)
        except BaseException:
            self.leave()
            raise

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Be out of the line, and wake its first; twice, or in the middle, is harmless."""
        try:
            while self.actions:
                self.actions.pop()()
        finally:
            with suppress(ValueError):
                self.line.remove(self)
            self.call = None
            with suppress(IndexError, RuntimeError):  # nobody waits, or has been woken already
                self.line[0].gate.release()

    def is_over(self) -> bool:
        """Whether the call that took it has left its thread without saying so."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.call:
            frame = frame.f_back
        return frame is None


def _call_under_way() -> FrameType | None:
    """The call that is amid a `with`: generators that make a context manager are suspended."""
    frame: FrameType | None = sys._getframe(3)  # of `Turns.turn`'s caller
    while frame and (frame.f_code.co_flags & CO_GENERATOR or frame.f_code.co_filename in _MANAGERS):
        frame = frame.f_back
    return frame


def _of_this_thread(line: "deque[_Turn]") -> _Turn | None:
    """What this thread holds or waits for in the line, further up its stack."""
    here = threading.get_ident()
    for turn in tuple(line):
        if turn.thread == here:
            if not turn.is_over():
                return turn
            turn.leave()
    return None
