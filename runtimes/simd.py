"""What kernels compute with: lanes, and arithmetic on sixteen numbers or 64 bytes at a time.

The same on every machine: LLVM splits vectors where registers are narrower. The few operations
that differ (`dot4`, `fma`, half precision, a table) are calls to functions that
`level_sources.py` defines for each instruction-set level.

Knows nothing about models or block formats.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from edgellama.ggml import IQ4_NL
from edgellama.runtimes.vectors import (
    call,
    f32,
    f32x16,
    f64,
    f64x16,
    i8x16,
    i8x64,
    i32,
    i32x16,
    i64,
    lanes_of,
    operation,
    same,
    splat,
)

# --- lanes --------------------------------------------------------------------------------------


@operation(f32x16(f32))
def splat_f32(b: Any, value: Any) -> Any:
    return splat(b, value)


@operation(i32x16(i32))
def splat_i32(b: Any, value: Any) -> Any:
    return splat(b, value)


@operation(f32(f32x16, i64))
def lane_f32(b: Any, value: Any, index: Any) -> Any:
    return b.extract_element(value, index)


@operation(i32x16())
def lane_numbers(b: Any) -> Any:
    return ir.Constant(i32x16.llvm, list(range(16)))


@operation(f32x16(i32x16, i32, i32, f32x16))
def keep_lanes(b: Any, index: Any, low: Any, high: Any, value: Any) -> Any:
    """`value` where low <= index < high, minus infinity elsewhere."""
    inside = b.and_(
        b.icmp_signed(">=", index, splat(b, low)), b.icmp_signed("<", index, splat(b, high))
    )
    return b.select(inside, value, ir.Constant(f32x16.llvm, [float("-inf")] * 16))


def _fold(b: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce 16 lanes in one fixed order: 8 with 8, 4 with 4, 2 with 2, 1 with 1."""
    lanes = 16
    while lanes > 1:
        half = lanes // 2
        low, high = lanes_of(b, value, range(half)), lanes_of(b, value, range(half, lanes))
        value, lanes = combine(low, high), half
    return b.extract_element(value, ir.Constant(ir.IntType(32), 0))


@operation(f32(f32x16))
def sum_f32(b: Any, value: Any) -> Any:
    return _fold(b, value, b.fadd)


@operation(f64(f64x16))
def sum_f64(b: Any, value: Any) -> Any:
    return _fold(b, value, b.fadd)


@operation(i32(i32x16))
def sum_i32(b: Any, value: Any) -> Any:
    return _fold(b, value, b.add)


@operation(f32(f32x16))
def max_f32(b: Any, value: Any) -> Any:
    """The largest lane; NaN if any lane is NaN."""
    return _fold(b, value, lambda low, high: _maximum(b, low, high))


# --- arithmetic ---------------------------------------------------------------------------------


@same
def add(b: Any, x: Any, y: Any) -> Any:
    return b.add(x, y) if isinstance(x.type.element, ir.IntType) else b.fadd(x, y)


@same
def sub(b: Any, x: Any, y: Any) -> Any:
    return b.sub(x, y) if isinstance(x.type.element, ir.IntType) else b.fsub(x, y)


@same
def mul(b: Any, x: Any, y: Any) -> Any:
    return b.mul(x, y) if isinstance(x.type.element, ir.IntType) else b.fmul(x, y)


@same
def div(b: Any, x: Any, y: Any) -> Any:
    return b.fdiv(x, y)


@operation(f32x16(f32x16, f32x16, f32x16))
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z; rounded once, except at level `generic`."""
    return call(b, "edgellama.fma", f32x16.llvm, x, y, z)


def _maximum(b: Any, x: Any, y: Any) -> Any:
    """Lane by lane; NaN wins, so that it is never lost on the way."""
    x_wins = b.fcmp_unordered(">", x, y)  # true too when either is NaN
    larger = b.select(x_wins, x, y)
    return b.select(b.fcmp_unordered("uno", y, y), y, larger)


@operation(f32x16(f32x16, f32x16))
def maximum(b: Any, x: Any, y: Any) -> Any:
    return _maximum(b, x, y)


@operation(f32x16(f32x16, f32))
def at_least(b: Any, x: Any, least: Any) -> Any:
    """The larger of the two; NaN stays."""
    bound = splat(b, least)
    return b.select(b.fcmp_ordered("<", x, bound), bound, x)


@operation(i64(f32x16, f32))
def any_above(b: Any, x: Any, bound: Any) -> Any:
    """1 if a lane is larger, or NaN; else 0."""
    found = b.bitcast(b.fcmp_unordered(">", x, splat(b, bound)), ir.IntType(16))
    return b.zext(b.icmp_unsigned("!=", found, ir.Constant(ir.IntType(16), 0)), ir.IntType(64))


@operation(f32x16(f32x16))
def absolute(b: Any, x: Any) -> Any:
    bits = b.bitcast(x, i32x16.llvm)
    return b.bitcast(b.and_(bits, ir.Constant(i32x16.llvm, [0x7FFFFFFF] * 16)), f32x16.llvm)


@operation(f64x16(f32x16))
def widen(b: Any, x: Any) -> Any:
    return b.fpext(x, f64x16.llvm)


@operation(f32x16(i32x16))
def to_f32(b: Any, x: Any) -> Any:
    return b.sitofp(x, f32x16.llvm)


@operation(i32x16(f32x16))
def round_i32(b: Any, x: Any) -> Any:
    """To nearest, ties to even, for |x| < 2 ** 22; NaN gives 0 and larger values saturate.

    Adding 1.5 * 2 ** 23 leaves no bits for a fraction; a baseline CPU has no instruction for it.
    """
    magic = ir.Constant(f32x16.llvm, [12582912.0] * 16)
    whole = b.fsub(b.fadd(x, magic), magic)
    return call(b, "llvm.fptosi.sat.v16i32.v16f32", i32x16.llvm, whole)


def _exponent(b: Any, n: Any) -> Any:
    """2.0 ** n by writing the exponent bits."""
    biased = b.add(n, ir.Constant(i32x16.llvm, [127] * 16))
    return b.bitcast(b.shl(biased, ir.Constant(i32x16.llvm, [23] * 16)), f32x16.llvm)


@operation(f32x16(i32x16))
def power_of_two(b: Any, n: Any) -> Any:
    """2.0 ** n for n in -126..127."""
    return _exponent(b, n)


@operation(f32x16(f32x16))
def power_of_shifted(b: Any, x: Any) -> Any:
    """2.0 ** n for n in -127..127, given n + 1.5 * 2 ** 23, whose low bits are n's; of -127: 0."""
    return _exponent(b, b.bitcast(x, i32x16.llvm))


