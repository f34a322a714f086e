"""Whether ONNX Runtime really runs on CUDA here, and sessions that stay where they are put.

ONNX Runtime lists a CUDA provider that cannot load, and falls back to the CPU without a word; so
the answer is a product of 4-bit weights in half precision that was really computed by CUDA.
"""

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpu.parts import Skip

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def runtime(device: str = "cpu") -> Any:
    """The onnxruntime module, its telemetry off; for CUDA, where it finds CUDA's libraries.

    torch brings them along and must come first; else they are packages of their own.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with_torch = device == "cuda" and importlib.util.find_spec("torch") is not None
    if with_torch:
        importlib.import_module("torch")
    import onnxruntime

    if device == "cuda" and not with_torch and CUDA in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()
    return onnxruntime


def session(model: bytes, device: str, **entries: str) -> Any:
    """A session all of whose nodes are on `device`: "cpu" or "cuda". Raises RuntimeError."""
    ort = runtime(device)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    if device == "cpu":
        options.intra_op_num_threads = 2
        return ort.InferenceSession(model, options, providers=[CPU])
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    made = ort.InferenceSession(model, options, providers=[CUDA])
    if made.get_providers()[0] != CUDA:
        raise RuntimeError(f"the session came back with {made.get_providers()}")
    return made


@cache
def missing(device: str) -> str | None:
    """Why `device` cannot be used, or None."""
    try:
        _check(device)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}{_library_error()}"
    return None


def require(device: str) -> None:
    """Raises Skip if ONNX Runtime is not here at all, RuntimeError if CUDA cannot be used."""
    if (why := missing(device)) is not None:
        raise Skip(why) if device == "cpu" else RuntimeError(why)


def _check(device: str) -> None:
    import onnx  # noqa: F401  the kit's models are made with it

    ort = runtime(device)
    if device == "cuda" and CUDA not in ort.get_available_providers():
        raise RuntimeError(f"onnxruntime {ort.__version__} has no CUDA provider")
    from gpu import ops

    far = ops.product(device, ops.Product(bits=4, m=1, k=64, n=64, dtype="float16"))
    if not far["nmse"] < 1e-5:
        raise RuntimeError(f"a product of 4-bit weights is off by NMSE {far['nmse']:.1e}")


def _library_error() -> str:
    """What the loader says of the CUDA provider's library, if there is one and it does not load."""
    try:
        ort = runtime()
    except ImportError:
        return ""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.exists():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f" ({error})"
    return ""


def bound(value: np.ndarray, device: str) -> Any:
    """An OrtValue on the device."""
    return runtime().OrtValue.ortvalue_from_numpy(value, device, 0)
