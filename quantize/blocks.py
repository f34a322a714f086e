"""What the bits of each tensor type mean: rows of blocks to float32 values.

One record a type. Sources: the GGUF specification and ggml's reference dequantizers, which the
arithmetic here matches to the bit. Knows nothing about files and models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import UnsupportedModelError, shown
from edgellama.ggml import BY_NAME, HALVES, IQ4_NL, RUNNABLE
from edgellama.quantize import packed
from edgellama.quantize.packed import Packed

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


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:  # d * q
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:  # d * (q - 8)
    return _half(blocks, 0) * (packed.q4(blocks[:, 2:]).codes.astype(np.float32) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:  # d * q + m
    scaled = _half(blocks, 0) * packed.q4(blocks[:, 4:]).codes.astype(np.float32)
    return scaled + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:  # d * (q - 16)
    codes = packed.q5(blocks[:, 2:6], blocks[:, 6:]).codes
    return _half(blocks, 0) * (codes.astype(np.float32) - np.float32(16))


def _q5_1(blocks: Bytes) -> Floats:  # d * q + m
    codes = packed.q5(blocks[:, 4:8], blocks[:, 8:]).codes
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _iq4_nl(blocks: Bytes) -> Floats:  # d * table[q]
    table = np.array(IQ4_NL, np.float32)
    return _half(blocks, 0) * table[packed.q4(blocks[:, 2:]).codes]


def _k_type(name: str, unpack: Callable[[Bytes], Packed], offset: int) -> BlockFormat:
    """A K type: d * scale * (q - offset) - dmin * minimum, with small integers a sub-block."""
    d, *dmin = HALVES[name]

    def decode_blocks(blocks: Bytes) -> Floats:
        parts = unpack(blocks)
        assert parts.scales is not None
        n, subs = parts.scales.shape
        codes = parts.codes.reshape(n, subs, -1).astype(np.float32) - np.float32(offset)
        values = (_half(blocks, d) * parts.scales.astype(np.float32))[..., None] * codes
        if parts.minima is not None:
            values -= (_half(blocks, dmin[0]) * parts.minima.astype(np.float32))[..., None]
        return values.reshape(n, -1)

    return BlockFormat(name, 256, BY_NAME[name].size, decode_blocks)


FORMATS = {
    record.name: record
    for record in (
        BlockFormat("F32", 1, 4, _f32),
        BlockFormat("F16", 1, 2, _f16),
        BlockFormat("BF16", 1, 2, _bf16),
        BlockFormat("Q8_0", 32, 2 + 32, _q8_0),
        BlockFormat("Q4_0", 32, 2 + 16, _q4_0),
        BlockFormat("Q4_1", 32, 2 + 2 + 16, _q4_1),
        BlockFormat("Q5_0", 32, 2 + 4 + 16, _q5_0),
        BlockFormat("Q5_1", 32, 2 + 2 + 4 + 16, _q5_1),
        BlockFormat("IQ4_NL", 32, 2 + 16, _iq4_nl),
        _k_type("Q2_K", packed.q2_k, 0),
        _k_type("Q3_K", packed.q3_k, 4),
        _k_type("Q4_K", packed.q4_k, 0),
        _k_type("Q5_K", packed.q5_k, 0),
        _k_type("Q6_K", packed.q6_k, 32),
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
