"""Errors outlive a copy, and the way from a worker process to the one that waits for it."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellama import errors
from edgellama.control import CancelToken
from edgellama.errors import (
    Cancelled,
    ContextOverflow,
    EdgeLlamaError,
    OutputError,
    ParameterError,
)

WAYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {number}": lambda error, number=number: pickle.loads(pickle.dumps(error, number))
        for number in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def family(kind: type[EdgeLlamaError] = EdgeLlamaError) -> Iterator[type[EdgeLlamaError]]:
    if kind.__module__ == errors.__name__:
        yield kind
    for each in kind.__subclasses__():
        yield from family(each)


def examples(kind: type[EdgeLlamaError]) -> list[EdgeLlamaError]:
    if kind is ContextOverflow:
        return [ContextOverflow(5, 4), ContextOverflow(5, 4, "Hurry")]
    if kind is Cancelled:
        return [Cancelled(), Cancelled("load")]
    told: dict[str, Any] = {
        "path": Path("a/b"),
        "where": "key 'x'",
        "field": "x",
        "value": [3, "y"],
        "allowed": "1..2",
        "hint": "Take 2",
    }
    return [kind("a problem"), kind("a problem", **told)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(family()))
def test_an_error_survives(kind: type[EdgeLlamaError], way: str) -> None:
    for error in examples(kind):
        error.add_note("seen in passing")
        again = WAYS[way](error)
        assert type(again) is kind and again is not error
        assert (str(again), again.args) == (str(error), error.args)
        assert vars(again) == vars(error)
        if isinstance(error, OutputError):
            assert (again.errno, again.filename) == (error.errno, error.filename)


@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_cannot_be_sent(way: str) -> None:
    """It is told as text; a mere copy of the error keeps it."""
    token = CancelToken()
    error = ParameterError("odd", field="ids", value=token)
    again = WAYS[way](error)
    assert str(again) == "odd" and again.field == "ids"
    assert again.value == (token if way == "copy" else errors.shown(token))


def refuse() -> None:
    raise ContextOverflow(17, 16)


def test_an_error_leaves_a_worker_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(ContextOverflow) as caught:
            pool.apply_async(refuse).get(120)
        assert (caught.value.need, caught.value.have) == (17, 16)
