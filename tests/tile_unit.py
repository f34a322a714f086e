"""Tile registers for processors without: what they cannot do, a handler of SIGILL does for them.

The kernels of level `amx` run as they are, every instruction of the processor's own but six, each
of which ends in an illegal instruction there. The handler decodes it, carries it out on tiles in
memory and goes on behind it. Sources: Intel's Software Developer's Manual (`tileloadd`,
`tdpbf16ps`… and the VEX prefix); `struct ucontext_t` of Linux on x86-64.

Knows nothing about kernels. Sums are rounded in the manual's order; subnormals are not flushed.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from checked import HERE, compiled
from llvmlite import ir
from numba import float32

from edgellama.runtimes import levels, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.vectors import i64, operation

LEVEL = "avx512vnni"  # what the handler is compiled for
THREADS = 256  # that may use tiles in the life of a process
REGISTERS = 40  # where those of the interrupted code lie in its ucontext, in the order r8…
IP = 16 * 8
KEYS, TILES = 8, 8 + THREADS * 8  # behind a count: who has which set of tiles; the sets
CONFIG, TILE = 64, 1024
SET = CONFIG + 8 * TILE
ILLEGAL = 4  # SIGILL


@operation(i64())
def thread_pointer(b: Any) -> Any:
    """A number that no two living threads share."""
    start = ir.Constant(ir.IntType(64).as_pointer(257), None)  # of what fs points to: LLVM's name
    return b.load(start)


@inline
def own_tiles(room: int) -> Any:
    """This thread's set: its configuration, then eight tiles."""
    mine = thread_pointer()
    for i in range(min(memory.atomic_load(room), THREADS)):
        if memory.load_i64(room + KEYS + i * 8) == mine:
            return room + TILES + i * SET
    i = memory.atomic_add(room, 1)
    if i >= THREADS:
        return 0
    memory.store_i64(room + KEYS + i * 8, mine)
    return room + TILES + i * SET


@inline
def register(registers: int, number: int) -> Any:
    """A general register by the number that instructions give it."""
    place = number - 8  # r8 to r15 come first
    if number < 8:  # then rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp: here by number
        place = 0x89AFBCED >> 4 * number & 15
    return memory.load_i64(registers + place * 8)


@inline
def signed(value: int, bits: int) -> Any:
    return value - ((value >> (bits - 1) & 1) << bits)


@inline
def word(at: int) -> Any:
    """A displacement of four bytes."""
    low = memory.load_u8(at) | memory.load_u8(at + 1) << 8
    return signed(low | memory.load_u8(at + 2) << 16 | memory.load_u8(at + 3) << 24, 32)


@inline
def operand(registers: int, at: int, prefix: int) -> Any:
    """Of the ModRM byte at `at`: the address in memory, the index register and the next byte.

    An operand without an index has 0 for it.
    """
    mode, base, behind, index = memory.load_u8(at) >> 6, memory.load_u8(at) & 7, at + 1, 0
    relative = mode == 0 and base == 5
    if base == 4:
        sib, behind = memory.load_u8(at + 1), at + 2
        number = sib >> 3 & 7 | (~prefix >> 6 & 1) << 3
        if number != 4:  # none
            index = register(registers, number) << (sib >> 6)
        base = sib & 7
    address = register(registers, base | (~prefix >> 5 & 1) << 3)
    if mode == 1:
        return address + signed(memory.load_u8(behind), 8), index, behind + 1
    if mode == 2:
        return address + word(behind), index, behind + 4
    if relative:
        return word(behind) + behind + 4, index, behind + 4
    return address, index, behind  # a base rbp without displacement does not occur here


@inline
def clear(start: int, n_bytes: int) -> None:
    for i in range(0, n_bytes, 8):
        memory.store_i64(start + i, 0)


@inline
def place(tiles: int, tile: int) -> Any:
    return tiles + CONFIG + tile * TILE


@inline
def rows(tiles: int, tile: int) -> Any:
    return memory.load_u8(tiles + 48 + tile)


@inline
def width(tiles: int, tile: int) -> Any:
    """Bytes in a row."""
    return memory.load_u8(tiles + 16 + 2 * tile) | memory.load_u8(tiles + 17 + 2 * tile) << 8


@inline
def configure(tiles: int, source: int) -> None:
    for i in range(0, CONFIG, 8):
        memory.store_i64(tiles + i, memory.load_i64(source + i))
    clear(tiles + CONFIG, 8 * TILE)


@inline
def copy_rows(tiles: int, tile: int, start: int, stride: int, store: int) -> None:
    """Between a tile and memory; bytes and rows beyond the tile's size become 0."""
    inside = place(tiles, tile)
    if not store:
        clear(inside, TILE)
    for row in range(rows(tiles, tile)):
        for i in range(0, width(tiles, tile), 4):
            here, there = inside + row * 64 + i, start + row * stride + i
            if store:
                memory.store_i32(there, memory.load_i32(here))
            else:
                memory.store_i32(here, memory.load_i32(there))


