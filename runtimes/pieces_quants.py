"""What matrix products are made of: the quantized types beyond plain 4 and 8 bits.

Codes of 5 and 6 bits lie as nibbles with planes of high bits, codes of 2 and 3 bits in planes
only; K types keep eight blocks of 32 columns behind one header of f16 scales. `repack.py` writes
all this; `pieces.py` says what a piece is.
"""

from typing import Any

from numba import float32

from edgellama.runtimes import memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.pieces import (
    dot_large,
    dot_minimum,
    dot_small,
    half_sum,
    load_nibbles,
    nibble,
    record_scale,
    scaled,
)

# --- planes: bits of 16 rows by 32 columns, a byte for each row and column modulo 4 ---------------


@inline
def load_pairs(p: int) -> Any:
    """128 bytes of 2-bit codes: of columns 0..15, then 16..31, two bits a group of 4 columns."""
    a, b = memory.load_i8x64(p), memory.load_i8x64(p + 64)
    return (
        simd.bits(a, 0, 3),
        simd.bits(a, 2, 3),
        simd.bits(a, 4, 3),
        simd.bits(a, 6, 3),
        simd.bits(b, 0, 3),
        simd.bits(b, 2, 3),
        simd.bits(b, 4, 3),
        simd.bits(b, 6, 3),
    )


@inline
def add_bits(codes: Any, p: int, place: int) -> Any:
    """Set bit `place` of the codes from 64 bytes: bit j is that of columns 4j..4j+3."""
    plane = memory.load_i8x64(p)
    return (
        simd.set_bits(codes[0], simd.bits(plane, 0, 1), place),
        simd.set_bits(codes[1], simd.bits(plane, 1, 1), place),
        simd.set_bits(codes[2], simd.bits(plane, 2, 1), place),
        simd.set_bits(codes[3], simd.bits(plane, 3, 1), place),
        simd.set_bits(codes[4], simd.bits(plane, 4, 1), place),
        simd.set_bits(codes[5], simd.bits(plane, 5, 1), place),
        simd.set_bits(codes[6], simd.bits(plane, 6, 1), place),
        simd.set_bits(codes[7], simd.bits(plane, 7, 1), place),
    )


@inline
def add_pairs(codes: Any, p: int, place: int) -> Any:
    """Set the two bits from `place` on of the codes, from 128 bytes of `load_pairs`."""
    pairs = load_pairs(p)
    return (
        simd.set_bits(codes[0], pairs[0], place),
        simd.set_bits(codes[1], pairs[1], place),
        simd.set_bits(codes[2], pairs[2], place),
        simd.set_bits(codes[3], pairs[3], place),
        simd.set_bits(codes[4], pairs[4], place),
        simd.set_bits(codes[5], pairs[5], place),
        simd.set_bits(codes[6], pairs[6], place),
        simd.set_bits(codes[7], pairs[7], place),
    )


