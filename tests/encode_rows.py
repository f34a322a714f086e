"""Rows to encode: ordinary ones, and those that break careless arithmetic. Seeded.

And ggml's own encoder, where llama-cpp-python is installed.
"""

import ctypes
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.ggml import BY_NAME, RUNNABLE

F = np.float32
Array = NDArray[Any]
COLUMNS = 768  # 3 blocks of a K type
KINDS = [kind for kind in RUNNABLE if kind != "F32"]
WEIGHTED = [kind for kind in KINDS if kind not in ("F16", "BF16", "Q8_0")]


def rows(seed: int = 0) -> Array:
    """85 rows, not a multiple of 16."""
    rng = np.random.default_rng(seed)

    def normal(n: int) -> Array:
        return rng.standard_normal((n, COLUMNS), F)

    outlier = normal(4) * F(1e-3)
    outlier[np.arange(4), rng.integers(0, COLUMNS, 4)] = 65504.0
    sparse = np.where(rng.random((6, COLUMNS)) < 0.8, F(0), normal(6))
    signs = np.where(rng.random((3, COLUMNS)) < 0.5, F(-1), F(1))
    sizes = (1e-44, 1e-39, 1e-30, 1e-16, 1e-9, 1e-6, 1e4, 1e18, 1e30, 3e37)
    return np.concatenate(
        [
            normal(11) * F(0.02),
            normal(3),
            np.zeros((2, COLUMNS), F),
            np.full((2, COLUMNS), -0.0, F),
            signs * F(0),
            sparse,
            np.full((1, COLUMNS), 1.25, F),
            np.full((1, COLUMNS), -3.7, F),
            -np.abs(normal(3)),
            np.abs(normal(3)),
            outlier,
            F(5) + normal(2) * F(1e-6),
            F(-5) + normal(2) * F(1e-6),
            rng.integers(-8, 8, (4, COLUMNS)).astype(F),
            signs * F(0.5),
            np.ldexp(normal(5), rng.integers(-110, 110, (5, COLUMNS))),
            *(normal(3) * F(size) for size in sizes),
        ]
    )


def importances(seed: int = 0) -> list[Array]:
    """Ordinary, with zeros, all zero, tiny."""
    rng = np.random.default_rng(seed + 1)
    usual = (rng.standard_normal(COLUMNS) ** 2).astype(F)
    some = np.where(rng.random(COLUMNS) < 0.5, F(0), usual)
    return [usual, some, np.zeros(COLUMNS, F), usual * F(1e-30)]


def sha256(values: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def ggml() -> Callable[[str, Array, Array | None], Array] | None:
    """encode(kind, rows, importance) → blocks, by ggml; None where it is not installed."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    libraries = sorted((Path(found.origin).parent / "lib").glob("*ggml-base*"))
    if not libraries:
        return None
    chunk = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    chunk.restype = ctypes.c_size_t

    def encode(kind: str, rows: Array, importance: Array | None = None) -> Array:
        form = BY_NAME[kind]
        blocks = np.zeros((len(rows), rows.shape[1] // form.block * form.size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        source, target = rows.ctypes.data, blocks.ctypes.data
        assert chunk(form.id, source, target, 0, *rows.shape, weights) == blocks.nbytes
        return blocks

    return encode
