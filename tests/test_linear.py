"""Matrix products and row lookups against slow twins, at every level this machine has."""

from typing import Any

import numpy as np
import pytest
from checked import (
    HERE,
    Arena,
    Array,
    any_bits,
    arena,
    compiled,
    f32_records,
    linear,
    q8_records,
    quantized,
    read_q8,
    repacked,
    run,
    split_bytes,
)
from numba import int32

from edgellama.ggml import BY_NAME, FLOATS
from edgellama.quantize.blocks import decode
from edgellama.runtimes import abi, memory, repack, simd

SIMPLE = [f"{how}:{kind}" for kind in ("Q4_0", "Q4_1", "Q8_0") for how in ("linear", "fine")]
INTEGERS = [
    f"{how}:{kind}" for kind in repack.LAYOUTS if kind not in FLOATS for how in ("linear", "fine")
]
KERNELS = [*INTEGERS, *(f"linear:{kind}" for kind in FLOATS)]
TOKENS = (1, 2, 31, 32, 33, 65)
ROWS = (1, 15, 16, 17, 33)
PRODUCT_ERROR = 4e-7  # of the sum of |terms|: float32 rounding; measured: up to 1e-7


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint32)


def type_of(kernel: str) -> str:
    return kernel.rpartition(":")[2]


def width(kernel: str, n: int) -> int:
    """Columns of n blocks of a type, or of n times 32."""
    return n * max(32, BY_NAME[type_of(kernel)].block)


def matrix(kernel: str, rows: int, columns: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return quantized(type_of(kernel), values)


def activations(memory: Arena, kernel: str, tokens: int, columns: int, seed: int = 1) -> Array:
    """Records of N(0, 1)."""
    wide = np.zeros((tokens, repack.padded(columns, abi.BLOCK)), np.float32)
    wide[:, :columns] = np.random.default_rng(seed).standard_normal((tokens, columns), np.float32)
    if type_of(kernel) in FLOATS:
        return f32_records(memory, wide)
    return q8_records(memory, *split_bytes(wide))


def codes_of(kind: str, raw: Array) -> tuple[Array, Array, Array]:
    """(codes, scales, minima) as float64, each with rows and blocks first.

    Codes stored too high to be unsigned are those of a minimum below zero.
    """
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = raw.reshape(len(raw), -1, size)
    halves = np.ascontiguousarray(blocks[..., : 4 if kind == "Q4_1" else 2]).view(np.float16)
    halves = halves.astype(np.float64)
    if kind == "Q8_0":
        codes = blocks[..., 2:].view(np.int8).astype(np.float64) + 128
        return codes, halves[..., 0], -128 * halves[..., 0]
    packed = blocks[..., halves.shape[-1] * 2 :]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float64)
    if kind == "Q4_0":
        return codes, halves[..., 0], -8 * halves[..., 0]
    return codes, halves[..., 0], halves[..., 1]


def decoded_products(x: Array, kind: str, raw: Array) -> tuple[Array, Array]:
    w = np.zeros((len(raw), x.shape[1]))
    values = decode(kind, raw)
    w[:, : values.shape[1]] = values
    return x @ w.T, np.abs(x) @ np.abs(w).T


def emulated(kernel: str, raw: Array, records: Array) -> tuple[Array, Array]:
    """(products, sums of |terms|), (tokens, rows), in float64 from the bits the kernel reads."""
    how, _, kind = kernel.partition(":")
    if kind in FLOATS:
        x = records.transpose(1, 0, 2).reshape(records.shape[1], -1).astype(np.float64)
        return decoded_products(x, kind, raw)
    q8 = read_q8(records)
    x = q8.high.astype(np.float64) + (q8.low / 128 if how == "fine" else 0)
    if kernel not in SIMPLE:
        x = (x * q8.scales[..., None]).reshape(len(x), -1)
        return decoded_products(x, kind, raw)
    codes, scales, minima = codes_of(kind, raw)
    whole = np.einsum("rbhc,tbhc->trbh", codes.reshape(*scales.shape, 2, 16), x)
    terms = np.einsum("trbh,tbh,rb->trbh", whole, q8.scales, scales)
    offsets = np.einsum("rb,tb->trb", minima, q8.fine_sum if how == "fine" else q8.sum)
    total = terms.sum(axis=(-2, -1)) + offsets.sum(axis=-1)
    return total, np.abs(terms).sum(axis=(-2, -1)) + np.abs(offsets).sum(axis=-1)


