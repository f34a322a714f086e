"""Weights as the kernels read them: 16 rows interleaved, block by block, as the file streams in.

A group of 16 rows is stored together, so that one vector register holds one number of each row.
Rows are padded to a multiple of 16 and float columns to a multiple of 32, with zeros. Nothing is
rounded: every code and scale of the file is kept, only moved (Q8_0 codes gain 128).

Knows nothing about kernels' code or files: bytes in, bytes out. `kernels_linear.py` reads what
this module writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama import ggml
from edgellama.ggml import HALVES
from edgellama.quantize import packed
from edgellama.quantize.packed import Packed
from edgellama.runtimes import abi

LANES = abi.LANES
Bytes = NDArray[np.uint8]


AT_ONCE = 1 << 18  # bytes of a file repacked together where there is something in between

Interleave = Callable[[Bytes, Bytes], None]


@dataclass(frozen=True)
class Layout:
    """How one type is repacked.

    `interleave(blocks, out)` moves the file's blocks of whole groups, (groups, 16, blocks, bytes
    of a block), to out, (groups, blocks, block_bytes).
    """

    columns: int  # of one repacked block
    block_bytes: int  # of one repacked block: 16 rows of `columns`
    record_bytes: int  # of activations
    interleave: Interleave
    records: int = 1  # of activations that meet one block
    at_once: int = 1 << 62  # bytes of a file: what is in between has to stay in cache

    @property
    def integer(self) -> bool:
        """Whether activations are packed as int8."""
        return self.record_bytes == abi.Q8_RECORD


def _put(out: Bytes, at: int, rows: Bytes, word: type[np.unsignedinteger[Any]]) -> int:
    """Move rows, (groups, 16, ..., bytes), to out[..., at:]: word by word, 16 rows side by side.

    Gives where the next field begins.
    """
    words: NDArray[Any] = rows.view(word)
    end: int = at + LANES * rows.shape[-1]
    target: NDArray[Any] = out[..., at:end].view(word)  # (groups, ..., words of a row * 16)
    target.reshape(*target.shape[:-1], -1, LANES)[...] = np.moveaxis(words, 1, -1)
    return end


def _put_halves(out: Bytes, blocks: Bytes, starts: Sequence[int]) -> int:
    """The f16 scales and minima come first in every layout."""
    at = 0
    for start in starts:
        at = _put(out, at, blocks[..., start : start + 2], np.uint16)
    return at


def _plain(name: str, *, flip: int = 0) -> Interleave:
    """Types whose codes need no more than moving; `flip` makes signed bytes unsigned."""

    def interleave(blocks: Bytes, out: Bytes) -> None:
        at = _put_halves(out, blocks, HALVES[name])
        _put(out, at, blocks[..., 2 * len(HALVES[name]) :], np.uint32)
        if flip:
            out[..., at:] ^= np.uint8(flip)

    return interleave


def _five_bits(name: str) -> Interleave:
    """Q5_0 and Q5_1: nibbles as in the file, and a plane of fifth bits."""

    def interleave(blocks: Bytes, out: Bytes) -> None:
        at, start = _put_halves(out, blocks, HALVES[name]), 2 * len(HALVES[name])
        high, low = blocks[..., start : start + 4], blocks[..., start + 4 :]
        at = _put(out, at, low, np.uint32)
        fifth = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
        _put(out, at, _bits(fifth, 0), np.uint32)

    return interleave


# Planes: the codes of 32 columns, (..., 32), in the bytes of a row that `_put` then moves. They are
# made of eight codes at a time, as a word of 64 bits.


def _words(codes: Bytes) -> NDArray[np.uint64]:
    return np.ascontiguousarray(codes).view("<u8")  # (..., 4)


def _repeated(byte: int) -> np.uint64:
    """A word of eight times this byte."""
    return np.uint64(byte * 0x0101_0101_0101_0101)


def _folded(words: NDArray[np.uint64], shift: int) -> NDArray[np.uint64]:
    """The upper half of a word or-ed into its lower one, this much further left in each byte."""
    return words & np.uint64(0xFFFF_FFFF) | words >> np.uint64(32) << np.uint64(shift)


def _nibbles(codes: Bytes) -> Bytes:
    """16 bytes: columns 0..15 in the low halves, 16..31 in the high ones."""
    four = _words(codes) & _repeated(15)
    joined: NDArray[np.uint64] = four[..., :2] | four[..., 2:] << np.uint64(4)
    return joined.view(np.uint8)


def _bits(codes: Bytes, place: int) -> Bytes:
    """4 bytes of one bit of the codes; see `pieces_quants.add_bits`."""
    bits = _words(codes) >> np.uint64(place) & _repeated(1)
    joined = bits[..., 0]
    for i in (1, 2, 3):
        joined = joined | bits[..., i] << np.uint64(2 * i)
    return _folded(joined, 1).astype("<u4")[..., None].view(np.uint8)


def _pairs(codes: Bytes, place: int) -> Bytes:
    """8 bytes of two bits of the codes; see `pieces_quants.load_pairs`."""
    pairs = _words(codes) >> np.uint64(place) & _repeated(3)
    joined = pairs[..., 0::2] | pairs[..., 1::2] << np.uint64(4)  # (..., 2)
    return _folded(joined, 2).astype("<u4").view(np.uint8)


def _k_layout(
    name: str, part: int, unpack: Callable[[Bytes], Packed], *planes: Callable[[Bytes], Bytes]
) -> Layout:
    """K types: 16 f16 a scale, then eight parts of 32 columns of `part` bytes each.

    A part holds its sub-blocks' small integers, and the planes of its codes.
    """
    header = 2 * LANES * len(HALVES[name])

    def interleave(blocks: Bytes, out: Bytes) -> None:
        _put_halves(out, blocks, HALVES[name])
        shape = (*blocks.shape[:3], 8, -1)  # (groups, 16, n, parts, of each)
        integers = unpack(blocks.reshape(-1, blocks.shape[-1]))
        body = out[..., header:].reshape(*out.shape[:2], 8, part)
        at = 0
        for small in _small(integers):
            at = _put(body, at, small.reshape(shape), np.uint8)
        codes = integers.codes.reshape(shape)
        for plane in planes:
            at = _put(body, at, plane(codes), np.uint32)

    return Layout(256, header + 8 * part, abi.Q8_RECORD, interleave, 8, AT_ONCE)


def _small(integers: Packed) -> list[Bytes]:
    """Sub-blocks' scales and minima as bytes; where both fit four bits, in one."""
    assert integers.scales is not None
    scales = integers.scales.view(np.uint8)
    if integers.minima is None:
        return [scales]
    if scales.shape[1] == 16:
        return [scales | integers.minima << np.uint8(4)]
    return [scales, integers.minima]


