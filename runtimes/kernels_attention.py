"""The operators that know positions: rope, and attention over the key/value cache.

The cache lies in blocks of 64 positions, each with all layers: memory is touched as positions
fill. Of one layer a block holds every head's keys, (4, head_dim, 16), so that one vector holds 16
positions, and then every head's values, (64, head_dim rounded up to 16). Kept as Q8_0, 32 columns
of a position share an f16 scale; `abi.py` has the sizes.

Units, signature and slow twins as in `kernels.py`.
"""

from typing import Any

from numba import float32, int32, int64

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument, exp

WORD, ARGS, LANES, BLOCK = abi.WORD, abi.ARGS, abi.LANES, abi.BLOCK
F16, Q8_0 = abi.KV_F16, abi.KV_Q8_0
key_bytes, value_bytes = inline(abi.key_bytes), inline(abi.value_bytes)
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
        values = block + n_kv_heads * 4 * key + (head * KEYS_AT_ONCE + index) * value
        if kind == Q8_0:
            store_key_q8(k + at, keys, index % LANES, head_dim, scratch)
            store_value_q8(v + at, values, head_dim, scratch)
        else:
            for i in range(head_dim):
                store_cached(keys, i * LANES + index % LANES, memory.load_f32(k + at + i * 4), kind)
                store_cached(values, i, memory.load_f32(v + at + i * 4), kind)


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
def store_value_q8(x: int, values: int, head_dim: int, scratch: int) -> None:
    for i in range(0, head_dim, BLOCK):
        to = values + i // BLOCK * (BLOCK + 2)
        quantize32(x + i * 4, head_dim - i, to, scratch)
        for j in range(BLOCK):
            memory.store_u8(to + 2 + j, memory.load_u8(scratch + 128 + j))


# --- attention -----------------------------------------------------------------------------------


@inline
def load_cached(address: int, kind: int) -> Any:
    """Sixteen cached numbers as float32."""
    if kind == F16:
        return memory.load_f16x16(address)
    return memory.load_f32x16(address)


@inline
def score16(query: int, keys: int, head_dim: int, kind: int) -> Any:
    """Dot products of one query with 16 keys."""
    total = simd.splat_f32(float32(0.0))
    if kind == Q8_0:
        for i in range(0, head_dim, BLOCK):
            at, part = keys + i * (LANES + 1), simd.splat_f32(float32(0.0))
            for j in range(min(BLOCK, head_dim - i)):
                column = simd.splat_f32(memory.load_f32(query + (i + j) * 4))
                part = simd.fma(memory.load_i8x16(at + j * LANES), column, part)
            total = simd.fma(part, memory.load_f16x16(at + BLOCK * LANES), total)
        return total
    size = LANES * (4 - 2 * kind)
    for i in range(head_dim):
        column = simd.splat_f32(memory.load_f32(query + i * 4))
        total = simd.fma(load_cached(keys + i * size, kind), column, total)
    return total


@inline
def four_scores(query: int, keys: int, key: int, head_dim: int, kind: int) -> Any:
    """`score16` of a whole block: four chains of additions at a time hide each other's delay."""
    zero = simd.splat_f32(float32(0.0))
    a, b, c, d = zero, zero, zero, zero
    if kind == Q8_0:
        for i in range(0, head_dim, BLOCK):
            at = keys + i * (LANES + 1)
            e, f, g, h = zero, zero, zero, zero
            for j in range(min(BLOCK, head_dim - i)):
                column, line = simd.splat_f32(memory.load_f32(query + (i + j) * 4)), at + j * LANES
                e = simd.fma(memory.load_i8x16(line), column, e)
                f = simd.fma(memory.load_i8x16(line + key), column, f)
                g = simd.fma(memory.load_i8x16(line + 2 * key), column, g)
                h = simd.fma(memory.load_i8x16(line + 3 * key), column, h)
            at += BLOCK * LANES
            a = simd.fma(e, memory.load_f16x16(at), a)
            b = simd.fma(f, memory.load_f16x16(at + key), b)
            c = simd.fma(g, memory.load_f16x16(at + 2 * key), c)
            d = simd.fma(h, memory.load_f16x16(at + 3 * key), d)
        return a, b, c, d
    size = LANES * (4 - 2 * kind)
    for i in range(head_dim):
        column, line = simd.splat_f32(memory.load_f32(query + i * 4)), keys + i * size
        a = simd.fma(load_cached(line, kind), column, a)
        b = simd.fma(load_cached(line + key, kind), column, b)
        c = simd.fma(load_cached(line + 2 * key, kind), column, c)
        d = simd.fma(load_cached(line + 3 * key, kind), column, d)
    return a, b, c, d


