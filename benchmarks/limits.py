"""What this machine can give at most: bytes read per second, and integer products per second.

    python benchmarks/limits.py [--threads N] [--rounds N]

Read bandwidth: all threads add up a buffer many times the size of the last cache. Products: all
threads run `simd.dot4_small`, what integer kernels are made of, on operands in the first
cache and sums in registers; four multiplications and four additions a lane. Where a level has a
unit for tiles of matrices, its products count instead if they are more. All kernels go through the
project's own compiler, at the instruction-set level named. Knows nothing about models.
"""

import argparse
import ctypes
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from edgellama.machine import available_memory, usable_cores
from edgellama.measure import PAUSE, Spread, in_turns
from edgellama.runtimes import levels, memory, simd
from edgellama.runtimes.compiler import object_code

AHEAD = (0, 1024, 2304, 4096)  # bytes between what is read and what is prefetched; the best counts
LEAST_BUFFER = 2**30
LINE, OPERANDS = 64, 2**15  # bytes; operands of the products stay in the first cache
SECONDS = 0.03  # a measurement lasts at least about this long
STEPS = 8  # of 32 columns, in a product of tiles


dot = simd.dot4_small


def read(address: int, n_bytes: int, ahead: int, out: int) -> None:
    """Add up float32 from `n_bytes`, a multiple of 256, of memory."""
    a = b = c = d = memory.load_f32x16(out)
    for at in range(address, address + n_bytes, 256):
        for line in range(0, 256, LINE):
            memory.prefetch(at + ahead + line)
        a = simd.add(a, memory.load_f32x16(at))
        b = simd.add(b, memory.load_f32x16(at + 64))
        c = simd.add(c, memory.load_f32x16(at + 128))
        d = simd.add(d, memory.load_f32x16(at + 192))
    memory.store_f32x16(out, simd.add(simd.add(a, b), simd.add(c, d)))


def wide_dots(address: int, turns: int, out: int) -> None:
    """Three vectors times four, `turns` times: twelve sums that wait for nothing but themselves."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = simd.splat_i32(0)
    for turn in range(turns):
        at = address + (turn * 512) % 7680
        a, b, c = memory.load_i8x64(at), memory.load_i8x64(at + 64), memory.load_i8x64(at + 128)
        x = memory.load_i8x64(at + 192)
        a0, b0, c0 = dot(a0, a, x), dot(b0, b, x), dot(c0, c, x)
        x = memory.load_i8x64(at + 256)
        a1, b1, c1 = dot(a1, a, x), dot(b1, b, x), dot(c1, c, x)
        x = memory.load_i8x64(at + 320)
        a2, b2, c2 = dot(a2, a, x), dot(b2, b, x), dot(c2, c, x)
        x = memory.load_i8x64(at + 384)
        a3, b3, c3 = dot(a3, a, x), dot(b3, b, x), dot(c3, c, x)
    a0, b0, c0 = simd.add(a0, a1), simd.add(b0, b1), simd.add(c0, c1)
    a2, b2, c2 = simd.add(a2, a3), simd.add(b2, b3), simd.add(c2, c3)
    total = simd.add(simd.add(simd.add(a0, b0), simd.add(a2, b2)), simd.add(c0, c2))
    memory.store_f32x16(out, simd.to_f32(total))


def narrow_dots(address: int, turns: int, out: int) -> None:
    """Two vectors times two, for sixteen registers of half the width; three times a turn."""
    a0 = a1 = b0 = b1 = simd.splat_i32(0)
    for turn in range(turns):
        at = address + (turn * 512) % 7680
        for part in range(at, at + 384, 128):
            a, b = memory.load_i8x64(part), memory.load_i8x64(part + 64)
            x, y = memory.load_i8x64(part + 128), memory.load_i8x64(part + 192)
            a0, b0 = dot(a0, a, x), dot(b0, b, x)
            a1, b1 = dot(a1, a, y), dot(b1, b, y)
    total = simd.add(simd.add(a0, a1), simd.add(b0, b1))
    memory.store_f32x16(out, simd.to_f32(total))


def tiles(address: int, turns: int, out: int) -> None:
    """32 tokens times 32 rows in bfloat16, `turns` times; see `kernels_tiles.plain_block`."""
    memory.tile_begin()
    for _turn in range(turns):
        memory.tile_block(address, address + STEPS * 2048, 2048, out, STEPS)
    memory.tile_end()


Kernel = Callable[..., None]
OPERATIONS = {  # multiplications and additions in one turn
    wide_dots: 12 * 64 * 2,
    narrow_dots: 12 * 64 * 2,
    tiles: 32 * 32 * STEPS * 32 * 2,
}
_engines: list[Any] = []  # they own the machine code


@cache
def compiled(kernel: Kernel, level: str) -> Kernel:
    """A kernel as a Python callable that lets go of the interpreter's lock."""
    n = kernel.__code__.co_argcount
    code = object_code(kernel.__name__, kernel, levels.LEVELS[level])
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(kernel.__name__)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * n)(address)


