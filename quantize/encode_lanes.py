"""What encoders compute with: sixteen blocks at once, one in each lane.

Operators on vectors, masks, the reference's ways of rounding, and the moves between rows in memory
and lanes. Nothing here is fused or reordered: a lane computes what a scalar program would.

Knows no block format. Importing this module imports Numba: only the compiler does so.
"""

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba.extending import lower_builtin, type_callable

from edgellama.ggml import IQ4_NL
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.vectors import (
    Vector,
    call,
    f32x16,
    i8x16,
    i16x16,
    i32,
    i32x16,
    i64,
    operation,
    pointer,
    read,
    splat,
    void,
    write,
)

_INT = ir.IntType(32)
_BITS = ir.VectorType(ir.IntType(1), 16)


def _all(value: int) -> Any:
    return ir.Constant(i32x16.llvm, [value] * 16)


# --- operators: x + y, x - y, x * y, x / y of two vectors of one type; | and & of integers --------


def _operator(symbol: Any, whole: str, real: str) -> None:
    """Teach Numba one operator; `whole` and `real` name LLVM's instructions ('' for none)."""

    def result(_context: Any) -> Any:
        def typer(x: Any, y: Any) -> Any:
            known = isinstance(x, Vector) and x == y and (whole if x == i32x16 else real)
            return x if known else None

        return typer

    def lower(_context: Any, b: Any, signature: Any, args: Any) -> Any:
        name = whole if signature.return_type == i32x16 else real
        return getattr(b, name)(*args)

    typing: Any = type_callable  # Numba does not type these
    lowering: Any = lower_builtin
    typing(symbol)(result)
    lowering(symbol, Vector, Vector)(lower)


for _symbol, _whole, _real in (
    (operator.add, "add", "fadd"),
    (operator.sub, "sub", "fsub"),
    (operator.mul, "mul", "fmul"),
    (operator.truediv, "", "fdiv"),
    (operator.or_, "or_", ""),
    (operator.and_, "and_", ""),
):
    _operator(_symbol, _whole, _real)


# --- masks: all bits of a lane, or none -----------------------------------------------------------


@operation(i32x16(f32x16, f32x16))
def less(b: Any, x: Any, y: Any) -> Any:
    return b.sext(b.fcmp_ordered("<", x, y), i32x16.llvm)


@operation(i32x16(f32x16, f32x16))
def equal(b: Any, x: Any, y: Any) -> Any:
    return b.sext(b.fcmp_ordered("==", x, y), i32x16.llvm)


@operation(i32x16(i32x16, i32x16))
def differ(b: Any, x: Any, y: Any) -> Any:
    return b.sext(b.icmp_signed("!=", x, y), i32x16.llvm)


@operation(f32x16(i32x16, f32x16, f32x16))
def choose(b: Any, mask: Any, x: Any, y: Any) -> Any:
    """x where the mask is set, else y."""
    return b.select(b.trunc(mask, _BITS), x, y)


@operation(i32x16(i32x16, i32x16, i32x16))
def choose_int(b: Any, mask: Any, x: Any, y: Any) -> Any:
    return b.select(b.trunc(mask, _BITS), x, y)


@operation(i64(i32x16))
def lanes_set(b: Any, mask: Any) -> Any:
    """Bit i is lane i's."""
    bits = b.bitcast(b.trunc(mask, _BITS), ir.IntType(16))
    return b.zext(bits, ir.IntType(64))


# --- numbers --------------------------------------------------------------------------------------


@operation(i32x16(f32x16))
def nearest(b: Any, x: Any) -> Any:
    """To nearest, ties to even; beyond 2 ** 22, infinite and NaN as the reference has them."""
    shifted = b.fadd(x, ir.Constant(f32x16.llvm, [12582912.0] * 16))  # 1.5 * 2 ** 23
    mantissa = b.and_(b.bitcast(shifted, i32x16.llvm), _all(0x7FFFFF))
    return b.sub(mantissa, _all(0x400000))


@operation(i32x16(f32x16))
def truncated(b: Any, x: Any) -> Any:
    """Toward zero for |x| < 2 ** 23; else 0, the low byte of what x86 makes of such."""
    bits = b.and_(b.bitcast(x, i32x16.llvm), _all(0x7FFFFFFF))
    small = b.icmp_signed("<", bits, _all(0x4B000000))
    return b.fptosi(b.select(small, x, ir.Constant(f32x16.llvm, None)), i32x16.llvm)


@operation(f32x16(f32x16, f32x16))
def with_sign(b: Any, x: Any, y: Any) -> Any:
    """|x| with the sign of y."""
    sign = b.and_(b.bitcast(y, i32x16.llvm), _all(-0x80000000))
    return b.bitcast(b.or_(b.and_(b.bitcast(x, i32x16.llvm), _all(0x7FFFFFFF)), sign), f32x16.llvm)


@operation(f32x16(f32x16))
def negative(b: Any, x: Any) -> Any:
    return b.fsub(ir.Constant(f32x16.llvm, [-0.0] * 16), x)


@operation(f32x16(f32x16))
def root(b: Any, x: Any) -> Any:
    return call(b, "llvm.sqrt.v16f32", f32x16.llvm, x)


@operation(i32x16(i32x16, i32, i32))
def clamp(b: Any, x: Any, low: Any, high: Any) -> Any:
    low, high = splat(b, low), splat(b, high)
    x = b.select(b.icmp_signed("<", x, high), x, high)
    return b.select(b.icmp_signed(">", x, low), x, low)


