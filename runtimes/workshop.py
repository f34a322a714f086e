"""One thread that makes things to order, while those who wait can be interrupted.

What several callers want is made once. The thread ends when nobody wants anything any more, after
the piece at hand: an interrupted caller returns at once, and the process can end in order, which
it could not while a daemon thread is deep in somebody else's code.

Knows nothing about what is made.
"""

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from edgellama.control import CancelToken, Progress

Key = TypeVar("Key", bound=tuple[Hashable, ...])
Thing = TypeVar("Thing")
_LOOK = 0.02  # seconds between two looks at a token and for signals


class _Order(Generic[Key, Thing]):
    """What one caller still wants, and where it is delivered: things by key, or what went wrong."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.wanted = list(keys)
        self.delivered: queue.SimpleQueue[tuple[Key, Thing] | BaseException] = queue.SimpleQueue()


class Workshop(Generic[Key, Thing]):
    """Makes `make(*key)` for every key ordered, one at a time."""

    def __init__(self, name: str, make: Callable[..., Thing]) -> None:
        self._name, self._make = name, make
        self._lock = threading.Lock()
        self._orders: list[_Order[Key, Thing]] = []
        self._worker: threading.Thread | None = None

    def order(
        self,
        keys: Sequence[Key],
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
        what: str = "",
    ) -> dict[Key, Thing]:
        """The things by key. Raises Cancelled within 100 ms, and whatever making them raised.

        `progress` is called in this thread, with (done, total, what).
        """
        order: _Order[Key, Thing] = _Order(keys)
        made: dict[Key, Thing] = {}
        try:
            self._accept(order)
            while len(made) < len(keys):
                if progress:
                    progress(len(made), len(keys), what)
                key, thing = self._next(order, cancel, what)
                made[key] = thing
        finally:
            with self._lock:
                order.wanted = []
        if progress:
            progress(len(made), len(keys), what)
        return made

    def _accept(self, order: _Order[Key, Thing]) -> None:
        with self._lock:
            self._orders.append(order)
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name=self._name, daemon=False)
                self._worker.start()

    def _next(
        self, order: _Order[Key, Thing], cancel: CancelToken | None, what: str
    ) -> tuple[Key, Thing]:
        while True:
            if cancel:
                cancel.check(what)
            try:
                delivery = order.delivered.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if isinstance(delivery, BaseException):
                raise delivery
            return delivery

    # --- the worker ------------------------------------------------------------------------------

    def _work(self) -> None:
        while (key := self._wanted()) is not None:
            try:
                result: Any = (key, self._make(*key))
            except BaseException as error:  # it is the callers' to handle
                result = error
            self._deliver(key, result)

    def _wanted(self) -> Key | None:
        """What to make next; None, and the thread ends, if nothing is wanted or all is ending."""
        with self._lock:
            self._orders = [order for order in self._orders if order.wanted]
            if self._orders and threading.main_thread().is_alive():
                return self._orders[0].wanted[0]
            self._worker = None
            return None

    def _deliver(self, key: Key, result: Any) -> None:
        with self._lock:
            for order in self._orders:
                if key in order.wanted:
                    order.wanted.remove(key)
                    order.delivered.put(result)
