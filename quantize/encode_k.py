"""Kernels that encode float32 rows as K types: 256 numbers, cut into 8 or 16 sub-blocks.

Sixteen blocks at once, one in each lane. Source: ggml's quantize_row_*_K_ref and, with importance,
quantize_row_*_K_impl, which the arithmetic here matches to the bit.

A block is encoded in three steps: a search gives each sub-block a scale (and a minimum); these are
rounded to small integers; codes follow from the rounded ones. Where a rounded scale is 0, codes
stay those of the search, as in ggml.
"""

from collections.abc import Callable
from typing import Any

from numba import int32

from edgellama.ggml import BY_NAME
from edgellama.quantize import encode_search, encode_simple
from edgellama.quantize.encode_lanes import (
    choose,
    choose_int,
    clamp,
    equal,
    half_bits,
    half_value,
    hidden,
    lanes_set,
    less,
    load_codes,
    load_int,
    nearest,
    put_halves,
    put_words,
    store_int,
    turn_all,
)
from edgellama.quantize.encode_packing import (
    AUXILIARY,
    BLOCK,
    BYTES,
    CODE_LEASTS,
    CODE_SCALES,
    MINIMA,
    SCALES,
    SMALL,
    SMALL_MINIMA,
    SUMS,
    WEIGHTS,
    pack_codes,
    put_bits,
    put_nibbles,
    put_pairs,
    put_scales_and_minima,
    put_small_scales,
    word,
)
from edgellama.quantize.encode_search import V, codes, number, symmetric_codes, weigh
from edgellama.quantize.encode_simple import Kernel, bytes_of
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.memory import load_f32x16 as load, store_f32x16 as store
from edgellama.runtimes.simd import absolute, shift_left, shift_right, to_f32

# --- codes from the rounded scales ----------------------------------------------------------------


@inline
def _recode(room: int, x: int, n: int, d: Any, least: Any, top: int, j: int) -> None:
    """Codes 0..top of sub-block j, in place."""
    zero = equal(d, number(0.0))
    any_zero = lanes_set(zero) != 0
    scale, minimum = load(room + CODE_SCALES + j * V), load(room + CODE_LEASTS + j * V)
    for i in range(n):
        v = load(x + i * V)
        code = clamp(nearest((v + least) / d), int32(0), int32(top))
        if any_zero:
            code = choose_int(zero, codes(scale, minimum, v, 0, top), code)
        store_int(x + i * V, code)


