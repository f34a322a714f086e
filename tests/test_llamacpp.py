"""The llama.cpp runtime: the others' contract, nothing on stderr, nothing left behind."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.distance import nmse

N = 150  # tokens: more than two of the batches in which all logits are computed
NEAR = 1e-5  # NMSE: llama.cpp rounds differently as its batches differ in size


def test_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "llama_cpp.llama_cpp", raising=False)
    path = write_tiny(tmp_path / "tiny.gguf")
    with pytest.raises(edgellama.DeviceUnavailable, match=r"pip install 'edgellama\[llamacpp\]'"):
        edgellama.load(path, runtime="llama.cpp")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = tiny_config(context_length=256)
    return write_tiny(tmp_path_factory.mktemp("llamacpp") / "tiny.gguf", config)


@pytest.fixture(scope="module")
def long_path(path: Path) -> Path:
    return write_tiny(path.parent / "long.gguf", tiny_config(context_length=4096))


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[edgellama.Model]:
    with edgellama.load(path, runtime="llama.cpp", threads=2, kv_type="f32") as model:
        yield model


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(i) for i in np.random.default_rng(5).integers(0, 288, N)]


def test_agrees_with_the_reference(model: edgellama.Model, path: Path, ids: list[int]) -> None:
    with edgellama.load(path, runtime="reference") as reference:
        wanted = reference.session().forward(ids, all_logits=True)
    got = model.session().forward(ids, all_logits=True)
    assert got.dtype == np.float32 and got.shape == (N, 288)
    assert nmse(wanted, got) < NEAR


def test_last_logits_are_the_last_of_all(model: edgellama.Model, ids: list[int]) -> None:
    every = model.session().forward(ids, all_logits=True)
    last = model.session().forward(ids)
    assert last.shape == (288,)
    assert nmse(every[-1], last) < NEAR


def test_truncate_forgets(model: edgellama.Model, ids: list[int]) -> None:
    session = model.session()
    session.forward(ids[:40])
    session.truncate(10)
    assert session.position == 10
    assert nmse(model.session().forward(ids[:11]), session.forward(ids[10:11])) < NEAR


def test_sessions_are_independent(model: edgellama.Model, ids: list[int]) -> None:
    one, two = model.session(), model.session()
    one.forward(ids[:20])
    two.forward(ids[50:90])
    assert nmse(model.session().forward(ids[:21]), one.forward(ids[20:21])) < NEAR


def test_cancelled_before_it_starts(model: edgellama.Model, ids: list[int]) -> None:
    session, token = model.session(), edgellama.CancelToken()
    session.forward(ids[:5])
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        session.forward(ids[5:], cancel=token)
    assert session.position == 5
    assert nmse(model.session().forward(ids[:6]), session.forward(ids[5:6])) < NEAR


def test_cancelled_in_the_middle(default_model: Path) -> None:
    """Within a batch: the whole of this prompt takes seconds."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    with edgellama.load(default_model, runtime="llama.cpp", threads=1, context=2048) as model:
        session, token = model.session(), edgellama.CancelToken()
        cancelled_at: list[float] = []

        def cancel() -> None:
            cancelled_at.append(time.monotonic())
            token.cancel()

        timer = threading.Timer(0.2, cancel)
        timer.start()
        with pytest.raises(edgellama.Cancelled):
            session.forward(list(range(1000, 3048)), cancel=token)
        timer.join()
        assert time.monotonic() - cancelled_at[0] < 5  # a hang bound, not a timing
        assert session.position == 0
        assert np.isfinite(session.forward([1, 2, 3])).all()


def test_cancelled_load(path: Path) -> None:
    token = edgellama.CancelToken()
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        edgellama.load(path, runtime="llama.cpp", cancel=token)


