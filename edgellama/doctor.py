"""What edgellama finds on this machine: versions, processor, memory, caches, devices; and what is
wrong with it.

Facts only, as plain values: who asks decides how to show them. Opens no model and no network, and
imports nothing heavy that is not asked about. Knows nothing about terminals.
"""

import importlib.util
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import edgellama
from edgellama import cgroups
from edgellama.errors import EdgeLlamaError
from edgellama.machine import available_memory, usable_cores
from edgellama.measure import machine
from edgellama.paths import cache_dir, cache_root
from edgellama.pull import SCRATCH, abandoned

REQUIRED = (
    *("numpy", "numba", "llvmlite", "gguf", "tokenizers", "jinja2"),
    *("typer", "rich", "prompt_toolkit", "huggingface_hub"),
)
OPTIONAL = ("onnx", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python")
NETWORK = (  # everything that can open a connection
    "edgellama pull (pip for the known model, huggingface_hub for ORG/REPO/FILE.gguf)",
    "edgellama chat without MODEL, when the default model is not here yet",
)
TEMPORARY = ".tmp"


@dataclass
class Findings:
    """Sections of facts, and problems: (what is wrong, what to do)."""

    versions: dict[str, str | None] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    onnx: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # EDGELLAMA_* that are set
    problems: list[tuple[str, str]] = field(default_factory=list)


def examine() -> Findings:
    """Look at everything. Never raises for what it finds: that is a problem in the list."""
    found = Findings()
    found.versions = _versions(found)
    found.processor = _processor(found)
    found.memory = _memory(found)
    found.caches = _caches(found)
    found.onnx = _onnx(found)
    found.network = _network()
    found.environment = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith("EDGELLAMA_")
    }
    return found


