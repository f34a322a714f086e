"""Closing a model while other threads open sessions, compute and forget, with any runtime."""

import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_tiny

import edgellama

ROUNDS = 8
WAITS = (0.0, 0.005, 0.02, 0.05)  # seconds before the model is closed
PROMPT = [5] * 200
RUNTIMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(find_spec(needed) is None, reason=f"{needed} is not installed"),
    )
    for name, needed in (("reference", "numpy"), ("onnx", "onnxruntime"))
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(context_length=1024, n_layers=3)
    return write_tiny(tmp_path_factory.mktemp("closing") / "tiny.gguf", config)


def opening(model: edgellama.Model) -> None:
    model.session()


def beginning(model: edgellama.Model) -> None:
    model.session().forward([1, 2, 3])


def computing(model: edgellama.Model) -> Callable[[edgellama.Model], None]:
    session = model.session()

    def work(_: edgellama.Model) -> None:
        session.forward(PROMPT)
        session.truncate(10)
        session.forward([7])
        session.truncate(0)

    return work


def replying(model: edgellama.Model) -> None:
    for _ in model.generate(PROMPT, edgellama.Sampling(seed=1), max_tokens=100):
        pass


def closed_while(
    model: edgellama.Model, works: list[Callable[[edgellama.Model], None]], wait: float
) -> list[BaseException]:
    """What threads raised that worked until the model was closed."""
    raised: list[BaseException] = []

    def repeat(work: Callable[[edgellama.Model], None]) -> None:
        try:
            while True:
                work(model)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=repeat, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    threading.Event().wait(wait)
    model.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_call_that_was_under_way_says_that_the_model_is_closed(
    path: Path, runtime: Any
) -> None:
    for i in range(ROUNDS):
        model = edgellama.load(path, runtime, context=256)
        works = [opening, opening, beginning, computing(model), replying]
        for error in closed_while(model, works, WAITS[i % len(WAITS)]):
            assert isinstance(error, edgellama.ParameterError), repr(error)
            assert str(error) == "the model is closed"
