"""Matrix products with repacked weights, and the embedding's row lookup, for every weight type.

A repacked matrix (`repack.py`) holds 16 rows interleaved, so one vector register holds 16 rows'
results and a block's 16 scales are converted at once. A type gives two pieces: `load`, which
brings one block of 16 rows into registers, and `dot`, which multiplies it with one token's
record. The order of a row's additions depends on its length alone: one token or many, any
thread, the same bits.

The slow twin is `Reference.linear` on weights decoded by `quantize/blocks.py`.
"""

from collections.abc import Callable
from typing import Any

from numba import float32, int32

from edgellama.runtimes import abi, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument
from edgellama.runtimes.repack import LAYOUTS

WORD, LANES, TILE = abi.WORD, abi.LANES, abi.TILE
Q8_LOW, Q8_SCALES, Q8_SUMS, Q8_LOW_SUMS = abi.Q8_LOW, abi.Q8_SCALES, abi.Q8_SUMS, abi.Q8_LOW_SUMS
Q8_SCALED_SUM, Q8_FINE_SUM = abi.Q8_SCALED_SUM, abi.Q8_FINE_SUM
AHEAD = 2304  # bytes; where prefetching pays most on the machines measured

Kernel = Callable[[int, int, int, int, int], None]


def _linear(load: Any, dot: Any, block_bytes: int, record_bytes: int, fine: int) -> Kernel:
    """The matrix product of one weight type, from its two pieces."""

    @inline
    def one_token(w: int, blocks: int, x: int) -> Any:
        """16 rows times one record row; the running total never leaves its register."""
        total = simd.splat_f32(float32(0.0))
        for block in range(blocks):
            p = w + block * block_bytes
            for line in range(0, block_bytes, 64):
                simd.prefetch(p + AHEAD + line)
            total = dot(load(p), x + block * record_bytes, total, fine)
        return total

    @inline
    def tile(w: int, blocks: int, x: int, n_tokens: int, count: int, totals: int) -> None:
        """16 rows times `count` tokens: each block is unpacked once for all of them."""
        for t in range(count):
            simd.store_f32x16(totals + t * 64, simd.splat_f32(float32(0.0)))
        for block in range(blocks):
            weights = load(w + block * block_bytes)
            record = x + block * n_tokens * record_bytes
            for t in range(count):
                total = simd.load_f32x16(totals + t * 64)
                total = dot(weights, record + t * record_bytes, total, fine)
                simd.store_f32x16(totals + t * 64, total)

    def linear(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """x @ weight.T. Unit: 16 rows of the weight.

        Arguments: weight, column blocks, packed x, y, y stride, 1 to add to what y holds,
        and the state word that counts the tokens.
        """
        weight, blocks = argument(instruction, 0), argument(instruction, 1)
        x, y, stride = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
        accumulate = argument(instruction, 5)
        n_tokens = simd.load_i64(state + argument(instruction, 6) * WORD)
        totals = simd.load_i64(state + abi.SCRATCH * WORD)
        totals += thread * simd.load_i64(state + abi.SCRATCH_BYTES * WORD)
        for group in range(first, last):
            w, out = weight + group * blocks * block_bytes, y + group * LANES * 4
            if n_tokens == 1:
                total = one_token(w, blocks, x)
                if accumulate != 0:
                    total = simd.add(simd.load_f32x16(out), total)
                simd.store_f32x16(out, total)
                continue
            for begin in range(0, n_tokens, TILE):
                count = min(TILE, n_tokens - begin)
                tile(w, blocks, x + begin * record_bytes, n_tokens, count, totals)
                for t in range(count):
                    at = out + (begin + t) * stride
                    total = simd.load_f32x16(totals + t * 64)
                    if accumulate != 0:
                        total = simd.add(simd.load_f32x16(at), total)
                    simd.store_f32x16(at, total)

    return linear


def _embed(decode: Any, block_bytes: int, columns: int) -> Kernel:
    """Row lookup of one weight type; `decode(block, lane, column)` gives one weight."""

    def embed(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """Rows of the weight by token id. Unit: a token.

        Arguments: weight, column blocks, y, y stride. Columns of padding decode to zero.
        """
        weight, blocks = argument(instruction, 0), argument(instruction, 1)
        y, stride = argument(instruction, 2), argument(instruction, 3)
        ids = simd.load_i64(state + abi.TOKENS * WORD)
        for token in range(first, last):
            row = simd.load_i64(ids + token * WORD)
            w, lane = weight + row // LANES * blocks * block_bytes, row % LANES
            for block in range(blocks):
                for column in range(columns):
                    value = decode(w + block * block_bytes, lane, column)
                    at = y + token * stride + (block * columns + column) * 4
                    simd.store_f32(at, value)

    return embed


# --- integer products ----------------------------------------------------------------------------


@inline
def load_nibbles(p: int) -> Any:
    """256 bytes: chunk j holds columns 4j..4j+3 (low) and 16+4j..16+4j+3 (high) of 16 rows."""
    a, b = simd.load_i8x64(p), simd.load_i8x64(p + 64)
    c, d = simd.load_i8x64(p + 128), simd.load_i8x64(p + 192)
    return (
        simd.low_nibbles(a),
        simd.low_nibbles(b),
        simd.low_nibbles(c),
        simd.low_nibbles(d),
        simd.high_nibbles(a),
        simd.high_nibbles(b),
        simd.high_nibbles(c),
        simd.high_nibbles(d),
    )


@inline
def minus_sum(x: int, at: int, offset: int) -> Any:
    """What codes stored `offset` too high add to a product, taken off beforehand."""
    return simd.splat_i32(int32(-offset * simd.load_i32(x + Q8_SUMS + at)))


@inline
def halves_small(codes: Any, x: int, first: Any, second: Any) -> Any:
    """first + codes (up to 127) times bytes 0..15, second + times bytes 16..31."""
    a = simd.dot4_small(first, codes[0], simd.splat_4bytes(x))
    b = simd.dot4_small(second, codes[4], simd.splat_4bytes(x + 16))
    a = simd.dot4_small(a, codes[1], simd.splat_4bytes(x + 4))
    b = simd.dot4_small(b, codes[5], simd.splat_4bytes(x + 20))
    a = simd.dot4_small(a, codes[2], simd.splat_4bytes(x + 8))
    b = simd.dot4_small(b, codes[6], simd.splat_4bytes(x + 24))
    a = simd.dot4_small(a, codes[3], simd.splat_4bytes(x + 12))
    b = simd.dot4_small(b, codes[7], simd.splat_4bytes(x + 28))
    return a, b


@inline
def halves_large(codes: Any, x: int, first: Any, second: Any) -> Any:
    """`halves_small` for codes up to 255."""
    a = simd.dot4(first, codes[0], simd.splat_4bytes(x))
    b = simd.dot4(second, codes[4], simd.splat_4bytes(x + 16))
    a = simd.dot4(a, codes[1], simd.splat_4bytes(x + 4))
    b = simd.dot4(b, codes[5], simd.splat_4bytes(x + 20))
    a = simd.dot4(a, codes[2], simd.splat_4bytes(x + 8))
    b = simd.dot4(b, codes[6], simd.splat_4bytes(x + 24))
    a = simd.dot4(a, codes[3], simd.splat_4bytes(x + 12))
    b = simd.dot4(b, codes[7], simd.splat_4bytes(x + 28))
    return a, b


@inline
def dot_small(codes: Any, x: int, offset: int, fine: int) -> Any:
    """Codes stored `offset` too high times the activations, by halves; times 128 if fine."""
    a, b = halves_small(codes, x, minus_sum(x, 0, offset), minus_sum(x, 4, offset))
    if fine != 0:
        low = Q8_LOW_SUMS - Q8_SUMS
        first, second = minus_sum(x, low, offset), minus_sum(x, low + 4, offset)
        c, d = halves_small(codes, x + Q8_LOW, first, second)
        a = simd.add(simd.shift_left(a, 7), c)
        b = simd.add(simd.shift_left(b, 7), d)
    return a, b


@inline
def dot_large(codes: Any, x: int, offset: int, fine: int) -> Any:
    """Codes stored `offset` too high times the activations, by halves; times 128 if fine."""
    a, b = halves_large(codes, x, minus_sum(x, 0, offset), minus_sum(x, 4, offset))
    if fine != 0:
        low = Q8_LOW_SUMS - Q8_SUMS
        first, second = minus_sum(x, low, offset), minus_sum(x, low + 4, offset)
        c, d = halves_large(codes, x + Q8_LOW, first, second)
        a = simd.add(simd.shift_left(a, 7), c)
        b = simd.add(simd.shift_left(b, 7), d)
    return a, b


@inline
def scaled(whole: Any, scales: Any, x: int, total: Any, fine: int) -> Any:
    """total + integer products of both halves times the record's scales times the rows'."""
    a, b = whole
    first, second = simd.load_f32(x + Q8_SCALES), simd.load_f32(x + Q8_SCALES + 4)
    if fine != 0:
        first, second = first * float32(1.0 / 128.0), second * float32(1.0 / 128.0)
    sum_ = simd.mul(simd.to_f32(a), simd.splat_f32(first))
    return simd.fma(simd.fma(simd.to_f32(b), simd.splat_f32(second), sum_), scales, total)


@inline
def nibble(p: int, lane: int, column: int) -> Any:
    """One 4-bit code of a repacked block."""
    byte = simd.load_u8(p + (column % 16) // 4 * 64 + lane * 4 + column % 4)
    return byte >> 4 if column >= 16 else byte & 15


# Q4_0: 16 f16 scales, 256 bytes of codes 8 too high.
@inline
def load_q4_0(p: int) -> Any:
    return load_nibbles(p + 32), simd.load_f16x16(p)


@inline
def dot_q4_0(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_small(codes, x, 8, fine), scales, x, total, fine)


@inline
def decode_q4_0(p: int, lane: int, column: int) -> Any:
    scale = simd.lane_f32(simd.load_f16x16(p), lane)
    return scale * float32(nibble(p + 32, lane, column) - 8)


# Q4_1: 16 f16 scales, 16 f16 minima, 256 bytes of codes.
@inline
def load_q4_1(p: int) -> Any:
    return load_nibbles(p + 64), simd.load_f16x16(p), simd.load_f16x16(p + 32)


@inline
def dot_q4_1(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales, minima = weights
    total = scaled(dot_small(codes, x, 0, fine), scales, x, total, fine)
    sum_at = Q8_FINE_SUM if fine != 0 else Q8_SCALED_SUM
    return simd.fma(minima, simd.splat_f32(simd.load_f32(x + sum_at)), total)


@inline
def decode_q4_1(p: int, lane: int, column: int) -> Any:
    scale = simd.lane_f32(simd.load_f16x16(p), lane)
    minimum = simd.lane_f32(simd.load_f16x16(p + 32), lane)
    return scale * float32(nibble(p + 64, lane, column)) + minimum


# Q8_0: 16 f16 scales, 512 bytes of codes 128 too high, so that they are unsigned.
@inline
def load_q8_0(p: int) -> Any:
    codes = (
        simd.load_i8x64(p + 32),
        simd.load_i8x64(p + 96),
        simd.load_i8x64(p + 160),
        simd.load_i8x64(p + 224),
        simd.load_i8x64(p + 288),
        simd.load_i8x64(p + 352),
        simd.load_i8x64(p + 416),
        simd.load_i8x64(p + 480),
    )
    return codes, simd.load_f16x16(p)


@inline
def dot_q8_0(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_large(codes, x, 128, fine), scales, x, total, fine)


@inline
def decode_q8_0(p: int, lane: int, column: int) -> Any:
    code = simd.load_u8(p + 32 + column // 4 * 64 + lane * 4 + column % 4) - 128
    return simd.lane_f32(simd.load_f16x16(p), lane) * float32(code)


# --- float products ------------------------------------------------------------------------------


def _float_pieces(load16: Any, size: int) -> tuple[Any, Any, Any]:
    """(load, dot, decode) for weights of `size` bytes that `load16` widens to float32.

    A block is 8 columns, each 16 rows wide.
    """
    wide = LANES * size

    @inline
    def load(p: int) -> Any:
        return (
            load16(p),
            load16(p + wide),
            load16(p + 2 * wide),
            load16(p + 3 * wide),
            load16(p + 4 * wide),
            load16(p + 5 * wide),
            load16(p + 6 * wide),
            load16(p + 7 * wide),
        )

    @inline
    def pair(v: Any, w: Any, x: int) -> Any:
        """Two columns times two activations."""
        first = simd.mul(v, simd.splat_f32(simd.load_f32(x)))
        return simd.fma(w, simd.splat_f32(simd.load_f32(x + 4)), first)

    @inline
    def dot(w: Any, x: int, total: Any, fine: int) -> Any:
        """A tree of additions within the block keeps the chain through `total` short."""
        a = simd.add(pair(w[0], w[1], x), pair(w[2], w[3], x + 8))
        b = simd.add(pair(w[4], w[5], x + 16), pair(w[6], w[7], x + 24))
        return simd.add(total, simd.add(a, b))

    @inline
    def decode(p: int, lane: int, column: int) -> Any:
        return simd.lane_f32(load16(p + column * wide), lane)

    return load, dot, decode


# --- the kernels, by weight type -----------------------------------------------------------------

_PIECES = {
    "Q4_0": (load_q4_0, dot_q4_0, decode_q4_0),
    "Q4_1": (load_q4_1, dot_q4_1, decode_q4_1),
    "Q8_0": (load_q8_0, dot_q8_0, decode_q8_0),
    "F16": _float_pieces(simd.load_f16x16, 2),
    "BF16": _float_pieces(simd.load_bf16x16, 2),
    "F32": _float_pieces(simd.load_f32x16, 4),
}


def linear(type_name: str, *, fine: bool = False) -> Kernel:
    """The matrix product for weights of one type; fine: with activations of 15 bits, not 8."""
    layout = LAYOUTS[type_name]
    load, dot, _ = _PIECES[type_name]
    return _linear(load, dot, layout.block_bytes, layout.record_bytes, int(fine))


def embed(type_name: str) -> Kernel:
    """The row lookup for weights of one type."""
    layout = LAYOUTS[type_name]
    return _embed(_PIECES[type_name][2], layout.block_bytes, layout.columns)
