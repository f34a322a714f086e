"""Matrix products and row lookups of the types with odd numbers of bits, at every level.

Their slow twin is the decoded matrix times the record's own values, in float64.
"""

import numpy as np
import pytest
from checked import (
    HERE,
    Array,
    arena,
    linear,
    q8_records,
    quantized,
    read_q8,
    repacked,
    run,
    split_bytes,
)

from edgellama.ggml import BY_NAME, HALVES, RUNNABLE
from edgellama.quantize.blocks import decode
from edgellama.runtimes import abi, repack

SIMPLE = ("Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32")
KINDS = [kind for kind in RUNNABLE if kind not in SIMPLE]
KERNELS = [f"{how}:{kind}" for kind in KINDS for how in ("linear", "fine")]
PRODUCT_ERROR = 4e-7  # of the largest weight times the sum of |activations|


def matrix(kind: str, rows: int, blocks: int, seed: int = 0) -> Array:
    """Random bits: every code and every small scale."""
    form = BY_NAME[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * form.size), np.uint8)
    for at in HALVES[kind]:
        scales = np.random.default_rng(seed + at + 1).uniform(-0.02, 0.02, (rows * blocks, 1))
        raw.reshape(-1, form.size)[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return raw


def activations(tokens: int, columns: int) -> Array:
    return np.random.default_rng(1).standard_normal((tokens, columns), np.float32)


def assert_close(y: Array, kernel: str, raw: Array, records: Array) -> None:
    how, _, kind = kernel.partition(":")
    q8 = read_q8(records)
    x = q8.high + (q8.low / 128 if how == "fine" else 0.0)
    x = (x * q8.scales[..., None]).reshape(len(x), -1)
    w = decode(kind, raw).astype(np.float64)
    size = np.abs(x).sum(axis=1)[:, None] * _largest_term(kind, raw)
    assert np.all(np.abs(y[:, : len(raw)] - x @ w.T) <= PRODUCT_ERROR * size + 1e-44)
    assert np.all(y[:, len(raw) :] == 0.0)


def _largest_term(kind: str, raw: Array) -> Array:
    """Of each row: values and minima may cancel, their rounding does not."""
    form = BY_NAME[kind]
    largest = np.zeros((len(raw), 1))
    for at in HALVES[kind]:
        halves = raw.reshape(len(raw), -1, form.size)[..., at : at + 2].copy().view(np.float16)
        biggest = np.abs(halves[..., 0].astype(np.float64)).max(axis=1)[:, None]
        largest += biggest * (63 * 63 if "K" in kind else 128)
    return largest.T


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products(kernel: str, level: str) -> None:
    kind = kernel.rpartition(":")[2]
    for rows, blocks, tokens in ((1, 1, 1), (17, 3, 1), (33, 2, 3), (16, 1, 33), (5, 9, 2)):
        raw = matrix(kind, rows, blocks)
        with arena() as memory:
            x = activations(tokens, blocks * BY_NAME[kind].block)
            records = q8_records(memory, *split_bytes(x))
            together = linear(memory, level, kernel, raw, records)
            assert_close(together, kernel, raw, records)
            last = memory.copy(np.ascontiguousarray(records[:, -1:]))
            alone = linear(memory, level, kernel, raw, last)
            assert alone.tobytes() == together[-1:].tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_levels_agree_to_the_bit(kernel: str) -> None:
    levels = [level for level in HERE if level != "generic"]
    if len(levels) < 2:
        pytest.skip("needs two levels with fused multiply-add")
    kind = kernel.rpartition(":")[2]
    raw = matrix(kind, 33, 3)
    with arena() as memory:
        records = q8_records(memory, *split_bytes(activations(5, 3 * BY_NAME[kind].block)))
        first, *others = (linear(memory, level, kernel, raw, records) for level in levels)
        for other in others:
            assert other.tobytes() == first.tobytes()


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
def test_extreme_bits(kind: str, level: str, byte: int) -> None:
    """All codes and small scales at their ends; scales zero, subnormal and the largest."""
    for scale in (0.0, 6e-8, 1.0, 65504.0):
        raw = np.full((17, 2 * BY_NAME[kind].size), byte, np.uint8)
        for at in HALVES[kind]:
            half = np.array([scale], np.float16).view(np.uint8)
            raw.reshape(-1, BY_NAME[kind].size)[:, at : at + 2] = half
        with arena() as memory:
            records = q8_records(memory, *split_bytes(activations(2, 2 * BY_NAME[kind].block)))
            for kernel in (f"linear:{kind}", f"fine:{kind}"):
                y = linear(memory, level, kernel, raw, records)
                assert_close(y, kernel, raw, records)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_embed_gives_the_decoder_s_bits(kind: str, level: str) -> None:
    raw = matrix(kind, 37, 2)
    columns = 2 * BY_NAME[kind].block
    ids = np.array([0, 36, 15, 16, 17], np.int64)
    with arena() as memory:
        y = memory.new((len(ids), columns), np.float32)
        weight, blocks = repacked(memory, kind, raw), repack.column_blocks(kind, columns)
        state = {abi.TOKENS: memory.copy(ids)}
        run(memory, level, f"embed:{kind}", (weight, blocks, y, columns * 4), len(ids), state)
        assert y.tobytes() == decode(kind, raw)[ids].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_repacking_keeps_values_that_were_encoded(kind: str) -> None:
    """What an encoder writes, not only random bits, comes through."""
    values = np.random.default_rng(3).standard_normal((20, 512), np.float32)
    raw = quantized(kind, values)
    ids = np.arange(20, dtype=np.int64)
    with arena() as memory:
        y = memory.new((20, 512), np.float32)
        weight, blocks = repacked(memory, kind, raw), repack.column_blocks(kind, 512)
        run(memory, HERE[0], f"embed:{kind}", (weight, blocks, y, 2048), 20, {abi.TOKENS: ids})
        assert np.array_equal(y, decode(kind, raw))