@inline
def keep_score(score: Any, at: int, low: int, high: int, scratch: int, peak: Any) -> Any:
    """Note 16 scores, those of positions low..high-1; gives the largest of each lane so far."""
    index = simd.add(simd.lane_numbers(), simd.splat_i32(int32(at)))
    score = simd.keep_lanes(index, int32(low), int32(high), score)
    memory.store_f32x16(scratch + at * 4, score)
    return simd.maximum(peak, score)


@inline
def add_value(total: Any, weight: Any, values: int, column: int, kind: int) -> Any:
    """total + weight times columns column..column+15 of one position's values."""
    if kind == Q8_0:
        at = values + column // BLOCK * (BLOCK + 2)
        scaled = simd.splat_f32(weight * memory.load_f16(at))
        return simd.fma(memory.load_i8x16(at + 2 + column % BLOCK), scaled, total)
    value = load_cached(values + column * (4 - 2 * kind), kind)
    return simd.fma(value, simd.splat_f32(weight), total)


@inline
def add_four(
    part: int, shrink: Any, values: int, value: int, low: int, high: int, column: int, kind: int,
    scratch: int,
) -> None:  # fmt: skip
    """Columns column..column+63 of a part, brought to the new scale, plus positions' values."""
    at = part + column * 4
    a = simd.mul(memory.load_f32x16(at), shrink)
    b = simd.mul(memory.load_f32x16(at + 64), shrink)
    c = simd.mul(memory.load_f32x16(at + 128), shrink)
    d = simd.mul(memory.load_f32x16(at + 192), shrink)
    for position in range(low, high):
        weight, here = memory.load_f32(scratch + position * 4), values + position * value
        if kind == Q8_0:
            line = here + column // BLOCK * (BLOCK + 2)
            first = simd.splat_f32(weight * memory.load_f16(line))
            second = simd.splat_f32(weight * memory.load_f16(line + BLOCK + 2))
            a = simd.fma(memory.load_i8x16(line + 2), first, a)
            b = simd.fma(memory.load_i8x16(line + 18), first, b)
            c = simd.fma(memory.load_i8x16(line + BLOCK + 4), second, c)
            d = simd.fma(memory.load_i8x16(line + BLOCK + 20), second, d)
        else:
            a = add_value(a, weight, here, column, kind)
            b = add_value(b, weight, here, column + 16, kind)
            c = add_value(c, weight, here, column + 32, kind)
            d = add_value(d, weight, here, column + 48, kind)
    memory.store_f32x16(at, a)
    memory.store_f32x16(at + 64, b)
    memory.store_f32x16(at + 128, c)
    memory.store_f32x16(at + 192, d)


