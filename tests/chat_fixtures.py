"""Fixtures of tests that talk with a tiny model; a file asks for them: `pytest_plugins`."""

from collections.abc import Iterator
from functools import partial

import pytest
from chatting import Begin, begun, opened

from edgellama import Model
from edgellama.cli.chat import Chat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(tmp_path_factory.mktemp("models") / "chat.gguf") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model without a chat template."""
    with opened(tmp_path_factory.mktemp("models") / "base.gguf", None) as loaded:
        yield loaded


@pytest.fixture
def begin(model: Model) -> Begin:
    return partial(begun, model)


@pytest.fixture
def chat(begin: Begin) -> Chat:
    return begin()
