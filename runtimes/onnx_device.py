"""ONNX Runtime's devices: which can be had here, and how a graph is made for each.

Nothing falls back silently: a device that was asked for is there, or the error says what is
missing and what installs it. Knows nothing about graphs' nodes or sessions.
"""

import contextlib
import ctypes
import importlib
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellama.errors import DeviceUnavailable, ParameterError, require_choice
from edgellama.runtimes import onnx_containers as containers
from edgellama.runtimes.base import Options
from edgellama.runtimes.onnx_lowering import Manner

INSTALL, INSTALL_CUDA = "pip install 'edgellama[onnx]'", "pip install 'edgellama[cuda]'"
DRIVER = "NVIDIA's driver for CUDA 13 (release 580 or later)"
REPLACE = f"pip uninstall onnxruntime onnxruntime-gpu; {INSTALL_CUDA}"
ACCURACIES = (0, 4)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HALVES = ("float16", "bfloat16")
FAST_PRODUCTS = "ep.cuda.fpa_intb_gemm"  # kernels that need weights prepared by optimizations
CANDIDATES = 64  # likeliest tokens that a step on CUDA gives besides its logits
_LIBRARIES = {  # what the CUDA provider is linked with, of CUDA 13: the package that has each
    "libcuda.so.1": "",  # the driver's own
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libcublasLt.so.13": "nvidia-cublas",
    "libcublas.so.13": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
}


@dataclass(frozen=True)
class Device:
    """One device, ready: what a session must be opened with."""

    name: str
    provider: str
    containers: str  # how types with a minimum are kept
    provider_options: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)  # of the session's config

    @staticmethod
    def of(api: Any, options: Options) -> "Device":
        """The device that the options name. Raises DeviceUnavailable where it cannot be had."""
        if options.device != "cuda":
            entries = {
                "session.intra_op.allow_spinning": "1",
                "session.force_spinning_stop": "1",  # between two calls threads sleep
            }
            return Device("cpu", CPU, containers.EXACT, {}, entries)
        require_cuda(api)
        return Device(
            "cuda",
            CUDA,
            containers.EIGHT_BIT,
            {"enable_cuda_graph": "1"},
            {"session.disable_cpu_ep_fallback": "1", FAST_PRODUCTS: "1"},
        )

    @property
    def memory(self) -> str:
        """Where a session's buffers lie."""
        return self.name

    @property
    def providers(self) -> list[Any]:
        return [(self.provider, dict(self.provider_options))]

    def manner(self, options: Options) -> Manner:
        """How the graph is lowered. Raises ParameterError for what the device cannot do."""
        if self.name == "cpu":
            accuracy = 4 if options.accuracy is None else options.accuracy
            if accuracy not in ACCURACIES or isinstance(accuracy, bool):
                raise _refused("accuracy", accuracy, ACCURACIES)
            if options.dtype is not None:
                raise _refused("dtype", options.dtype, ("None: the CPU computes in float32",))
            require_choice("kv_type", options.kv_type, ("f16", "f32"))  # float32 holds both
            return Manner(accuracy=accuracy)
        if options.accuracy is not None:
            raise _refused("accuracy", options.accuracy, ("None: it is for the CPU",))
        require_choice("kv_type", options.kv_type, ("f16",))
        dtype = require_choice("dtype", options.dtype or HALVES[0], HALVES)
        return Manner(dtype, candidates=CANDIDATES)

    def reason(self, options: Options) -> str:
        """Why it is this one."""
        if options.device == self.name:
            return "asked for"
        return "auto is the CPU"

    def check(self, session: Any) -> None:
        """The session must run where it was asked to: ONNX Runtime itself would fall back."""
        found = session.get_providers()
        if found[0] != self.provider:
            raise _unavailable(f"ONNX Runtime fell back to {found[0]}", INSTALL_CUDA)
        elsewhere = {name: n for name, n in placement(session).items() if name != self.provider}
        if elsewhere:
            problem = f"{sum(elsewhere.values())} nodes run on {', '.join(elsewhere)}"
            raise _unavailable(f"the graph is not all on the device: {problem}", REPLACE)


def placement(session: Any) -> dict[str, int]:
    """How many nodes each provider runs; nothing where the release cannot tell."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(Exception):
        for part in session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def _refused(name: str, value: object, allowed: tuple[object, ...]) -> ParameterError:
    text = " or ".join(map(str, allowed))
    return ParameterError(f"{name} = {value}; allowed: {text}", field=name, value=value)


def _unavailable(problem: str, install: str) -> DeviceUnavailable:
    return DeviceUnavailable(
        f"device = 'cuda': {problem}", field="device", value="cuda", hint=f"Install it: {install}"
    )


def require_cuda(api: Any) -> None:
    """Load what the CUDA provider needs. Raises DeviceUnavailable naming what is missing."""
    if CUDA not in api.get_available_providers():
        both = " (onnxruntime hides onnxruntime-gpu when both are installed)"
        problem = "this onnxruntime was built without CUDA" + (both if _both_installed() else "")
        raise _unavailable(problem, REPLACE)
    if sys.platform != "linux":
        return
    for library, package in _LIBRARIES.items():
        if not _load(library):
            install = DRIVER if package == "" else INSTALL_CUDA
            owner = package or "NVIDIA's driver"
            problem = f"{library} is missing, a part of {owner}"
            raise _unavailable(problem, install)


def _both_installed() -> bool:
    from importlib.metadata import distributions

    names = {str(found.metadata["Name"]).lower() for found in distributions()}
    return {"onnxruntime", "onnxruntime-gpu"} <= names


def _load(library: str) -> bool:
    """From where the system looks, else from NVIDIA's Python packages."""
    places = [Path(entry) / "nvidia" for entry in sys.path if entry]
    files = [str(file) for place in places for file in place.glob(f"*/lib/{library}")]
    for name in (library, *files):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def bindings() -> tuple[Any, str]:
    """(onnxruntime, how its telemetry was switched off). Raises DeviceUnavailable without it."""
    imported = "onnxruntime" in sys.modules
    if not imported:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # the one exception to "no change"
    try:
        api = importlib.import_module("onnxruntime")
    except (ImportError, OSError, RuntimeError) as error:  # missing, or its library is broken
        raise DeviceUnavailable(
            f"onnxruntime cannot be imported: {error}",
            field="runtime",
            value="onnx",
            hint=f"Install it: {INSTALL} for the CPU, {INSTALL_CUDA} for an NVIDIA GPU",
        ) from error
    if imported:
        api.disable_telemetry_events()
    return api, "off by its interface" if imported else "off before the import"
