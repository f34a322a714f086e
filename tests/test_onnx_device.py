"""Devices of the onnx runtime: what is not there is named, and nothing runs elsewhere silently."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import write_tiny

import edgellama
from edgellama.runtimes.base import Options

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)"
)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_OPTIONS = Options(context=64, threads=1, device="cuda")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    yield write_tiny(tmp_path / "tiny.gguf", types="Q8_0")


def device() -> Any:
    """CUDA's, as it is where all of its libraries are."""
    from edgellama.runtimes.onnx_containers import EIGHT_BIT
    from edgellama.runtimes.onnx_device import Device

    return Device("cuda", CUDA, EIGHT_BIT)


def session_of(**nodes: int) -> Any:
    """What ONNX Runtime says of a session whose nodes run there."""
    parts = [SimpleNamespace(ep_name=n, get_nodes=lambda k=k: [0] * k) for n, k in nodes.items()]
    return SimpleNamespace(
        get_providers=lambda: [CUDA, CPU], get_provider_graph_assignment_info=lambda: parts
    )


def test_no_silent_fallback_from_cuda(path: Path) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    for runtime in ("auto", "onnx"):
        with pytest.raises(edgellama.DeviceUnavailable, match=r"pip install 'edgellama\[cuda\]'"):
            edgellama.load(path, runtime, device="cuda")


def test_a_missing_library_is_named() -> None:
    """A build with CUDA on a machine without NVIDIA's driver."""
    from edgellama.runtimes import onnx_device

    if sys.platform != "linux":
        pytest.skip("libraries are looked for by these names on Linux")
    if onnx_device._load("libcuda.so.1"):
        pytest.skip("NVIDIA's driver is here")
    build = SimpleNamespace(get_available_providers=lambda: [CUDA])
    with pytest.raises(edgellama.DeviceUnavailable, match=r"libcuda\.so\.1 is missing.*driver"):
        onnx_device.require_cuda(build)


def test_a_session_that_came_back_on_the_cpu_is_refused(path: Path) -> None:
    with edgellama.load(path, "onnx") as model:
        session: Any = model._runtime.inference  # type: ignore[union-attr]
        with pytest.raises(edgellama.DeviceUnavailable, match=f"fell back to {CPU}"):
            device().check(session)


def test_nodes_elsewhere_are_refused() -> None:
    device().check(session_of(**{CUDA: 300}))
    with pytest.raises(edgellama.DeviceUnavailable, match=f"2 nodes run on {CPU}"):
        device().check(session_of(**{CUDA: 300, CPU: 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_type": "q8_0"}, "kv_type = 'q8_0'; allowed: f16"),
        ({"kv_type": "f32"}, "kv_type = 'f32'; allowed: f16"),
        ({"dtype": "float32"}, "dtype = 'float32'; allowed: float16, bfloat16"),
        ({"accuracy": 4}, "accuracy = 4; allowed: None"),
    ],
)
def test_what_cuda_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(edgellama.ParameterError, match=message):
        device().manner(replace(CUDA_OPTIONS, **options))


def test_what_cuda_does() -> None:
    for dtype in (None, "float16", "bfloat16"):
        manner = device().manner(replace(CUDA_OPTIONS, dtype=dtype))
        assert manner.dtype == (dtype or "float16") and manner.candidates == 64
