"""Vector types and operations for Numba kernels.

Sixteen float32, sixteen int32 or sixty-four bytes at a time, whatever the machine: LLVM splits
them where its registers are narrower. The few operations that differ by machine (`dot4`, `fma`,
the half-precision conversions) are calls to functions that `levels.py` defines for each
instruction-set level. Memory is reached by address only: no arrays, no exceptions, no reference
counts, so the machine code needs nothing of Numba to run.

Knows nothing about models or block formats. Importing this module imports Numba: only the
compiler does so.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic, models, register_model

from edgellama.ggml import IQ4_NL

# Numba does not type these; this is the one place where that is papered over.
_intrinsic: Callable[[Any], Any] = _numba_intrinsic
_insert_function: Callable[..., Any] = cgutils.get_or_insert_function
Emit = Callable[..., Any]

_ELEMENTS = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "f32": ir.FloatType(),
    "f64": ir.DoubleType(),
}


class Vector(types.Type):
    """`lanes` elements of one kind, held in registers."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> Any:
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Any) -> None:
        initialize: Any = super().__init__
        initialize(manager, vector, vector.llvm)


i8x16 = Vector("i8", 16)
i8x64 = Vector("i8", 64)
i16x16 = Vector("i16", 16)
i32x16 = Vector("i32", 16)
f32x16 = Vector("f32", 16)
f64x16 = Vector("f64", 16)
_i64, _i32, _f32, _f64, _void = types.int64, types.int32, types.float32, types.float64, types.void


def _operation(signature: Any) -> Callable[[Emit], Any]:
    """Make `emit(builder, *values)` callable from kernels, with this one signature."""

    def make(emit: Emit) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        def typing(_context: Any, *_args: Any) -> Any:
            return signature, codegen

        return _named(typing, emit)

    return make


def _named(typing: Any, emit: Emit) -> Any:
    """`typing` as an intrinsic with the name, documentation and parameters of `emit`."""
    typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
    typing.__signature__ = inspect.signature(emit)  # its first parameter stands for the context
    return _intrinsic(typing)


