"""What a wrong argument does: it is refused by name, and nothing has changed.

Beside test_arguments.py, where the rows of the catalogue of bad inputs are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