@inline
def clear(part: int, width: int) -> None:
    """A sum over no positions: see `attend_block`."""
    for i in range(0, width, LANES):
        memory.store_f32x16(part + i * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32x16(part + width * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32(part + width * 4 + 64, float32(LEAST))


@inline
def attend_block(
    query: int, part: int, keys: int, values: int, low: int, high: int, head_dim: int, kind: int,
    scratch: int,
) -> None:  # fmt: skip
    """Add positions low..high-1 of one block of the cache to one query's sums.

    Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). A part is the weighted sum of
    values, (head_dim rounded up to 16); 16 partial sums of the weights; and the largest score,
    which all of them are relative to.
    """
    width = padded_head(head_dim)
    sums = part + width * 4
    key, value = key_bytes(kind, head_dim), value_bytes(kind, head_dim)
    previous = memory.load_f32(sums + 64)
    peak = simd.splat_f32(previous)
    if low < LANES and high > 2 * LANES:
        a, b, c, d = four_scores(query, keys, key, head_dim, kind)
        peak = keep_score(a, 0, low, high, scratch, peak)
        peak = keep_score(b, LANES, low, high, scratch, peak)
        peak = keep_score(c, 2 * LANES, low, high, scratch, peak)
        peak = keep_score(d, 3 * LANES, low, high, scratch, peak)
    else:
        for i in range(low // LANES * LANES, high, LANES):
            score = score16(query, keys + i // LANES * key, head_dim, kind)
            peak = keep_score(score, i, low, high, scratch, peak)
    largest = simd.max_f32(peak)
    memory.store_f32(sums + 64, largest)
    shrink = exp(simd.splat_f32(previous - largest))
    weights = simd.mul(memory.load_f32x16(sums), shrink)
    for i in range(low // LANES * LANES, high, LANES):
        weight = exp(simd.sub(memory.load_f32x16(scratch + i * 4), simd.splat_f32(largest)))
        memory.store_f32x16(scratch + i * 4, weight)
        weights = simd.add(weights, weight)
    memory.store_f32x16(sums, weights)
    whole = width // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        add_four(part, shrink, values, value, low, high, i, kind, scratch)
    for i in range(whole, width, LANES):
        total = simd.mul(memory.load_f32x16(part + i * 4), shrink)
        for position in range(low, high):
            weight = memory.load_f32(scratch + position * 4)
            total = add_value(total, weight, values + position * value, i, kind)
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
def fetch_share(start: int, n_bytes: int, number: int, count: int) -> None:
    """Ask for one of `count` shares of what lies ahead; its pages follow no pattern to foresee."""
    share = (n_bytes // 64 + count - 1) // count * 64
    for at in range(number * share, min((number + 1) * share, n_bytes), 64):
        memory.prefetch(start + at)


@inline
def attend_split(
    queries: int, to: int, step: int, group: int, cache: int, block_bytes: int, head: int,
    n_kv_heads: int, begin: int, end: int, head_dim: int, kind: int, scratch: int,
) -> None:  # fmt: skip
    """Sums over positions begin..end-1 for the queries of one key head, `step` bytes apart.

    The queries take turns at each block of 64 positions, which stays in the nearest cache.
    """
    key, value = key_bytes(kind, head_dim), value_bytes(kind, head_dim)
    for i in range(group):
        clear(to + i * step, padded_head(head_dim))
    for block in range(begin // KEYS_AT_ONCE, (end + KEYS_AT_ONCE - 1) // KEYS_AT_ONCE):
        at = cache + block * block_bytes
        keys = at + head * 4 * key
        values = at + n_kv_heads * 4 * key + head * KEYS_AT_ONCE * value
        low = max(int64(0), begin - block * KEYS_AT_ONCE)
        high = min(int64(KEYS_AT_ONCE), end - block * KEYS_AT_ONCE)
        for i in range(group):
            fetch_share(keys + block_bytes, 4 * key, i, group)
            fetch_share(values + block_bytes, KEYS_AT_ONCE * value, i, group)
            query, part = queries + i * head_dim * 4, to + i * step
            attend_block(query, part, keys, values, low, high, head_dim, kind, scratch)


def attention(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Causal attention of one token's query heads that share keys.

    The cache is summed in splits of 1,024 positions, which are joined from the first on: the order
    of sums depends on positions alone. A unit is a key head of a token; where there is one token
    only, each split of it is a unit of its own, so that all threads share a long cache, and
    `merge` joins them.

    Arguments: q, q stride, parts, bytes of a part, n_kv_heads, heads per key head, head_dim; of
    the cache: how numbers are kept, bytes from its block to this layer, bytes of a block; scale
    (float64); window (positions, 0: all).
    """
    q, q_stride = argument(instruction, 0), argument(instruction, 1)
    parts, part_bytes = argument(instruction, 2), argument(instruction, 3)
    n_kv_heads, group = argument(instruction, 4), argument(instruction, 5)
    head_dim, kind = argument(instruction, 6), argument(instruction, 7)
    cache = memory.load_i64(state + abi.CACHE * WORD) + argument(instruction, 8)
    block_bytes = argument(instruction, 9)
    scale = float32(memory.load_f64(instruction + (ARGS + 10) * WORD))
    window = argument(instruction, 11)
    start = memory.load_i64(state + abi.START * WORD)
    splits = memory.load_i64(state + abi.SPLITS * WORD)
    parallel = memory.load_i64(state + abi.PARALLEL * WORD)
    scratch = memory.load_i64(state + abi.SCRATCH * WORD)
    scratch += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
    queries = scratch + KEYS_AT_ONCE * 4
    other = queries + group * head_dim * 4
    for unit in range(first, last):
        token, head = unit // parallel // n_kv_heads, unit // parallel % n_kv_heads
        x = q + token * q_stride + head * group * head_dim * 4
        copy_scaled(x, queries, group * head_dim, scale)
        query = (token * n_kv_heads + head) * group
        part = parts + (query * parallel + unit % parallel) * part_bytes
        step = parallel * part_bytes
        stop = start + token + 1
        least = max(int64(0), stop - window) if window > 0 else int64(0)
        for split in range(unit % parallel, splits, parallel):
            begin, end = max(least, split * SPLIT), min(stop, (split + 1) * SPLIT)
            if split < parallel:
                attend_split(queries, part, step, group, cache, block_bytes, head, n_kv_heads,
                             begin, end, head_dim, kind, scratch)  # fmt: skip
            elif begin < end:
                attend_split(queries, other, part_bytes, group, cache, block_bytes, head,
                             n_kv_heads, begin, end, head_dim, kind, scratch)  # fmt: skip
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