def _same(emit: Emit) -> Any:
    """An operation whose operands and result all have one vector type, whichever it is."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    def typing(_context: Any, *args: Any) -> Any:
        if not all(isinstance(a, Vector) and a == args[0] for a in args):
            return None
        return args[0](*args), codegen

    return _named(typing, emit)


def _pointer(b: Any, address: Any, element: Any) -> Any:
    return b.inttoptr(address, element.as_pointer())


def _read(b: Any, address: Any, element: Any, align: int) -> Any:
    value = b.load(_pointer(b, address, element))
    value.align = align
    return value


def _write(b: Any, address: Any, value: Any, align: int) -> None:
    b.store(value, _pointer(b, address, value.type)).align = align


def _splat(b: Any, value: Any, lanes: int = 16) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = b.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))


def _call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = _insert_function(b.module, kind, name)
    return b.call(function, args)


# --- memory -------------------------------------------------------------------------------------


@_operation(_i64(_i64))
def load_i64(b: Any, address: Any) -> Any:
    return _read(b, address, ir.IntType(64), 8)


@_operation(_f64(_i64))
def load_f64(b: Any, address: Any) -> Any:
    return _read(b, address, ir.DoubleType(), 8)


@_operation(_i32(_i64))
def load_i32(b: Any, address: Any) -> Any:
    return _read(b, address, ir.IntType(32), 4)


@_operation(_i64(_i64))
def load_u8(b: Any, address: Any) -> Any:
    return b.zext(_read(b, address, ir.IntType(8), 1), ir.IntType(64))


@_operation(_f32(_i64))
def load_f32(b: Any, address: Any) -> Any:
    return _read(b, address, ir.FloatType(), 4)


@_operation(_void(_i64, _f32))
def store_f32(b: Any, address: Any, value: Any) -> None:
    _write(b, address, value, 4)


@_operation(_void(_i64, _i32))
def store_i32(b: Any, address: Any, value: Any) -> None:
    _write(b, address, value, 4)


@_operation(f32x16(_i64))
def load_f32x16(b: Any, address: Any) -> Any:
    return _read(b, address, f32x16.llvm, 4)


@_operation(i8x64(_i64))
def load_i8x64(b: Any, address: Any) -> Any:
    return _read(b, address, i8x64.llvm, 1)


@_operation(f32x16(_i64))
def load_f16x16(b: Any, address: Any) -> Any:
    """Sixteen half-precision numbers, widened."""
    halves = _read(b, address, i16x16.llvm, 2)
    return _call(b, "edgellama.from_f16", f32x16.llvm, halves)


@_operation(f32x16(_i64))
def load_bf16x16(b: Any, address: Any) -> Any:
    """Sixteen bfloat16 numbers, widened: they are the upper halves of float32."""
    wide = b.zext(_read(b, address, i16x16.llvm, 2), i32x16.llvm)
    return b.bitcast(b.shl(wide, ir.Constant(i32x16.llvm, [16] * 16)), f32x16.llvm)


@_operation(f32x16(_i64))
def load_i8x16(b: Any, address: Any) -> Any:
    """Sixteen signed bytes as float32."""
    return b.sitofp(_read(b, address, i8x16.llvm, 1), f32x16.llvm)


@_operation(f32x16(_i64))
def load_u8x16(b: Any, address: Any) -> Any:
    """Sixteen unsigned bytes as float32."""
    return b.uitofp(_read(b, address, i8x16.llvm, 1), f32x16.llvm)


@_operation(f32x16(_i64))
def load_low_u4x16(b: Any, address: Any) -> Any:
    """The low halves of sixteen bytes as float32."""
    low = b.and_(_read(b, address, i8x16.llvm, 1), ir.Constant(i8x16.llvm, [15] * 16))
    return b.uitofp(low, f32x16.llvm)


@_operation(f32x16(_i64))
def load_high_u4x16(b: Any, address: Any) -> Any:
    """The high halves of sixteen bytes as float32."""
    high = b.lshr(_read(b, address, i8x16.llvm, 1), ir.Constant(i8x16.llvm, [4] * 16))
    return b.uitofp(high, f32x16.llvm)


@_operation(_void(_i64, f32x16))
def store_f32x16(b: Any, address: Any, value: Any) -> None:
    _write(b, address, value, 4)


def _lanes(b: Any, value: Any, lanes: range) -> Any:
    index = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return b.shuffle_vector(value, value, index)


@_operation(_void(_i64, f32x16))
def store_low8(b: Any, address: Any, value: Any) -> None:
    _write(b, address, _lanes(b, value, range(8)), 4)


@_operation(_void(_i64, f32x16))
def store_high8(b: Any, address: Any, value: Any) -> None:
    _write(b, address, _lanes(b, value, range(8, 16)), 4)


@_operation(_void(_i64, f32x16))
def store_f16x16(b: Any, address: Any, value: Any) -> None:
    """Sixteen numbers rounded to half precision, to nearest even."""
    _write(b, address, _call(b, "edgellama.to_f16", i16x16.llvm, value), 2)


@_operation(_void(_i64, _f32))
def store_f16(b: Any, address: Any, value: Any) -> None:
    """One number rounded to half precision, to nearest even."""
    halves = _call(b, "edgellama.to_f16", i16x16.llvm, _splat(b, value))
    _write(b, address, b.extract_element(halves, ir.Constant(ir.IntType(32), 0)), 2)


@_operation(_void(_i64, i32x16))
def store_as_i8x16(b: Any, address: Any, value: Any) -> None:
    """The low byte of each lane."""
    _write(b, address, b.trunc(value, i8x16.llvm), 1)


@_operation(_void(_i64))
def prefetch(b: Any, address: Any) -> None:
    """Ask for the cache line at `address`; an address that cannot be read is harmless."""
    flags = [ir.Constant(ir.IntType(32), n) for n in (0, 3, 1)]  # read, keep, data
    pointer = _pointer(b, address, ir.IntType(8))
    _call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


# --- lanes --------------------------------------------------------------------------------------


@_operation(f32x16(_f32))
def splat_f32(b: Any, value: Any) -> Any:
    return _splat(b, value)


@_operation(i32x16(_i32))
def splat_i32(b: Any, value: Any) -> Any:
    return _splat(b, value)


@_operation(i8x64(_i64))
def splat_4bytes(b: Any, address: Any) -> Any:
    """The four bytes at `address`, sixteen times."""
    return b.bitcast(_splat(b, _read(b, address, ir.IntType(32), 4)), i8x64.llvm)


@_operation(_f32(f32x16, _i64))
def lane_f32(b: Any, value: Any, index: Any) -> Any:
    return b.extract_element(value, index)


@_operation(i32x16())
def lane_numbers(b: Any) -> Any:
    return ir.Constant(i32x16.llvm, list(range(16)))


@_operation(f32x16(i32x16, _i32, _i32, f32x16))
def keep_lanes(b: Any, index: Any, low: Any, high: Any, value: Any) -> Any:
    """`value` where low <= index < high, minus infinity elsewhere."""
    inside = b.and_(
        b.icmp_signed(">=", index, _splat(b, low)), b.icmp_signed("<", index, _splat(b, high))
    )
    return b.select(inside, value, ir.Constant(f32x16.llvm, [float("-inf")] * 16))


def _fold(b: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce 16 lanes in one fixed order: 8 with 8, 4 with 4, 2 with 2, 1 with 1."""
    lanes = 16
    while lanes > 1:
        half = lanes // 2
        low, high = _lanes(b, value, range(half)), _lanes(b, value, range(half, lanes))
        value, lanes = combine(low, high), half
    return b.extract_element(value, ir.Constant(ir.IntType(32), 0))


