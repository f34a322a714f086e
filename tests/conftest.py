"""What all tests share: the real model, where it has been pulled; what the marker `gpu` means."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from edgellama.errors import EdgeLlamaError
from edgellama.paths import DEFAULT_MODEL, model_path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what ends in `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _default_model() -> Path | None:
    if chosen := os.environ.get("EDGELLAMA_TEST_MODEL"):
        return Path(chosen)
    with contextlib.suppress(EdgeLlamaError):
        return model_path(DEFAULT_MODEL)
    return None


FOUND = _default_model()  # now: whoever asks first may have pointed to another cache


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file: $EDGELLAMA_TEST_MODEL, else the one in the cache."""
    if FOUND is None:
        pytest.skip("the default model is not here: `edgellama pull` fetches it")
    return FOUND


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where ONNX Runtime has really computed something on CUDA."""
    if item.get_closest_marker("gpu"):
        from gpu.provider import missing

        if (why := missing("cuda")) is not None:
            pytest.skip(f"CUDA cannot be used here: {why}")