def _versions(found: Findings) -> dict[str, str | None]:
    """By distribution; None for what is not installed."""
    versions: dict[str, str | None] = {
        "edgellama": edgellama.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in (*REQUIRED, *OPTIONAL):
        versions[name] = _version(name)
        if versions[name] is None and name in REQUIRED:
            found.problems.append((f"{name} is not installed", "pip install edgellama"))
    return versions


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- processor and memory ------------------------------------------------------------------------


def _processor(found: Findings) -> dict[str, Any]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    facts: dict[str, Any] = {
        "name": machine()["processor"],
        "logical": os.cpu_count(),
        "allowed": allowed,
        "quota": cgroups.cores(),
        "threads": usable_cores(),
        "levels": [],
        "level": None,
        "reason": None,
        "features": [],
    }
    try:
        from edgellama.runtimes import levels

        facts["levels"] = list(levels.available())
        facts["features"] = _features()
        level, facts["reason"] = levels.choose()
        facts["level"] = level.name
    except EdgeLlamaError as error:
        found.problems.append((str(error), error.hint or "See the message"))
    except ImportError as error:
        found.problems.append((f"LLVM cannot be used: {error}", "pip install llvmlite"))
    if facts["level"] == "generic" and facts["levels"] == ["generic"]:
        problem = "the processor has none of the vector instructions that edgellama makes use of"
        found.problems.append((problem, "Models run, but slowly"))
    return facts


def _features() -> list[str]:
    """LLVM's names of those features that make a difference to edgellama."""
    import llvmlite.binding as llvm

    from edgellama.runtimes.levels import LEVELS

    known = {feature for level in LEVELS.values() for feature in level.needs}
    try:
        here = {name for name, has in llvm.get_host_cpu_features().items() if has}
    except RuntimeError:  # LLVM cannot tell on this system
        return []
    return sorted(known & here)


def _memory(found: Findings) -> dict[str, Any]:
    available, limit = available_memory(), cgroups.free_memory()
    if available is not None and available < 500_000_000:
        problem = f"only {available / 1e6:.0f} MB of memory are available"
        found.problems.append((problem, "`edgellama estimate FILE` tells what a model needs"))
    return {"available": available, "cgroup_left": limit}


# --- caches --------------------------------------------------------------------------------------


def _caches(found: Findings) -> dict[str, Any]:
    try:
        root = cache_root()
    except EdgeLlamaError as error:
        found.problems.append((str(error), error.hint or ""))
        return {"root": None}
    facts = {"root": str(root)}
    return facts | {"models": _models(root, found), "kernels": _kernels(root, found)}


def _folder(root: Path, kind: Any, found: Findings) -> dict[str, Any]:
    """Whether the folder can be used. One that is not there yet is not created."""
    folder, facts = root / kind, {"path": str(root / kind), "files": 0, "bytes": 0}
    if not folder.exists():
        parent = next(parent for parent in folder.parents if parent.exists())
        facts["writable"] = parent.is_dir() and os.access(parent, os.W_OK)
        if not facts["writable"]:
            reason = "is not writable" if parent.is_dir() else "is no folder"
            problem = f"{folder} cannot be made: {parent} {reason}"
            found.problems.append((problem, "Set EDGELLAMA_CACHE to a folder of your own"))
        return facts
    try:
        cache_dir(kind)
    except EdgeLlamaError as error:
        found.problems.append((str(error), error.hint or "Set EDGELLAMA_CACHE to another folder"))
        return facts | {"writable": False}
    facts["writable"] = os.access(folder, os.W_OK)
    if not facts["writable"]:
        advice = "Make it yours, or set EDGELLAMA_CACHE to a folder of your own"
        found.problems.append((f"{folder} is not writable: nothing can be kept", advice))
    return facts


def _models(root: Path, found: Findings) -> dict[str, Any]:
    facts = _folder(root, "models", found)
    folder = Path(facts["path"])
    names, transcoded, left = [], 0, []
    _tell_killed_pulls(folder, found)
    for file in _files(folder):
        inside = file.relative_to(folder)
        facts["files"], facts["bytes"] = facts["files"] + 1, facts["bytes"] + _size(file)
        if file.name.startswith(".") and file.name.endswith(TEMPORARY):
            left.append(file)
        elif inside.parts[0] == ".onnx":
            transcoded += _size(file)
        elif inside.parts[0].startswith(SCRATCH):
            continue
        elif file.suffix == ".gguf":
            names.append(os.fspath(inside if len(inside.parts) > 1 else inside.with_suffix("")))
    _tell_left_behind(left, found)
    return facts | {"names": sorted(names), "transcoded_bytes": transcoded}


def _tell_killed_pulls(models: Path, found: Findings) -> None:
    for folder in abandoned(models):
        size = sum(map(_size, _files(folder)))
        problem = f"{folder}: left behind by a pull that was killed, {size / 1e6:.1f} MB"
        found.problems.append((problem, "The next `edgellama pull` removes it; so can you"))


def _kernels(root: Path, found: Findings) -> dict[str, Any]:
    facts = _folder(root, "kernels", found)
    facts |= {"compiled": 0, "stale": 0, "foreign": [], "shipped": None}
    try:
        from edgellama.runtimes import kernel_cache, shipped_kernels
    except ImportError:
        return facts
    left = []
    for file in _files(Path(facts["path"])):
        facts["files"], facts["bytes"] = facts["files"] + 1, facts["bytes"] + _size(file)
        if file.name.endswith(TEMPORARY):
            left.append(file)
        elif not (file.name.startswith("edgellama_") and file.suffix == ".o"):
            facts["foreign"].append(str(file))
        else:
            facts["compiled" if kernel_cache.is_current(file.name) else "stale"] += 1
    _tell_left_behind(left, found)
    _tell_foreign(facts, found)
    place = shipped_kernels.folder()
    facts["shipped"] = None if place is None else str(place)
    hint = f"{shipped_kernels.VARIABLE} must name a folder that only its owner can write to"
    found.problems += [(warning, hint) for warning in shipped_kernels.warnings]
    return facts


def _tell_foreign(facts: dict[str, Any], found: Findings) -> None:
    if facts["foreign"]:
        problem = f"{facts['foreign'][0]} is not edgellama's ({len(facts['foreign'])} such files)"
        found.problems.append((problem, "Nothing reads it: move it away"))


def _tell_left_behind(left: list[Path], found: Findings) -> None:
    if left:
        problem = f"{left[0]}: left behind by a process that was killed ({len(left)} such files)"
        found.problems.append((problem, "The next writer removes it; so can you"))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone meanwhile
        return 0


# --- ONNX Runtime and the network ----------------------------------------------------------------


def _onnx(found: Findings) -> dict[str, Any]:
    """Imports onnxruntime, if it is there: its providers are not known otherwise."""
    facts: dict[str, Any] = {"version": None, "providers": [], "cuda": None, "telemetry": None}
    both = _version("onnxruntime") is not None and _version("onnxruntime-gpu") is not None
    if importlib.util.find_spec("onnxruntime") is None:
        return facts | {"cuda": "onnxruntime is not installed"}
    from edgellama.runtimes import onnx_device

    if both:
        problem = "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other"
        found.problems.append((problem, onnx_device.REPLACE))
    try:
        api, facts["telemetry"] = onnx_device.bindings()
        facts["version"] = api.get_version_string()
        facts["providers"] = list(api.get_available_providers())
    except EdgeLlamaError as error:
        found.problems.append((str(error), error.hint or onnx_device.INSTALL))
        return facts
    try:
        onnx_device.require_cuda(api)
        facts["cuda"] = "its libraries are here"
    except EdgeLlamaError as error:
        facts["cuda"] = str(error)
        if _version("onnxruntime-gpu") is not None:
            found.problems.append((str(error), error.hint or onnx_device.INSTALL_CUDA))
    return facts


def _network() -> dict[str, Any]:
    """What could connect, and what forbids it; nothing is tried."""
    hub = os.environ.get("HF_HUB_OFFLINE")
    return {
        "used_by": list(NETWORK),
        "hub_offline": hub,
        "telemetry": "edgellama has none; ONNX Runtime's is switched off before it is used",
    }
