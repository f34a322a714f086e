"""Stopping work that is under way: the cancel token.

Knows nothing about who does the work. Compiled kernels poll the token's memory cell, so setting it
is seen in the middle of a matrix product, not only between calls.
"""

from array import array

from edgellama.errors import Cancelled


class CancelToken:
    """Set once, from any thread; every call that was given the token stops within 100 ms."""

    __slots__ = ("_cell",)

    def __init__(self) -> None:
        self._cell = array("q", [0])  # never resized, so its address stays

    def cancel(self) -> None:
        self._cell[0] = 1

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
