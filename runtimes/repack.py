"""Weights as the kernels read them: 16 rows interleaved, block by block, as the file streams in.

A group of 16 rows is stored together, so that one vector register holds one number of each row.
Rows are padded to a multiple of 16 and float columns to a multiple of 32, with zeros. Nothing is
rounded: every code and scale of the file is kept, only moved (Q8_0 codes gain 128).

Knows nothing about kernels' code or files: bytes in, bytes out. `kernels_linear.py` reads what
this module writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama import ggml
from edgellama.ggml import HALVES
from edgellama.runtimes import abi

LANES = abi.LANES
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]

AT_ONCE = 1 << 19  # bytes of a file repacked together where there is something in between

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


# Codes of 1, 2 or 4 bits are fields of bytes, in the file and here. Words of four bytes come row
# beside row first, (words, groups, blocks, 16): then the work is done on whole arrays.


def _words(blocks: Bytes, start: int, stop: int) -> Words:
    """Bytes start..stop-1 of every block, (words, groups, blocks, 16)."""
    source = blocks[..., start:stop].view(np.uint32)  # (groups, 16, blocks, words)
    return np.ascontiguousarray(source.transpose(3, 0, 2, 1))


def _repeated(byte: int) -> np.uint32:
    """A word of four times this byte."""
    return np.uint32(byte * 0x0101_0101)


def _exchange(low: Words, high: Words, shift: int, mask: int) -> None:
    """Bits of `high` under the mask change places with those `shift` further left in `low`."""
    different = low >> np.uint32(shift)
    different ^= high
    different &= np.uint32(mask)
    high ^= different
    different <<= np.uint32(shift)
    low ^= different


def _transpose_fields(words: Words, bits: int) -> None:
    """words: (runs, 8 / bits, ...). Field i of a run's word j changes places with field j of i."""
    runs, fields, step = len(words), words.shape[1], 1
    while step < fields:
        pairs = words.reshape(runs, fields // (2 * step), 2, step, *words.shape[2:])
        mask = _repeated(255 // (2 ** (bits * step) + 1))  # every other `step` fields of a byte
        _exchange(pairs[:, :, 0], pairs[:, :, 1], bits * step, int(mask))
        step *= 2


@dataclass(frozen=True)
class _Plane:
    """`bits` bits of each of a K type's 256 codes, from byte `start` of the block on.

    `shape`: of the words in the file. Runs; pieces of a run; words whose fields are transposed,
    8 / bits; words that stay side by side.
    """

    start: int
    bits: int
    shape: tuple[int, int, int, int]

    def put(self, blocks: Bytes, body: Bytes, at: int) -> int:
        """Move it to body[..., at:], (groups, blocks, 8, bytes of a part); gives where it ends."""
        runs, pieces, fields, side = self.shape
        words = _words(blocks, self.start, self.start + 32 * self.bits)
        _transpose_fields(words.reshape(runs * pieces, fields, side, *words.shape[1:]), self.bits)
        end = at + LANES * 4 * self.bits
        target = body[..., at:end].view(np.uint32)
        target = target.reshape(*body.shape[:2], runs, fields, pieces, side, LANES)
        target[...] = words.reshape(*self.shape, *words.shape[1:]).transpose(4, 5, 0, 2, 1, 3, 6)
        return end


# Four exchanges move bit 4k + j of a word, that of column 4k + j, to bit 8j + k.
_COLUMNS_TO_PLACES = ((14, 0xCCCC), (7, 0xAA00AA), (2, 0xC0C0C0C), (1, 0x22222222))


def _five_bits(name: str) -> Interleave:
    """Q5_0 and Q5_1: nibbles as in the file, and a plane of fifth bits."""
    start = 2 * len(HALVES[name])

    def interleave(blocks: Bytes, out: Bytes) -> None:
        at = _put_halves(out, blocks, HALVES[name])
        at = _put(out, at, blocks[..., start + 4 :], np.uint32)
        (bits,) = _words(blocks, start, start + 4)
        for shift, mask in _COLUMNS_TO_PLACES:
            _exchange(bits, bits, shift, mask)
        out[..., at:].view(np.uint32)[...] = bits

    return interleave


def _k_layout(
    name: str, part: int, scales: Callable[[Bytes], Sequence[Words]], *planes: _Plane
) -> Layout:
    """K types: 16 f16 a scale, then eight parts of 32 columns of `part` bytes each.

    A part holds its sub-blocks' small integers, and the planes of its codes.
    """
    header = 2 * LANES * len(HALVES[name])

    def interleave(blocks: Bytes, out: Bytes) -> None:
        _put_halves(out, blocks, HALVES[name])
        body = out[..., header:].reshape(*out.shape[:2], 8, part)
        at = 0
        for small in scales(blocks):
            at = _put_small(small, body, at)
        for plane in planes:
            at = plane.put(blocks, body, at)

    return Layout(256, header + 8 * part, abi.Q8_RECORD, interleave, 8, AT_ONCE)


def _put_small(words: Words, body: Bytes, at: int) -> int:
    """Sub-blocks' bytes, four a word, to body[..., at:]; gives where they end."""
    n = len(words)
    each = n // 2  # of a part
    end = at + each * LANES
    four = words.view(np.uint8).reshape(*words.shape, 4 // each, each)
    target = body[..., at:end].reshape(*body.shape[:2], n, 4 // each, each, LANES)
    target[...] = four.transpose(1, 2, 0, 4, 5, 3)
    return end


def _bytes_at(start: int) -> Callable[[Bytes], Sequence[Words]]:
    """16 bytes as in the file: Q6_K's scales; Q2_K's scales and minima, four bits of each."""
    return lambda blocks: [_words(blocks, start, start + 16)]


def _scales_and_minima(blocks: Bytes) -> Sequence[Words]:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits; the last four of each are in pieces."""
    scales, minima, rest = words = _words(blocks, 4, 16)
    low, top = _repeated(0x0F), _repeated(0x30)
    last_scales = rest & low | scales >> np.uint32(2) & top
    last_minima = rest >> np.uint32(4) & low | minima >> np.uint32(2) & top
    words[:2] &= _repeated(0x3F)
    return np.stack([scales, last_scales]), np.stack([minima, last_minima])


def _q3_k_scales(blocks: Bytes) -> Sequence[Words]:
    """16 signed scales of 6 bits, 32 too high: 8 bytes hold the lower four bits, 4 the rest."""
    *lower, upper = _words(blocks, 96, 108)
    scales = np.empty((4, *upper.shape), np.uint32)
    for i, words in enumerate(scales):
        np.bitwise_and(lower[i % 2] >> np.uint32(i // 2 * 4), _repeated(0x0F), out=words)
        words |= (upper >> np.uint32(2 * i) & _repeated(0x03)) << np.uint32(4)
    scales.view(np.uint8)[...] -= np.uint8(32)
    return [scales]


def _floats(word: type[np.unsignedinteger[Any]], size: int) -> Layout:
    def interleave(blocks: Bytes, out: Bytes) -> None:
        """A block of the file is one number: (groups, 16, columns, size)."""
        _put(out.reshape(len(out), blocks.shape[2], LANES * size), 0, blocks, word)

    columns = abi.F32_COLUMNS
    return Layout(columns, columns * LANES * size, abi.F32_RECORD, interleave)


_BITS, _PAIRS, _NIBBLES, _NIBBLES_OF_TWO = (1, 1, 8, 1), (2, 2, 4, 1), (4, 1, 2, 4), (2, 2, 2, 4)
LAYOUTS = {
    "Q4_0": Layout(32, 288, abi.Q8_RECORD, _plain("Q4_0")),
    "Q4_1": Layout(32, 320, abi.Q8_RECORD, _plain("Q4_1")),
    "Q8_0": Layout(32, 544, abi.Q8_RECORD, _plain("Q8_0", flip=128)),
    "Q5_0": Layout(32, 352, abi.Q8_RECORD, _five_bits("Q5_0"), at_once=AT_ONCE),
    "Q5_1": Layout(32, 384, abi.Q8_RECORD, _five_bits("Q5_1"), at_once=AT_ONCE),
    "IQ4_NL": Layout(32, 288, abi.Q8_RECORD, _plain("IQ4_NL")),
    "Q2_K": _k_layout("Q2_K", 160, _bytes_at(0), _Plane(16, 2, _PAIRS)),
    "Q3_K": _k_layout("Q3_K", 224, _q3_k_scales, _Plane(32, 2, _PAIRS), _Plane(0, 1, _BITS)),
    "Q4_K": _k_layout("Q4_K", 288, _scales_and_minima, _Plane(16, 4, _NIBBLES)),
    "Q5_K": _k_layout(
        "Q5_K", 352, _scales_and_minima, _Plane(48, 4, _NIBBLES), _Plane(16, 1, _BITS)
    ),
    "Q6_K": _k_layout(
        "Q6_K", 416, _bytes_at(192), _Plane(0, 4, _NIBBLES_OF_TWO), _Plane(128, 2, _PAIRS)
    ),
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
