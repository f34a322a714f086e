"""Encoding: float32 rows to the blocks of a type, bit for bit as llama.cpp's own quantizer.

Kernels, compiled on first use and kept, encode 16 blocks at once; here rows are cut into pieces
for them and for threads. Knows nothing about files and models.

Source: ggml's `ggml_quantize_chunk`, whose bytes these are, with and without importance.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import ParameterError, UnsupportedModelError, shown
from edgellama.ggml import BY_NAME, HALVES, RUNNABLE
from edgellama.runtimes import kernel_cache, levels
from edgellama.runtimes.levels import Level

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Kernel = Callable[..., None]

LANES = 16
ROOM = 1 << 15  # bytes of memory a kernel works in
PIECE = 1 << 20  # numbers a thread encodes at a time, at most: some milliseconds
SMALLEST = 1 << 16  # and at least, for threads to pay
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def encode(
    rows: Floats,
    type_name: str,
    *,
    importance: Floats | None = None,
    threads: int = 1,
    level: Level | None = None,
) -> Bytes:
    """The blocks of float32 rows, (n, columns) → (n, row bytes).

    `importance`: a number for each column, at least 0, by which errors there count; types that
    cannot use it (Q8_0 and floats) ignore it. Rows must be finite. The same rows give the same
    bytes however they are cut into calls, at every instruction-set `level` (by default the best),
    with any number of threads. Scales may overflow float16: see `first_overflow`.

    Raises UnsupportedModelError for a type that has no encoder, ParameterError for rows that are
    no whole blocks and for importance that does not fit.
    """
    _check(rows, type_name, importance)
    rows = np.ascontiguousarray(rows, np.float32)
    if type_name == "F32":
        return rows.view(np.uint8).copy()
    kind = BY_NAME[type_name]
    out = np.empty((rows.shape[0], rows.shape[1] // kind.block * kind.size), np.uint8)
    if importance is None or type_name not in WEIGHTED:
        kernel = _kernel(f"encode:{type_name}", level)
        lanes, target, weights = rows.reshape(-1, kind.block), out.reshape(-1, kind.size), None
    else:
        kernel = _kernel(f"weighted:{type_name}", level)
        lanes, target = rows, out
        weights = np.ascontiguousarray(importance, np.float32)

    def work(first: int) -> None:
        piece = slice(first, first + step)
        _encode_lanes(kernel, lanes[piece], target[piece], kind.block, weights)

    piece_size = min(PIECE, max(SMALLEST, rows.size // (4 * max(1, threads))))
    step = max(1, piece_size // (LANES * max(1, lanes.shape[1]))) * LANES
    _spread(work, range(0, len(lanes), step), threads)
    return out


def _spread(work: Callable[[int], None], starts: range, threads: int) -> None:
    """Call `work` for every start, in so many threads; kernels release the interpreter's lock."""
    if threads <= 1 or len(starts) <= 1:
        for first in starts:
            work(first)
        return
    with ThreadPoolExecutor(threads, "edgellama-encode") as pool:
        for _ in pool.map(work, starts):
            pass


def _check(rows: Floats, type_name: str, importance: Floats | None) -> None:
    if type_name not in RUNNABLE:
        allowed = ", ".join(RUNNABLE)
        raise UnsupportedModelError(
            f"tensors cannot be encoded as {shown(type_name)}; supported: {allowed}",
            field="type",
            value=type_name,
            allowed=allowed,
        )
    block = BY_NAME[type_name].block
    if rows.ndim != 2 or rows.shape[1] % block:
        raise ParameterError(
            f"an array of shape {rows.shape} cannot be encoded as {type_name}: "
            f"it takes rows of a multiple of {block} columns",
            field="rows",
            value=rows.shape,
            allowed=f"(n, multiple of {block})",
        )
    if importance is not None and importance.shape != rows.shape[1:]:
        raise ParameterError(
            f"importance of shape {importance.shape} does not fit {rows.shape[1]} columns",
            field="importance",
            value=importance.shape,
            allowed=str(rows.shape[1:]),
        )


def _kernel(name: str, level: Level | None) -> Kernel:
    level = level or levels.choose()[0]
    return kernel_cache.function(kernel_cache.addresses([name], level)[name], 8)


def _encode_lanes(
    kernel: Kernel, lanes: Floats, out: Bytes, block: int, weights: Floats | None
) -> None:
    """Encode lanes, (n, numbers of a lane); the last group of 16 is filled up with zeros."""
    whole = len(lanes) // LANES * LANES
    _run(kernel, lanes[:whole], out[:whole], block, weights)
    rest = len(lanes) - whole
    if rest:
        last = np.zeros((LANES, lanes.shape[1]), np.float32)
        last[:rest] = lanes[whole:]
        blocks = np.empty((LANES, out.shape[1]), np.uint8)
        _run(kernel, last, blocks, block, weights)
        out[whole:] = blocks[:rest]


def _run(kernel: Kernel, lanes: Floats, out: Bytes, block: int, weights: Floats | None) -> None:
    room = np.empty(ROOM + 64, np.uint8)
    kernel(
        lanes.ctypes.data,
        lanes.shape[1] * 4,
        out.ctypes.data,
        out.shape[1],
        len(lanes) // LANES,
        lanes.shape[1] // block,
        0 if weights is None else weights.ctypes.data,
        room.ctypes.data + -room.ctypes.data % 64,
    )


def first_overflow(blocks: Bytes, type_name: str) -> int | None:
    """The first row that holds an infinite or NaN scale, or None: (n, row bytes) of any type.

    What a type's float16 scales (F16's numbers themselves) cannot hold ends as infinity. Rows with
    magnitudes beyond 1e9 are to be refused before: they may defeat a search without a trace here,
    as they do in ggml.
    """
    if type_name == "F32":
        exponents, top = blocks.view("<u4"), 0x7F800000
    elif type_name in ("F16", "BF16"):
        exponents, top = blocks.view("<u2"), 0x7C00 if type_name == "F16" else 0x7F80
    else:
        each = blocks.reshape(len(blocks), -1, BY_NAME[type_name].size)
        halves = [each[..., at : at + 2] for at in HALVES[type_name]]
        exponents, top = np.concatenate(halves, axis=-1).view("<u2"), 0x7C00
    bad = ((exponents & top) == top).reshape(len(blocks), -1).any(axis=1)
    return int(bad.argmax()) if bad.any() else None
