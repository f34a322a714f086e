"""Fixtures of tests at a pseudo-terminal; a file asks for them: `pytest_plugins`. POSIX only."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pseudoterminal import Window
from terminalhome import Home, at_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[Home]:
    with at_home(tmp_path_factory.mktemp("home"), default_model) as home:
        yield home


@pytest.fixture
def talk(home: Home) -> Window:
    return home.talk()
