"""What matrix products are made of, weight type by weight type: the plain ones.

Each type gives three pieces: `load(p, i)` brings block i of the 16 rows at p into registers;
`dot(weights, x, total, fine)` multiplies it with one token's record; `decode(p, lane, column)`
gives one weight. `kernels_linear.py` turns pieces into kernels, `repack.py` writes the memory they
read, `pieces_quants.py` has the types with odd numbers of bits.

The slow twin is `Reference.linear` on weights decoded by `quantize/blocks.py`.
"""

from typing import Any

from numba import float32, int32

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline

LANES = abi.LANES


@inline
def load_nibbles(p: int) -> Any:
    """256 bytes: chunk j holds columns 4j..4j+3 (low) and 16+4j..16+4j+3 (high) of 16 rows."""
    a, b = memory.load_i8x64(p), memory.load_i8x64(p + 64)
    c, d = memory.load_i8x64(p + 128), memory.load_i8x64(p + 192)
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


def _products(dot4: Any) -> Any:
    """Codes times a record's activations, by one of `simd.dot4` and `simd.dot4_small`."""

    @inline
    def halves(codes: Any, x: int) -> Any:
        """Codes times bytes 0..15, and times bytes 16..31: two chains in flight."""
        zero = simd.splat_i32(int32(0))
        a = dot4(zero, codes[0], memory.splat_4bytes(x))
        b = dot4(zero, codes[4], memory.splat_4bytes(x + 16))
        a = dot4(a, codes[1], memory.splat_4bytes(x + 4))
        b = dot4(b, codes[5], memory.splat_4bytes(x + 20))
        a = dot4(a, codes[2], memory.splat_4bytes(x + 8))
        b = dot4(b, codes[6], memory.splat_4bytes(x + 24))
        a = dot4(a, codes[3], memory.splat_4bytes(x + 12))
        b = dot4(b, codes[7], memory.splat_4bytes(x + 28))
        return a, b

    @inline
    def dot(codes: Any, x: int, fine: int) -> Any:
        """Codes times the activations, by halves; times 128 if fine."""
        a, b = halves(codes, x)
        if fine != 0:
            c, d = halves(codes, x + abi.Q8_LOW)
            a = simd.add(simd.shift_left(a, 7), c)
            b = simd.add(simd.shift_left(b, 7), d)
        return a, b

    return dot


dot_small = _products(simd.dot4_small)  # codes up to 127
dot_large = _products(simd.dot4)  # codes up to 255


@inline
def record_scale(x: int, half: int) -> Any:
    """What a product of 16 columns is to be multiplied by, and by 1 / 128 if fine."""
    return simd.splat_f32(memory.load_f32(x + abi.Q8_SCALES + half * 4))


@inline
def record_sum(x: int, fine: int) -> Any:
    """The sum of a record's activations."""
    return simd.splat_f32(memory.load_f32(x + (abi.Q8_FINE_SUM if fine != 0 else abi.Q8_SUM)))


@inline
def half_sum(x: int, half: int, fine: int) -> Any:
    """The sum of 16 of them."""
    sums = abi.Q8_FINE_SUMS if fine != 0 else abi.Q8_SUMS
    return simd.splat_f32(memory.load_f32(x + sums + half * 4))


@inline
def scaled(whole: Any, scales: Any, x: int, total: Any, fine: int, offset: int) -> Any:
    """total + integer products of both halves times the record's scales times the rows'.

    What codes stored `offset` too high add is taken off here.
    """
    excess = simd.splat_f32(float32(0.0))
    if offset != 0:
        excess = simd.mul(record_sum(x, fine), simd.splat_f32(float32(-offset)))
    a, b = simd.to_f32(whole[0]), simd.to_f32(whole[1])
    if fine != 0:
        both = simd.fma(b, record_scale(x, 1), simd.mul(a, record_scale(x, 0)))
        both = simd.fma(both, simd.splat_f32(float32(1.0 / 128.0)), excess)
    else:
        both = simd.fma(b, record_scale(x, 1), simd.fma(a, record_scale(x, 0), excess))
    return simd.fma(both, scales, total)


