"""Single kernels run on guarded memory: what they may not touch is found out.

Every buffer lies between canaries that `Arena.check` compares. With `EDGELLAMA_TEST_GUARD` set to
`low` or `high`, it lies against pages that cannot be touched instead, before or behind it, so that
a stray read ends the process too.
"""

import ctypes
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tiny import encoded

from edgellama.ggml import BY_NAME, HALVES
from edgellama.runtimes import abi, kernel_cache, levels, repack

GUARD = os.environ.get("EDGELLAMA_TEST_GUARD", "")
CANARY = 0xA5
MARGIN = 256  # bytes of canaries on either side
HERE = levels.available()
Array = NDArray[Any]


class Arena:
    """Buffers for kernels, each between guards; new ones hold NaN in every float type."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Array, int]] = []

    def new(self, shape: int | Sequence[int], dtype: Any = np.uint8) -> Array:
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = _walled(n_bytes) if GUARD else self._between_canaries(n_bytes)
        data[:] = 0xFF
        return data.view(dtype).reshape(shape)

    def _between_canaries(self, n_bytes: int) -> Array:
        room = np.full(n_bytes + 2 * MARGIN + 64, CANARY, np.uint8)
        start = MARGIN + -(room.ctypes.data + MARGIN) % 64
        self.rooms.append((room, start))
        self.rooms.append((room[start + n_bytes :], MARGIN))
        return room[start : start + n_bytes]

    def copy(self, values: Array) -> Array:
        room = self.new(values.shape, values.dtype)
        room[...] = values
        return room

    def check(self) -> None:
        for room, n in self.rooms:
            assert np.all(room[:n] == CANARY), "a kernel wrote outside its buffers"


@contextmanager
def arena() -> Iterator[Arena]:
    """An Arena, checked at the end."""
    made = Arena()
    yield made
    made.check()


def _walled(n_bytes: int) -> Array:
    """Memory that begins right behind (`low`) or ends right before (`high`) a forbidden page."""
    page = mmap.PAGESIZE
    inner = -(-max(n_bytes, 1) // page) * page
    room = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for wall in (address, address + page + inner):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    start = page if GUARD == "low" else page + inner - n_bytes
    return np.frombuffer(room, np.uint8, n_bytes, start)


def bits(value: float) -> int:
    """A float64 as the word that an instruction holds."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def run(
    memory: Arena,
    level: str,
    name: str,
    arguments: Sequence[int | float | Array],
    units: int,
    state: dict[int, int | Array] | None = None,
    cuts: Sequence[int] = (),
) -> None:
    """Run one kernel over all its units, cut into calls at `cuts`, by threads 0 and 1 in turn."""
    address = kernel_cache.addresses([name], levels.LEVELS[level])[name]
    kernel = kernel_cache.function(address, 5)
    instruction = memory.new(abi.INSTRUCTION_WORDS, np.int64)
    instruction[:] = 0  # as the lowering leaves what it does not set
    for i, argument in enumerate(arguments):
        instruction[abi.ARGS + i] = _word(argument)
    words = memory.new(abi.STATE_WORDS, np.int64)
    words[abi.ONE] = 1
    for at, value in (state or {}).items():
        words[at] = _word(value)
    edges = [0, *cuts, units]
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        kernel(instruction.ctypes.data, words.ctypes.data, first, last, i % 2)


def _word(value: int | float | Array) -> int:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return bits(value) if isinstance(value, float) else int(value)


@cache
def compiled(level: str, name: str, function: Callable[..., None]) -> Callable[..., None]:
    """A kernel written for a test, as a Python callable."""
    import llvmlite.binding as llvm

    from edgellama.runtimes.compiler import object_code

    code = object_code(name, function, levels.LEVELS[level])
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    n = function.__code__.co_argcount
    return kernel_cache.function(engine.get_function_address(name), n)


_ENGINES: list[Any] = []  # they own the machine code


# --- what matrix products read -------------------------------------------------------------------


def quantized(kind: str, values: Array) -> Array:
    """float32 (rows, columns) as a file holds them: uint8 (rows, row_bytes)."""
    return np.ascontiguousarray(encoded(kind, values)).view(np.uint8)


