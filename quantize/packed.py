"""The small integers inside quantized blocks: where their bits lie, type by type.

Gives every type's codes as one byte each, and K types' scales and minima of sub-blocks. What they
are multiplied by is `blocks.py`'s business; kernels' memory is `repack.py`'s. Source: ggml's type
definitions. Knows nothing about tensors and files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Packed:
    """The integers of n blocks. A value is scale * (code - offset) - minimum."""

    codes: Bytes  # (n, values of a block)
    scales: NDArray[np.int8] | Bytes | None = None  # (n, sub-blocks)
    minima: Bytes | None = None  # (n, sub-blocks)


def spread(packed: Bytes, width: int, bits: int) -> Bytes:
    """(n, k) bytes as (n, k * 8 / bits) codes: a run of `width` bytes gives all its lowest bits
    first, then all its next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, width) >> shifts  # (n, runs, 8 / bits, width)
    return (runs & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def q4(codes: Bytes) -> Packed:
    """16 bytes: columns 0..15 in the low halves, 16..31 in the high ones."""
    return Packed(spread(codes, 16, 4))


def q5(high: Bytes, low: Bytes) -> Packed:
    """`high`: 4 bytes, bit i is the fifth bit of column i."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return Packed(spread(low, 16, 4) | fifth << np.uint8(4))


def q2_k(blocks: Bytes) -> Packed:
    scales = blocks[:, :16]
    return Packed(spread(blocks[:, 16:80], 32, 2), scales & np.uint8(15), scales >> np.uint8(4))


def q3_k(blocks: Bytes) -> Packed:
    """Codes are 4 too high. Of 16 scales of 6 bits, 8 bytes hold the low halves, 4 the rest."""
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    codes = spread(low, 32, 2) | spread(high, 32, 1) << np.uint8(2)
    scales = spread(packed[:, :8], 8, 4) | spread(packed[:, 8:], 4, 2) << np.uint8(4)
    return Packed(codes, scales.astype(np.int8) - np.int8(32))


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes as 8 scales and 8 minima of 6 bits; the last four of each are in pieces."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    top = np.uint8(0x30)
    last_scales = rest & np.uint8(15) | scales >> np.uint8(2) & top
    last_minima = rest >> np.uint8(4) | minima >> np.uint8(2) & top
    six = np.uint8(63)
    return (
        np.concatenate([scales & six, last_scales], axis=1),
        np.concatenate([minima & six, last_minima], axis=1),
    )


def q4_k(blocks: Bytes) -> Packed:
    return Packed(spread(blocks[:, 16:], 32, 4), *_scales_and_minima(blocks[:, 4:16]))


def q5_k(blocks: Bytes) -> Packed:
    codes = spread(blocks[:, 48:], 32, 4) | spread(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return Packed(codes, *_scales_and_minima(blocks[:, 4:16]))


def q6_k(blocks: Bytes) -> Packed:
    """Codes are 32 too high."""
    low, high = spread(blocks[:, :128], 64, 4), spread(blocks[:, 128:192], 32, 2)
    return Packed(low | high << np.uint8(4), blocks[:, 192:208].view(np.int8))
