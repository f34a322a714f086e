"""What the bits of each tensor type mean: rows of blocks to float32 values.

One record a type. Sources: the GGUF specification and ggml's reference dequantizers, which the
arithmetic here matches to the bit. Knows nothing about files and models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import UnsupportedModelError, shown
from edgellama.ggml import BY_NAME, RUNNABLE

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One type: `size` bytes hold `block` values; `decode` takes (n, size) to (n, block)."""

    name: str
    block: int
    size: int
    decode: Callable[[Bytes], Floats]


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of each block, (n, 1)."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """4-bit values of (n, k) bytes as (n, 2 k): all low halves first, then all high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:  # d * q
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:  # d * (q - 8)
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:  # d * q + m
    scaled = _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32)
    return scaled + _half(blocks, 2)


FORMATS = {
    record.name: record
    for record in (
        BlockFormat("F32", 1, 4, _f32),
        BlockFormat("F16", 1, 2, _f16),
        BlockFormat("BF16", 1, 2, _bf16),
        BlockFormat("Q8_0", 32, 2 + 32, _q8_0),
        BlockFormat("Q4_0", 32, 2 + 16, _q4_0),
        BlockFormat("Q4_1", 32, 2 + 2 + 16, _q4_1),
    )
}
for _record in FORMATS.values():
    assert (_record.block, _record.size) == BY_NAME[_record.name][2:], _record.name
assert tuple(FORMATS) == RUNNABLE


def decode(type_name: str, raw: Bytes) -> Floats:
    """The values of whole rows: raw bytes (rows, row_bytes) → float32 (rows, columns).

    Raises UnsupportedModelError for a type that edgellama does not decode.
    """
    record = FORMATS.get(type_name)
    if record is None:
        supported = ", ".join(FORMATS)
        problem = f"tensor type {shown(type_name)} is not supported; supported: {supported}"
        raise UnsupportedModelError(problem, field="type", value=type_name, allowed=supported)
    assert raw.dtype == np.uint8 and raw.ndim == 2 and raw.shape[1] % record.size == 0, raw.shape
    blocks = np.ascontiguousarray(raw).reshape(-1, record.size)
    return record.decode(blocks).reshape(raw.shape[0], -1)