@operation(i32x16(i32x16, i64))
def shift_right(b: Any, x: Any, n: Any) -> Any:
    """x / 2 ** n, rounded down."""
    return b.ashr(x, splat(b, b.trunc(n, ir.IntType(32))))


@operation(i32x16(i32x16, i64))
def shift_left(b: Any, x: Any, n: Any) -> Any:
    return b.shl(x, splat(b, b.trunc(n, ir.IntType(32))))


@operation(f64(f64))
def sqrt_f64(b: Any, x: Any) -> Any:
    return call(b, "llvm.sqrt.f64", ir.DoubleType(), x)


@operation(i8x64(i8x64))
def low_nibbles(b: Any, x: Any) -> Any:
    return b.and_(x, ir.Constant(i8x64.llvm, [15] * 64))


@operation(i8x64(i8x64))
def high_nibbles(b: Any, x: Any) -> Any:
    return b.lshr(x, ir.Constant(i8x64.llvm, [4] * 64))


@operation(i8x64(i8x64, i64, i64))
def bits(b: Any, x: Any, start: Any, mask: Any) -> Any:
    """(x >> start) & mask, byte by byte."""
    byte = ir.IntType(8)
    shifted = b.lshr(x, splat(b, b.trunc(start, byte), 64))
    return b.and_(shifted, splat(b, b.trunc(mask, byte), 64))


@operation(i8x64(i8x64, i8x64, i64))
def set_bits(b: Any, x: Any, y: Any, start: Any) -> Any:
    """x | (y << start), byte by byte."""
    return b.or_(x, b.shl(y, splat(b, b.trunc(start, ir.IntType(8)), 64)))


@operation(i8x64(i8x64))
def nonlinear(b: Any, x: Any) -> Any:
    """Entry x of IQ4_NL's table of 16 signed bytes, plus 128 to be unsigned; x is 0..15."""
    table = ir.Constant(i8x16.llvm, [entry + 128 for entry in IQ4_NL])
    return call(b, "edgellama.lookup", i8x64.llvm, table, x)


@operation(i64(i64))
def nonlinear_value(b: Any, x: Any) -> Any:
    """Entry x of IQ4_NL's table."""
    table = ir.Constant(ir.VectorType(ir.IntType(8), 16), list(IQ4_NL))
    return b.sext(b.extract_element(table, x), ir.IntType(64))


@operation(f32x16(i8x64, i64))
def byte_of_lanes(b: Any, x: Any, index: Any) -> Any:
    """Unsigned byte `index` of each lane's four."""
    lanes = b.bitcast(x, i32x16.llvm)
    eight = ir.Constant(ir.IntType(32), 8)
    shifted = b.lshr(lanes, splat(b, b.mul(b.trunc(index, ir.IntType(32)), eight)))
    return b.uitofp(b.and_(shifted, ir.Constant(i32x16.llvm, [255] * 16)), f32x16.llvm)


@operation(f32x16(f32x16, f32x16))
def zip_low(b: Any, x: Any, y: Any) -> Any:
    """x0 y0 x1 y1 … x7 y7."""
    return _zipped(b, x, y, 0)


@operation(f32x16(f32x16, f32x16))
def zip_high(b: Any, x: Any, y: Any) -> Any:
    """x8 y8 x9 y9 … x15 y15."""
    return _zipped(b, x, y, 8)


def _zipped(b: Any, x: Any, y: Any, start: int) -> Any:
    lanes = [lane for i in range(start, start + 8) for lane in (i, 16 + i)]
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), 16), lanes))


@operation(i32x16(i32x16, i8x64, i8x64))
def dot4(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total + the sum of each lane's four products, unsigned byte by signed byte; exact."""
    return call(b, "edgellama.dot4", i32x16.llvm, total, unsigned, signed)


@operation(i32x16(i32x16, i8x64, i8x64))
def dot4_small(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """`dot4` for unsigned bytes up to 127, where pairs of products fit 16 bits."""
    return call(b, "edgellama.dot4_small", i32x16.llvm, total, unsigned, signed)