def test_says_nothing_to_the_host(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with edgellama.load(path, runtime="llama.cpp") as model:
        model.session().forward([1, 2, 3])
        assert model.device["runtime"] == "llama.cpp" and model.device["version"]
    assert capfd.readouterr() == ("", "")


def test_closed_twice_and_in_any_order(path: Path) -> None:
    model = edgellama.load(path, runtime="llama.cpp")
    session, other = model.session(), model.session()
    session.close()
    session.close()
    model.close()
    model.close()
    other.close()
    with pytest.raises(edgellama.ParameterError, match="closed"):
        other.forward([1])


CLOSING = """
import sys, threading, time
import edgellama

def load():
    return edgellama.load(sys.argv[1], runtime="llama.cpp", threads=1, context=2048)

def expect_closed(work):
    try:
        while True:
            work()
    except edgellama.ParameterError as error:
        said.append(str(error))

def closing(works, wait):
    threads = [threading.Thread(target=expect_closed, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(wait)
    model.close()
    for thread in threads:
        thread.join()

said = []
for i in range(20):  # sessions are opened, and dropped
    model = load()
    closing([model.session] * 2, 0.005 * (1 + i % 5))
for i in range(4):  # sessions wait for their turn, are computing, forget
    model = load()
    sessions = [model.session() for _ in range(4)]

    def work(session):
        session.forward(list(range(200)) * 5)
        session.truncate(3)
        session.truncate(0)

    closing([lambda session=session: work(session) for session in sessions], 0.05)
assert said == ["the model is closed"] * 56, said
"""


def test_closing_a_model_while_sessions_are_opened_and_work(long_path: Path) -> None:
    """In a process of its own: what has been freed must not be touched."""
    command = [sys.executable, "-X", "faulthandler", "-c", CLOSING, str(long_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["session", "model"])
def test_closing_ends_a_call_that_computes_and_one_that_waits(long_path: Path, what: str) -> None:
    model = edgellama.load(long_path, runtime="llama.cpp", threads=1, context=4096)
    said: list[str] = []

    def work(session: edgellama.Session) -> None:
        try:
            while True:
                session.forward([5] * 4000)
                session.truncate(0)
        except edgellama.ParameterError as error:
            said.append(str(error))

    sessions = [model.session() for _ in range(3)]
    threads = [threading.Thread(target=work, args=(s,), daemon=True) for s in sessions]
    for thread in threads:
        thread.start()
    for closed in sessions if what == "session" else [model]:
        closed.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert said == [f"the {what} is closed"] * 3
    model.close()


def test_waiting_for_another_session_can_be_cancelled(long_path: Path) -> None:
    with edgellama.load(long_path, runtime="llama.cpp", threads=1, context=4096) as model:
        session, token = model.session(), edgellama.CancelToken()
        begun, over = threading.Event(), threading.Event()

        def compute() -> None:
            with model._runtime.turns.turn():
                begun.set()
                over.wait(60)

        other = threading.Thread(target=compute)
        other.start()
        assert begun.wait(60)
        threading.Timer(0.05, token.cancel).start()
        with pytest.raises(edgellama.Cancelled):
            session.forward([1, 2, 3], cancel=token)
        over.set()
        other.join()
        assert session.position == 0 and session.forward([1]).shape == (288,)


def test_unknown_cache_type_is_refused(path: Path) -> None:
    with pytest.raises(edgellama.ParameterError, match="kv_type = 'q3'"):
        edgellama.load(path, runtime="llama.cpp", kv_type="q3")


def test_greedy_reply_is_the_cpus(path: Path) -> None:
    """Float32 weights and a seeded model: no near-ties for rounding to decide."""
    greedy = edgellama.Sampling(temperature=0)
    tokens = []
    for runtime in ("llama.cpp", "cpu"):
        with edgellama.load(path, runtime=runtime, kv_type="f32") as model:
            tokens.append([c.token for c in model.generate([1, 9, 40], greedy, max_tokens=12)])
    assert tokens[0] == tokens[1]


FORK = """
import os, sys
import edgellama

def load():
    return edgellama.load(sys.argv[1], runtime="llama.cpp", threads=2)

with load() as model, load():
    model.session().forward([1, 2, 3])
    child = os.fork()
    if child == 0:
        try:
            load().session().forward([1, 2, 3])
        except edgellama.ForkedProcess:
            os._exit(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert model.session().forward([1]).shape == (288,)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is POSIX's")
def test_a_forked_child_does_not_wait_for_threads_it_does_not_have(path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
