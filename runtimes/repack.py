"""Weights as the kernels read them: 16 rows interleaved, block by block, as the file streams in.

A group of 16 rows is stored together, so that one vector register holds one number of each row.
Rows are padded to a multiple of 16 and float columns to a multiple of 32, with zeros. Nothing is
rounded: every code and scale of the file is kept, only moved (Q8_0 codes gain 128).

Knows nothing about kernels' code or files: bytes in, bytes out. `kernels_linear.py` reads what
this module writes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellama import ggml
from edgellama.runtimes import abi

LANES = abi.LANES
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How one type is repacked.

    `interleave` turns the file's blocks of whole groups, (groups, 16, blocks, bytes of a block),
    into (groups, blocks, block_bytes).
    """

    columns: int  # of one repacked block
    block_bytes: int  # of one repacked block: 16 rows of `columns`
    record_bytes: int  # of the activations that meet one block
    interleave: Callable[[Bytes], Bytes]

    @property
    def integer(self) -> bool:
        """Whether activations are packed as int8."""
        return self.record_bytes == abi.Q8_RECORD


def _scales(blocks: Bytes) -> Bytes:
    """(groups, 16, n, 2) → (groups, n, 32): 16 rows' f16 scales side by side."""
    groups, _, n, _ = blocks.shape
    return blocks.transpose(0, 2, 1, 3).reshape(groups, n, 2 * LANES)


def _chunks(blocks: Bytes) -> Bytes:
    """(groups, 16, n, b) → (groups, n, 16 b): four bytes of each row in turn."""
    groups, _, n, size = blocks.shape
    chunks = blocks.reshape(groups, LANES, n, size // 4, 4).transpose(0, 2, 3, 1, 4)
    return chunks.reshape(groups, n, LANES * size)


def _interleave_q4_0(blocks: Bytes) -> Bytes:
    return np.concatenate([_scales(blocks[..., :2]), _chunks(blocks[..., 2:])], axis=-1)


def _interleave_q4_1(blocks: Bytes) -> Bytes:
    parts = [_scales(blocks[..., :2]), _scales(blocks[..., 2:4]), _chunks(blocks[..., 4:])]
    return np.concatenate(parts, axis=-1)


def _interleave_q8_0(blocks: Bytes) -> Bytes:
    codes = _chunks(blocks[..., 2:]) ^ np.uint8(128)
    return np.concatenate([_scales(blocks[..., :2]), codes], axis=-1)


def _interleave_floats(size: int) -> Callable[[Bytes], Bytes]:
    def interleave(blocks: Bytes) -> Bytes:
        """(groups, 16, columns, size) → (groups, columns / 8, 8 * 16 * size)."""
        groups, _, columns, _ = blocks.shape
        by_column = blocks.transpose(0, 2, 1, 3)  # (groups, columns, 16, size)
        return by_column.reshape(groups, columns // 8, 8 * LANES * size)

    return interleave


def _floats(size: int) -> Layout:
    columns = abi.F32_COLUMNS
    return Layout(columns, columns * LANES * size, abi.F32_RECORD, _interleave_floats(size))


LAYOUTS = {
    "Q4_0": Layout(32, 288, abi.Q8_RECORD, _interleave_q4_0),
    "Q4_1": Layout(32, 320, abi.Q8_RECORD, _interleave_q4_1),
    "Q8_0": Layout(32, 544, abi.Q8_RECORD, _interleave_q8_0),
    "F16": _floats(2),
    "BF16": _floats(2),
    "F32": _floats(4),
}


def padded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def column_blocks(type_name: str, columns: int) -> int:
    """Repacked blocks along a row of so many columns, padding included."""
    return padded(columns, abi.BLOCK) // LAYOUTS[type_name].columns


def repacked_bytes(type_name: str, rows: int, columns: int) -> int:
    """Size of a repacked matrix."""
    groups = padded(rows, LANES) // LANES
    return groups * column_blocks(type_name, columns) * LAYOUTS[type_name].block_bytes


def repack(type_name: str, raw: Bytes, columns: int, out: Bytes) -> None:
    """Repack whole rows into `out`.

    raw: (rows, row_bytes) as in the file; out: `repacked_bytes` bytes. Rows beyond the last whole
    group of 16 are padded with zeros.
    """
    kind, layout = ggml.BY_NAME[type_name], LAYOUTS[type_name]
    rows = raw.shape[0]
    groups, blocks = padded(rows, LANES) // LANES, columns // kind.block
    wide = blocks if layout.integer else padded(columns, abi.BLOCK)
    whole = raw.reshape(rows, blocks, kind.size)
    if rows < groups * LANES or wide > blocks:
        room = np.zeros((groups * LANES, wide, kind.size), np.uint8)
        room[:rows, :blocks] = whole
        whole = room
    moved = layout.interleave(whole.reshape(groups, LANES, wide, kind.size))
    out[:] = moved.reshape(-1)
