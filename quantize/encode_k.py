"""Kernels that encode float32 rows as K types: 256 numbers, cut into 8 or 16 sub-blocks.

Here are the types with scales and minima, and the table of all; see `encode_k_scales.py`.

Sixteen blocks at once, one in each lane. Source: ggml's quantize_row_*_K_ref and, with importance,
quantize_row_*_K_impl, which the arithmetic here matches to the bit.

A block is encoded in three steps: a search gives each sub-block a scale (and a minimum); these are
rounded to small integers; codes follow from the rounded ones. Where a rounded scale is 0, codes
stay those of the search, as in ggml.

Knows nothing about where rows come from: `encode.py` cuts them into lanes.
"""

from typing import Any

from numba import int32

from edgellama.ggml import BY_NAME
from edgellama.quantize import encode_k_scales, encode_search, encode_simple
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
    word,
)
from edgellama.quantize.encode_search import V, codes, number, weigh
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


def _round_by_largest(n: int, top: int) -> Any:
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


def _round_by_search(n: int, top: int, cut: bool) -> Any:
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


def _fit_plain(n: int, top: int, first: float, steps: int) -> Any:
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


def _fit_weighted(n: int, top: int) -> Any:
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


# --- every type -----------------------------------------------------------------------------------

_TYPES = {
    "Q2_K": _q2_k,
    "Q3_K": encode_k_scales.q3_k,
    "Q4_K": _q4_k,
    "Q5_K": lambda weighted: _q4_k(weighted, five=True),
    "Q6_K": encode_k_scales.q6_k,
}


def kernel(name: str, weighted: bool = False) -> Kernel:
    """The kernel of one type, of whichever module; arguments as in `encode_simple.kernel`."""
    if name not in _TYPES:
        return encode_simple.kernel(name, weighted)
    return encode_simple.over_blocks(_TYPES[name](weighted), BLOCK, BY_NAME[name].size)