@_operation(_f32(f32x16))
def sum_f32(b: Any, value: Any) -> Any:
    return _fold(b, value, b.fadd)


@_operation(_f64(f64x16))
def sum_f64(b: Any, value: Any) -> Any:
    return _fold(b, value, b.fadd)


@_operation(_i32(i32x16))
def sum_i32(b: Any, value: Any) -> Any:
    return _fold(b, value, b.add)


@_operation(_f32(f32x16))
def max_f32(b: Any, value: Any) -> Any:
    """The largest lane; NaN if any lane is NaN."""
    return _fold(b, value, lambda low, high: _maximum(b, low, high))


# --- arithmetic ---------------------------------------------------------------------------------


@_same
def add(b: Any, x: Any, y: Any) -> Any:
    return b.add(x, y) if isinstance(x.type.element, ir.IntType) else b.fadd(x, y)


@_same
def sub(b: Any, x: Any, y: Any) -> Any:
    return b.sub(x, y) if isinstance(x.type.element, ir.IntType) else b.fsub(x, y)


@_same
def mul(b: Any, x: Any, y: Any) -> Any:
    return b.mul(x, y) if isinstance(x.type.element, ir.IntType) else b.fmul(x, y)


@_same
def div(b: Any, x: Any, y: Any) -> Any:
    return b.fdiv(x, y)


@_operation(f32x16(f32x16, f32x16, f32x16))
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z; rounded once, except at level `generic`."""
    return _call(b, "edgellama.fma", f32x16.llvm, x, y, z)


def _maximum(b: Any, x: Any, y: Any) -> Any:
    """Lane by lane; NaN wins, so that it is never lost on the way."""
    x_wins = b.fcmp_unordered(">", x, y)  # true too when either is NaN
    larger = b.select(x_wins, x, y)
    return b.select(b.fcmp_unordered("uno", y, y), y, larger)


@_operation(f32x16(f32x16, f32x16))
def maximum(b: Any, x: Any, y: Any) -> Any:
    return _maximum(b, x, y)


@_operation(f32x16(f32x16))
def absolute(b: Any, x: Any) -> Any:
    bits = b.bitcast(x, i32x16.llvm)
    return b.bitcast(b.and_(bits, ir.Constant(i32x16.llvm, [0x7FFFFFFF] * 16)), f32x16.llvm)


@_operation(f64x16(f32x16))
def widen(b: Any, x: Any) -> Any:
    return b.fpext(x, f64x16.llvm)


@_operation(f32x16(i32x16))
def to_f32(b: Any, x: Any) -> Any:
    return b.sitofp(x, f32x16.llvm)


@_operation(i32x16(f32x16))
def round_i32(b: Any, x: Any) -> Any:
    """To nearest, ties to even, for |x| < 2 ** 22; NaN gives 0 and larger values saturate.

    Adding 1.5 * 2 ** 23 leaves no bits for a fraction; a baseline CPU has no instruction for it.
    """
    magic = ir.Constant(f32x16.llvm, [12582912.0] * 16)
    whole = b.fsub(b.fadd(x, magic), magic)
    return _call(b, "llvm.fptosi.sat.v16i32.v16f32", i32x16.llvm, whole)


@_operation(f32x16(i32x16))
def power_of_two(b: Any, n: Any) -> Any:
    """2.0 ** n for n in -126..127, by writing the exponent bits."""
    biased = b.add(n, ir.Constant(i32x16.llvm, [127] * 16))
    return b.bitcast(b.shl(biased, ir.Constant(i32x16.llvm, [23] * 16)), f32x16.llvm)


@_operation(i32x16(i32x16, _i64))
def shift_right(b: Any, x: Any, n: Any) -> Any:
    """x / 2 ** n, rounded down."""
    return b.ashr(x, _splat(b, b.trunc(n, ir.IntType(32))))


@_operation(i32x16(i32x16, _i64))
def shift_left(b: Any, x: Any, n: Any) -> Any:
    return b.shl(x, _splat(b, b.trunc(n, ir.IntType(32))))


@_operation(_f64(_f64))
def sqrt_f64(b: Any, x: Any) -> Any:
    return _call(b, "llvm.sqrt.f64", ir.DoubleType(), x)


@_operation(i8x64(i8x64))
def low_nibbles(b: Any, x: Any) -> Any:
    return b.and_(x, ir.Constant(i8x64.llvm, [15] * 64))


@_operation(i8x64(i8x64))
def high_nibbles(b: Any, x: Any) -> Any:
    return b.lshr(x, ir.Constant(i8x64.llvm, [4] * 64))


@_operation(i8x64(i8x64, _i64, _i64))
def bits(b: Any, x: Any, start: Any, mask: Any) -> Any:
    """(x >> start) & mask, byte by byte."""
    byte = ir.IntType(8)
    shifted = b.lshr(x, _splat(b, b.trunc(start, byte), 64))
    return b.and_(shifted, _splat(b, b.trunc(mask, byte), 64))


@_operation(i8x64(i8x64, i8x64, _i64))
def set_bits(b: Any, x: Any, y: Any, start: Any) -> Any:
    """x | (y << start), byte by byte."""
    return b.or_(x, b.shl(y, _splat(b, b.trunc(start, ir.IntType(8)), 64)))


@_operation(i8x64(i8x64))
def nonlinear(b: Any, x: Any) -> Any:
    """Entry x of IQ4_NL's table of 16 signed bytes, plus 128 to be unsigned; x is 0..15."""
    table = ir.Constant(i8x16.llvm, [entry + 128 for entry in IQ4_NL])
    return _call(b, "edgellama.lookup", i8x64.llvm, table, x)


