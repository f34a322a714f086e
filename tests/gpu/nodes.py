"""Where a runtime parts from the reference: every value of the decoder graph, in its order.

Knows nothing about goldens: the reference runtime agrees with them far closer than is asked here.
"""

from pathlib import Path
from typing import Any

import numpy as np

import edgellama
from edgellama.errors import ParameterError
from gpu.parts import Row, Skip


def compare(path: Path, ids: list[int], options: dict[str, Any], tolerance: float) -> Row:
    """The first value further off than the tolerance (NMSE), and what each layer's last one is.

    The unfused graph first, then the one that runs in earnest, where a runtime has both.
    """
    from edgellama.runtimes.trace import MOST_TOKENS

    ids = ids[:MOST_TOKENS]
    fused = (False, True) if options["runtime"] == "onnx" else (False,)
    with edgellama.load(path, runtime="reference") as reference:
        wanted = _values(reference, ids, False)
        with edgellama.load(path, **options) as model:
            stages = [_values(model, ids, stage) for stage in fused]
        names = [node.output for node in reference.graph.nodes]
        layers = reference.config.n_layers
    far = [
        (name + (" (fused)" if stage else ""), _nmse(wanted[name], found[name]))
        for stage, found in enumerate(stages)
        for name in names
        if name in found
    ]
    return row(far, tolerance, layers)


def _values(model: edgellama.Model, ids: list[int], fused: bool) -> dict[str, np.ndarray]:
    from edgellama.runtimes.trace import tracer

    assert model._runtime is not None
    try:
        return tracer(model._runtime, fused).values(ids)
    except ParameterError as error:
        raise Skip(str(error)) from error


def _nmse(wanted: np.ndarray, found: np.ndarray) -> float:
    exact = wanted.astype(np.float64)
    error = float(((found.astype(np.float64) - exact) ** 2).sum() / (exact**2).sum())
    return error if np.isfinite(error) else float("inf")


def row(far: list[tuple[str, float]], tolerance: float, layers: int) -> Row:
    first = next((i for i, (_, error) in enumerate(far) if error > tolerance), None)
    by_name = dict(far)
    ends = [by_name.get(f"blk.{i}.ffn_residual") for i in range(layers)]
    found: Row = {
        "nmse": max(error for _, error in far),
        "nodes": len(far),
        "bound": tolerance,
        "by_layer": ends,
        "ok": first is None,
    }
    if first is not None:
        found["first_node"] = f"{far[first][0]}: {far[first][1]:.1e}"
    return found