def assert_close(y: Array, kernel: str, raw: Array, records: Array) -> None:
    expected, size = emulated(kernel, raw, records)
    rows = len(raw)
    assert np.all(np.abs(y[:, :rows] - expected) <= PRODUCT_ERROR * size + 1e-44)
    assert np.all(y[:, rows:] == 0.0)  # the rows of padding


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_all_shapes(kernel: str, level: str) -> None:
    two = width(kernel, 2)
    wide = [width(kernel, n) for n in (1, 2, 3)]
    wide += [1, 7, 33] if type_of(kernel) in FLOATS else []
    shapes = {(rows, two, 1) for rows in ROWS} | {(17, columns, 3) for columns in wide}
    for rows, columns, tokens in sorted(shapes | {(17, two, tokens) for tokens in TOKENS}):
        raw = matrix(kernel, rows, columns)
        with arena() as memory:
            records = activations(memory, kernel, tokens, columns)
            assert_close(linear(memory, level, kernel, raw, records), kernel, raw, records)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_long_rows(kernel: str, level: str) -> None:
    raw = matrix(kernel, 16, 4096)
    with arena() as memory:
        records = activations(memory, kernel, 2, 4096)
        assert_close(linear(memory, level, kernel, raw, records), kernel, raw, records)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_token_and_many_give_the_same_bits(kernel: str, level: str) -> None:
    raw = matrix(kernel, 33, width(kernel, 3))
    for tokens in TOKENS:
        with arena() as memory:
            records = activations(memory, kernel, tokens, width(kernel, 3))
            together = linear(memory, level, kernel, raw, records)
            for token in {0, tokens // 2, tokens - 1}:
                one = memory.copy(np.ascontiguousarray(records[:, token : token + 1]))
                alone = linear(memory, level, kernel, raw, one)
                assert np.array_equal(bits(alone[0]), bits(together[token]))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_any_split_of_the_units_gives_the_same_bits(kernel: str, level: str, tokens: int) -> None:
    raw = matrix(kernel, 70, width(kernel, 2))  # 5 units
    with arena() as memory:
        records = activations(memory, kernel, tokens, width(kernel, 2))
        whole = linear(memory, level, kernel, raw, records)
        for cuts in ([1], [4], [2, 3], [1, 2, 3, 4]):
            parts = linear(memory, level, kernel, raw, records, cuts=cuts)
            assert np.array_equal(bits(parts), bits(whole))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_accumulating_adds_to_what_was_there(kernel: str, level: str, tokens: int) -> None:
    raw = matrix(kernel, 17, width(kernel, 2))
    with arena() as memory:
        records = activations(memory, kernel, tokens, width(kernel, 2))
        plain = linear(memory, level, kernel, raw, records)
        before = np.random.default_rng(5).standard_normal(plain.shape, np.float32)
        added = linear(memory, level, kernel, raw, records, add_to=before)
        assert np.array_equal(bits(added), bits(before + plain))


# --- extremes of the integer types ---------------------------------------------------------------


def extreme(kind: str, rows: int, blocks: int, code: int, scale: float, minimum: float) -> Array:
    """Rows whose codes are all one byte pattern."""
    halves = np.array([scale, minimum][: 2 if kind == "Q4_1" else 1], np.float16).view(np.uint8)
    packed = np.full(32 if kind == "Q8_0" else 16, code, np.uint8)
    return np.tile(np.concatenate([halves, packed]), (rows, blocks))


def whole_records(memory: Arena, high: Array, low: Array) -> Array:
    """Scales of 1: plain products are the integer products themselves."""
    return q8_records(memory, high, low, np.ones(high.shape[:3], np.float32))


def assert_whole(y: Array, kernel: str, raw: Array, records: Array) -> None:
    """Plain products are exact; fine ones have more bits than float32 holds."""
    if kernel.startswith("fine"):
        assert_close(y, kernel, raw, records)
    else:
        assert np.array_equal(y, emulated(kernel, raw, records)[0])


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", SIMPLE)
def test_integer_products_at_the_extremes(kernel: str, level: str) -> None:
    codes = (0, 0x7F, 0x80, 0x81, 0xFF) if kernel.endswith("Q8_0") else (0, 0xFF, 0x0F, 0xF0)
    for code in codes:
        raw = extreme(type_of(kernel), 16, 3, code, 1.0, 2.0)
        for high, low in ((127, 0), (-127, 0), (126, 63), (-127, 63), (127, -64), (-126, -64)):
            for tokens in (1, 2):
                with arena() as memory:
                    x = np.full((tokens, 3, 2, 16), high, np.int8)
                    records = whole_records(memory, x, np.full_like(x, low))
                    y = linear(memory, level, kernel, raw, records)
                    assert_whole(y, kernel, raw, records)


@pytest.mark.parametrize("kernel", SIMPLE)
def test_integer_products_of_random_codes(kernel: str) -> None:
    """Scales are powers of two, so rounding is the same with and without fused multiply-add."""
    rng = np.random.default_rng(7)
    size = 32 if kernel.endswith("Q8_0") else 16
    raw = extreme(type_of(kernel), 48, 4, 0, 0.5, -2.0).reshape(48, 4, -1)
    raw[..., -size:] = rng.integers(0, 256, (48, 4, size))
    raw = raw.reshape(48, -1)
    with arena() as memory:
        high = rng.integers(-127, 128, (33, 4, 2, 16)).astype(np.int8)
        low = rng.integers(-64, 64, (33, 4, 2, 16)).astype(np.int8)
        records = whole_records(memory, high, low)
        results = [linear(memory, level, kernel, raw, records) for level in HERE]
        assert_whole(results[0], kernel, raw, records)
        for other in results[1:]:
            assert np.array_equal(bits(other), bits(results[0]))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", INTEGERS)
def test_products_of_any_bits(kernel: str, level: str) -> None:
    """Random bytes as weights, and activations at their limits."""
    kind, rng = type_of(kernel), np.random.default_rng(9)
    raw = any_bits(kind, rng, (32, 2 * (width(kernel, 1) // BY_NAME[kind].block)))
    shape = (3, width(kernel, 2) // 32, 2, 16)
    for choices in ([-127, 127], [-127, 0, 127], [127], range(-127, 128)):
        with arena() as memory:
            high = rng.choice(np.array(choices, np.int8), shape)
            low = rng.integers(-64, 64, shape).astype(np.int8)
            scales = rng.random(shape[:3], np.float32)
            records = q8_records(memory, high, np.where(high > 0, -64, low), scales)
            assert_close(linear(memory, level, kernel, raw, records), kernel, raw, records)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", SIMPLE)
@pytest.mark.parametrize("scale", [0.0, 6e-8, 5.9e-5, 65504.0, -65504.0])
def test_scales_of_every_size(kernel: str, level: str, scale: float) -> None:
    """Zero, the least subnormal half, the largest subnormal one and the largest of all."""
    raw = extreme(type_of(kernel), 17, 2, 0x9A, scale, -scale)
    with arena() as memory:
        records = activations(memory, kernel, 3, 64)
        assert_close(linear(memory, level, kernel, raw, records), kernel, raw, records)


@pytest.mark.skipif("avx512vnni" not in HERE, reason="needs two levels with fused multiply-add")
@pytest.mark.parametrize("kernel", KERNELS)
def test_levels_with_fused_multiply_add_agree_to_the_bit(kernel: str) -> None:
    raw = matrix(kernel, 33, width(kernel, 3))
    for tokens in (1, 33):
        with arena() as memory:
            records = activations(memory, kernel, tokens, width(kernel, 3))
            results = [
                linear(memory, level, kernel, raw, records) for level in HERE if level != "generic"
            ]
            assert len(results) >= 2
            for other in results[1:]:
                assert np.array_equal(bits(other), bits(results[0]))


# --- row lookup ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", *FLOATS])
def test_embed_gives_the_decoder_s_bits(kind: str, level: str) -> None:
    for columns in [width(kind, 1), width(kind, 3)] + ([7, 33] if kind in FLOATS else []):
        raw = matrix(kind, 37, columns)
        ids = np.array([0, 36, 15, 16, 17, 36], np.int64)
        wide = repack.padded(columns, abi.BLOCK)
        with arena() as memory:
            y = memory.new((len(ids), wide), np.float32)
            weight = repacked(memory, kind, raw)
            blocks = repack.column_blocks(kind, columns)
            arguments = (weight, blocks, y, wide * 4)
            state: dict[int, int | Array] = {abi.TOKENS: memory.copy(ids)}
            run(memory, level, f"embed:{kind}", arguments, len(ids), state, cuts=[2, 5])
            assert np.array_equal(bits(y[:, :columns]), bits(decode(kind, raw)[ids]))
            assert np.all(y[:, columns:] == 0.0)


# --- the functions that differ by level ----------------------------------------------------------


def _dot4(u: int, s: int, start: int, out: int) -> None:
    total = simd.splat_i32(int32(start))
    total = simd.dot4(total, memory.load_i8x64(u), memory.load_i8x64(s))
    memory.store_f32x16(out, simd.to_f32(total))


def _dot4_small(u: int, s: int, start: int, out: int) -> None:
    total = simd.splat_i32(int32(start))
    total = simd.dot4_small(total, memory.load_i8x64(u), memory.load_i8x64(s))
    memory.store_f32x16(out, simd.to_f32(total))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize(("function", "most"), [(_dot4, 255), (_dot4_small, 127)])
def test_dot4_is_exact(function: Any, most: int, level: str) -> None:
    kernel = compiled(level, function.__name__, function)
    rng = np.random.default_rng(3)
    pairs = [(u, s) for u in (0, 1, most) for s in (-128, -127, 0, 127)]
    cases = [(np.full(64, u, np.uint8), np.full(64, s, np.int8)) for u, s in pairs]
    for _ in range(50):
        u = rng.choice(np.array([0, 1, most - 1, most], np.uint8), 64)
        cases.append((u, rng.integers(-128, 128, 64).astype(np.int8)))
    for u, s in cases:
        for start in (0, -1000, 1000):
            with arena() as memory:
                out = memory.new(16, np.float32)
                a, b = memory.copy(u), memory.copy(s)
                kernel(a.ctypes.data, b.ctypes.data, start, out.ctypes.data)
                products = u.astype(np.int64) * s.astype(np.int64)
                assert np.array_equal(out, start + products.reshape(16, 4).sum(axis=1))


def _widen(halves: int, out: int, n: int) -> None:
    for i in range(0, n, 16):
        memory.store_f32x16(out + i * 4, memory.load_f16x16(halves + i * 2))


def _narrow(values: int, out: int, n: int) -> None:
    for i in range(0, n, 16):
        memory.store_f16x16(out + i * 2, memory.load_f32x16(values + i * 4))


@pytest.mark.parametrize("level", HERE)
def test_every_half_is_widened_exactly(level: str) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    with arena() as memory:
        source, out = memory.copy(halves), memory.new(65536, np.float32)
        compiled(level, "_widen", _widen)(source.ctypes.data, out.ctypes.data, 65536)
        number = ~np.isnan(halves)
        assert np.array_equal(bits(out)[number], bits(halves.astype(np.float32))[number])
        assert np.all(np.isnan(out[~number]))


def narrowed_cases() -> Array:
    """Every half, the midpoints between neighbours, and their neighbours in float32."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2  # exact: one bit more than a half has
    around = [f(middles, np.float32(v)) for f in (np.nextafter,) for v in (0, np.inf)]
    far = [0.0, 65504.0, 65519.996, 65520.0, 65536.0, 1e30, 3.4e38, 1e-45, 1e-30, 2.98e-8, np.inf]
    positive = np.concatenate([halves, middles, *around, np.array(far, np.float32)])
    both = np.concatenate([positive, -positive]).astype(np.float32)
    return np.concatenate([both, np.zeros(-len(both) % 16, np.float32)])


@pytest.mark.parametrize("level", HERE)
def test_narrowing_rounds_to_nearest_even(level: str) -> None:
    values = narrowed_cases()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    with arena() as memory:
        source, out = memory.copy(values), memory.new(len(values), np.float16)
        compiled(level, "_narrow", _narrow)(source.ctypes.data, out.ctypes.data, len(values))
        assert np.array_equal(out.view(np.uint16), expected.view(np.uint16))
        source[:16] = np.nan
        compiled(level, "_narrow", _narrow)(source.ctypes.data, out.ctypes.data, 16)
        assert np.all(np.isnan(out[:16]))
