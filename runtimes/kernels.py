"""The operators of the graph, but for matrix products: embed to attention, and packing.

Every kernel has one signature, (instruction, state, first, last, thread): it does the units of
work first..last-1, which any thread may be given, and nothing it computes depends on who does
them. Rows are float32, padded with zeros to a multiple of 32. The slow twins are the methods of
`reference.py`.

Knows nothing about threads, types of weights or Python objects: addresses and numbers only.
"""

from typing import Any

from numba import float32, int32, int64

from edgellama.runtimes import abi, simd
from edgellama.runtimes.compiler import inline

WORD, ARGS = abi.WORD, abi.ARGS
BLOCK, LANES = abi.BLOCK, abi.LANES
KEYS_AT_ONCE = abi.ATTENTION_BLOCK


@inline
def argument(instruction: int, index: int) -> Any:
    """Word `index` of the kernel's own arguments."""
    return simd.load_i64(instruction + (ARGS + index) * WORD)


@inline
def exp(x: Any) -> Any:
    """e ** x for sixteen lanes within 2 units in the last place; minus infinity gives 0.

    x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e ** r (Cephes' expf).
    """
    clamped = simd.maximum(x, simd.splat_f32(float32(-104.0)))
    clamped = simd.sub(simd.splat_f32(float32(0.0)), clamped)
    clamped = simd.maximum(clamped, simd.splat_f32(float32(-89.0)))
    clamped = simd.sub(simd.splat_f32(float32(0.0)), clamped)
    n = simd.round_i32(simd.mul(clamped, simd.splat_f32(float32(1.44269504088896341))))
    whole = simd.to_f32(n)
    r = simd.fma(whole, simd.splat_f32(float32(-0.693359375)), clamped)
    r = simd.fma(whole, simd.splat_f32(float32(2.12194440e-4)), r)
    p = simd.splat_f32(float32(1.9875691500e-4))
    p = simd.fma(p, r, simd.splat_f32(float32(1.3981999507e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(8.3334519073e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(4.1665795894e-2)))
    p = simd.fma(p, r, simd.splat_f32(float32(1.6666665459e-1)))
    p = simd.fma(p, r, simd.splat_f32(float32(5.0000001201e-1)))
    p = simd.fma(p, simd.mul(r, r), simd.add(r, simd.splat_f32(float32(1.0))))
    # 2 ** n in two steps: n reaches -150, below the smallest exponent.
    half = simd.shift_right(n, 1)
    rest = simd.sub(n, half)
    return simd.mul(simd.mul(p, simd.power_of_two(half)), simd.power_of_two(rest))


# --- packing -------------------------------------------------------------------------------------


@inline
def pack_q8_half(x: Any, record: int, half: int) -> Any:
    """16 float32 as high and low bytes with one scale; (almost) zeros get scale 0.

    Gives scale * sum of the high bytes, and of high + low / 128.
    """
    largest = simd.max_f32(simd.absolute(x))
    scale = largest / float32(127.0)
    inverse = float32(127.0 * 128.0) / largest
    if largest < float32(1e-30):  # its inverse could overflow
        scale, inverse = float32(0.0), float32(0.0)
    both = simd.round_i32(simd.mul(x, simd.splat_f32(inverse)))
    high = simd.shift_right(simd.add(both, simd.splat_i32(int32(64))), 7)
    low = simd.sub(both, simd.shift_left(high, 7))  # -64..63
    simd.store_as_i8x16(record + half * LANES, high)
    simd.store_as_i8x16(record + abi.Q8_LOW + half * LANES, low)
    high_sum, low_sum = simd.sum_i32(high), simd.sum_i32(low)
    simd.store_f32(record + abi.Q8_SCALES + half * 4, scale)
    simd.store_i32(record + abi.Q8_SUMS + half * 4, high_sum)
    simd.store_i32(record + abi.Q8_LOW_SUMS + half * 4, low_sum)
    coarse = scale * float32(high_sum)
    return coarse, coarse + scale * float32(low_sum) * float32(1.0 / 128.0)


@inline
def pack_q8(a: Any, b: Any, record: int) -> None:
    """32 columns as one record for integer products."""
    first, first_fine = pack_q8_half(a, record, 0)
    second, second_fine = pack_q8_half(b, record, 1)
    simd.store_f32(record + abi.Q8_SCALED_SUM, first + second)
    simd.store_f32(record + abi.Q8_FINE_SUM, first_fine + second_fine)


@inline
def pack(a: Any, b: Any, block: int, token: int, n_tokens: int, q8: int, f32: int) -> None:
    """Store 32 columns in each format that has an address."""
    if q8 != 0:
        pack_q8(a, b, q8 + (block * n_tokens + token) * abi.Q8_RECORD)
    if f32 != 0:
        step = n_tokens * abi.F32_RECORD
        record = f32 + 4 * block * step + token * abi.F32_RECORD
        simd.store_low8(record, a)
        simd.store_high8(record + step, a)
        simd.store_low8(record + 2 * step, b)
        simd.store_high8(record + 3 * step, b)


def pack_rows(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Pack rows for a matrix product. Arguments: rows, stride, blocks, q8, f32. Unit: a token."""
    rows, stride = argument(instruction, 0), argument(instruction, 1)
    blocks, q8, f32 = (
        argument(instruction, 2),
        argument(instruction, 3),
        argument(instruction, 4),
    )
    n_tokens = simd.load_i64(state + abi.N_TOKENS * WORD)
    for token in range(first, last):
        for block in range(blocks):
            x = rows + token * stride + block * BLOCK * 4
            pack(simd.load_f32x16(x), simd.load_f32x16(x + 64), block, token, n_tokens, q8, f32)


def norm(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """RMS norm of rows, packed. Unit: a token.

    Arguments: rows, stride, blocks, q8, f32, weight, eps (float64), 1 / columns (float64), and
    the state word that counts the tokens. The mean square is float64: squares of 1e20 fit.
    """
    rows, stride = argument(instruction, 0), argument(instruction, 1)
    blocks, q8, f32 = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
    weight = argument(instruction, 5)
    eps = simd.load_f64(instruction + (ARGS + 6) * WORD)
    share = simd.load_f64(instruction + (ARGS + 7) * WORD)
    n_tokens = simd.load_i64(state + argument(instruction, 8) * WORD)
    for token in range(first, last):
        x = rows + token * stride
        total = simd.widen(simd.splat_f32(float32(0.0)))
        for i in range(2 * blocks):
            wide = simd.widen(simd.load_f32x16(x + i * 64))
            total = simd.add(total, simd.mul(wide, wide))
        scale = simd.splat_f32(float32(1.0 / simd.sqrt_f64(simd.sum_f64(total) * share + eps)))
        for block in range(blocks):
            p, w = x + block * BLOCK * 4, weight + block * BLOCK * 4
            a = simd.mul(simd.mul(simd.load_f32x16(p), scale), simd.load_f32x16(w))
            b = simd.mul(simd.mul(simd.load_f32x16(p + 64), scale), simd.load_f32x16(w + 64))
            pack(a, b, block, token, n_tokens, q8, f32)


@inline
def silu_mul(gate: Any, up: Any) -> Any:
    """gate / (1 + exp(-gate)) * up."""
    one = simd.splat_f32(float32(1.0))
    grown = exp(simd.sub(simd.splat_f32(float32(0.0)), gate))
    return simd.mul(simd.div(gate, simd.add(one, grown)), up)


def swiglu(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """silu(gate) * up, packed. Unit: 32 columns of one token.

    Arguments: gate, up, stride, blocks, q8, f32, and how many times 16 columns there are (0: all
    that the blocks have room for). What lies behind them is another's and is taken as zeros.
    """
    gate, up, stride = argument(instruction, 0), argument(instruction, 1), argument(instruction, 2)
    blocks, q8, f32 = argument(instruction, 3), argument(instruction, 4), argument(instruction, 5)
    vectors = argument(instruction, 6)
    n_tokens = simd.load_i64(state + abi.N_TOKENS * WORD)
    for unit in range(first, last):
        token, block = unit // blocks, unit % blocks
        at = token * stride + block * BLOCK * 4
        a = silu_mul(simd.load_f32x16(gate + at), simd.load_f32x16(up + at))
        b = simd.splat_f32(float32(0.0))
        if vectors == 0 or 2 * block + 1 < vectors:
            b = silu_mul(simd.load_f32x16(gate + at + 64), simd.load_f32x16(up + at + 64))
        pack(a, b, block, token, n_tokens, q8, f32)


def select(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Copy the rows whose logits are wanted. Arguments: from, to, stride. Unit: a row."""
    source, target, stride = (
        argument(instruction, 0),
        argument(instruction, 1),
        argument(instruction, 2),
    )
    rows = simd.load_i64(state + abi.ROWS * WORD)
    for row in range(first, last):
        x = source + simd.load_i64(rows + row * WORD) * stride
        for at in range(0, stride, 64):
            simd.store_f32x16(target + row * stride + at, simd.load_f32x16(x + at))


# --- attention -----------------------------------------------------------------------------------


@inline
def rotate(x: int, angles: int, pairs: int) -> None:
    """Turn `pairs` neighbouring pairs of float32 at x, in place."""
    for i in range(pairs):
        cos, sin = simd.load_f32(angles + i * 8), simd.load_f32(angles + i * 8 + 4)
        a, b = simd.load_f32(x + i * 8), simd.load_f32(x + i * 8 + 4)
        simd.store_f32(x + i * 8, a * cos - b * sin)
        simd.store_f32(x + i * 8 + 4, a * sin + b * cos)


def rope(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Turn queries and keys, and put keys and values into the cache. Unit: a head of a token.

    Arguments: q, k, v, stride, n_heads, n_kv_heads, head_dim, pairs, half precision (0 or 1),
    byte offsets of this layer in the key and the value cache, bytes of one head in each.
    Keys lie (positions / 16, head_dim, 16), so that one vector holds 16 positions; values lie
    (positions, head_dim rounded up to 16).
    """
    q, k, v = argument(instruction, 0), argument(instruction, 1), argument(instruction, 2)
    stride, n_heads = argument(instruction, 3), argument(instruction, 4)
    n_kv_heads, head_dim = argument(instruction, 5), argument(instruction, 6)
    pairs, half = argument(instruction, 7), argument(instruction, 8)
    keys = simd.load_i64(state + abi.KEYS * WORD) + argument(instruction, 9)
    values = simd.load_i64(state + abi.VALUES * WORD) + argument(instruction, 10)
    key_bytes, value_bytes = argument(instruction, 11), argument(instruction, 12)
    angles = simd.load_i64(state + abi.ANGLES * WORD)
    start = simd.load_i64(state + abi.START * WORD)
    per_token = n_heads + n_kv_heads
    for unit in range(first, last):
        token, head = unit // per_token, unit % per_token
        position = start + token
        turn = angles + position * pairs * 8
        if head < n_heads:
            rotate(q + token * stride + head * head_dim * 4, turn, pairs)
            continue
        head -= n_heads
        x = k + token * stride + head * head_dim * 4
        rotate(x, turn, pairs)
        to = keys + head * key_bytes
        store_key(x, to, position, head_dim, half)
        to = values + head * value_bytes
        store_value(v + token * stride + head * head_dim * 4, to, position, head_dim, half)


@inline
def store_key(x: int, to: int, position: int, head_dim: int, half: int) -> None:
    """One key: a column of its block of 16 positions."""
    at = (position // LANES) * head_dim * LANES + position % LANES
    for i in range(head_dim):
        value = simd.load_f32(x + i * 4)
        if half != 0:
            simd.store_f16(to + (at + i * LANES) * 2, value)
        else:
            simd.store_f32(to + (at + i * LANES) * 4, value)


@inline
def store_value(x: int, to: int, position: int, head_dim: int, half: int) -> None:
    """One value: a row of its own; the padding behind it holds zeros from the start."""
    width = (head_dim + LANES - 1) // LANES * LANES
    for i in range(head_dim):
        value = simd.load_f32(x + i * 4)
        if half != 0:
            simd.store_f16(to + (position * width + i) * 2, value)
        else:
            simd.store_f32(to + (position * width + i) * 4, value)


@inline
def load_cached(address: int, half: int) -> Any:
    """Sixteen cached numbers as float32."""
    if half != 0:
        return simd.load_f16x16(address)
    return simd.load_f32x16(address)


@inline
def score16(query: int, keys: int, head_dim: int, half: int) -> Any:
    """Dot products of one query with 16 keys."""
    size = 4 - 2 * half
    total = simd.splat_f32(float32(0.0))
    for i in range(head_dim):
        key = load_cached(keys + i * LANES * size, half)
        total = simd.fma(key, simd.splat_f32(simd.load_f32(query + i * 4)), total)
    return total


@inline
def attend(
    query: int,
    out: int,
    keys: int,
    values: int,
    low: int,
    high: int,
    head_dim: int,
    half: int,
    scratch: int,
) -> None:
    """Softmax-weighted sum of values low..high-1 for one query, block by block of 64 positions.

    Online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): each block rescales what was
    summed before it, so no row of scores is ever held. `out`: head_dim rounded up to 16.
    """
    size = 4 - 2 * half
    width = (head_dim + LANES - 1) // LANES * LANES
    for i in range(0, width, LANES):
        simd.store_f32x16(out + i * 4, simd.splat_f32(float32(0.0)))
    largest = -float32(3.0e38)
    weights = simd.splat_f32(float32(0.0))
    for block in range(low // KEYS_AT_ONCE, (high + KEYS_AT_ONCE - 1) // KEYS_AT_ONCE):
        begin = block * KEYS_AT_ONCE
        peak = simd.splat_f32(largest)
        for i in range(0, KEYS_AT_ONCE, LANES):
            score = score16(query, keys + (begin + i) * head_dim * size, head_dim, half)
            index = simd.add(simd.lane_numbers(), simd.splat_i32(int32(begin + i)))
            score = simd.keep_lanes(index, int32(low), int32(high), score)
            simd.store_f32x16(scratch + i * 4, score)
            peak = simd.maximum(peak, score)
        previous, largest = largest, simd.max_f32(peak)
        shrink = exp(simd.splat_f32(previous - largest))
        weights = simd.mul(weights, shrink)
        for i in range(0, KEYS_AT_ONCE, LANES):
            score = simd.sub(simd.load_f32x16(scratch + i * 4), simd.splat_f32(largest))
            weight = exp(score)
            simd.store_f32x16(scratch + i * 4, weight)
            weights = simd.add(weights, weight)
        from_, to = max(low, begin), min(high, begin + KEYS_AT_ONCE)
        for i in range(0, width, LANES):
            total = simd.mul(simd.load_f32x16(out + i * 4), shrink)
            for position in range(from_, to):
                value = load_cached(values + (position * width + i) * size, half)
                weight = simd.load_f32(scratch + (position - begin) * 4)
                total = simd.fma(value, simd.splat_f32(weight), total)
            simd.store_f32x16(out + i * 4, total)
    share = simd.splat_f32(float32(1.0) / simd.sum_f32(weights))
    for i in range(0, width, LANES):
        simd.store_f32x16(out + i * 4, simd.mul(simd.load_f32x16(out + i * 4), share))


def attention(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Causal attention over the cache. Unit: a query head of a token.

    Arguments: q, q stride, out, out stride, n_heads, heads per key head, head_dim, half precision,
    key and value cache offsets of this layer, bytes of one head in each, scale (float64), window
    (positions, 0: all).
    """
    q, q_stride = argument(instruction, 0), argument(instruction, 1)
    out, out_stride = argument(instruction, 2), argument(instruction, 3)
    n_heads, group = argument(instruction, 4), argument(instruction, 5)
    head_dim, half = argument(instruction, 6), argument(instruction, 7)
    keys = simd.load_i64(state + abi.KEYS * WORD) + argument(instruction, 8)
    values = simd.load_i64(state + abi.VALUES * WORD) + argument(instruction, 9)
    key_bytes, value_bytes = argument(instruction, 10), argument(instruction, 11)
    scale = float32(simd.load_f64(instruction + (ARGS + 12) * WORD))
    window = argument(instruction, 13)
    start = simd.load_i64(state + abi.START * WORD)
    scratch = simd.load_i64(state + abi.SCRATCH * WORD)
    scratch += thread * simd.load_i64(state + abi.SCRATCH_BYTES * WORD)
    query, result = scratch + KEYS_AT_ONCE * 4, scratch + (KEYS_AT_ONCE + head_dim + LANES) * 4
    for unit in range(first, last):
        token, head = unit // n_heads, unit % n_heads
        x = q + token * q_stride + head * head_dim * 4
        for i in range(head_dim):
            simd.store_f32(query + i * 4, simd.load_f32(x + i * 4) * scale)
        high = start + token + 1
        low = max(int64(0), high - window) if window > 0 else int64(0)
        at = head // group
        k, v = keys + at * key_bytes, values + at * value_bytes
        attend(query, result, k, v, low, high, head_dim, half, scratch)
        y = out + token * out_stride + head * head_dim * 4
        for i in range(head_dim):
            simd.store_f32(y + i * 4, simd.load_f32(result + i * 4))