def _floats(word: type[np.unsignedinteger[Any]], size: int) -> Layout:
    def interleave(blocks: Bytes, out: Bytes) -> None:
        """A block of the file is one number: (groups, 16, columns, size)."""
        _put(out.reshape(len(out), blocks.shape[2], LANES * size), 0, blocks, word)

    columns = abi.F32_COLUMNS
    return Layout(columns, columns * LANES * size, abi.F32_RECORD, interleave)


LAYOUTS = {
    "Q4_0": Layout(32, 288, abi.Q8_RECORD, _plain("Q4_0")),
    "Q4_1": Layout(32, 320, abi.Q8_RECORD, _plain("Q4_1")),
    "Q8_0": Layout(32, 544, abi.Q8_RECORD, _plain("Q8_0", flip=128)),
    "Q5_0": Layout(32, 352, abi.Q8_RECORD, _five_bits("Q5_0"), at_once=AT_ONCE),
    "Q5_1": Layout(32, 384, abi.Q8_RECORD, _five_bits("Q5_1"), at_once=AT_ONCE),
    "IQ4_NL": Layout(32, 288, abi.Q8_RECORD, _plain("IQ4_NL")),
    "Q2_K": _k_layout("Q2_K", 160, packed.q2_k, partial(_pairs, place=0)),
    "Q3_K": _k_layout("Q3_K", 224, packed.q3_k, partial(_pairs, place=0), partial(_bits, place=2)),
    "Q4_K": _k_layout("Q4_K", 288, packed.q4_k, _nibbles),
    "Q5_K": _k_layout("Q5_K", 352, packed.q5_k, _nibbles, partial(_bits, place=4)),
    "Q6_K": _k_layout("Q6_K", 416, packed.q6_k, _nibbles, partial(_pairs, place=4)),
    "F16": _floats(np.uint16, 2),
    "BF16": _floats(np.uint16, 2),
    "F32": _floats(np.uint32, 4),
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
    rows_of_groups = whole.reshape(groups, LANES, wide, kind.size)
    target = out.reshape(groups, -1, layout.block_bytes)
    step = max(1, layout.at_once // (LANES * wide * kind.size))
    for first in range(0, groups, step):
        part = slice(first, first + step)
        layout.interleave(rows_of_groups[part], target[part])