def last_cache_bytes() -> int | None:
    """The size of the largest cache; None where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * (2**10 if match[2] == "K" else 2**20))
    return max(sizes, default=None)


class Limits:
    """Buffers and kernels, ready to measure at any moment. `levels_` are measured for products."""

    def __init__(self, threads: int, levels_: tuple[str, ...], n_bytes: int | None = None) -> None:
        size = n_bytes or max(LEAST_BUFFER, 8 * (last_cache_bytes() or 0))
        room = available_memory()
        size = size if room is None else min(size, room // 4)
        self.threads, self.levels = threads, levels_
        whole = np.ones(size, np.uint8)  # touched: every page has memory of its own
        skip = -whole.ctypes.data % LINE
        self.buffer = whole[skip : skip + (size - LINE) // (256 * threads) * 256 * threads]
        self.operands = np.random.default_rng(0).integers(0, 128, (threads, OPERANDS), np.uint8)
        self.out = np.zeros((threads, 1024), np.float32)  # pages apart
        self.ahead = max(AHEAD, key=self._read)
        self.best = {level: self._best_dots(level) for level in levels_}

    def read(self) -> float:
        """GB/s by all threads."""
        return self._read(self.ahead)

    def dots(self, level: str) -> float:
        """TOP/s by all threads."""
        return self._rate(level, *self.best[level])

    def step(self) -> dict[str, float | None]:
        """Everything once: `read`, and `dots` by level."""
        time.sleep(PAUSE)
        return {"read": self.read()} | {f"dots {name}": self.dots(name) for name in self.levels}

    def _read(self, ahead: int) -> float:
        share, start = len(self.buffer) // self.threads, self.buffer.ctypes.data
        kernel, out = compiled(read, self.levels[0]), self.out
        work = [(start + i * share, share, ahead, out[i].ctypes.data) for i in range(self.threads)]
        return len(self.buffer) / _seconds(kernel, work) / 1e9

    def _best_dots(self, level: str) -> tuple[Kernel, int]:
        """The fastest kernel, and turns enough to measure."""
        turns, kernels = 5000, [wide_dots, narrow_dots]
        if levels.LEVELS[level].tiles:
            kernels.append(tiles)
        rates = {k: max(self._rate(level, k, turns) for _ in range(3)) for k in kernels}
        best = max(rates, key=rates.__getitem__)
        seconds = turns * self.threads * OPERATIONS[best] / rates[best] / 1e12
        return best, max(1000, int(turns * SECONDS / seconds))

    def _rate(self, level: str, kernel: Kernel, turns: int) -> float:
        work = [
            (self.operands[i].ctypes.data, turns, self.out[i].ctypes.data)
            for i in range(self.threads)
        ]
        seconds = _seconds(compiled(kernel, level), work)
        return turns * self.threads * OPERATIONS[kernel] / seconds / 1e12


def _seconds(kernel: Kernel, work: list[tuple[int, ...]]) -> float:
    """Run the kernel in as many threads as there are pieces of work."""
    threads = [threading.Thread(target=kernel, args=arguments) for arguments in work[1:]]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    kernel(*work[0])
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def measure(limits: Limits, rounds: int = 9) -> dict[str, Spread]:
    """By figure of `Limits.step`: the best of the rounds is `high`."""
    (samples,) = in_turns([limits.step], rounds)
    return {figure: Spread.of(values) for figure, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what this machine can give.")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    found = Limits(given.threads, (levels.choose()[0].name,))
    for figure, spread in measure(found, given.rounds).items():
        unit = "GB/s" if figure == "read" else "TOP/s"
        print(f"{figure}: {spread.median:.2f} {unit}, best {spread.high:.2f}", end="")
        print(f", {given.threads} threads")


if __name__ == "__main__":
    main()
