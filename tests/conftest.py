"""What all tests share: the real model, where it has been pulled."""

import os
from pathlib import Path

import pytest

from edgellama.errors import EdgeLlamaError
from edgellama.paths import DEFAULT_MODEL, model_path


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file: $EDGELLAMA_TEST_MODEL, else the one in the cache."""
    chosen = os.environ.get("EDGELLAMA_TEST_MODEL")
    if chosen:
        return Path(chosen)
    try:
        return model_path(DEFAULT_MODEL)
    except EdgeLlamaError:
        pytest.skip("the default model is not here: `edgellama pull` fetches it")
