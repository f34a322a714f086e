"""The operators that know positions: rope, and attention over the key/value cache.

The cache lies in blocks of 64 positions, each with all layers: memory is touched as positions
fill. Of one layer a block holds every head's keys, (4, head_dim, 16), so that one vector holds 16
positions, and then every head's values, (64, head_dim rounded up to 16).

Units, signature and slow twins as in `kernels.py`.
"""

from typing import Any

from numba import float32, int32, int64

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument, exp

WORD, ARGS, LANES = abi.WORD, abi.ARGS, abi.LANES
KEYS_AT_ONCE, SPLIT = abi.ATTENTION_BLOCK, abi.ATTENTION_SPLIT
LEAST = -3.0e38  # below every score, and still a number: its exponential is 0


@inline
def padded_head(head_dim: int) -> Any:
    return (head_dim + LANES - 1) // LANES * LANES


# --- rope ----------------------------------------------------------------------------------------


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

    Arguments: q, k, v, stride, n_heads, n_kv_heads, head_dim, pairs, half precision (0 or 1), and
    of the cache: bytes from its block to this layer, bytes of a block.
    """
    q, k, v = argument(instruction, 0), argument(instruction, 1), argument(instruction, 2)
    stride, n_heads = argument(instruction, 3), argument(instruction, 4)
    n_kv_heads, head_dim = argument(instruction, 5), argument(instruction, 6)
    pairs, half = argument(instruction, 7), argument(instruction, 8)
    cache = memory.load_i64(state + abi.CACHE * WORD) + argument(instruction, 9)
    block_bytes = argument(instruction, 10)
    angles = memory.load_i64(state + abi.ANGLES * WORD)
    start = memory.load_i64(state + abi.START * WORD)
    per_token = n_heads + n_kv_heads
    size = 4 - 2 * half
    for unit in range(first, last):
        token, head = unit // per_token, unit % per_token
        position = start + token
        turn = angles + position * pairs * 8
        if head < n_heads:
            rotate(q + token * stride + head * head_dim * 4, turn, pairs)
            continue
        at = token * stride + (head - n_heads) * head_dim * 4
        rotate(k + at, turn, pairs)
        block = cache + position // KEYS_AT_ONCE * block_bytes
        keys = block + (head - n_heads) * KEYS_AT_ONCE * head_dim * size
        values = block + n_kv_heads * KEYS_AT_ONCE * head_dim * size
        values += (head - n_heads) * KEYS_AT_ONCE * padded_head(head_dim) * size
        store_key(k + at, keys, position % KEYS_AT_ONCE, head_dim, half)
        store_value(v + at, values, position % KEYS_AT_ONCE, head_dim, half)


@inline
def store_key(x: int, keys: int, position: int, head_dim: int, half: int) -> None:
    """One key: a column of its 16 positions."""
    at = position // LANES * head_dim * LANES + position % LANES
    for i in range(head_dim):
        store_cached(keys, at + i * LANES, memory.load_f32(x + i * 4), half)


@inline
def store_value(x: int, values: int, position: int, head_dim: int, half: int) -> None:
    """One value: a row of its own; the padding behind it holds zeros from the start."""
    at = position * padded_head(head_dim)
    for i in range(head_dim):
        store_cached(values, at + i, memory.load_f32(x + i * 4), half)


@inline
def store_cached(base: int, index: int, value: Any, half: int) -> None:
    if half != 0:
        memory.store_f16(base + index * 2, value)
    else:
        memory.store_f32(base + index * 4, value)


# --- attention -----------------------------------------------------------------------------------


@inline
def load_cached(address: int, half: int) -> Any:
    """Sixteen cached numbers as float32."""
    if half != 0:
        return memory.load_f16x16(address)
    return memory.load_f32x16(address)


@inline
def score16(query: int, keys: int, head_dim: int, half: int) -> Any:
    """Dot products of one query with 16 keys."""
    size = 4 - 2 * half
    total = simd.splat_f32(float32(0.0))
    for i in range(head_dim):
        key = load_cached(keys + i * LANES * size, half)
        total = simd.fma(key, simd.splat_f32(memory.load_f32(query + i * 4)), total)
    return total


@inline
def clear(part: int, width: int) -> None:
    """A sum over no positions: see `attend_block`."""
    for i in range(0, width, LANES):
        memory.store_f32x16(part + i * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32x16(part + width * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32(part + width * 4 + 64, float32(LEAST))


@inline
def attend_block(
    query: int, part: int, keys: int, values: int, low: int, high: int, head_dim: int, half: int,
    scratch: int,
) -> None:  # fmt: skip
    """Add positions low..high-1 of one block of the cache to one query's sums.

    Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). A part is the weighted sum of
    values, (head_dim rounded up to 16); 16 partial sums of the weights; and the largest score,
    which all of them are relative to.
    """
    size, width = 4 - 2 * half, padded_head(head_dim)
    sums = part + width * 4
    previous = memory.load_f32(sums + 64)
    peak = simd.splat_f32(previous)
    for i in range(low // LANES * LANES, high, LANES):
        score = score16(query, keys + i * head_dim * size, head_dim, half)
        index = simd.add(simd.lane_numbers(), simd.splat_i32(int32(i)))
        score = simd.keep_lanes(index, int32(low), int32(high), score)
        memory.store_f32x16(scratch + i * 4, score)
        peak = simd.maximum(peak, score)
    largest = simd.max_f32(peak)
    memory.store_f32(sums + 64, largest)
    shrink = exp(simd.splat_f32(previous - largest))
    weights = simd.mul(memory.load_f32x16(sums), shrink)
    for i in range(low // LANES * LANES, high, LANES):
        weight = exp(simd.sub(memory.load_f32x16(scratch + i * 4), simd.splat_f32(largest)))
        memory.store_f32x16(scratch + i * 4, weight)
        weights = simd.add(weights, weight)
    memory.store_f32x16(sums, weights)
    for i in range(0, width, LANES):
        total = simd.mul(memory.load_f32x16(part + i * 4), shrink)
        for position in range(low, high):
            value = load_cached(values + (position * width + i) * size, half)
            weight = simd.splat_f32(memory.load_f32(scratch + position * 4))
            total = simd.fma(value, weight, total)
        memory.store_f32x16(part + i * 4, total)


@inline
def join(part: int, other: int, width: int) -> None:
    """Add the other part's sums, both brought to the larger of the two largest scores."""
    mine, theirs = memory.load_f32(part + width * 4 + 64), memory.load_f32(other + width * 4 + 64)
    peak = simd.maximum(simd.splat_f32(mine), simd.splat_f32(theirs))
    shrink = exp(simd.sub(simd.splat_f32(mine), peak))
    other_shrink = exp(simd.sub(simd.splat_f32(theirs), peak))
    for i in range(0, width + LANES, LANES):
        both = simd.mul(memory.load_f32x16(part + i * 4), shrink)
        both = simd.fma(memory.load_f32x16(other + i * 4), other_shrink, both)
        memory.store_f32x16(part + i * 4, both)
    memory.store_f32(part + width * 4 + 64, simd.max_f32(peak))