def any_bits(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Random blocks, (rows, blocks), with small scales: uint8 (rows, row_bytes)."""
    raw = rng.integers(0, 256, (*shape, BY_NAME[kind].size), np.uint8)
    for at in HALVES[kind]:
        scales = (rng.standard_normal((*shape, 1)) / 16).astype(np.float16)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(shape[0], -1)


def repacked(memory: Arena, kind: str, raw: Array) -> Array:
    """A matrix as `repack` lays it out."""
    columns = raw.shape[1] // BY_NAME[kind].size * BY_NAME[kind].block
    room = memory.new(repack.repacked_bytes(kind, len(raw), columns))
    repack.repack(kind, raw, columns, room)
    return room


class Q8(NamedTuple):
    """The fields of records for integer products, tokens first; floats as float64."""

    high: Array  # int8 (tokens, blocks, 2, 16)
    low: Array
    scales: Array  # (tokens, blocks, 2)
    sums: Array
    fine_sums: Array
    sum: Array  # (tokens, blocks)
    fine_sum: Array


_FIELDS = (  # where each lies, its type and its shape in a block
    (0, np.int8, (2, 16)),
    (abi.Q8_LOW, np.int8, (2, 16)),
    (abi.Q8_SCALES, np.float32, (2,)),
    (abi.Q8_SUMS, np.float32, (2,)),
    (abi.Q8_FINE_SUMS, np.float32, (2,)),
    (abi.Q8_SUM, np.float32, ()),
    (abi.Q8_FINE_SUM, np.float32, ()),
)


def half_sums(high: Array, low: Array, scales: Array) -> tuple[Array, Array]:
    """Sums of halves' activations, of the high bytes and of both, float32 (tokens, blocks, 2)."""
    sums, low_sums = (x.sum(axis=-1, dtype=np.int32).astype(np.float32) for x in (high, low))
    coarse = scales.astype(np.float32) * sums
    return coarse, coarse + scales.astype(np.float32) * low_sums / np.float32(128)


def q8_records(memory: Arena, high: Array, low: Array, scales: Array) -> Array:
    """Records (blocks, tokens, Q8_RECORD); the sums are worked out here."""
    coarse, fine = half_sums(high, low, scales)
    tokens, blocks = scales.shape[:2]
    records = memory.new((blocks, tokens, abi.Q8_RECORD))
    values = Q8(high, low, scales, coarse, fine, coarse.sum(axis=-1), fine.sum(axis=-1))
    for (at, dtype, _), value in zip(_FIELDS, values, strict=True):
        plain = np.ascontiguousarray(value.reshape(tokens, blocks, -1), dtype).view(np.uint8)
        records[..., at : at + plain.shape[-1]] = plain.transpose(1, 0, 2)
    return records


def read_q8(records: Array) -> Q8:
    values = []
    for at, dtype, shape in _FIELDS:
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        plain = np.ascontiguousarray(records[..., at : at + n_bytes].transpose(1, 0, 2))
        value = plain.view(dtype).reshape(*plain.shape[:2], *shape)
        values.append(value.astype(np.float64) if dtype is np.float32 else value)
    return Q8(*values)


def split_bytes(x: Array) -> tuple[Array, Array, Array]:
    """A slow twin of packing: (high, low, scales) of float32 (tokens, columns)."""
    halves = x.astype(np.float32).reshape(len(x), -1, 2, 16)
    largest = np.abs(halves).max(axis=-1)
    largest = np.where(largest == 0, np.float32(1), largest)
    both = np.rint(halves * (np.float32(127 * 128) / largest)[..., None]).astype(np.int64)
    high = (both + 64) // 128
    return high.astype(np.int8), (both - 128 * high).astype(np.int8), largest / np.float32(127)


def f32_records(memory: Arena, x: Array) -> Array:
    """float32 (tokens, columns, a multiple of 32) as records (columns / 8, tokens, 8)."""
    tokens, columns = x.shape
    return memory.copy(
        np.ascontiguousarray(x.reshape(tokens, columns // 8, 8).transpose(1, 0, 2), np.float32)
    )


def linear(
    memory: Arena,
    level: str,
    kernel: str,
    raw: Array,
    records: Array,
    *,
    cuts: Sequence[int] = (),
    add_to: Array | None = None,
) -> Array:
    """x @ weight.T through `linear:F16`, `fine:Q4_0`…: float32 (tokens, rows padded to 16)."""
    kind = kernel.partition(":")[2]
    columns = raw.shape[1] // BY_NAME[kind].size * BY_NAME[kind].block
    tokens, wide = records.shape[1], repack.padded(len(raw), abi.LANES)
    y = memory.new((tokens, wide), np.float32)
    if add_to is not None:
        y[...] = add_to
    scratch = memory.new((2, abi.TILE * 64))
    blocks = repack.column_blocks(kind, columns)
    weight = repacked(memory, kind, raw)
    arguments = (weight, blocks, records, y, wide * 4, int(add_to is not None), abi.N_TOKENS)
    state: dict[int, int | Array] = {abi.N_TOKENS: tokens, abi.SCRATCH: scratch}
    state[abi.SCRATCH_BYTES] = abi.TILE * 64
    run(memory, level, kernel, arguments, wide // abi.LANES, state, cuts)
    return y
