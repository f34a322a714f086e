"""Weights as the kernels read them: 16 rows interleaved, block by block, as the file streams in.

A group of 16 rows is stored together, so that one vector register holds one number of each row.
Rows are padded to a multiple of 16 and float columns to a multiple of 32, with zeros. Nothing is
rounded: every code and scale of the file is kept, only moved (Q8_0 codes gain 128).

Knows nothing about kernels' code or files: bytes in, bytes out. `kernels_linear.py` reads what
this module writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgellama import ggml
from edgellama.ggml import HALVES
from edgellama.quantize import packed
from edgellama.quantize.packed import Packed
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
    record_bytes: int  # of activations
    interleave: Callable[[Bytes], Bytes]
    records: int = 1  # of activations that meet one block

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


def _halves(blocks: Bytes, *starts: int) -> list[Bytes]:
    return [_scales(blocks[..., at : at + 2]) for at in starts]


def _codes(blocks: Bytes, unpack: Callable[[Bytes], Packed]) -> tuple[Bytes, Packed]:
    """(groups, 16, n, bytes) → codes (groups, 16, columns / 32, 32), and all the integers."""
    parts = unpack(blocks.reshape(-1, blocks.shape[-1]))
    return parts.codes.reshape(*blocks.shape[:2], -1, 32), parts


def _nibbles(codes: Bytes) -> Bytes:
    """(groups, 16, n, 32) → (groups, n, 256): columns 0..15 in the low halves of bytes."""
    four = np.uint8(15)
    return _chunks(codes[..., :16] & four | (codes[..., 16:] & four) << np.uint8(4))


def _bits(codes: Bytes, place: int) -> Bytes:
    """(groups, 16, n, 32) → (groups, n, 64): one bit of the codes; see `add_bits`."""
    bits = codes.reshape(*codes.shape[:3], 8, 4) >> np.uint8(place) & np.uint8(1)
    return _chunks(np.bitwise_or.reduce(bits << np.arange(8, dtype=np.uint8)[:, None], axis=-2))


def _pairs(codes: Bytes, place: int) -> Bytes:
    """(groups, 16, n, 32) → (groups, n, 128): two bits of the codes; see `load_pairs`."""
    pairs = codes.reshape(*codes.shape[:3], 2, 4, 4) >> np.uint8(place) & np.uint8(3)
    joined = pairs << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    both = np.bitwise_or.reduce(joined, axis=-2)  # (groups, 16, n, 2, 4)
    return _chunks(both.reshape(*codes.shape[:3], 8))


def _interleave_q5_0(blocks: Bytes) -> Bytes:
    codes, _ = _codes(blocks, lambda b: packed.q5(b[:, 2:6], b[:, 6:]))
    return np.concatenate([*_halves(blocks, 0), _nibbles(codes), _bits(codes, 4)], axis=-1)


def _interleave_q5_1(blocks: Bytes) -> Bytes:
    codes, _ = _codes(blocks, lambda b: packed.q5(b[:, 4:8], b[:, 8:]))
    return np.concatenate([*_halves(blocks, 0, 2), _nibbles(codes), _bits(codes, 4)], axis=-1)


def _interleave_k(
    name: str, unpack: Callable[[Bytes], Packed], planes: Callable[[Bytes], list[Bytes]]
) -> Callable[[Bytes], Bytes]:
    """K types: 16 f16 a scale, then 8 times the sub-blocks' integers and the codes' planes."""

    def interleave(blocks: Bytes) -> Bytes:
        codes, parts = _codes(blocks, unpack)
        groups, _, n, _ = blocks.shape
        small = [p for p in _small(parts) if p is not None]
        rows = [p.reshape(groups, LANES, n * 8, -1).transpose(0, 2, 3, 1) for p in small]
        bodies = [r.reshape(groups, n * 8, -1) for r in rows] + planes(codes)
        body = np.concatenate(bodies, axis=-1).reshape(groups, n, -1)
        return np.concatenate([*_halves(blocks, *HALVES[name]), body], axis=-1)

    return interleave


def _small(parts: Packed) -> list[Bytes | None]:
    """Sub-blocks' scales and minima as bytes; where both fit four bits, in one."""
    assert parts.scales is not None
    scales = parts.scales.view(np.uint8)
    if parts.minima is not None and parts.scales.shape[1] == 16:
        return [scales | parts.minima << np.uint8(4)]
    return [scales, parts.minima]


def _k_layout(
    name: str, part: int, unpack: Callable[[Bytes], Packed], *planes: Callable[[Bytes], Bytes]
) -> Layout:
    """`part`: bytes of 32 columns of 16 rows."""
    interleave = _interleave_k(name, unpack, lambda codes: [plane(codes) for plane in planes])
    header = 2 * LANES * len(HALVES[name])
    return Layout(256, header + 8 * part, abi.Q8_RECORD, interleave, records=8)


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
    "Q5_0": Layout(32, 352, abi.Q8_RECORD, _interleave_q5_0),
    "Q5_1": Layout(32, 384, abi.Q8_RECORD, _interleave_q5_1),
    "IQ4_NL": Layout(32, 288, abi.Q8_RECORD, _interleave_q4_0),
    "Q2_K": _k_layout("Q2_K", 160, packed.q2_k, partial(_pairs, place=0)),
    "Q3_K": _k_layout("Q3_K", 224, packed.q3_k, partial(_pairs, place=0), partial(_bits, place=2)),
    "Q4_K": _k_layout("Q4_K", 288, packed.q4_k, _nibbles),
    "Q5_K": _k_layout("Q5_K", 352, packed.q5_k, _nibbles, partial(_bits, place=4)),
    "Q6_K": _k_layout("Q6_K", 416, packed.q6_k, _nibbles, partial(_pairs, place=4)),
    "F16": _floats(2),
    "BF16": _floats(2),
    "F32": _floats(4),
}


def padded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def column_blocks(type_name: str, columns: int) -> int:
    """Repacked blocks along a row of so many columns, padding included."""
    return padded(columns, max(abi.BLOCK, LAYOUTS[type_name].columns)) // LAYOUTS[type_name].columns


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
