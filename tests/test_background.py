"""Work in a second thread: results, errors and Ctrl-C reach the one that waits."""

import signal
import threading
from collections.abc import Iterator

import pytest

from edgellama.cli.background import Background, Noted, in_background, still_working
from edgellama.control import CancelToken
from edgellama.errors import ParameterError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def until_cancelled(cancel: CancelToken, begun: threading.Event) -> Iterator[int]:
    """Numbers without end; the token brings a last one, -1."""
    number = 0
    while not cancel.cancelled:
        yield number
        number += 1
        begun.set()
    yield -1


def test_result_and_error_come_through() -> None:
    assert in_background(lambda: 42, CancelToken()) == 42
    with pytest.raises(ParameterError, match="no good"):
        in_background(_refuse, CancelToken())


def _refuse() -> None:
    raise ParameterError("no good")


def test_interrupt_cancels_and_is_passed_on() -> None:
    cancel, released = CancelToken(), threading.Event()

    def work() -> None:
        while not cancel.cancelled:
            released.wait(0.01)
        cancel.check("the work")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        in_background(work, cancel, idle=interrupt)
    assert cancel.cancelled and not still_working()
    assert signal.getsignal(signal.SIGINT) is before


def test_work_that_cannot_be_stopped_is_not_waited_for() -> None:
    cancel, released = CancelToken(), threading.Event()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_background(lambda: released.wait(60), cancel, idle=interrupt)
        assert still_working()
    finally:
        released.set()
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(10)
    assert not still_working()


def test_interrupted_stream_still_gives_its_end() -> None:
    cancel, begun = CancelToken(), threading.Event()
    seen = []
    with Background(lambda: until_cancelled(cancel, begun), cancel) as running:
        for number in running:
            seen.append(number)
            if len(seen) == 5:
                interrupt()  # strikes in the loop, not in the waiting
    assert running.interrupted
    assert seen == [*range(len(seen) - 1), -1]


def test_second_interrupt_is_final() -> None:
    cancel, begun = CancelToken(), threading.Event()
    with (
        pytest.raises(KeyboardInterrupt),
        Background(lambda: until_cancelled(cancel, begun), cancel) as running,
    ):
        interrupt()
        assert running.interrupted
        interrupt()


def test_noted_interrupts_raise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, begun = CancelToken(), threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with Noted() as left:
        with Background(lambda: until_cancelled(cancel, begun), cancel) as running:
            interrupt()
            assert running.interrupted and not left.pressed  # that one was the reply's
            interrupt()
            assert list(running)[-1] == -1
        assert left.pressed
        interrupt()
        monkeypatch.setattr("edgellama.cli.background.GRACE", -1.0)  # that time has passed
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_leaving_early_stops_the_work() -> None:
    cancel, begun = CancelToken(), threading.Event()
    with Background(lambda: until_cancelled(cancel, begun), cancel) as running:
        assert next(iter(running)) == 0
    assert cancel.cancelled and not still_working()
