"""Things made to order in another thread: made once, and nobody who waits is held up."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from test_kernel_cache import files, finish, start

from edgellama.control import CancelToken
from edgellama.errors import Cancelled
from edgellama.runtimes.workshop import Workshop

HANG = 60.0  # seconds; what is bounded by it takes milliseconds
SOON = 1.0  # ten times what is promised


class Bench:
    """Something to make that takes until it is allowed to end, and counts how often."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.made: list[str] = []
        self.workshop: Workshop[tuple[str], str] = Workshop("test", self.make)

    def make(self, name: str) -> str:
        self.begun.release()
        assert self.may_end.acquire(timeout=HANG)
        self.made.append(name)
        if name == "bad":
            raise ValueError(name)
        return name.upper()

    def order(self, *names: str, cancel: CancelToken | None = None) -> dict[tuple[str], str]:
        return self.workshop.order([(name,) for name in names], cancel=cancel, what="making")

    def ended(self) -> bool:
        stop = time.monotonic() + HANG
        while self.workshop._worker is not None and time.monotonic() < stop:
            time.sleep(0.001)
        return self.workshop._worker is None


def test_two_who_want_the_same_share_the_work() -> None:
    bench, results = Bench(), []
    threads = [
        threading.Thread(target=lambda: results.append(bench.order("a", "b"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    stop = time.monotonic() + HANG
    while len(bench.workshop._orders) < 2 and time.monotonic() < stop:
        time.sleep(0.001)
    bench.may_end.release(2)
    for thread in threads:
        thread.join(HANG)
    assert results == [{("a",): "A", ("b",): "B"}] * 2
    assert bench.made == ["a", "b"]
    assert bench.ended()


def test_progress_is_told_in_the_callers_thread() -> None:
    bench, steps = Bench(), []
    bench.may_end.release(2)
    bench.workshop.order(
        [("a",), ("b",)], lambda *step: steps.append((*step, threading.get_ident())), None, "w"
    )
    me = threading.get_ident()
    assert steps == [(0, 2, "w", me), (1, 2, "w", me), (2, 2, "w", me)]


def test_a_cancelled_caller_returns_at_once_and_the_rest_is_not_made() -> None:
    bench, cancel = Bench(), CancelToken()
    threading.Thread(target=lambda: bench.begun.acquire(timeout=HANG) and cancel.cancel()).start()
    began = time.monotonic()
    with pytest.raises(Cancelled, match="making"):
        bench.order("a", "b", cancel=cancel)
    assert time.monotonic() - began < SOON
    assert bench.made == []
    bench.may_end.release()
    assert bench.ended()
    assert bench.made == ["a"]
    bench.may_end.release()
    assert bench.order("b") == {("b",): "B"}  # and it opens again


def test_one_cancelled_caller_does_not_harm_the_other() -> None:
    bench, cancel, result = Bench(), CancelToken(), []
    other = threading.Thread(target=lambda: result.append(bench.order("a", "b")))
    other.start()
    assert bench.begun.acquire(timeout=HANG)
    cancel.cancel()
    with pytest.raises(Cancelled):
        bench.order("a", "c", cancel=cancel)
    bench.may_end.release(2)
    other.join(HANG)
    assert result == [{("a",): "A", ("b",): "B"}]
    assert bench.ended() and bench.made == ["a", "b"]


def test_what_goes_wrong_reaches_the_caller() -> None:
    bench = Bench()
    bench.may_end.release(9)  # "c" may have been begun already
    with pytest.raises(ValueError, match="bad"):
        bench.order("a", "bad", "c")
    assert bench.ended()
    assert bench.order("a") == {("a",): "A"}


# --- compiling kernels ---------------------------------------------------------------------------

LOAD = """
import sys, time, threading
from edgellama.control import CancelToken
from edgellama.errors import Cancelled
from edgellama.runtimes import kernel_cache, levels
level = levels.choose()[0]
names = ["select", "norm", "pack_rows", "swiglu", "rope"]

def compiling(done, total, what):
    print(what, flush=True)
"""
INTERRUPTED = """
try:
    kernel_cache.addresses(names, level, compiling)
except KeyboardInterrupt:
    print("interrupted", "numba" in sys.modules, flush=True)
"""
CANCELLED = """
cancel = CancelToken()
threading.Timer(0.7, cancel.cancel).start()  # in the middle of importing Numba, or of a kernel
try:
    kernel_cache.addresses(names, level, compiling, cancel)
except Cancelled:
    print("cancelled")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a process are POSIX's")
@pytest.mark.parametrize("wait", [0.0, 1.0])
def test_a_signal_while_compiling(wait: float, tmp_path: Path) -> None:
    """The caller hears of it at once; the process ends in order, with the kernel at hand kept."""
    process = start(tmp_path, LOAD + INTERRUPTED)
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling kernels\n"
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    while (line := process.stdout.readline()) == "compiling kernels\n":
        pass
    assert line.startswith("interrupted")
    assert time.monotonic() - began < SOON
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")
    assert 1 <= len(files(tmp_path)) < 5


def test_cancelling_while_compiling(tmp_path: Path) -> None:
    assert finish(start(tmp_path, LOAD + CANCELLED)).endswith("cancelled")
    assert 1 <= len(files(tmp_path)) < 5
    for file in files(tmp_path):
        assert file.suffix == ".o"  # nothing half-written


DAEMON = """
threading.Thread(target=kernel_cache.addresses, args=(names, level, compiling), daemon=True).start()
time.sleep(0.7)
"""


def test_ending_while_a_daemon_thread_compiles(tmp_path: Path) -> None:
    process = start(tmp_path, LOAD + DAEMON)
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")
    assert len(files(tmp_path)) < 5
