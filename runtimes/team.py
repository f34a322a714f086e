"""The threads that run programs.

A team sleeps while there is nothing to do. Its threads never touch Numba's threading layers, and
compiled code runs without the interpreter's lock. The caller's thread comes back to the interpreter
several times in a long program, so that a signal's exception is raised soon.

Knows nothing about what programs compute.
"""

import ctypes
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.runtimes import abi

Words = NDArray[np.int64]
_Job = tuple[Any, ...]  # arguments of `follow`, then whatever must stay alive meanwhile
SLICE = 0.03  # seconds in compiled code, about, until the interpreter may raise an exception
UNKNOWN = 0.003  # seconds that an instruction takes, until it has been measured
LOOK = 5.0  # seconds between two looks of an idle helper whether its team still exists
_STOP = np.ones(1, np.int64)  # a cancel cell that is set


class Team:
    """N threads: the caller's own and N - 1 helpers. One program runs at a time.

    A team that is dropped without `close` stops its helpers too.
    """

    def __init__(self, threads: int, lead: Callable[..., None], follow: Callable[..., None]):
        self.threads = threads
        self._lead, self._epoch = lead, 0
        self._under_way: tuple[Words, NDArray[np.uint8], Words] | None = None
        self._pace: dict[int, float] = {}  # tokens -> seconds an instruction
        self._queues: list[queue.SimpleQueue[_Job | None]] = []
        self._stop = weakref.finalize(self, _stop, self._queues)
        self._helpers: list[threading.Thread] = []
        for number in range(1, threads):
            jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            helper = threading.Thread(
                target=_help,
                args=(weakref.ref(self), jobs, follow, number),
                name=f"edgellama-{number}",
                daemon=True,
            )
            self._queues.append(jobs)
            self._helpers.append(helper)
            helper.start()

    def run(self, program: Words, counters: NDArray[np.uint8], state: Words) -> None:
        """Run a program to its end or to its cancellation. The caller holds the model's lock.

        An exception that a signal raises here leaves no thread at work on the program.
        """
        self.settle()
        self._under_way = program, counters, state
        try:
            self._open(program, counters, state)
            self._run_slices(program, counters, state)
        finally:
            self.settle()

    def _open(self, program: Words, counters: NDArray[np.uint8], state: Words) -> None:
        self._epoch = self._epoch % 0x7FFFFFF0 + 1
        state[abi.EPOCH], state[abi.THREADS] = self._epoch, self.threads
        open_counters(counters, self._epoch)
        places = (program.ctypes.data, counters.ctypes.data, len(program), state.ctypes.data)
        for jobs in self._queues:
            jobs.put((*places, self._epoch, program, counters, state))

    def _run_slices(self, program: Words, counters: NDArray[np.uint8], state: Words) -> None:
        """Helpers do not wait for the next slice: they may be ahead of this thread."""
        n, tokens = len(program), int(state[abi.N_TOKENS])
        step = max(1, int(SLICE / self._pace.get(tokens, UNKNOWN)))
        began = time.perf_counter()
        for first in range(0, n, step):
            self._lead_slice(program, counters, state, first, min(step, n - first))
        self._under_way = None  # `lead` came to the end of the program, or closed it
        self._pace[tokens] = max((time.perf_counter() - began) / max(n, 1), 1e-9)

    def _lead_slice(
        self, program: Words, counters: NDArray[np.uint8], state: Words, first: int, n: int
    ) -> None:
        self._lead(
            program.ctypes.data + first * program.strides[0],
            counters.ctypes.data + first * abi.COUNTER_BYTES,
            n,
            state.ctypes.data,
        )

    def settle(self) -> None:
        """Close a program that an exception left: afterwards no helper touches its memory."""
        if self._under_way is not None:
            program, counters, state = self._under_way
            state[abi.CANCEL] = _STOP.ctypes.data
            self._lead_slice(program, counters, state, 0, len(program))
            self._under_way = None

    def close(self) -> None:
        self.settle()
        self._stop()
        for helper in self._helpers:
            helper.join()
        self._helpers = []


def _help(
    team: "weakref.ref[Team]",
    jobs: "queue.SimpleQueue[_Job | None]",
    follow: Callable[..., None],
    number: int,
) -> None:
    """A helper's life. It must not keep its team, which could never be dropped then."""
    job: _Job | None
    while True:
        try:
            job = jobs.get(timeout=LOOK)
        except queue.Empty:
            if team() is None:  # a signal may have broken off what tells helpers to stop
                return
            continue
        if job is None:
            return
        follow(*job[:5], number)
        del job  # it keeps a session's memory alive


def _stop(queues: "list[queue.SimpleQueue[_Job | None]]") -> None:
    for jobs in queues:
        jobs.put(None)


def open_counters(counters: NDArray[np.uint8], epoch: int) -> None:
    """Open every instruction for this epoch, which closes it to a helper late from another.

    DONE goes first: such a helper either finds nothing to claim, or the epoch over.
    """
    words = counters.view(np.int64).reshape(-1, abi.COUNTER_BYTES // abi.WORD)
    words[:, abi.DONE // abi.WORD] = epoch << 32
    words[:, 0] = epoch << 32


def give_up_core() -> int:
    """Address of the C function by which a waiting thread lets others run; 0 where unknown."""
    try:
        if sys.platform == "win32":
            function = ctypes.WinDLL("kernel32").SwitchToThread
        else:
            function = ctypes.CDLL(None).sched_yield
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
