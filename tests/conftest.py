"""What all tests share: the real model, where it has been pulled; what the marker `gpu` means."""

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where ONNX Runtime has really computed something on CUDA."""
    if item.get_closest_marker("gpu"):
        from gpu.provider import missing

        if (why := missing("cuda")) is not None:
            pytest.skip(f"CUDA cannot be used here: {why}")
