"""Rope, and the key/value cache: queries and keys are turned, keys and values put in their place.

The cache lies in blocks of 64 positions, each with all layers: memory is touched as positions
fill. Of one layer a block holds every head's keys, 4 times (head_dim, 16), so that one vector
holds 16 positions, and then every head's values, (64, head_dim rounded up to 16). Kept as Q8_0, 32
columns of a position share an f16 scale: of keys each 32 columns of 16 positions are followed by
their 16 scales, of values each 32 columns of 64 positions by their 64. `abi.py` has the sizes.

Units, signature and slow twins as in `kernels.py`.
"""

from typing import Any

from numba import float32

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument

WORD, LANES, BLOCK = abi.WORD, abi.LANES, abi.BLOCK
F16, Q8_0 = abi.KV_F16, abi.KV_Q8_0
KEYS_AT_ONCE = abi.ATTENTION_BLOCK
key_bytes, value_bytes = inline(abi.key_bytes), inline(abi.value_bytes)


@inline
def padded_head(head_dim: int) -> Any:
    return (head_dim + LANES - 1) // LANES * LANES


@inline
def rotate(x: int, angles: int, pairs: int) -> None:
    """Turn `pairs` neighbouring pairs of float32 at x, in place."""
    for i in range(pairs):
        cos, sin = memory.load_f32(angles + i * 8), memory.load_f32(angles + i * 8 + 4)
        a, b = memory.load_f32(x + i * 8), memory.load_f32(x + i * 8 + 4)
        memory.store_f32(x + i * 8, a * cos - b * sin)
        memory.store_f32(x + i * 8 + 4, a * sin + b * cos)


def rope(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Turn queries and keys, and put keys and values into the cache. Unit: a head of a token.

    Arguments: q, k, v, stride, n_heads, n_kv_heads, head_dim, pairs, and of the cache: how numbers
    are kept, bytes from its block to this layer, bytes of a block.
    """
    q, k, v = argument(instruction, 0), argument(instruction, 1), argument(instruction, 2)
    stride, n_heads = argument(instruction, 3), argument(instruction, 4)
    n_kv_heads, head_dim = argument(instruction, 5), argument(instruction, 6)
    pairs, kind = argument(instruction, 7), argument(instruction, 8)
    cache = memory.load_i64(state + abi.CACHE * WORD) + argument(instruction, 9)
    block_bytes = argument(instruction, 10)
    angles = memory.load_i64(state + abi.ANGLES * WORD)
    start = memory.load_i64(state + abi.START * WORD)
    scratch = memory.load_i64(state + abi.SCRATCH * WORD)
    scratch += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
    per_token = n_heads + n_kv_heads
    key, value = key_bytes(kind, head_dim), value_bytes(kind, head_dim)
    for unit in range(first, last):
        token, head = unit // per_token, unit % per_token
        position = start + token
        turn = angles + position * pairs * 8
        if head < n_heads:
            rotate(q + token * stride + head * head_dim * 4, turn, pairs)
            continue
        head -= n_heads
        at = token * stride + head * head_dim * 4
        rotate(k + at, turn, pairs)
        block, index = cache + position // KEYS_AT_ONCE * block_bytes, position % KEYS_AT_ONCE
        keys = block + (head * 4 + index // LANES) * key
        values = block + n_kv_heads * 4 * key + head * KEYS_AT_ONCE * value
        if kind == Q8_0:
            store_key_q8(k + at, keys, index % LANES, head_dim, scratch)
            store_value_q8(v + at, values, index, head_dim, scratch)
        else:
            for i in range(head_dim):
                store_cached(keys, i * LANES + index % LANES, memory.load_f32(k + at + i * 4), kind)
                to = index * padded_head(head_dim) + i
                store_cached(values, to, memory.load_f32(v + at + i * 4), kind)


@inline
def store_cached(base: int, index: int, value: Any, kind: int) -> None:
    """One number; the padding behind a position's values holds zeros from the start."""
    if kind == F16:
        memory.store_f16(base + index * 2, value)
    else:
        memory.store_f32(base + index * 4, value)


@inline
def quantize32(x: int, count: int, scale_at: int, scratch: int) -> None:
    """The next 32 of `count` numbers, or zeros, as int8 codes at scratch + 128, and their scale."""
    for i in range(BLOCK):
        memory.store_f32(scratch + i * 4, memory.load_f32(x + i * 4) if i < count else float32(0.0))
    a, b = memory.load_f32x16(scratch), memory.load_f32x16(scratch + 64)
    largest = simd.max_f32(simd.maximum(simd.absolute(a), simd.absolute(b)))
    memory.store_f16(scale_at, largest / float32(127.0))
    scale = memory.load_f16(scale_at)  # as it is kept
    inverse = float32(1.0) / scale if scale > float32(0.0) else float32(0.0)
    memory.store_as_i8x16(scratch + 128, simd.round_i32(simd.mul(a, simd.splat_f32(inverse))))
    memory.store_as_i8x16(scratch + 144, simd.round_i32(simd.mul(b, simd.splat_f32(inverse))))


@inline
def store_key_q8(x: int, keys: int, lane: int, head_dim: int, scratch: int) -> None:
    """Of each 32 columns: 32 rows of 16 positions' codes, then their 16 scales."""
    for i in range(0, head_dim, BLOCK):
        to = keys + i * (LANES + 1)
        quantize32(x + i * 4, head_dim - i, to + BLOCK * LANES + lane * 2, scratch)
        for j in range(BLOCK):
            memory.store_u8(to + j * LANES + lane, memory.load_u8(scratch + 128 + j))


@inline
def store_value_q8(x: int, values: int, index: int, head_dim: int, scratch: int) -> None:
    """Of each 32 columns: 64 positions' codes, then their 64 scales."""
    for i in range(0, head_dim, BLOCK):
        to = values + i // BLOCK * KEYS_AT_ONCE * (BLOCK + 2)
        quantize32(x + i * 4, head_dim - i, to + KEYS_AT_ONCE * BLOCK + index * 2, scratch)
        for j in range(BLOCK):
            memory.store_u8(to + index * BLOCK + j, memory.load_u8(scratch + 128 + j))
