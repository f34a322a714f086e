"""What kernels do with memory: loads and stores by address, prefetching, atomics and calls.

No arrays, no exceptions, no reference counts: machine code made of these needs nothing of Numba
to run. Knows nothing about models or block formats.
"""

from typing import Any

from llvmlite import ir

from edgellama.runtimes.vectors import (
    call,
    f32,
    f32x16,
    f64,
    i8x16,
    i8x64,
    i16x16,
    i32,
    i32x16,
    i64,
    lanes_of,
    operation,
    pointer,
    read,
    splat,
    void,
    write,
)


@operation(i64(i64))
def load_i64(b: Any, address: Any) -> Any:
    return read(b, address, ir.IntType(64), 8)


@operation(f64(i64))
def load_f64(b: Any, address: Any) -> Any:
    return read(b, address, ir.DoubleType(), 8)


@operation(i32(i64))
def load_i32(b: Any, address: Any) -> Any:
    return read(b, address, ir.IntType(32), 4)


@operation(i64(i64))
def load_u8(b: Any, address: Any) -> Any:
    return b.zext(read(b, address, ir.IntType(8), 1), ir.IntType(64))


@operation(f32(i64))
def load_f32(b: Any, address: Any) -> Any:
    return read(b, address, ir.FloatType(), 4)


@operation(void(i64, f32))
def store_f32(b: Any, address: Any, value: Any) -> None:
    write(b, address, value, 4)


@operation(void(i64, i64))
def store_i64(b: Any, address: Any, value: Any) -> None:
    write(b, address, value, 8)


@operation(void(i64, i32))
def store_i32(b: Any, address: Any, value: Any) -> None:
    write(b, address, value, 4)


@operation(f32x16(i64))
def load_f32x16(b: Any, address: Any) -> Any:
    return read(b, address, f32x16.llvm, 4)


@operation(i8x64(i64))
def load_i8x64(b: Any, address: Any) -> Any:
    return read(b, address, i8x64.llvm, 1)


@operation(f32x16(i64))
def load_f16x16(b: Any, address: Any) -> Any:
    """Sixteen half-precision numbers, widened."""
    halves = read(b, address, i16x16.llvm, 2)
    return call(b, "edgellama.from_f16", f32x16.llvm, halves)


@operation(f32x16(i64))
def load_bf16x16(b: Any, address: Any) -> Any:
    """Sixteen bfloat16 numbers, widened: they are the upper halves of float32."""
    wide = b.zext(read(b, address, i16x16.llvm, 2), i32x16.llvm)
    return b.bitcast(b.shl(wide, ir.Constant(i32x16.llvm, [16] * 16)), f32x16.llvm)


@operation(f32x16(i64))
def load_i8x16(b: Any, address: Any) -> Any:
    """Sixteen signed bytes as float32."""
    return b.sitofp(read(b, address, i8x16.llvm, 1), f32x16.llvm)


@operation(f32x16(i64))
def load_u8x16(b: Any, address: Any) -> Any:
    """Sixteen unsigned bytes as float32."""
    return b.uitofp(read(b, address, i8x16.llvm, 1), f32x16.llvm)


@operation(f32x16(i64))
def load_low_u4x16(b: Any, address: Any) -> Any:
    """The low halves of sixteen bytes as float32."""
    low = b.and_(read(b, address, i8x16.llvm, 1), ir.Constant(i8x16.llvm, [15] * 16))
    return b.uitofp(low, f32x16.llvm)


@operation(f32x16(i64))
def load_high_u4x16(b: Any, address: Any) -> Any:
    """The high halves of sixteen bytes as float32."""
    high = b.lshr(read(b, address, i8x16.llvm, 1), ir.Constant(i8x16.llvm, [4] * 16))
    return b.uitofp(high, f32x16.llvm)


@operation(void(i64, f32x16))
def store_f32x16(b: Any, address: Any, value: Any) -> None:
    write(b, address, value, 4)


@operation(void(i64, f32x16))
def store_low8(b: Any, address: Any, value: Any) -> None:
    write(b, address, lanes_of(b, value, range(8)), 4)


@operation(void(i64, f32x16))
def store_high8(b: Any, address: Any, value: Any) -> None:
    write(b, address, lanes_of(b, value, range(8, 16)), 4)


@operation(void(i64, f32x16))
def store_f16x16(b: Any, address: Any, value: Any) -> None:
    """Sixteen numbers rounded to half precision, to nearest even."""
    write(b, address, call(b, "edgellama.to_f16", i16x16.llvm, value), 2)


@operation(void(i64, f32))
def store_f16(b: Any, address: Any, value: Any) -> None:
    """One number rounded to half precision, to nearest even."""
    halves = call(b, "edgellama.to_f16", i16x16.llvm, splat(b, value))
    write(b, address, b.extract_element(halves, ir.Constant(ir.IntType(32), 0)), 2)


@operation(f32(i64))
def load_f16(b: Any, address: Any) -> Any:
    """One half-precision number, widened."""
    halves = splat(b, read(b, address, ir.IntType(16), 2))
    wide = call(b, "edgellama.from_f16", f32x16.llvm, halves)
    return b.extract_element(wide, ir.Constant(ir.IntType(32), 0))