@inline
def recode_with_minima(room: int, n: int, top: int, d: Any, dmin: Any) -> None:
    """d, dmin: what multiplies the small scales and minima."""
    for j in range(hidden(BLOCK // n)):
        scale = d * to_f32(load_int(room + SMALL + j * V))
        least = dmin * to_f32(load_int(room + SMALL_MINIMA + j * V))
        _recode(room, room + j * n * V, n, scale, least, top, j)


# --- Q4_K and Q5_K, and Q2_K: scales and minima ---------------------------------------------------


@inline
def _rounded(values: int, n: int, inverse: Any, target: int, top: int) -> None:
    """Scales or minima as unsigned bytes of at most `top`."""
    for j in range(n):
        byte = nearest(inverse * load(values + j * V)) & word(255)
        store_int(target + j * V, clamp(byte, int32(0), int32(top)))


@inline
def _largest_of(values: int, n: int) -> Any:
    most = number(0.0)
    for j in range(n):
        v = load(values + j * V)
        most = choose(less(most, v), v, most)
    return most


def _round_by_largest(n: int, top: int) -> Callable[[int], Any]:
    """Without importance, the largest scale becomes the largest integer."""

    @inline
    def one(values: int, target: int) -> Any:
        most = _largest_of(values, n)
        some = less(number(0.0), most)
        inverse = choose(some, number(top) / most, number(0.0))
        _rounded(values, n, inverse, target, 255 if top == 15 else top)
        return half_bits(choose(some, most / number(top), number(0.0)))

    @inline
    def all_of(room: int) -> Any:
        return one(room + SCALES, room + SMALL), one(room + MINIMA, room + SMALL_MINIMA)

    return all_of


def _round_by_search(n: int, top: int, cut: bool) -> Callable[[int], Any]:
    """With importance: sub-blocks count by the sums of their weights."""
    search = encode_search.fit_positive(n, top)

    @inline
    def one(room: int, values: int, target: int) -> Any:
        d = search(values, room + SUMS, room + BYTES)
        for j in range(n):
            byte = load_codes(room + BYTES + j * 16) & word(255)
            store_int(target + j * V, clamp(byte, int32(0), int32(top)) if cut else byte)
        return half_bits(d)

    @inline
    def all_of(room: int) -> Any:
        d = one(room, room + SCALES, room + SMALL)
        return d, one(room, room + MINIMA, room + SMALL_MINIMA)

    return all_of


@inline
def _keep(room: int, j: int, found: Any) -> None:
    scale, minus, code_scale, code_least = found
    store(room + SCALES + j * V, scale)
    store(room + MINIMA + j * V, minus)
    store(room + CODE_SCALES + j * V, code_scale)
    store(room + CODE_LEASTS + j * V, code_least)


def _fit_plain(n: int, top: int, first: float, steps: int) -> Callable[[int, int], None]:
    """Weights without importance: |x| (Q2_K), or that and the sub-block's root mean square."""
    search = encode_search.fit_minimum(n, top, first, 0.1, steps, mean=n == 16)

    @inline
    def fit(room: int, w: int) -> None:
        for j in range(hidden(BLOCK // n)):
            x, average = room + j * n * V, number(0.0)
            if n == 32:
                average = encode_search.root_mean_square(x, n)
            for i in range(n):
                size = absolute(load(x + i * V))
                store(room + WEIGHTS + i * V, size if n == 16 else average + size)
            _keep(room, j, search(x, room + WEIGHTS, room + AUXILIARY))

    return fit


def _fit_weighted(n: int, top: int) -> Callable[[int, int], None]:
    search = encode_search.fit_minimum(n, top, -0.9, 0.05, 36)

    @inline
    def fit(room: int, w: int) -> None:
        total = encode_search.sum_of_squares(room, BLOCK)
        if n == 32:
            total = number(2.0) * total
        variance = total / number(float(BLOCK))
        for j in range(hidden(BLOCK // n)):
            x = room + j * n * V
            total = weigh(x, w + j * n * 4, variance, room + WEIGHTS, n)
            store(room + SUMS + j * V, total)
            _keep(room, j, search(x, room + WEIGHTS, room + AUXILIARY))

    return fit


def _q4_k(weighted: bool, five: bool = False) -> Any:
    top, first, steps = (31, -0.5, 15) if five else (15, -1.0, 20)
    fit = _fit_weighted(32, top) if weighted else _fit_plain(32, top, first, steps)
    # ggml cuts what a search gives to 6 bits for Q5_K alone
    rounded = _round_by_search(8, 63, five) if weighted else _round_by_largest(8, 63)

    @inline
    def encode(room: int, w: int, target: int, step: int) -> None:
        fit(room, w)
        d, dmin = rounded(room)
        put_halves(target, step, d)
        put_halves(target + 2, step, dmin)
        put_scales_and_minima(room, target + 4, step)
        recode_with_minima(room, 32, top, half_value(d), half_value(dmin))
        pack_codes(room)
        if five:
            put_bits(room, target + 16, step, 4)
        put_nibbles(room, target + (48 if five else 16), step, 32)

    return encode


def _q2_k(weighted: bool) -> Any:
    fit = _fit_weighted(16, 3) if weighted else _fit_plain(16, 3, -0.5, 15)
    rounded = _round_by_search(16, 15, False) if weighted else _round_by_largest(16, 15)

    @inline
    def encode(room: int, w: int, target: int, step: int) -> None:
        fit(room, w)
        d, dmin = rounded(room)
        for i in range(16):
            small, least = room + SMALL + i * V, room + SMALL_MINIMA + i * V
            byte = load_int(small) | shift_left(load_int(least), 4)
            store_int(small, byte & word(15))
            store_int(least, shift_right(byte & word(255), 4))
            store_int(room + SUMS + i * V, byte & word(255))
        for i in range(4):
            put_words(target + i * 4, step, bytes_of(room + SUMS + i * 4 * V))
        put_halves(target + 80, step, d)
        put_halves(target + 82, step, dmin)
        recode_with_minima(room, 16, 3, half_value(d), half_value(dmin))
        pack_codes(room)
        put_pairs(room, target + 16, step, 0)

    return encode


# --- Q6_K and Q3_K: scales alone, of either sign --------------------------------------------------


@inline
def _largest_scale(room: int) -> Any:
    return encode_search.largest(room + SCALES, 16)


def _q6_k(weighted: bool) -> Any:
    search = encode_search.fit_symmetric(16, 32)

    @inline
    def fit(room: int, w: int) -> None:
        for j in range(hidden(16)):
            weights = 0
            if weighted:
                weights = room + WEIGHTS
                for i in range(16):
                    store(weights + i * V, encode_search.same(w + (j * 16 + i) * 4))
            scale, code_scale, none = search(room + j * 16 * V, weights)
            store(room + SCALES + j * V, scale)
            store(room + CODE_SCALES + j * V, code_scale)
            store_int(room + CODE_LEASTS + j * V, none)

    @inline
    def encode(room: int, w: int, target: int, step: int) -> None:
        fit(room, w)
        size, most = _largest_scale(room)
        nothing = less(size, number(encode_search.TINY))  # then ggml clears the block
        inverse = number(-128.0) / most
        bits = choose_int(nothing, word(0), half_bits(number(1.0) / inverse))
        put_halves(target + 208, step, bits)
        for j in range(hidden(16)):
            small = nearest(inverse * load(room + SCALES + j * V))
            small = clamp(small, int32(-(2**31)), int32(127)) & word(255)
            small = shift_right(shift_left(choose_int(nothing, word(0), small), 24), 24)
            store_int(room + SMALL + j * V, small & word(255))
            _recode_symmetric(room, j, half_value(bits) * to_f32(small), 32, nothing)
        for i in range(4):
            put_words(target + 192 + i * 4, step, bytes_of(room + SMALL + i * 4 * V))
        pack_codes(room)
        put_nibbles(room, target, step, 64)
        put_pairs(room, target + 128, step, 4)

    return encode


@inline
def _searched(room: int, j: int) -> Any:
    """What `symmetric_codes` takes, of sub-block j."""
    scale, none = load(room + CODE_SCALES + j * V), load_int(room + CODE_LEASTS + j * V)
    return scale, scale, none


@inline
def _recode_symmetric(room: int, j: int, d: Any, top: int, nothing: Any) -> None:
    """Codes 0..2 * top - 1 of sub-block j, in place; 0 in lanes of `nothing`."""
    zero = equal(d, number(0.0))
    any_zero = lanes_set(zero) != 0
    found = _searched(room, j)
    for i in range(j * 16, j * 16 + 16):
        v = load(room + i * V)
        code = clamp(nearest(v / d), int32(-top), int32(top - 1)) + word(top)
        if any_zero:
            code = choose_int(zero, symmetric_codes(found, v, top), code)
            code = choose_int(nothing, word(0), code)
        store_int(room + i * V, code)


@inline
def _put_q3_k(room: int, target: int, step: int) -> None:
    pack_codes(room)
    put_bits(room, target, step, 2)
    put_pairs(room, target + 32, step, 0)


@inline
def _q3_k_scales(room: int, bits: Any, target: int, step: int, j: int) -> Any:
    return half_value(bits) * to_f32(load_int(room + SMALL + j * V) - word(32))


def _q3_k(weighted: bool) -> Any:
    return _q3_k_weighted() if weighted else _q3_k_plain()


def _q3_k_weighted() -> Any:
    search, outer = encode_search.fit_symmetric(16, 4), encode_search.fit_symmetric(16, 32)

    @inline
    def fit(room: int, w: int) -> None:
        total = encode_search.sum_of_squares(room, BLOCK)
        variance = number(2.0) * total / number(float(BLOCK))
        for j in range(hidden(16)):
            x = room + j * 16 * V
            total = weigh(x, w + j * 16 * 4, variance, room + WEIGHTS, 16)
            store(room + SUMS + j * V, total)
            scale, code_scale, none = search(x, room + WEIGHTS)
            store(room + SCALES + j * V, scale)
            store(room + CODE_SCALES + j * V, code_scale)
            store_int(room + CODE_LEASTS + j * V, none)

    @inline
    def encode(room: int, w: int, target: int, step: int) -> None:
        fit(room, w)
        found = outer(room + SCALES, room + SUMS)
        bits = half_bits(found[0])
        for j in range(hidden(16)):
            small = symmetric_codes(found, load(room + SCALES + j * V), 32)
            store_int(room + SMALL + j * V, small)
            d = half_value(bits) * to_f32(small - word(32))
            _recode_symmetric(room, j, d, 4, word(0))
        put_halves(target + 108, step, bits)
        put_small_scales(room, target + 96, step)
        _put_q3_k(room, target, step)

    return encode


def _q3_k_plain() -> Any:
    search = encode_search.fit_by_turns(16, 4)

    @inline
    def recode(room: int, j: int, d: Any) -> None:
        zero = equal(d, number(0.0))
        for i in range(j * 16, j * 16 + 16):
            code = clamp(nearest(load(room + i * V) / d), int32(-4), int32(3))
            code = choose_int(zero, load_codes(room + BYTES + i * 16), code) + word(4)
            store_int(room + i * V, code)

    @inline
    def encode(room: int, w: int, target: int, step: int) -> None:
        for j in range(hidden(16)):
            x, stored = room + j * 16 * V, room + BYTES + j * 256
            store(room + SCALES + j * V, search(x, stored))
        _, most = _largest_scale(room)
        nothing = equal(most, number(0.0))
        inverse = number(-32.0) / most
        bits = choose_int(nothing, word(0), half_bits(number(1.0) / inverse))
        for j in range(hidden(16)):
            small = nearest(inverse * load(room + SCALES + j * V))
            small = shift_right(shift_left(small, 24), 24)  # ggml keeps it in a byte
            small = clamp(small, int32(-32), int32(31)) + word(32)
            small = choose_int(nothing, word(0), small)
            store_int(room + SMALL + j * V, small)
            recode(room, j, half_value(bits) * to_f32(small - word(32)))
        put_halves(target + 108, step, bits)
        put_small_scales(room, target + 96, step)
        _put_q3_k(room, target, step)

    return encode


_TYPES = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": lambda weighted: _q4_k(weighted, five=True),
    "Q6_K": _q6_k,
}


def kernel(name: str, weighted: bool = False) -> Kernel:
    """The kernel of one type, of whichever module; arguments as in `encode_simple.kernel`."""
    if name not in _TYPES:
        return encode_simple.kernel(name, weighted)
    one, size = _TYPES[name](weighted), BY_NAME[name].size

    def encode(
        source: int,
        stride: int,
        target: int,
        step: int,
        groups: int,
        blocks: int,
        w: int,
        room: int,
    ) -> None:
        for group in range(groups):
            for block in range(blocks):
                x = source + group * 16 * stride + block * BLOCK * 4
                turn_all(x, stride, room, BLOCK)
                importance = w + block * BLOCK * 4
                one(room, importance, target + group * 16 * step + block * size, step)

    return encode
