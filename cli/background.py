"""Work in a second thread, so that Ctrl-C is seen at once even inside a long compiled call.

Knows nothing about the work but its cancel token.
"""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, Self, TypeVar

from edgellama.control import CancelToken
from edgellama.errors import Cancelled

T = TypeVar("T")
GRACE = 5.0  # seconds that a cancelled reply has to come to its end
SHORT_GRACE = 0.5  # the same for work whose end nobody waits for: a compiler cannot be stopped
_LOOK = 0.05  # seconds between two looks for a signal: Windows does not wake a waiting thread
_NAME = "edgellama-work"


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Background(Generic[T]):
    """The items of `work()`, made in another thread; leaving the `with` stops that thread.

    Within the `with`, the first Ctrl-C raises nothing: it sets `cancel` and `interrupted`, and
    whatever the work still yields follows, within `grace` seconds. A second one goes to whoever
    handled them before: Python, which raises KeyboardInterrupt at once, or `Noted`. `idle` is
    called now and then while nothing comes.
    """

    def __init__(
        self,
        work: Callable[[], Iterable[T]],
        cancel: CancelToken,
        idle: Callable[[], None] = lambda: None,
        grace: float = GRACE,
    ) -> None:
        self.interrupted = False
        self._work, self._cancel, self._idle, self._grace = work, cancel, idle, grace
        self._items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._deadline = float("inf")
        self._before: Any = None  # the handler of Ctrl-C outside
        # a daemon: work that does not come to its end must not hold up the program's
        self._thread = threading.Thread(target=self._produce, name=_NAME, daemon=True)

    def _produce(self) -> None:
        try:
            for item in self._work():
                self._items.put(item)
        except BaseException as error:  # handed to the thread that waits
            self._items.put(_End(error))
        else:
            self._items.put(_End(None))

    def __enter__(self) -> Self:
        # a handler that raised could strike anywhere in the caller's loop, not only while waiting
        self._before = _handled(self._interrupt)
        self._thread.start()
        return self

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self._before(number, frame)
        self.interrupted = True
        self._stop()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._stop()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))

    def _stop(self) -> None:
        self._cancel.cancel()
        self._deadline = min(self._deadline, time.monotonic() + self._grace)

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._next()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _next(self) -> T | _End:
        while time.monotonic() < self._deadline:
            try:
                return self._items.get(timeout=_LOOK)
            except queue.Empty:
                self._idle()
        raise KeyboardInterrupt


class Noted:
    """Within the `with`, Ctrl-C raises nothing and sets `pressed`: nothing is left half done.

    Should it come again after `GRACE` seconds, something hangs, and KeyboardInterrupt is raised.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._first = float("inf")
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = _handled(self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first > GRACE:
            raise KeyboardInterrupt
        self.pressed, self._first = True, min(now, self._first)


def _handled(handler: Callable[[int, FrameType | None], None]) -> Any:
    """Have Ctrl-C handled; returns the handler before, or None where that is not to be changed."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        return None
    signal.signal(signal.SIGINT, handler)
    return before


def in_background(
    work: Callable[[], T], cancel: CancelToken, idle: Callable[[], None] = lambda: None
) -> T:
    """`work()`'s result or exception. Ctrl-C sets `cancel` and ends in KeyboardInterrupt."""
    with Background(lambda: [work()], cancel, idle, SHORT_GRACE) as running:
        try:
            (result,) = running
        except Cancelled:
            if running.interrupted:
                raise KeyboardInterrupt from None
            raise
    if running.interrupted:  # it came to its end before it saw the token
        raise KeyboardInterrupt
    return result


def still_working() -> bool:
    """Whether some work has outlived its grace."""
    return any(thread.name == _NAME for thread in threading.enumerate())
