"""What a wrong argument does: it is refused by name, and nothing has changed.

Beside test_arguments.py, where the rows of the catalogue of bad inputs are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny

import edgellama
from edgellama import Model, ParameterError, Sampling, Session

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("refused") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with edgellama.load(path, runtime="reference", context=64) as loaded:
        yield loaded


def generated(model: Model, session: Session, **options: Any) -> Any:
    return model.generate([9], session=session, **options)


def chatted(model: Model, session: Session, **options: Any) -> Any:
    return model.chat(MESSAGES, template=TEMPLATE, session=session, **options)


@pytest.mark.parametrize("call", [generated, chatted])
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"params": Sampling(logit_bias={288: 1})}, "logit_bias id"),
        ({"params": "x"}, "params"),
        ({"cancel": True}, "cancel"),
    ],
)
def test_a_refused_reply_leaves_the_cache(
    model: Model, call: Callable[..., Any], options: dict[str, Any], field: str
) -> None:
    with model.session() as session:
        session.forward([1, 5, 6, 7, 8])
        with pytest.raises(ParameterError) as caught:
            call(model, session, **options)
        assert caught.value.field == field
        assert session.ids == (1, 5, 6, 7, 8)


ODD_IDS = [
    np.array([[1, 2]]),
    np.array([[1], [2]]),
    np.zeros((0, 3), np.int64),
    np.array(3),
    np.array([1.0]),
    np.array([True]),
    None,
    5,
    b"ab",
    [np.array([1])],
    [10**30],
]


@pytest.mark.parametrize("ids", ODD_IDS)
def test_ids_are_one_row_of_integers(model: Model, ids: Any) -> None:
    with model.session() as session:
        for call in (session.forward, session.generate, model.generate):
            with pytest.raises(ParameterError) as caught:
                call(ids)
            assert caught.value.field == ("prompt" if "prompt" in str(caught.value) else "ids")
        assert session.position == 0


def test_integers_of_numpy_do_as_well(path: Path) -> None:
    eight: Any = np.int64(8)
    with edgellama.load(path, context=eight, threads=np.uint8(1)) as model:
        assert model.info.context == 8 and type(model.info.context) is int
        session = model.session()
        session.forward([1, 5, 6])
        session.truncate(np.int32(2))
        assert session.ids == (1, 5)
        last = list(model.generate([1], max_tokens=np.int16(1)))[-1]
        assert last.usage is not None and last.usage.completion_tokens == 1
        with pytest.raises(ParameterError, match=r"n = 9; allowed: an integer 0\.\.2"):
            session.truncate(np.int64(9))
