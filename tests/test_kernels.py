"""Packing, norms and other small kernels against slow twins, at every level this machine has.

Matrix products are in `test_linear.py`, attention in `test_attention_kernels.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checked import (
    GUARD,
    HERE,
    Arena,
    Array,
    arena,
    compiled,
    half_sums,
    linear,
    quantized,
    read_q8,
    run,
)

from edgellama.runtimes import abi, kernels, memory
from edgellama.runtimes.repack import padded

NAN, INF = np.float32(np.nan), np.float32(np.inf)


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint32)


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


# --- packing -------------------------------------------------------------------------------------


def packed(memory: Arena, level: str, rows: Array) -> tuple[Array, Array]:
    """(q8 records, f32 records) of float32 rows, whose width is a multiple of 32."""
    tokens, columns = rows.shape
    q8 = memory.new((columns // 32, tokens, abi.Q8_RECORD))
    f32 = memory.new((columns // 8, tokens, 8), np.float32)
    arguments = (memory.copy(rows.astype(np.float32)), columns * 4, columns // 32, q8, f32)
    run(memory, level, "pack_rows", arguments, tokens, {abi.N_TOKENS: tokens}, cuts=[tokens // 2])
    return q8, f32


def columns_of(f32: Array) -> Array:
    """f32 records back as rows."""
    return f32.transpose(1, 0, 2).reshape(f32.shape[1], -1)


def hard_rows() -> Array:
    """Blocks that int8 scales find hard, one a row."""
    rows = np.random.default_rng(0).standard_normal((12, 32), np.float32)
    rows[0], rows[1], rows[2] = 0.0, 1e-45, 3e38
    rows[3] *= np.float32(1e-30)
    rows[4, 5], rows[5, 20] = 1e30, -3e38
    rows[6], rows[7] = -1.0, np.arange(32)
    rows[8] *= np.float32(1e30)
    rows[9, ::2] = 0.0
    return rows


@pytest.mark.parametrize("level", HERE)
def test_codes_are_off_by_half_a_step_at_most(level: str) -> None:
    rows = hard_rows()
    with arena() as memory, np.errstate(over="ignore"):
        q8 = read_q8(packed(memory, level, rows)[0])
        assert np.all(np.abs(q8.high.astype(int)) <= 127)
        assert np.all((q8.low >= -64) & (q8.low <= 63))
        assert np.all(np.isfinite(q8.scales))
        for low, step in ((0, 1.0), (q8.low / 128, 1 / 128)):
            restored = ((q8.high + low) * q8.scales[..., None]).reshape(rows.shape)
            steps = np.repeat(q8.scales.reshape(len(rows), 2), 16, axis=1) * step
            assert np.all(np.abs(restored - rows) <= 0.51 * steps + 1e-30)
        coarse, fine = half_sums(q8.high, q8.low, q8.scales)
        assert np.array_equal(q8.sums, coarse) and np.array_equal(q8.fine_sums, fine)
        assert np.array_equal(q8.sum.astype(np.float32), coarse.sum(axis=-1))
        assert np.array_equal(q8.fine_sum.astype(np.float32), fine.sum(axis=-1))


@pytest.mark.parametrize("level", HERE)
def test_float_records_hold_the_rows_themselves(level: str) -> None:
    rows = np.random.default_rng(1).standard_normal((5, 96), np.float32)
    with arena() as memory:
        q8, f32 = packed(memory, level, rows)
        assert np.array_equal(bits(columns_of(f32)), bits(rows))
        fields = read_q8(q8)
        restored = (fields.high + fields.low / 128) * fields.scales[..., None]
        assert np.allclose(restored.reshape(5, 96), rows, atol=2e-4)


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("kernel", ["linear:Q4_0", "fine:Q4_1", "linear:Q8_0", "linear:F32"])
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_nan_and_infinity_are_not_lost(kernel: str, level: str, wrong: np.float32) -> None:
    rows = np.ones((2, 32), np.float32)
    rows[1, 21] = wrong
    kind = kernel.partition(":")[2]
    raw = quantized(kind, np.random.default_rng(2).standard_normal((16, 32)))
    with arena() as memory:
        q8, f32 = packed(memory, level, rows)
        y = linear(memory, level, kernel, raw, f32 if kind == "F32" else q8)
        assert np.all(np.isfinite(y[0])) and not np.any(np.isfinite(y[1]))


# --- norm, swiglu, select ------------------------------------------------------------------------


@pytest.mark.parametrize("level", HERE)
def test_norm(level: str) -> None:
    columns, eps = 72, 1e-5
    wide = padded(columns, abi.BLOCK)
    rng = np.random.default_rng(3)
    rows = np.zeros((8, wide), np.float32)
    rows[:, :columns] = rng.standard_normal((8, columns))
    sizes = np.array([1, 0, 1e19, 1e-30, 1e4, 1e-3, 1e37, 1e-45], np.float32)
    rows *= sizes[:, None]
    weight = np.zeros(wide, np.float32)
    weight[:columns] = 1 + rng.standard_normal(columns) / 4
    with arena() as memory:
        f32 = memory.new((wide // 8, len(rows), 8), np.float32)
        arguments = (memory.copy(rows), wide * 4, wide // 32, 0, f32, memory.copy(weight))
        more = (eps, 1.0 / columns, abi.N_ROWS)
        run(memory, level, "norm", (*arguments, *more), len(rows), {abi.N_ROWS: len(rows)}, [3])
        x = rows[:, :columns].astype(np.float64)
        expected = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * weight[:columns]
        y = columns_of(f32)
        assert np.all(np.abs(y[:, :columns] - expected) <= 1e-6 * np.abs(expected) + 1e-44)
        assert np.all(y[:, columns:] == 0.0)


@pytest.mark.parametrize("level", HERE)
def test_swiglu(level: str) -> None:
    edges = [0.0, -0.0, 88, -88, 89, -89, 104, -104, 1e4, -1e4, 1e-30, -1e-30, 3e38, -3e38]
    gate = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32) * 8
    gate[1, : len(edges)] = edges
    up = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float32)
    up[1] = 1.0
    with arena() as memory:
        f32 = memory.new((8, 3, 8), np.float32)
        arguments = (memory.copy(gate), memory.copy(up), 256, 2, 0, f32)
        run(memory, level, "swiglu", arguments, 6, {abi.N_TOKENS: 3}, cuts=[1, 4])
        expected = silu(gate.astype(np.float64)) * up
        error = np.abs(columns_of(f32) - expected)
        assert np.all(error <= 6e-7 * np.abs(expected) + 1e-36)


@pytest.mark.parametrize("level", HERE)
def test_swiglu_takes_nothing_from_behind_its_columns(level: str) -> None:
    """48 columns: a block and a half. Buffers end there, or NaN follows."""
    gate = np.random.default_rng(4).standard_normal((2, 48), np.float32)
    up = np.random.default_rng(5).standard_normal((2, 48), np.float32)
    with arena() as memory:
        rows = memory.new((2, 96), np.float32)  # gate, then up
        rows[:, :48], rows[:, 48:] = gate, up
        f32 = memory.new((8, 2, 8), np.float32)
        at = rows.ctypes.data
        run(memory, level, "swiglu", (at, at + 192, 384, 2, 0, f32, 3), 4, {abi.N_TOKENS: 2})
        y = columns_of(f32)
        assert np.allclose(y[:, :48], silu(gate) * up, rtol=1e-6)
        assert np.all(y[:, 48:] == 0.0)


def _exp(x: int, y: int, n: int) -> None:
    for i in range(0, n, 16):
        memory.store_f32x16(y + i * 4, kernels.exp(memory.load_f32x16(x + i * 4)))


@pytest.mark.parametrize("level", HERE)
def test_exp(level: str) -> None:
    special = np.array([0, -0.0, 88.7, 89, 100, INF, -103.9, -104, -200, -INF, NAN], np.float32)
    x = np.concatenate([np.linspace(-104, 88, 16373), special]).astype(np.float32)
    with arena() as memory:
        source, out = memory.copy(x), memory.new(len(x), np.float32)
        assert len(x) % 16 == 0
        compiled(level, "_exp", _exp)(source.ctypes.data, out.ctypes.data, len(x))
        with np.errstate(over="ignore"):
            expected = np.exp(x.astype(np.float64)).astype(np.float32).astype(np.float64)
        finite = np.isfinite(expected)
        error = np.abs(out[finite] - expected[finite])
        assert np.all(error <= 2e-7 * expected[finite] + 1.5e-45)
        assert np.array_equal(out[~finite], expected[~finite], equal_nan=True)
        assert out[-2] == 0.0 and np.isnan(out[-1])


@pytest.mark.parametrize("level", HERE)
def test_select_copies_rows(level: str) -> None:
    rows = np.random.default_rng(6).standard_normal((7, 32), np.float32)
    wanted = np.array([6, 0, 3, 3], np.int64)
    with arena() as memory:
        out = memory.new((4, 32), np.float32)
        state: dict[int, int | Array] = {abi.ROWS: memory.copy(wanted)}
        run(memory, level, "select", (memory.copy(rows), out, 128), 4, state, cuts=[3])
        assert np.array_equal(bits(out), bits(rows[wanted]))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pages are protected through mprotect")
@pytest.mark.skipif(bool(GUARD), reason="this is the guarded run")
@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("level", HERE)
def test_kernels_stay_inside_their_buffers(side: str, level: str) -> None:
    """The other tests once more, with every buffer against a page that cannot be touched."""
    here = Path(__file__)
    names = (here.name, "test_attention_kernels.py", "test_linear.py")
    files = [str(here.with_name(name)) for name in names]
    chosen = f"{level} and not split and not random"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    environment = os.environ | {"EDGELLAMA_TEST_GUARD": side}
    done = subprocess.run(
        [*command, *files],
        env=environment,
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