@operation(i32x16(f32x16))
def half_bits(b: Any, x: Any) -> Any:
    """The bits of x as float16, rounded to nearest even."""
    return b.zext(call(b, "edgellama.to_f16", i16x16.llvm, x), i32x16.llvm)


@operation(f32x16(i32x16))
def half_value(b: Any, bits: Any) -> Any:
    return call(b, "edgellama.from_f16", f32x16.llvm, b.trunc(bits, i16x16.llvm))


@operation(i32x16(f32x16))
def brain_bits(b: Any, x: Any) -> Any:
    """The bits of x as bfloat16, rounded to nearest even; NaN stays NaN."""
    bits, sixteen = b.bitcast(x, i32x16.llvm), _all(16)
    odd = b.and_(b.lshr(bits, sixteen), _all(1))
    rounded = b.lshr(b.add(bits, b.add(odd, _all(0x7FFF))), sixteen)
    quiet = b.or_(b.lshr(bits, sixteen), _all(64))
    return b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)


# --- IQ4_NL: codes number the entries of a table --------------------------------------------------

_MIDDLES = [(low + high) / 2 for low, high in pairwise(IQ4_NL)]


def _by_middles(b: Any, x: Any, results: Sequence[Any]) -> Any:
    """The result of the entry nearest to x, of the higher one in the middle; NaN has the last."""
    found = results[-1]
    for middle, result in reversed(list(zip(_MIDDLES, results[:-1], strict=True))):
        below = b.fcmp_ordered("<", x, ir.Constant(f32x16.llvm, [middle] * 16))
        found = b.select(below, result, found)
    return found


@operation(f32x16(f32x16))
def nearest_entry(b: Any, x: Any) -> Any:
    return _by_middles(b, x, [ir.Constant(f32x16.llvm, [float(v)] * 16) for v in IQ4_NL])


@operation(i32x16(f32x16))
def nearest_code(b: Any, x: Any) -> Any:
    return _by_middles(b, x, [_all(code) for code in range(16)])


# --- memory ---------------------------------------------------------------------------------------


@operation(i32x16(i64))
def load_int(b: Any, address: Any) -> Any:
    return read(b, address, i32x16.llvm, 4)


@operation(void(i64, i32x16))
def store_int(b: Any, address: Any, value: Any) -> None:
    write(b, address, value, 4)


@operation(void(i64, i32x16))
def store_halves(b: Any, address: Any, value: Any) -> None:
    """The low 16 bits of each lane, side by side."""
    write(b, address, b.trunc(value, i16x16.llvm), 2)


@operation(i32x16(i64))
def load_codes(b: Any, address: Any) -> Any:
    """Sixteen signed bytes."""
    return b.sext(read(b, address, i8x16.llvm, 1), i32x16.llvm)


def _scatter(b: Any, address: Any, stride: Any, value: Any, align: int) -> None:
    for lane in range(16):
        place = b.add(address, b.mul(stride, ir.Constant(ir.IntType(64), lane)))
        write(b, place, b.extract_element(value, ir.Constant(_INT, lane)), align)


@operation(void(i64, i64, i32x16))
def put_words(b: Any, address: Any, stride: Any, value: Any) -> None:
    """Lane i's 32 bits to address + i * stride."""
    _scatter(b, address, stride, value, 1)


@operation(void(i64, i64, i32x16))
def put_halves(b: Any, address: Any, stride: Any, value: Any) -> None:
    """Lane i's low 16 bits to address + i * stride."""
    _scatter(b, address, stride, b.trunc(value, i16x16.llvm), 1)


@operation(void(i64, i64, i64))
def turn(b: Any, source: Any, stride: Any, target: Any) -> None:
    """16 numbers of each of 16 rows, `stride` bytes apart, to 16 vectors: lane i is row i's."""
    rows = []
    for lane in range(16):
        place = b.add(source, b.mul(stride, ir.Constant(ir.IntType(64), lane)))
        rows.append(read(b, place, f32x16.llvm, 4))
    for step in (8, 4, 2, 1):  # swap the off-diagonal quarters of ever smaller squares
        kept = [lane for lane in range(16) if not lane & step]
        low = [lane if not lane & step else 16 + lane - step for lane in range(16)]
        high = [lane + step if not lane & step else 16 + lane for lane in range(16)]
        for i in kept:
            x, y = rows[i], rows[i + step]
            rows[i] = b.shuffle_vector(x, y, ir.Constant(i32x16.llvm, low))
            rows[i + step] = b.shuffle_vector(x, y, ir.Constant(i32x16.llvm, high))
    for column, values in enumerate(rows):
        place = b.add(target, ir.Constant(ir.IntType(64), column * 64))
        b.store(values, pointer(b, place, f32x16.llvm)).align = 4


@operation(i64(i64))
def hidden(b: Any, n: Any) -> Any:
    """n, which the compiler cannot know: loops that count so are not unrolled, to compile soon."""
    kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
    return b.call(ir.InlineAsm(kind, "", "=r,0"), [n])


@inline
def turn_all(source: int, stride: int, target: int, n: int) -> None:
    """n numbers of each of 16 rows to n vectors."""
    for i in range(0, n, 16):
        turn(source + i * 4, stride, target + i * 64)
