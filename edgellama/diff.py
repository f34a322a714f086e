"""Where two runtimes, or two files, part: every value of the decoder graph, in the graph's order.

Both compute the same tokens; the first value further apart than the tolerance has a name. Knows
nothing about how a runtime shows its values: see `edgellama.runtimes.trace`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellama.control import CancelToken, Progress
from edgellama.errors import ParameterError, require_choice
from edgellama.ggml import FLOATS
from edgellama.opening import load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgellama.model import Model

TEXT = "The capital of France is Paris, and the capital of Italy is"
RUNTIMES = ("cpu", "onnx", "reference", "onnx:cpu", "onnx:cuda")  # that show their values
UNFUSED, FUSED = "unfused", "fused"

# Normalized mean square errors that rounding alone explains. Measured on the default model: float32
# arithmetic 3e-11, activations of 8 bits 9e-4 in the cpu runtime and 1e-2 in onnx, CUDA's graph of
# float16 with minima of 8 bits 2.4e-3 (on the CPU).
EXACT = 1e-9
ROUNDED = {"cpu": 5e-3, "onnx": 5e-2, "onnx:cuda": 1e-2}


@dataclass(frozen=True)
class NodeDistance:
    """One value of the graph in both."""

    name: str
    stage: str  # "unfused" or "fused": which graph ONNX Runtime ran
    nmse: float  # squared error over a's squares; infinite where only one of them is finite

    def __str__(self) -> str:
        return f"{self.name} ({self.stage}): {self.nmse:.1e}"


@dataclass(frozen=True)
class Difference:
    """What was compared; `first` is None where nothing is further apart than the tolerance."""

    a: str  # what ran: one of RUNTIMES, "onnx" on the CPU
    b: str
    tolerance: float
    tokens: int
    first: NodeDistance | None
    before: NodeDistance | None  # the last value that still agreed
    nodes: tuple[NodeDistance, ...]
    unseen: tuple[str, ...]  # values that one of the two never writes down


def diff(
    path: "str | os.PathLike[str]",
    other: "str | os.PathLike[str] | None" = None,
    a: str = "cpu",
    b: str = "onnx",
    *,
    text: str = TEXT,
    tolerance: float | None = None,
    accuracy: int = 0,
    threads: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Run `path` with runtime `a`, `other` (the same file if None) with `b`, and compare.

    a, b: "cpu", "onnx" or "reference"; "onnx:cuda" is onnx on that device, "onnx:cpu" and "onnx"
    are onnx on the CPU. text: what both compute, up to 64 tokens of it. tolerance: a normalized
    mean square error; None for what rounding explains in these runtimes. accuracy: onnx's on the
    CPU. Raises ParameterError for a runtime that shows no values or for models of different shape,
    and what `load` raises, DeviceUnavailable among it.
    """
    require_choice("a", a, RUNTIMES)
    require_choice("b", b, RUNTIMES)
    other = path if other is None else other
    how: dict[str, Any] = {"threads": threads, "cancel": cancel, "progress": progress}
    with _load(path, a, accuracy, how) as first, _load(other, b, accuracy, how) as second:
        _check_shapes(first, second)
        if tolerance is None:
            tolerance = max(_rounding(first, accuracy), _rounding(second, accuracy))
        from edgellama.runtimes.trace import MOST_TOKENS

        ids = first.tokenizer.encode(text, bos=first.tokenizer.add_bos)[:MOST_TOKENS]
        if not ids or max(ids) >= first.config.vocab_size:
            raise ParameterError("text has no tokens of this model", field="text")
        return _compared(first, second, ids, tolerance)


def _load(path: "str | os.PathLike[str]", name: str, accuracy: int, how: dict[str, Any]) -> "Model":
    return load(path, context=None, **_options(name, accuracy), **how)


def _options(name: str, accuracy: int) -> dict[str, Any]:
    """What `load` takes for one of RUNTIMES."""
    runtime, _, device = name.partition(":")
    options: dict[str, Any] = {"runtime": runtime, "device": device or "auto"}
    options["kv_type"] = "f32" if runtime == "cpu" else "f16"
    if runtime == "onnx" and device != "cuda":  # where accuracy has no levels
        options["accuracy"] = accuracy
    return options


def _check_shapes(first: "Model", second: "Model") -> None:
    if first.graph.nodes != second.graph.nodes:
        raise ParameterError("the two files are models of different shape: nothing compares")


def _name(model: "Model") -> str:
    """Its runtime; with the device where that is not the CPU."""
    runtime, device = str(model.device["runtime"]), str(model.device["device"])
    return runtime if device == "cpu" else f"{runtime}:{device}"


def _rounding(model: "Model", accuracy: int) -> float:
    """The tolerance that a runtime's own rounding asks for."""
    name = _name(model)
    if name == "onnx:cuda":  # float16, whatever the weights are
        return ROUNDED[name]
    if name == "reference" or set(model.info.types) <= set(FLOATS):
        return EXACT
    return EXACT if name == "onnx" and accuracy == 0 else ROUNDED[name]


def _compared(first: "Model", second: "Model", ids: Sequence[int], tolerance: float) -> Difference:
    """Unfused; then, where the second has one, the fused graph at the names that survive."""
    names = [node.output for node in first.graph.nodes]
    wanted = _values(first, ids, fused=False)
    found = _values(second, ids, fused=False)
    nodes = _distances(names, wanted, found, UNFUSED)
    if "onnx" in (first.device["runtime"], second.device["runtime"]):
        wanted, fused = _values(first, ids, fused=True), _values(second, ids, fused=True)
        nodes += _distances(names, wanted, fused, FUSED)
    seen = {node.name for node in nodes}
    at = next((i for i, node in enumerate(nodes) if not node.nmse <= tolerance), None)
    return Difference(
        a=_name(first),
        b=_name(second),
        tolerance=tolerance,
        tokens=len(ids),
        first=None if at is None else nodes[at],
        before=nodes[at - 1] if at else None,
        nodes=tuple(nodes),
        unseen=tuple(name for name in names if name not in seen),
    )


def _values(model: "Model", ids: Sequence[int], *, fused: bool) -> "dict[str, NDArray[Any]]":
    from edgellama.runtimes.trace import tracer

    assert model._runtime is not None
    return tracer(model._runtime, fused).values(list(ids))


def _distances(
    names: list[str], wanted: "dict[str, Any]", found: "dict[str, Any]", stage: str
) -> list[NodeDistance]:
    shared = (name for name in names if name in wanted and name in found)
    return [NodeDistance(name, stage, _nmse(wanted[name], found[name])) for name in shared]


def _nmse(wanted: "NDArray[Any]", found: "NDArray[Any]") -> float:
    import numpy as np

    a, b = wanted.astype(np.float64), found.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        same = np.array_equal(a, b, equal_nan=True)
        return 0.0 if same else float("inf")
    size = float((a**2).sum())
    error = float(((a - b) ** 2).sum())
    return error / size if size else (0.0 if error == 0 else float("inf"))
