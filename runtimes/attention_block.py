"""One block of the key/value cache and up to four queries: scores, softmax, weighted values.

Four queries share what a vector of keys or values costs to convert. One query alone takes more
keys at a time instead; it does the same additions in the same order. How the cache lies in
memory, `kernels_cache.py` says; which blocks a query sees is `kernels_attention.py`'s to know.
"""

from typing import Any

from numba import float32, int32, int64

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels_cache import padded_head

LANES, BLOCK, KEYS_AT_ONCE = abi.LANES, abi.BLOCK, abi.ATTENTION_BLOCK
F16, Q8_0 = abi.KV_F16, abi.KV_Q8_0
key_bytes = inline(abi.key_bytes)
MARGIN = 6.0  # weights up to 2 ** 6
# A row is what is known of one query: where it is and its part is, and the positions it sees.
ROW, QUERY, PART, BEGIN, END = abi.ROW_BYTES, 0, abi.WORD, 2 * abi.WORD, 3 * abi.WORD
WEIGHTS = KEYS_AT_ONCE * 4  # bytes of one query's weights for a block


@inline
def exp2(x: Any) -> Any:
    """2 ** x for x <= 8 within 2 units in the last place; below 2 ** -126 it gives 0.

    x = n + r with |r| <= 1 / 2, and a polynomial for 2 ** r (Cephes' exp2f).
    """
    x = simd.at_least(x, float32(-127.0))
    magic = simd.splat_f32(float32(12582912.0))  # leaves no bits for a fraction
    shifted = simd.add(x, magic)
    r = simd.sub(x, simd.sub(shifted, magic))
    p = simd.splat_f32(float32(1.535336188319500e-4))
    p = simd.fma(p, r, simd.splat_f32(float32(1.339887440266574e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(9.618437357674640e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(5.550332471162809e-2)))
    p = simd.fma(p, r, simd.splat_f32(float32(2.402264791363012e-1)))
    p = simd.fma(p, r, simd.splat_f32(float32(6.931472028550421e-1)))
    p = simd.fma(p, r, simd.splat_f32(float32(1.0)))
    return simd.mul(p, simd.power_of_shifted(shifted))


# --- scores --------------------------------------------------------------------------------------


@inline
def load_cached(address: int, kind: int) -> Any:
    """Sixteen cached numbers as float32; of Q8_0 the codes."""
    if kind == Q8_0:
        return memory.load_i8x16(address)
    if kind == F16:
        return memory.load_f16x16(address)
    return memory.load_f32x16(address)


@inline
def load_ahead(address: int, kind: int, ahead: int) -> Any:
    """The same, and asks for what will be wanted later: one line at a time holds nothing up."""
    memory.prefetch(address + ahead)
    return load_cached(address, kind)


@inline
def number_bytes(kind: int) -> Any:
    return 1 if kind == Q8_0 else 4 - 2 * kind


@inline
def column(query: int, i: int) -> Any:
    return simd.splat_f32(memory.load_f32(query + i * 4))


@inline
def sums_of_four(
    a: int, b: int, c: int, d: int, keys: int, key: int, n: int, kind: int, ahead: int
) -> Any:
    """Dot products of n columns: four queries with 2 times 16 keys, `key` bytes apart."""
    size, zero = LANES * number_bytes(kind), simd.splat_f32(float32(0.0))
    a0, b0, c0, d0 = zero, zero, zero, zero
    a1, b1, c1, d1 = zero, zero, zero, zero
    for i in range(n):
        x = load_ahead(keys + i * size, kind, ahead)
        y = load_ahead(keys + key + i * size, kind, ahead)
        a0, a1 = simd.fma(x, column(a, i), a0), simd.fma(y, column(a, i), a1)
        b0, b1 = simd.fma(x, column(b, i), b0), simd.fma(y, column(b, i), b1)
        c0, c1 = simd.fma(x, column(c, i), c0), simd.fma(y, column(c, i), c1)
        d0, d1 = simd.fma(x, column(d, i), d0), simd.fma(y, column(d, i), d1)
    return a0, a1, b0, b1, c0, c1, d0, d1


@inline
def scores_of_four(
    a: int, b: int, c: int, d: int, keys: int, key: int, head_dim: int, kind: int, ahead: int
) -> Any:
    """The same of all columns; of Q8_0 with the scales of 32 columns each."""
    if kind != Q8_0:
        return sums_of_four(a, b, c, d, keys, key, head_dim, kind, ahead)
    zero = simd.splat_f32(float32(0.0))
    a0, b0, c0, d0 = zero, zero, zero, zero
    a1, b1, c1, d1 = zero, zero, zero, zero
    for i in range(0, head_dim, BLOCK):
        at, n = keys + i * (LANES + 1), min(BLOCK, head_dim - i)
        s = sums_of_four(a + i * 4, b + i * 4, c + i * 4, d + i * 4, at, key, n, kind, ahead)
        x = memory.load_f16x16(at + BLOCK * LANES)
        y = memory.load_f16x16(at + BLOCK * LANES + key)
        a0, a1 = simd.fma(s[0], x, a0), simd.fma(s[1], y, a1)
        b0, b1 = simd.fma(s[2], x, b0), simd.fma(s[3], y, b1)
        c0, c1 = simd.fma(s[4], x, c0), simd.fma(s[5], y, c1)
        d0, d1 = simd.fma(s[6], x, d0), simd.fma(s[7], y, d1)
    return a0, a1, b0, b1, c0, c1, d0, d1


@inline
def sums_of_one(query: int, keys: int, key: int, n: int, kind: int, ahead: int) -> Any:
    """Dot products of n columns: one query with 4 times 16 keys."""
    size, zero = LANES * number_bytes(kind), simd.splat_f32(float32(0.0))
    a, b, c, d = zero, zero, zero, zero
    for i in range(n):
        x, at = column(query, i), keys + i * size
        a = simd.fma(load_ahead(at, kind, ahead), x, a)
        b = simd.fma(load_ahead(at + key, kind, ahead), x, b)
        c = simd.fma(load_ahead(at + 2 * key, kind, ahead), x, c)
        d = simd.fma(load_ahead(at + 3 * key, kind, ahead), x, d)
    return a, b, c, d


@inline
def scores_of_one(query: int, keys: int, key: int, head_dim: int, kind: int, ahead: int) -> Any:
    """The same of all columns."""
    if kind != Q8_0:
        return sums_of_one(query, keys, key, head_dim, kind, ahead)
    zero = simd.splat_f32(float32(0.0))
    a, b, c, d = zero, zero, zero, zero
    for i in range(0, head_dim, BLOCK):
        at = keys + i * (LANES + 1)
        s = sums_of_one(query + i * 4, at, key, min(BLOCK, head_dim - i), kind, ahead)
        at += BLOCK * LANES
        a = simd.fma(s[0], memory.load_f16x16(at), a)
        b = simd.fma(s[1], memory.load_f16x16(at + key), b)
        c = simd.fma(s[2], memory.load_f16x16(at + 2 * key), c)
        d = simd.fma(s[3], memory.load_f16x16(at + 3 * key), d)
    return a, b, c, d


# --- softmax -------------------------------------------------------------------------------------


@inline
def soften(row: int, at: int, low: int, high: int, width: int, weights: int) -> None:
    """Turn the scores of positions at + low..high-1 into weights, 2 ** (score - origin).

    Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). A part is the weighted sum of
    values, (head_dim rounded up to 16); 16 partial sums of the weights; the origin of both; and
    what the sum of values is still to be multiplied with. The origin moves to the largest score
    when that is more than MARGIN above, which after a few blocks is seldom.
    """
    sums = memory.load_i64(row + PART) + width * 4
    begin = int32(memory.load_i64(row + BEGIN) - at)
    end = int32(memory.load_i64(row + END) - at)
    origin, above = memory.load_f32(sums + 64), int64(0)
    for i in range(low // LANES * LANES, high, LANES):
        index = simd.add(simd.lane_numbers(), simd.splat_i32(int32(i)))
        score = simd.keep_lanes(index, begin, end, memory.load_f32x16(weights + i * 4))
        memory.store_f32x16(weights + i * 4, score)  # minus infinity, weight 0, where unseen
        above += simd.any_above(score, origin + float32(MARGIN))
    memory.store_f32(sums + 68, float32(1.0))
    total = memory.load_f32x16(sums)
    if above > 0:
        largest = largest_of(low, high, weights, origin)
        shrink = exp2(simd.splat_f32(origin - largest))
        total, origin = simd.mul(total, shrink), largest
        memory.store_f32(sums + 64, origin)
        memory.store_f32(sums + 68, simd.lane_f32(shrink, 0))
    for i in range(low // LANES * LANES, high, LANES):
        weight = exp2(simd.sub(memory.load_f32x16(weights + i * 4), simd.splat_f32(origin)))
        memory.store_f32x16(weights + i * 4, weight)
        total = simd.add(total, weight)
    memory.store_f32x16(sums, total)


@inline
def largest_of(low: int, high: int, scores: int, least: Any) -> Any:
    """NaN if any is; at least `least`."""
    peak = simd.splat_f32(least)
    for i in range(low // LANES * LANES, high, LANES):
        peak = simd.maximum(peak, memory.load_f32x16(scores + i * 4))
    return simd.max_f32(peak)


@inline
def scale_weights(weights: int, scales: int, low: int, high: int, to: int) -> None:
    """Weights times the positions' scales of some columns."""
    for i in range(low // LANES * LANES, high, LANES):
        scale = memory.load_f16x16(scales + i * 2)
        memory.store_f32x16(to + i * 4, simd.mul(memory.load_f32x16(weights + i * 4), scale))


# --- values --------------------------------------------------------------------------------------


@inline
def columns_at(values: int, i: int, kind: int) -> Any:
    """Where columns i..i+15 of a block's first position are."""
    if kind == Q8_0:
        return values + i // BLOCK * KEYS_AT_ONCE * (BLOCK + 2) + i % BLOCK
    return values + i * number_bytes(kind)


@inline
def position_bytes(width: int, kind: int) -> Any:
    """From one position's columns to the next one's."""
    return BLOCK if kind == Q8_0 else width * number_bytes(kind)


@inline
def gather_four(
    row: int, count: int, values: int, low: int, high: int, width: int, kind: int, ahead: int,
    weights: int,
) -> None:  # fmt: skip
    """The four rows' sums, brought to their new scales, plus the positions' weighted values.

    Of fewer rows the last stands for those missing and is kept once.
    """
    a = memory.load_i64(row + PART)
    b = memory.load_i64(row + ROW + PART)
    c = memory.load_i64(row + min(2, count - 1) * ROW + PART)
    d = memory.load_i64(row + min(3, count - 1) * ROW + PART)
    step, scaled = position_bytes(width, kind), weights
    for i in range(0, width, 2 * LANES):
        j = i + LANES if i + LANES < width else i  # the same columns twice do no harm
        if kind == Q8_0:
            scales, scaled = (
                columns_at(values, i, kind) + KEYS_AT_ONCE * BLOCK,
                weights + 4 * WEIGHTS,
            )
            for k in range(count):
                scale_weights(weights + k * WEIGHTS, scales, low, high, scaled + k * WEIGHTS)
        a0 = shrunk(a, i, width)
        a1 = shrunk(a, j, width)
        b0 = shrunk(b, i, width)
        b1 = shrunk(b, j, width)
        c0 = shrunk(c, i, width)
        c1 = shrunk(c, j, width)
        d0 = shrunk(d, i, width)
        d1 = shrunk(d, j, width)
        first, second = columns_at(values, i, kind), columns_at(values, j, kind)
        for k in range(low, high):
            x = load_ahead(first + k * step, kind, ahead)
            y = load_cached(second + k * step, kind)
            a0, a1 = simd.fma(x, column(scaled, k), a0), simd.fma(y, column(scaled, k), a1)
            w = column(scaled + WEIGHTS, k)
            b0, b1 = simd.fma(x, w, b0), simd.fma(y, w, b1)
            w = column(scaled + 2 * WEIGHTS, k)
            c0, c1 = simd.fma(x, w, c0), simd.fma(y, w, c1)
            w = column(scaled + 3 * WEIGHTS, k)
            d0, d1 = simd.fma(x, w, d0), simd.fma(y, w, d1)
        keep_two(a0, a1, a + i * 4, a + j * 4)
        keep_two(b0, b1, b + i * 4, b + j * 4)
        if count > 2:
            keep_two(c0, c1, c + i * 4, c + j * 4)
        if count > 3:
            keep_two(d0, d1, d + i * 4, d + j * 4)


@inline
def shrunk(part: int, i: int, width: int) -> Any:
    """Columns i..i+15 of a part, relative to the new origin."""
    return simd.mul(memory.load_f32x16(part + i * 4), column(part, width + 17))


@inline
def keep_two(x: Any, y: Any, first: int, second: int) -> None:
    memory.store_f32x16(first, x)
    memory.store_f32x16(second, y)


@inline
def gather_one(
    row: int, values: int, low: int, high: int, width: int, kind: int, ahead: int, weights: int
) -> None:
    """The same of one row, up to 64 columns at a time."""
    part = memory.load_i64(row + PART)
    step, scaled, other = position_bytes(width, kind), weights, weights
    for i in range(0, width, 4 * LANES):
        j, k, m = min(i + 16, width - 16), min(i + 32, width - 16), min(i + 48, width - 16)
        if kind == Q8_0:
            scaled, other = weights + WEIGHTS, weights + 2 * WEIGHTS
            behind = KEYS_AT_ONCE * BLOCK
            scale_weights(weights, columns_at(values, i, kind) + behind, low, high, scaled)
            at = columns_at(values, k // BLOCK * BLOCK, kind) + behind
            scale_weights(weights, at, low, high, other)
        a = shrunk(part, i, width)
        b = shrunk(part, j, width)
        c = shrunk(part, k, width)
        d = shrunk(part, m, width)
        first, second = columns_at(values, i, kind), columns_at(values, j, kind)
        third, fourth = columns_at(values, k, kind), columns_at(values, m, kind)
        for position in range(low, high):
            skip = position * step
            x, y = column(scaled, position), column(other, position)
            a = simd.fma(load_ahead(first + skip, kind, ahead), x, a)
            b = simd.fma(load_cached(second + skip, kind), x, b)
            c = simd.fma(load_ahead(third + skip, kind, ahead), y, c)
            d = simd.fma(load_cached(fourth + skip, kind), y, d)
        keep_two(d, c, part + m * 4, part + k * 4)
        keep_two(b, a, part + j * 4, part + i * 4)


# --- all of it -----------------------------------------------------------------------------------


@inline
def score(
    row: int, count: int, keys: int, low: int, high: int, head_dim: int, kind: int, ahead: int,
    weights: int,
) -> None:  # fmt: skip
    """Scores of 1 to 4 rows with one block's keys, at least low..high-1, where weights will be."""
    key = key_bytes(kind, head_dim)
    if count == 1:
        s = scores_of_one(memory.load_i64(row + QUERY), keys, key, head_dim, kind, ahead)
        keep_two(s[0], s[1], weights, weights + 64)
        keep_two(s[2], s[3], weights + 128, weights + 192)
        return
    a, b = memory.load_i64(row + QUERY), memory.load_i64(row + ROW + QUERY)
    c = memory.load_i64(row + min(2, count - 1) * ROW + QUERY)
    d = memory.load_i64(row + min(3, count - 1) * ROW + QUERY)
    for i in range(low // (2 * LANES) * (2 * LANES), high, 2 * LANES):
        t = scores_of_four(a, b, c, d, keys + i // LANES * key, key, head_dim, kind, ahead)
        to = weights + i * 4
        keep_two(t[0], t[1], to, to + 64)
        keep_two(t[2], t[3], to + WEIGHTS, to + WEIGHTS + 64)
        keep_two(t[4], t[5], to + 2 * WEIGHTS, to + 2 * WEIGHTS + 64)
        keep_two(t[6], t[7], to + 3 * WEIGHTS, to + 3 * WEIGHTS + 64)


@inline
def gather(
    row: int, count: int, values: int, low: int, high: int, width: int, kind: int, ahead: int,
    weights: int,
) -> None:  # fmt: skip
    if count == 1:
        gather_one(row, values, low, high, width, kind, ahead, weights)
    else:
        gather_four(row, count, values, low, high, width, kind, ahead, weights)


@inline
def attend(
    row: int, count: int, keys: int, values: int, at: int, low: int, high: int, head_dim: int,
    kind: int, ahead: int, weights: int,
) -> None:  # fmt: skip
    """Add positions at + low..high-1, of one block of the cache, to the parts of 1 to 4 rows."""
    width = padded_head(head_dim)
    score(row, count, keys, low, high, head_dim, kind, ahead, weights)
    for i in range(count):
        soften(row + i * ROW, at, low, high, width, weights + i * WEIGHTS)
    gather(row, count, values, low, high, width, kind, ahead, weights)