@_operation(_i64(_i64))
def nonlinear_value(b: Any, x: Any) -> Any:
    """Entry x of IQ4_NL's table."""
    table = ir.Constant(ir.VectorType(ir.IntType(8), 16), list(IQ4_NL))
    return b.sext(b.extract_element(table, x), ir.IntType(64))


@_operation(i32x16(i32x16, i8x64, i8x64))
def dot4(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total + the sum of each lane's four products, unsigned byte by signed byte; exact."""
    return _call(b, "edgellama.dot4", i32x16.llvm, total, unsigned, signed)


@_operation(i32x16(i32x16, i8x64, i8x64))
def dot4_small(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """`dot4` for unsigned bytes up to 127, where pairs of products fit 16 bits."""
    return _call(b, "edgellama.dot4_small", i32x16.llvm, total, unsigned, signed)


# --- threads ------------------------------------------------------------------------------------


@_operation(_i64(_i64))
def atomic_load(b: Any, address: Any) -> Any:
    return b.load_atomic(_pointer(b, address, ir.IntType(64)), "acquire", 8)


@_operation(_void(_i64, _i64))
def atomic_store(b: Any, address: Any, value: Any) -> None:
    b.store_atomic(value, _pointer(b, address, ir.IntType(64)), "release", 8)


@_operation(_i64(_i64, _i64))
def atomic_add(b: Any, address: Any, value: Any) -> Any:
    """The value before the addition."""
    return b.atomic_rmw("add", _pointer(b, address, ir.IntType(64)), value, "acq_rel")


@_operation(_i64(_i64, _i64))
def atomic_exchange(b: Any, address: Any, value: Any) -> Any:
    return b.atomic_rmw("xchg", _pointer(b, address, ir.IntType(64)), value, "acq_rel")


@_operation(_i64(_i64, _i64, _i64))
def atomic_claim(b: Any, address: Any, expected: Any, value: Any) -> Any:
    """1 if the cell held `expected` and now holds `value`, else 0."""
    pointer = _pointer(b, address, ir.IntType(64))
    pair = b.cmpxchg(pointer, expected, value, "acq_rel", "acquire")
    return b.zext(b.extract_value(pair, 1), ir.IntType(64))


@_operation(_void())
def pause(b: Any) -> None:
    """Tell the core that this is a wait loop."""
    _call(b, "edgellama.pause", ir.VoidType())


@_operation(_void(_i64))
def call_plain(b: Any, function: Any) -> None:
    """Call the C function without arguments at this address."""
    kind = ir.FunctionType(ir.VoidType(), [])
    b.call(b.inttoptr(function, kind.as_pointer()), [])


@_operation(_void(_i64, _i64, _i64, _i64, _i64, _i64))
def call_kernel(
    b: Any, function: Any, instruction: Any, state: Any, first: Any, last: Any, thread: Any
) -> None:
    """Call the kernel at this address."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
    b.call(b.inttoptr(function, kind.as_pointer()), [instruction, state, first, last, thread])