@inline
def multiply(tiles: int, target: int, x: int, w: int) -> None:
    """target += x @ w: pairs of bfloat16 in x's rows meet those in w's columns."""
    c, a, b = place(tiles, target), place(tiles, x), place(tiles, w)
    for row in range(rows(tiles, target)):
        even, odd = simd.splat_f32(float32(0.0)), simd.splat_f32(float32(0.0))
        for k in range(rows(tiles, w)):
            first = simd.splat_f32(memory.load_bf16(a + row * 64 + k * 4))
            second = simd.splat_f32(memory.load_bf16(a + row * 64 + k * 4 + 2))
            even = simd.fma(first, memory.load_even_bf16x16(b + k * 64), even)
            odd = simd.fma(second, memory.load_odd_bf16x16(b + k * 64), odd)
        total = simd.add(memory.load_f32x16(c + row * 64), simd.add(even, odd))
        memory.store_f32x16(c + row * 64, total)


@inline
def fits(tiles: int, target: int, x: int, w: int) -> Any:
    """Whether the processor would take these three tiles."""
    different = target != x and x != w and target != w
    same = rows(tiles, target) == rows(tiles, x) and width(tiles, target) == width(tiles, w)
    return different and same and width(tiles, x) == 4 * rows(tiles, w) > 0


@inline
def carry_out(tiles: int, registers: int, at: int) -> Any:
    """Do the instruction at `at`; its end, or 0 where it is none of the six."""
    prefix, more, code = memory.load_u8(at + 1), memory.load_u8(at + 2), memory.load_u8(at + 3)
    modrm = memory.load_u8(at + 4)
    kind, tile, in_memory = more & 3, modrm >> 3 & 7, modrm < 0xC0
    if memory.load_u8(at) != 0xC4 or prefix & 0x1F != 2 or more & 0x84 or tiles == 0:
        return 0
    source, stride, end = at, 0, at + 5
    if in_memory:
        source, stride, end = operand(registers, at + 4, prefix)
    if code == 0x49 and kind == 0 and in_memory and tile == 0:  # ldtilecfg
        configure(tiles, source)
        return end
    if code == 0x49 and kind == 0 and modrm == 0xC0:  # tilerelease
        clear(tiles, SET)
        return end
    if memory.load_u8(tiles) != 1 or rows(tiles, tile) == 0:  # not configured
        return 0
    if code == 0x49 and kind == 3 and modrm & 0xC7 == 0xC0:  # tilezero
        clear(place(tiles, tile), TILE)
        return end
    if code == 0x4B and kind >= 2 and in_memory and modrm & 7 == 4:  # tilestored, tileloadd
        copy_rows(tiles, tile, source, stride, int(kind == 2))
        return end
    rows_tile = ~(more >> 3) & 15
    if code == 0x5C and kind == 2 and not in_memory and fits(tiles, tile, modrm & 7, rows_tile):
        multiply(tiles, tile, modrm & 7, rows_tile)  # tdpbf16ps
        return end
    return 0


def _handler(room: int) -> Any:
    def tile_unit(signal: int, info: int, context: int) -> None:
        registers = context + REGISTERS
        at = memory.load_i64(registers + IP)
        # What is no tile instruction jumps to 0: the process must not go round in circles.
        memory.store_i64(registers + IP, carry_out(own_tiles(room), registers, at))

    return tile_unit


class _Action(ctypes.Structure):
    """`struct sigaction` of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cache
def _address() -> tuple[int, Any]:
    """The handler's machine code, and what must live as long."""
    room = np.zeros(TILES + THREADS * SET + 64, np.uint8)
    start = room.ctypes.data + -room.ctypes.data % 64
    handler = compiled(LEVEL, "tile_unit", _handler(start))
    return ctypes.cast(handler, ctypes.c_void_p).value or 0, (room, handler)


def missing() -> str | None:
    """Why kernels for tile registers cannot run here, with or without this module's help."""
    if "amx" in HERE:
        return None
    if sys.platform != "linux":
        return "illegal instructions are handled on Linux only"
    lacks = set(levels.LEVELS["amx"].needs) - {"amx-tile", "amx-bf16"} - levels._features()
    return f"this processor lacks {', '.join(sorted(lacks))}" if lacks else None


@contextmanager
def tile_registers() -> Iterator[None]:
    """Within, kernels for tile registers can be run: the processor's own, where it has them."""
    if "amx" in HERE:
        yield
        return
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    action, before = _Action(handler=_address()[0], flags=4), _Action()  # SA_SIGINFO
    assert sigaction(ILLEGAL, ctypes.byref(action), ctypes.byref(before)) == 0
    try:
        yield
    finally:
        assert sigaction(ILLEGAL, ctypes.byref(before), None) == 0
