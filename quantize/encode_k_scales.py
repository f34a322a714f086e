"""The K types with scales alone, of either sign: Q6_K and Q3_K, 16 sub-blocks of 16 numbers.

Otherwise as `encode_k.py`, which see. Knows nothing about minima.
"""

from typing import Any

from numba import int32

from edgellama.quantize import encode_search
from edgellama.quantize.encode_lanes import (
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
    BLOCK,
    BYTES,
    CODE_LEASTS,
    CODE_SCALES,
    SCALES,
    SMALL,
    SUMS,
    WEIGHTS,
    pack_codes,
    put_bits,
    put_nibbles,
    put_pairs,
    put_small_scales,
    word,
)
from edgellama.quantize.encode_search import V, number, symmetric_codes, weigh
from edgellama.quantize.encode_simple import bytes_of
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.memory import load_f32x16 as load, store_f32x16 as store
from edgellama.runtimes.simd import shift_left, shift_right, to_f32


@inline
def _largest_scale(room: int) -> Any:
    return encode_search.largest(room + SCALES, 16)


@inline
def _keep(room: int, j: int, found: Any) -> None:
    """What a search found for sub-block j; `_searched` gives it back."""
    scale, code_scale, none = found
    store(room + SCALES + j * V, scale)
    store(room + CODE_SCALES + j * V, code_scale)
    store_int(room + CODE_LEASTS + j * V, none)


def q6_k(weighted: bool) -> Any:
    search = encode_search.fit_symmetric(16, 32)

    @inline
    def fit(room: int, w: int) -> None:
        for j in range(hidden(16)):
            weights = 0
            if weighted:
                weights = room + WEIGHTS
                for i in range(16):
                    store(weights + i * V, encode_search.same(w + (j * 16 + i) * 4))
            _keep(room, j, search(room + j * 16 * V, weights))

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
def _put_q3_k(room: int, target: int, step: int, bits: Any) -> None:
    put_halves(target + 108, step, bits)
    put_small_scales(room, target + 96, step)
    pack_codes(room)
    put_bits(room, target, step, 2)
    put_pairs(room, target + 32, step, 0)


def q3_k(weighted: bool) -> Any:
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
            _keep(room, j, search(x, room + WEIGHTS))

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
        _put_q3_k(room, target, step, bits)

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
        _put_q3_k(room, target, step, bits)

    return encode
