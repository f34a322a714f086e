"""Kernels that encode float32 rows: floats, and the types whose blocks are 32 numbers.

A kernel takes groups of 16 lanes; a lane is a run of blocks, so that importance, which differs by
column, is the same for all. Source: ggml's quantize_row_*_ref and quantize_row_*_impl, which the
arithmetic here matches to the bit. K types: see `encode_k.py`. Knows nothing about where rows come
from: `encode.py` cuts them into lanes.
"""

from collections.abc import Callable
from typing import Any

from numba import float32, int32

from edgellama.ggml import BY_NAME
from edgellama.quantize import encode_search
from edgellama.quantize.encode_lanes import (
    brain_bits,
    choose,
    clamp,
    equal,
    half_bits,
    less,
    load_int,
    nearest_code,
    negative,
    put_halves,
    put_words,
    store_halves,
    store_int,
    truncated,
    turn_all,
    with_sign,
)
from edgellama.quantize.encode_search import V, codes, number, symmetric_codes, weigh
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.memory import load_f32x16 as load, store_f32x16 as store
from edgellama.runtimes.simd import absolute, shift_left, shift_right, splat_i32

BLOCK = 32
Kernel = Callable[[int, int, int, int, int, int, int, int], None]
# Scratch: values (and then codes), weights, a search's room, the variance of a lane's row.
WEIGHTS, ROOM, VARIANCE = 32 * V, 64 * V, 96 * V


# --- floats ---------------------------------------------------------------------------------------


def _floats(name: str) -> Kernel:
    """F16 and BF16: a lane is one number, and nothing depends on importance."""
    brain = name == "BF16"

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
            v = load(source + group * V)
            store_halves(target + group * 32, brain_bits(v) if brain else half_bits(v))

    return encode


# --- what blocks are made of ----------------------------------------------------------------------


@inline
def bytes_of(c: int) -> Any:
    """Four codes in the bytes of a word."""
    low = load_int(c) | shift_left(load_int(c + V), 8)
    return low | shift_left(load_int(c + 2 * V) | shift_left(load_int(c + 3 * V), 8), 16)


@inline
def put_nibbles(c: int, target: int, step: int) -> None:
    """16 bytes: codes 0..15 in the low halves, 16..31 in the high ones."""
    nibbles = splat_i32(int32(0x0F0F0F0F))
    for i in range(4):
        low, high = bytes_of(c + i * 4 * V) & nibbles, bytes_of(c + (16 + i * 4) * V) & nibbles
        put_words(target + i * 4, step, low | shift_left(high, 4))


@inline
def put_fifth_bits(c: int, target: int, step: int) -> None:
    """4 bytes: bit i is the fifth bit of code i."""
    word = splat_i32(int32(0))
    for i in range(BLOCK):
        bit = shift_right(load_int(c + i * V), 4) & splat_i32(int32(1))
        word = word | shift_left(bit, i)
    put_words(target, step, word)


@inline
def _limits(x: int) -> Any:
    low = high = load(x)
    for i in range(1, BLOCK):
        v = load(x + i * V)
        low, high = choose(less(v, low), v, low), choose(less(high, v), v, high)
    return low, high


@inline
def inverse(d: Any) -> Any:
    """1 / d, and 0 for 0."""
    return choose(equal(d, number(0.0)), number(0.0), number(1.0) / d)


# --- one block in each lane: values in the room, the block to target; without importance ----------


@inline
def _q8_0(room: int, target: int, step: int) -> None:
    most = number(0.0)
    for i in range(BLOCK):
        v = absolute(load(room + i * V))
        most = choose(less(most, v), v, most)
    d = most / number(127.0)
    scale = inverse(d)
    put_halves(target, step, half_bits(d))
    below_half = number(0.49999997)  # added, it rounds to nearest, ties away from zero
    for i in range(BLOCK):
        v = load(room + i * V) * scale
        code = truncated(v + with_sign(below_half, v)) & splat_i32(int32(255))
        store_int(room + i * V, code)
    for i in range(8):
        put_words(target + 2 + i * 4, step, bytes_of(room + i * 4 * V))


def _by_largest(half: int) -> Any:
    """Q4_0 and Q5_0: the largest magnitude becomes -half; codes are half too high."""

    @inline
    def encode(room: int, target: int, step: int) -> None:
        _, most = encode_search.largest(room, BLOCK)
        d = most / number(-half)
        scale = inverse(d)
        put_halves(target, step, half_bits(d))
        for i in range(BLOCK):
            code = truncated(load(room + i * V) * scale + number(half + 0.5))
            store_int(room + i * V, clamp(code, int32(-128), int32(2 * half - 1)))

    return encode


def _by_limits(top: int) -> Any:
    """Q4_1 and Q5_1: codes 0..top from the least to the largest."""

    @inline
    def encode(room: int, target: int, step: int) -> None:
        low, high = _limits(room)
        d = (high - low) / number(top)
        scale = inverse(d)
        put_halves(target, step, half_bits(d))
        put_halves(target + 2, step, half_bits(low))
        for i in range(BLOCK):
            code = truncated((load(room + i * V) - low) * scale + number(0.5))
            store_int(room + i * V, clamp(code, int32(-128), int32(top)))

    return encode


# --- with importance: weights are in the room too -------------------------------------------------