@operation(void(i64, f32x16, f32x16))
def store_bf16x32(b: Any, address: Any, first: Any, second: Any) -> None:
    """32 numbers rounded to bfloat16, to nearest even."""
    halves = ir.VectorType(ir.IntType(16), 32)
    write(b, address, call(b, "edgellama.to_bf16", halves, first, second), 2)


@operation(f32x16(i64))
def load_even_bf16x16(b: Any, address: Any) -> Any:
    """The first of sixteen pairs of bfloat16 numbers, widened."""
    pairs = read(b, address, i32x16.llvm, 4)
    return b.bitcast(b.shl(pairs, ir.Constant(i32x16.llvm, [16] * 16)), f32x16.llvm)


@operation(f32x16(i64))
def load_odd_bf16x16(b: Any, address: Any) -> Any:
    """The second of sixteen pairs of bfloat16 numbers, widened."""
    pairs = read(b, address, i32x16.llvm, 4)
    return b.bitcast(b.and_(pairs, ir.Constant(i32x16.llvm, [-65536] * 16)), f32x16.llvm)


@operation(f32(i64))
def load_bf16(b: Any, address: Any) -> Any:
    """One bfloat16 number, widened."""
    word = b.zext(read(b, address, ir.IntType(16), 2), ir.IntType(32))
    return b.bitcast(b.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())


@operation(void())
def tile_begin(b: Any) -> None:
    """Set this thread's tile registers up; `tile_end` before the kernel returns."""
    call(b, "edgellama.tile_begin", ir.VoidType())


@operation(void())
def tile_end(b: Any) -> None:
    call(b, "edgellama.tile_end", ir.VoidType())


@operation(void(i64, i64, i64, i64, i64))
def tile_block(b: Any, panel: Any, x: Any, x_step: Any, c: Any, steps: Any) -> None:
    """32 tokens times 32 rows over 32 * steps columns; see `kernels_tiles.plain_block`."""
    call(b, "edgellama.tile_block", ir.VoidType(), panel, x, x_step, c, steps)


@operation(void(i64, i64))
def store_u8(b: Any, address: Any, value: Any) -> None:
    write(b, address, b.trunc(value, ir.IntType(8)), 1)


@operation(void(i64, i32x16))
def store_as_i8x16(b: Any, address: Any, value: Any) -> None:
    """The low byte of each lane."""
    write(b, address, b.trunc(value, i8x16.llvm), 1)


@operation(void(i64))
def prefetch(b: Any, address: Any) -> None:
    """Ask for the cache line at `address`; an address that cannot be read is harmless."""
    flags = [ir.Constant(ir.IntType(32), n) for n in (0, 3, 1)]  # read, keep, data
    line = pointer(b, address, ir.IntType(8))
    call(b, "llvm.prefetch.p0", ir.VoidType(), line, *flags)


@operation(i8x64(i64))
def splat_4bytes(b: Any, address: Any) -> Any:
    """The four bytes at `address`, sixteen times."""
    return b.bitcast(splat(b, read(b, address, ir.IntType(32), 4)), i8x64.llvm)


# --- threads ------------------------------------------------------------------------------------


@operation(i64(i64))
def atomic_load(b: Any, address: Any) -> Any:
    return b.load_atomic(pointer(b, address, ir.IntType(64)), "acquire", 8)


@operation(i64(i64, i64))
def atomic_add(b: Any, address: Any, value: Any) -> Any:
    """The value before the addition."""
    return b.atomic_rmw("add", pointer(b, address, ir.IntType(64)), value, "acq_rel")


@operation(i64(i64, i64))
def atomic_exchange(b: Any, address: Any, value: Any) -> Any:
    return b.atomic_rmw("xchg", pointer(b, address, ir.IntType(64)), value, "acq_rel")


@operation(i64(i64, i64, i64))
def atomic_claim(b: Any, address: Any, expected: Any, value: Any) -> Any:
    """1 if the cell held `expected` and now holds `value`, else 0."""
    cell = pointer(b, address, ir.IntType(64))
    pair = b.cmpxchg(cell, expected, value, "acq_rel", "acquire")
    return b.zext(b.extract_value(pair, 1), ir.IntType(64))


@operation(void())
def pause(b: Any) -> None:
    """Tell the core that this is a wait loop."""
    call(b, "edgellama.pause", ir.VoidType())


@operation(void(i64))
def call_plain(b: Any, function: Any) -> None:
    """Call the C function without arguments at this address."""
    kind = ir.FunctionType(ir.VoidType(), [])
    b.call(b.inttoptr(function, kind.as_pointer()), [])


@operation(void(i64, i64, i64, i64, i64, i64))
def call_kernel(
    b: Any, function: Any, instruction: Any, state: Any, first: Any, last: Any, thread: Any
) -> None:
    """Call the kernel at this address."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
    b.call(b.inttoptr(function, kind.as_pointer()), [instruction, state, first, last, thread])
