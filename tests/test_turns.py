"""Who waits for whom: sessions take turns step by step, and whoever waits can be stopped."""

import _thread
import asyncio
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, Chunk, Model, ParameterError, Sampling
from edgellama.control import Turns
from edgellama.runtimes import team

LONG = 3900  # tokens of a prompt that takes seconds
SOON = 2.0  # seconds; the aim is 0.1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(
        dim=256, ffn_dim=512, n_heads=8, n_kv_heads=4, head_dim=32, n_layers=8, context_length=4096
    )
    return write_tiny(tmp_path_factory.mktemp("turns") / "tiny.gguf", config, "F32")


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with edgellama.load(path, threads=2) as loaded:
        yield loaded


class Other(threading.Thread):
    """Work in another thread, under way when this returns; keeps what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()
        time.sleep(0.1)

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def end(self) -> Exception | None:
        self.join(60)
        assert not self.is_alive()
        return self.error


def elapsed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def test_a_short_step_does_not_wait_for_a_long_prompt(model: Model) -> None:
    long, short = model.session(), model.session()
    other = Other(lambda: long.forward([5] * LONG))
    waited = elapsed(lambda: short.forward([7]))
    assert other.is_alive() and waited < SOON
    assert other.end() is None
    assert long.position == LONG


def test_waiting_for_a_session_can_be_cancelled(model: Model) -> None:
    session, token = model.session(), CancelToken()
    other = Other(lambda: session.forward([5] * LONG))
    threading.Timer(0.05, token.cancel).start()

    def wait() -> None:
        with pytest.raises(Cancelled):
            session.forward([7], cancel=token)

    assert elapsed(wait) < SOON
    assert other.is_alive()
    assert other.end() is None
    assert session.position == LONG


@pytest.mark.parametrize("what", ["session", "model"])
def test_closing_ends_a_call_in_another_thread(model: Model, what: str) -> None:
    session = model.session()
    other = Other(lambda: session.forward([5] * LONG))
    assert elapsed(session.close if what == "session" else model.close) < SOON
    error = other.end()
    assert isinstance(error, ParameterError) and f"the {what} is closed" in str(error)


def test_a_reply_notices_that_its_session_was_used(model: Model) -> None:
    session = model.session()
    first = session.generate([5, 6, 7], Sampling(temperature=0), max_tokens=20)
    next(first)
    session.forward([9])
    with pytest.raises(ParameterError, match="used otherwise"):
        list(first)
    second = session.generate([5, 6, 8], Sampling(temperature=0), max_tokens=20)
    third = session.generate([5, 6, 9], Sampling(temperature=0), max_tokens=3)
    with pytest.raises(ParameterError, match="used otherwise"):
        next(second)
    assert [chunk.finish_reason for chunk in third][-1] is not None


def test_replies_for_asyncio_are_those_of_the_iterators(model: Model) -> None:
    greedy = Sampling(temperature=0)
    prompts = [[5, 6, 7], [9, 8]]
    messages = [{"role": "user", "content": "a"}]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    async def collected(chunks: AsyncIterator[Chunk]) -> list[tuple[int | None, str]]:
        return [(chunk.token, chunk.text) async for chunk in chunks]

    async def together() -> list[list[tuple[int | None, str]]]:
        replies = [model.agenerate(ids, greedy, max_tokens=8) for ids in prompts]
        chat = model.achat(messages, greedy, max_tokens=8, template=template)
        return await asyncio.gather(*map(collected, [*replies, chat]))

    expected = [model.generate(ids, greedy, max_tokens=8) for ids in prompts]
    expected.append(model.chat(messages, greedy, max_tokens=8, template=template))
    plain = [[(chunk.token, chunk.text) for chunk in chunks] for chunks in expected]
    assert asyncio.run(together()) == plain
    assert all(plain)


def test_arguments_of_the_wrong_kind_are_named(model: Model) -> None:
    for params in (0.5, {}, 0, "hot"):
        with pytest.raises(ParameterError, match="params"):
            model.generate("hi", params)  # type: ignore[arg-type]
    for path in (None, 3, b"x"):
        with pytest.raises(ParameterError, match="path"):
            edgellama.load(path)  # type: ignore[arg-type]
    for name, value in (
        ("deterministic", 1),
        ("deterministic", None),
        ("cancel", True),
        ("progress", "yes"),
    ):
        with pytest.raises(ParameterError, match=name):
            edgellama.load("nowhere.gguf", **{name: value})  # type: ignore[arg-type]
    hi: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    for name in ("cancel", "session"):
        wrong: Any = {name: "mine"}
        for reply in (
            lambda wrong=wrong: model.generate("hi", **wrong),
            lambda wrong=wrong: model.chat(hi, template="alpaca", **wrong),
            lambda wrong=wrong: model.infill_chunks("a", "b", **wrong),
        ):
            with pytest.raises(ParameterError, match=name):
                reply()


def test_turns_are_handed_on_in_order() -> None:
    turns, order = Turns(), []

    def work(number: int) -> None:
        with turns.turn():
            order.append(number)

    with turns.turn():
        threads = [Other(lambda number=number: work(number)) for number in range(4)]
    for thread in threads:
        thread.end()
    assert order == [0, 1, 2, 3]


def test_a_cancelled_wait_leaves_the_line() -> None:
    turns, token, order = Turns(), CancelToken(), []

    def wait() -> None:
        with turns.turn(token, "waiting"):
            order.append("never")

    with turns.turn():
        other = Other(wait)
        token.cancel()
        assert isinstance(other.end(), Cancelled)
    with turns.turn():
        order.append("free")
    assert order == ["free"]


def test_a_turn_whose_call_is_gone_is_over() -> None:
    """As when a signal's exception keeps `__exit__` from being called."""
    turns, order = Turns(), []

    def lose() -> None:
        turns.turn().__enter__()

    def take(name: str) -> None:
        with turns.turn():
            order.append(name)

    lose()
    assert Other(lambda: take("another thread")).end() is None
    lose()
    take("this thread")
    assert order == ["another thread", "this thread"]