def _symmetric(half: int) -> Any:
    search = encode_search.fit_symmetric(BLOCK, half)

    @inline
    def encode(room: int, target: int, step: int) -> None:
        found = search(room, room + WEIGHTS)
        put_halves(target, step, half_bits(found[0]))
        for i in range(BLOCK):
            store_int(room + i * V, symmetric_codes(found, load(room + i * V), half))

    return encode


def _with_minimum(top: int) -> Any:
    search = encode_search.fit_minimum(BLOCK, top, -0.9, 0.05, 36)

    @inline
    def encode(room: int, target: int, step: int) -> None:
        d, minus, scale, least = search(room, room + WEIGHTS, room + ROOM)
        put_halves(target, step, half_bits(d))
        put_halves(target + 2, step, half_bits(negative(minus)))
        for i in range(BLOCK):
            store_int(room + i * V, codes(scale, least, load(room + i * V), 0, top))

    return encode


_table_search = encode_search.fit_table(BLOCK, 7)


@inline
def _iq4_nl(room: int, target: int, step: int) -> None:
    d = _table_search(room, room + WEIGHTS)
    put_halves(target, step, half_bits(d))
    scale = inverse(d)
    for i in range(BLOCK):
        store_int(room + i * V, nearest_code(scale * load(room + i * V)))


# --- around them ----------------------------------------------------------------------------------


@inline
def _no_rest(room: int, target: int, step: int) -> None:
    pass


@inline
def _nibbles_at_2(room: int, target: int, step: int) -> None:
    put_nibbles(room, target + 2, step)


@inline
def _nibbles_at_4(room: int, target: int, step: int) -> None:
    put_nibbles(room, target + 4, step)


@inline
def _bits_at_2(room: int, target: int, step: int) -> None:
    put_fifth_bits(room, target + 2, step)
    put_nibbles(room, target + 6, step)


@inline
def _bits_at_4(room: int, target: int, step: int) -> None:
    put_fifth_bits(room, target + 4, step)
    put_nibbles(room, target + 8, step)


# what computes the codes without importance and with it, and what stores them
_TYPES = {
    "Q8_0": (_q8_0, None, _no_rest),
    "Q4_0": (_by_largest(8), lambda: _symmetric(8), _nibbles_at_2),
    "Q5_0": (_by_largest(16), lambda: _symmetric(16), _bits_at_2),
    "Q4_1": (_by_limits(15), lambda: _with_minimum(15), _nibbles_at_4),
    "Q5_1": (_by_limits(31), lambda: _with_minimum(31), _bits_at_4),
    "IQ4_NL": (_iq4_nl, lambda: _iq4_nl, _nibbles_at_2),
}


@inline
def _no_preparation(x: int, stride: int, blocks: int, room: int) -> None:
    pass


def over_blocks(one: Any, length: int, size: int, prepare: Any = _no_preparation) -> Kernel:
    """The kernel of a type whose blocks are `length` numbers in `size` bytes.

    one(room, w, target, step) encodes the 16 blocks whose values are in the room, w their columns'
    importance; prepare(x, stride, blocks, room) comes first for every 16 lanes.
    """

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
            x, y = source + group * 16 * stride, target + group * 16 * step
            prepare(x, stride, blocks, room)
            for block in range(blocks):
                turn_all(x + block * length * 4, stride, room, length)
                one(room, w + block * length * 4, y + block * size, step)

    return encode


def _plain(name: str) -> Kernel:
    begin, _, end = _TYPES[name]
    table = name == "IQ4_NL"

    @inline
    def one(room: int, w: int, target: int, step: int) -> None:
        if table:
            for i in range(BLOCK):
                v = load(room + i * V)
                store(room + WEIGHTS + i * V, v * v)
        begin(room, target, step)
        end(room, target, step)

    return over_blocks(one, BLOCK, BY_NAME[name].size)


@inline
def _variance_of_rows(x: int, stride: int, blocks: int, room: int) -> None:
    total = number(0.0)
    for block in range(blocks):
        turn_all(x + block * BLOCK * 4, stride, room, BLOCK)
        for i in range(BLOCK):
            v = load(room + i * V)
            total = total + v * v
    store(room + VARIANCE, total / number(float32(blocks * BLOCK)))


def _weighted(name: str) -> Kernel:
    """With a table the variance is a block's, otherwise the whole row's, as in ggml."""
    _, make, end = _TYPES[name]
    assert make is not None
    begin, size, table = make(), BY_NAME[name].size, name == "IQ4_NL"

    @inline
    def one(room: int, w: int, target: int, step: int) -> None:
        if table:
            variance = encode_search.sum_of_squares(room, BLOCK) * number(2 / BLOCK)
        else:
            variance = load(room + VARIANCE)
        weigh(room, w, variance, room + WEIGHTS, BLOCK)
        begin(room, target, step)
        end(room, target, step)

    return over_blocks(one, BLOCK, size, _no_preparation if table else _variance_of_rows)


def kernel(name: str, weighted: bool = False) -> Kernel:
    """The kernel of one type.

    Arguments: the rows of the first group, bytes between lanes, the same of the blocks, groups,
    blocks of a lane (1 without importance), importance of a lane's columns, SCRATCH bytes.
    """
    if name in ("F16", "BF16"):
        return _floats(name)
    return _weighted(name) if weighted else _plain(name)