@inline
def bit(p: int, lane: int, column: int) -> Any:
    """One bit of a plane of `add_bits`."""
    return (memory.load_u8(p + lane * 4 + column % 4) >> (column // 4)) & 1


@inline
def pair(p: int, lane: int, column: int) -> Any:
    """One 2-bit code of a plane of `load_pairs`."""
    byte = memory.load_u8(p + column // 16 * 64 + lane * 4 + column % 4)
    return (byte >> (column % 16 // 4 * 2)) & 3


@inline
def half(p: int, lane: int) -> Any:
    """One of 16 f16."""
    return simd.lane_f32(memory.load_f16x16(p), lane)


@inline
def scaled_half(whole: Any, x: int, half: int, fine: int, offset: int) -> Any:
    """A half's integer product times the record's scale, less what an offset of codes adds."""
    excess = simd.splat_f32(float32(0.0))
    if offset != 0:
        excess = simd.mul(half_sum(x, half, fine), simd.splat_f32(float32(-offset)))
    if fine == 0:
        return simd.fma(simd.to_f32(whole), record_scale(x, half), excess)
    product = simd.mul(simd.to_f32(whole), record_scale(x, half))
    return simd.fma(product, simd.splat_f32(float32(1.0 / 128.0)), excess)


@inline
def scaled_halves(
    whole: Any, first: Any, second: Any, x: int, total: Any, fine: int, offset: int
) -> Any:
    """total + products of columns 0..15 by one scale of the rows and of 16..31 by another."""
    left = simd.mul(scaled_half(whole[0], x, 0, fine, offset), first)
    return simd.add(total, simd.fma(scaled_half(whole[1], x, 1, fine, offset), second, left))


# --- Q5_0: 16 f16 scales, nibbles, fifth bits; codes 16 too high ----------------------------------


@inline
def load_q5_0(p: int, i: int) -> Any:
    return add_bits(load_nibbles(p + 32), p + 288, 4), memory.load_f16x16(p)


@inline
def dot_q5_0(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_small(codes, x, fine), scales, x, total, fine, 16)


@inline
def decode_q5_0(p: int, lane: int, column: int) -> Any:
    code = nibble(p + 32, lane, column) + 16 * bit(p + 288, lane, column) - 16
    return half(p, lane) * float32(code)


# --- Q5_1: 16 f16 scales, 16 f16 minima, nibbles, fifth bits --------------------------------------


@inline
def load_q5_1(p: int, i: int) -> Any:
    codes = add_bits(load_nibbles(p + 64), p + 320, 4)
    return codes, memory.load_f16x16(p), memory.load_f16x16(p + 32)


@inline
def decode_q5_1(p: int, lane: int, column: int) -> Any:
    code = nibble(p + 64, lane, column) + 16 * bit(p + 320, lane, column)
    return half(p, lane) * float32(code) + half(p + 32, lane)


# --- IQ4_NL: 16 f16 scales, nibbles that number the entries of a table ----------------------------


@inline
def load_iq4_nl(p: int, i: int) -> Any:
    n = load_nibbles(p + 32)
    codes = (
        simd.nonlinear(n[0]),
        simd.nonlinear(n[1]),
        simd.nonlinear(n[2]),
        simd.nonlinear(n[3]),
        simd.nonlinear(n[4]),
        simd.nonlinear(n[5]),
        simd.nonlinear(n[6]),
        simd.nonlinear(n[7]),
    )
    return codes, memory.load_f16x16(p)


@inline
def dot_iq4_nl(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, scales = weights
    return scaled(dot_large(codes, x, fine), scales, x, total, fine, 128)


@inline
def decode_iq4_nl(p: int, lane: int, column: int) -> Any:
    return half(p, lane) * float32(simd.nonlinear_value(nibble(p + 32, lane, column)))


# --- K types: 256 columns, f16 scales of the rows' small integer scales ---------------------------

HEADER_1, HEADER_2 = 32, 64  # 16 f16 scales, and then 16 f16 scales of minima
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = 160, 224, 288, 352, 416  # bytes of 32 columns


@inline
def minimum_of(p: int, q: int) -> Any:
    """-dmin * m of 16 rows, m being unsigned bytes at q."""
    minus = simd.sub(simd.splat_f32(float32(0.0)), memory.load_f16x16(p + 32))
    return simd.mul(minus, memory.load_u8x16(q))


@inline
def load_q4_k(p: int, i: int) -> Any:
    q = p + HEADER_2 + i * Q4_K
    scales = simd.mul(memory.load_f16x16(p), memory.load_u8x16(q))
    return load_nibbles(q + 32), scales, minimum_of(p, q + 16)


@inline
def load_q5_k(p: int, i: int) -> Any:
    q = p + HEADER_2 + i * Q5_K
    scales = simd.mul(memory.load_f16x16(p), memory.load_u8x16(q))
    return add_bits(load_nibbles(q + 32), q + 288, 4), scales, minimum_of(p, q + 16)


@inline
def decode_q4_k(p: int, lane: int, column: int) -> Any:
    q = p + HEADER_2 + column // 32 * Q4_K
    scale = half(p, lane) * float32(memory.load_u8(q + lane))
    minimum = half(p + 32, lane) * float32(memory.load_u8(q + 16 + lane))
    return scale * float32(nibble(q + 32, lane, column % 32)) - minimum


@inline
def decode_q5_k(p: int, lane: int, column: int) -> Any:
    q = p + HEADER_2 + column // 32 * Q5_K
    scale = half(p, lane) * float32(memory.load_u8(q + lane))
    minimum = half(p + 32, lane) * float32(memory.load_u8(q + 16 + lane))
    code = nibble(q + 32, lane, column % 32) + 16 * bit(q + 288, lane, column % 32)
    return scale * float32(code) - minimum


@inline
def load_q6_k(p: int, i: int) -> Any:
    q = p + HEADER_1 + i * Q6_K
    scales = memory.load_f16x16(p)
    codes = add_pairs(load_nibbles(q + 32), q + 288, 4)
    return (
        codes,
        simd.mul(scales, memory.load_i8x16(q)),
        simd.mul(scales, memory.load_i8x16(q + 16)),
    )


@inline
def dot_q6_k(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, first, second = weights
    return scaled_halves(dot_small(codes, x, fine), first, second, x, total, fine, 32)


@inline
def signed_scale(p: int, q: int, lane: int, column: int) -> Any:
    """d * s of a half block, s being a signed byte."""
    byte = memory.load_u8(q + column // 16 * 16 + lane)
    return half(p, lane) * float32(byte - 256 if byte > 127 else byte)


@inline
def decode_q6_k(p: int, lane: int, column: int) -> Any:
    q, c = p + HEADER_1 + column // 32 * Q6_K, column % 32
    code = nibble(q + 32, lane, c) + 16 * pair(q + 288, lane, c) - 32
    return signed_scale(p, q, lane, c) * float32(code)


@inline
def load_q3_k(p: int, i: int) -> Any:
    q = p + HEADER_1 + i * Q3_K
    scales = memory.load_f16x16(p)
    codes = add_bits(load_pairs(q + 32), q + 160, 2)
    return (
        codes,
        simd.mul(scales, memory.load_i8x16(q)),
        simd.mul(scales, memory.load_i8x16(q + 16)),
    )


@inline
def dot_q3_k(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, first, second = weights
    return scaled_halves(dot_small(codes, x, fine), first, second, x, total, fine, 4)


@inline
def decode_q3_k(p: int, lane: int, column: int) -> Any:
    q, c = p + HEADER_1 + column // 32 * Q3_K, column % 32
    code = pair(q + 32, lane, c) + 4 * bit(q + 160, lane, c) - 4
    return signed_scale(p, q, lane, c) * float32(code)


# Q2_K: a byte holds a half block's scale (low nibble) and minimum (high nibble).
@inline
def load_q2_k(p: int, i: int) -> Any:
    q = p + HEADER_2 + i * Q2_K
    scales = memory.load_f16x16(p)
    minus = simd.sub(simd.splat_f32(float32(0.0)), memory.load_f16x16(p + 32))
    return (
        load_pairs(q + 32),
        simd.mul(scales, memory.load_low_u4x16(q)),
        simd.mul(scales, memory.load_low_u4x16(q + 16)),
        simd.mul(minus, memory.load_high_u4x16(q)),
        simd.mul(minus, memory.load_high_u4x16(q + 16)),
    )


@inline
def dot_q2_k(weights: Any, x: int, total: Any, fine: int) -> Any:
    codes, first, second, least, other_least = weights
    total = scaled_halves(dot_small(codes, x, fine), first, second, x, total, fine, 0)
    total = simd.fma(least, half_sum(x, 0, fine), total)
    return simd.fma(other_least, half_sum(x, 1, fine), total)


@inline
def decode_q2_k(p: int, lane: int, column: int) -> Any:
    q, c = p + HEADER_2 + column // 32 * Q2_K, column % 32
    byte = memory.load_u8(q + c // 16 * 16 + lane)
    minimum = half(p + 32, lane) * float32(byte >> 4)
    return half(p, lane) * float32(byte & 15) * float32(pair(q + 32, lane, c)) - minimum


PIECES = {
    "Q5_0": (load_q5_0, dot_q5_0, decode_q5_0),
    "Q5_1": (load_q5_1, dot_minimum, decode_q5_1),
    "IQ4_NL": (load_iq4_nl, dot_iq4_nl, decode_iq4_nl),
    "Q2_K": (load_q2_k, dot_q2_k, decode_q2_k),
    "Q3_K": (load_q3_k, dot_q3_k, decode_q3_k),
    "Q4_K": (load_q4_k, dot_minimum, decode_q4_k),
    "Q5_K": (load_q5_k, dot_minimum, decode_q5_k),
    "Q6_K": (load_q6_k, dot_q6_k, decode_q6_k),
}