@inline
def copy_scaled(x: int, to: int, n: int, scale: Any) -> None:
    for i in range(n):
        memory.store_f32(to + i * 4, memory.load_f32(x + i * 4) * scale)


@inline
def attend_split(
    queries: int, to: int, step: int, group: int, cache: int, block_bytes: int, head: int,
    n_kv_heads: int, begin: int, end: int, head_dim: int, half: int, scratch: int,
) -> None:  # fmt: skip
    """Sums over positions begin..end-1 for the queries of one key head, `step` bytes apart.

    The queries take turns at each block of 64 positions, which stays in the nearest cache.
    """
    size, width = 4 - 2 * half, padded_head(head_dim)
    for i in range(group):
        clear(to + i * step, width)
    for block in range(begin // KEYS_AT_ONCE, (end + KEYS_AT_ONCE - 1) // KEYS_AT_ONCE):
        at = cache + block * block_bytes
        keys = at + head * KEYS_AT_ONCE * head_dim * size
        values = at + (n_kv_heads * head_dim + head * width) * KEYS_AT_ONCE * size
        low = max(int64(0), begin - block * KEYS_AT_ONCE)
        high = min(int64(KEYS_AT_ONCE), end - block * KEYS_AT_ONCE)
        for i in range(group):
            query, part = queries + i * head_dim * 4, to + i * step
            attend_block(query, part, keys, values, low, high, head_dim, half, scratch)


def attention(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Causal attention of one token's query heads that share keys.

    The cache is summed in splits of 1,024 positions, which are joined from the first on: the order
    of sums depends on positions alone. A unit is a key head of a token; where there is one token
    only, each split of it is a unit of its own, so that all threads share a long cache, and
    `merge` joins them.

    Arguments: q, q stride, parts, bytes of a part, n_kv_heads, heads per key head, head_dim, half
    precision; of the cache: bytes from its block to this layer, bytes of a block; scale (float64);
    window (positions, 0: all).
    """
    q, q_stride = argument(instruction, 0), argument(instruction, 1)
    parts, part_bytes = argument(instruction, 2), argument(instruction, 3)
    n_kv_heads, group = argument(instruction, 4), argument(instruction, 5)
    head_dim, half = argument(instruction, 6), argument(instruction, 7)
    cache = memory.load_i64(state + abi.CACHE * WORD) + argument(instruction, 8)
    block_bytes = argument(instruction, 9)
    scale = float32(memory.load_f64(instruction + (ARGS + 10) * WORD))
    window = argument(instruction, 11)
    start = memory.load_i64(state + abi.START * WORD)
    splits, parallel = (
        memory.load_i64(state + abi.SPLITS * WORD),
        memory.load_i64(state + abi.PARALLEL * WORD),
    )
    scratch = memory.load_i64(state + abi.SCRATCH * WORD)
    scratch += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
    queries = scratch + KEYS_AT_ONCE * 4
    other = queries + group * head_dim * 4
    for unit in range(first, last):
        token, head = unit // parallel // n_kv_heads, unit // parallel % n_kv_heads
        x = q + token * q_stride + head * group * head_dim * 4
        copy_scaled(x, queries, group * head_dim, scale)
        part = (
            parts + ((token * n_kv_heads + head) * group * parallel + unit % parallel) * part_bytes
        )
        step = parallel * part_bytes
        stop = start + token + 1
        least = max(int64(0), stop - window) if window > 0 else int64(0)
        for split in range(unit % parallel, splits, parallel):
            begin, end = max(least, split * SPLIT), min(stop, (split + 1) * SPLIT)
            if split < parallel:
                attend_split(queries, part, step, group, cache, block_bytes, head, n_kv_heads,
                             begin, end, head_dim, half, scratch)  # fmt: skip
            elif begin < end:
                attend_split(queries, other, part_bytes, group, cache, block_bytes, head,
                             n_kv_heads, begin, end, head_dim, half, scratch)  # fmt: skip
                for i in range(group):
                    join(part + i * step, other + i * part_bytes, padded_head(head_dim))


def merge(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Join the splits that were units of their own, and divide by the weights. Unit: a head.

    Arguments: parts, bytes of a part, out, out stride, n_heads, head_dim.
    """
    parts, part_bytes = argument(instruction, 0), argument(instruction, 1)
    out, out_stride = argument(instruction, 2), argument(instruction, 3)
    n_heads, head_dim = argument(instruction, 4), argument(instruction, 5)
    parallel = memory.load_i64(state + abi.PARALLEL * WORD)
    width = padded_head(head_dim)
    for unit in range(first, last):
        part = parts + unit * parallel * part_bytes
        for split in range(1, parallel):
            join(part, part + split * part_bytes, width)
        share = float32(1.0) / simd.sum_f32(memory.load_f32x16(part + width * 4))
        y = out + unit // n_heads * out_stride + unit % n_heads * head_dim * 4
        copy_scaled(part, y, head_dim, share)