@inline
def nibble(p: int, lane: int, column: int) -> Any:
    """One 4-bit code of a repacked block."""
    byte = memory.load_u8(p + (column % 16) // 4 * 64 + lane * 4 + column % 4)
    return byte >> 4 if column >= 16 else byte & 15


# Q4_0: 16 f16 scales, 256 bytes of codes 8 too high.
@inline
def load_q4_0(p: int, i: int) -> Any:
    return load_nibbles(p + 32), memory.load_f16x16(p)


@inline
def dot_q4_0(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_small(codes, x, fine), scales, x, total, fine, 8)


@inline
def decode_q4_0(p: int, lane: int, column: int) -> Any:
    scale = simd.lane_f32(memory.load_f16x16(p), lane)
    return scale * float32(nibble(p + 32, lane, column) - 8)


# Q4_1: 16 f16 scales, 16 f16 minima, 256 bytes of codes.
@inline
def load_q4_1(p: int, i: int) -> Any:
    return load_nibbles(p + 64), memory.load_f16x16(p), memory.load_f16x16(p + 32)


@inline
def dot_minimum(weights: Any, x: int, total: Any, fine: int) -> Any:
    """Codes with one scale and one minimum for all 32 columns."""
    codes, scales, minima = weights
    total = scaled(dot_small(codes, x, fine), scales, x, total, fine, 0)
    return simd.fma(minima, record_sum(x, fine), total)


@inline
def decode_q4_1(p: int, lane: int, column: int) -> Any:
    scale = simd.lane_f32(memory.load_f16x16(p), lane)
    minimum = simd.lane_f32(memory.load_f16x16(p + 32), lane)
    return scale * float32(nibble(p + 64, lane, column)) + minimum


# Q8_0: 16 f16 scales, 512 bytes of codes 128 too high, so that they are unsigned.
@inline
def load_q8_0(p: int, i: int) -> Any:
    codes = (
        memory.load_i8x64(p + 32),
        memory.load_i8x64(p + 96),
        memory.load_i8x64(p + 160),
        memory.load_i8x64(p + 224),
        memory.load_i8x64(p + 288),
        memory.load_i8x64(p + 352),
        memory.load_i8x64(p + 416),
        memory.load_i8x64(p + 480),
    )
    return codes, memory.load_f16x16(p)


@inline
def dot_q8_0(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_large(codes, x, fine), scales, x, total, fine, 128)


@inline
def decode_q8_0(p: int, lane: int, column: int) -> Any:
    code = memory.load_u8(p + 32 + column // 4 * 64 + lane * 4 + column % 4) - 128
    return simd.lane_f32(memory.load_f16x16(p), lane) * float32(code)


# --- float products ------------------------------------------------------------------------------


def _float_pieces(load16: Any, size: int) -> tuple[Any, Any, Any]:
    """(load, dot, decode) for weights of `size` bytes that `load16` widens to float32.

    A block is 8 columns, each 16 rows wide.
    """
    wide = LANES * size

    @inline
    def load(p: int, i: int) -> Any:
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
        first = simd.mul(v, simd.splat_f32(memory.load_f32(x)))
        return simd.fma(w, simd.splat_f32(memory.load_f32(x + 4)), first)

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


PIECES = {
    "Q4_0": (load_q4_0, dot_q4_0, decode_q4_0),
    "Q4_1": (load_q4_1, dot_minimum, decode_q4_1),
    "Q8_0": (load_q8_0, dot_q8_0, decode_q8_0),
    "F16": _float_pieces(memory.load_f16x16, 2),
    "BF16": _float_pieces(memory.load_bf16x16, 2),
    "F32": _float_pieces(memory.load_f32x16, 4),
}