def test_what_is_to_be_done_at_last_does_not_wait_for_its_own_thread() -> None:
    turns, order = Turns(), []

    def call() -> None:
        with turns.turn():
            turns.finally_do(lambda: order.append("at its end"))
            order.append("turn")

    call()
    turns.finally_do(lambda: order.append("free"))
    assert order == ["turn", "at its end", "free"]


@pytest.fixture
def handle() -> Iterator[Callable[[Callable[[], object], float], None]]:
    """Have something done by a signal handler, some seconds from now."""
    before = signal.getsignal(signal.SIGINT)
    timers = []

    def later(act: Callable[[], object], seconds: float) -> None:
        signal.signal(signal.SIGINT, lambda *_: act())
        timers.append(threading.Timer(seconds, _thread.interrupt_main))
        timers[-1].start()

    yield later
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", ["session", "model"])
def test_closing_in_a_signal_handler(model: Model, handle: Any, what: str) -> None:
    session = model.session()
    handle(session.close if what == "session" else model.close, 0.1)
    with pytest.raises(ParameterError, match=f"the {what} is closed"):
        session.forward([5] * LONG)
    assert session._runtime_session.cache.size == 0  # type: ignore[attr-defined]


def test_a_call_in_a_signal_handler_is_refused_where_it_would_wait(
    model: Model, handle: Any
) -> None:
    session, other = model.session(), model.session()
    for amid in (session, other):
        handle(lambda amid=amid: amid.forward([7]), 0.1)
        with pytest.raises(ParameterError, match="amid another call"):
            session.forward([5] * LONG)
    assert session.forward([5]).shape == other.forward([5]).shape


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # amid a callback
def test_interrupts_at_any_moment_leave_a_session_that_works(model: Model) -> None:
    """Also while the exception, and with it every frame it went through, is still at hand."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    session, rng, interrupts = model.session(), random.Random(0), 0
    expected = model.session().forward([1, 5, 6])
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(5e-5, 5e-3))
                for _ in range(10_000):
                    list(model.generate([1, 5, 6], max_tokens=3, session=session))
            except KeyboardInterrupt:
                interrupts += 1
                signal.setitimer(signal.ITIMER_REAL, 60)  # nothing here may wait for ever
                session.truncate(0)
                assert np.array_equal(session.forward([1, 5, 6]), expected)
                session.close()
                session = model.session()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 150


def test_helpers_of_a_team_that_was_lost_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a signal's exception breaks off what tells them to stop."""
    monkeypatch.setattr(team, "LOOK", 0.1)
    lost = team.Team(3, lambda *_: None, lambda *_: None)
    helpers = lost._helpers
    lost._stop.detach()
    del lost
    for helper in helpers:
        helper.join(60)
        assert not helper.is_alive()
