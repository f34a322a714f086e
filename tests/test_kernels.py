"""The kernels but for matrix products against slow twins, at every level this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checked import GUARD, HERE, Arena, Array, arena, compiled, linear, quantized, read_q8, run

from edgellama.runtimes import abi, kernels, memory
from edgellama.runtimes.places import part_bytes
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
        assert np.array_equal(q8.sums, q8.high.sum(axis=-1, dtype=np.int32))
        assert np.array_equal(q8.low_sums, q8.low.sum(axis=-1, dtype=np.int32))
        for low, step in ((0, 1.0), (q8.low / 128, 1 / 128)):
            restored = ((q8.high + low) * q8.scales[..., None]).reshape(rows.shape)
            steps = np.repeat(q8.scales.reshape(len(rows), 2), 16, axis=1) * step
            assert np.all(np.abs(restored - rows) <= 0.51 * steps + 1e-30)
        scales = q8.scales.astype(np.float32)
        coarse = scales * q8.sums.astype(np.float32)
        fine = coarse + scales * q8.low_sums.astype(np.float32) / np.float32(128)
        assert np.array_equal(q8.scaled_sum.astype(np.float32), coarse.sum(axis=-1))
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


# --- rope and attention --------------------------------------------------------------------------


class Heads:
    """Queries, keys and values of some tokens, and a cache that holds NaN where nothing is."""

    def __init__(
        self, memory: Arena, n: int, heads: int, kv_heads: int, head_dim: int, dtype: type
    ) -> None:
        self.n, self.heads, self.kv_heads, self.head_dim = n, heads, kv_heads, head_dim
        self.half = int(dtype is np.float16)
        self.memory, self.pairs = memory, head_dim // 2
        rng = np.random.default_rng(8)
        self.q = rng.standard_normal((n, heads, head_dim), np.float32)
        self.k = rng.standard_normal((n, kv_heads, head_dim), np.float32)
        self.v = rng.standard_normal((n, kv_heads, head_dim), np.float32)
        positions = padded(n, abi.ATTENTION_BLOCK)
        width = padded(head_dim, 16)
        self.cache = memory.new((positions // 64, kv_heads * 64 * (head_dim + width)), dtype)
        keys, values = np.split(self.cache, [kv_heads * 64 * head_dim], axis=1)
        self.keys = keys.reshape(-1, kv_heads, 4, head_dim, 16)
        self.values = values.reshape(-1, kv_heads, 64, width)
        theta = np.arange(positions)[:, None] * 0.7 ** np.arange(self.pairs)
        self.angles = np.stack([np.cos(theta), np.sin(theta)], axis=-1).astype(np.float32)

    def where(self) -> tuple[int, ...]:
        return self.half, 0, self.cache[0].nbytes

    def stored_keys(self) -> Array:
        """(positions, n_kv_heads, head_dim)"""
        return self.keys.transpose(0, 2, 4, 1, 3).reshape(-1, self.kv_heads, self.head_dim)

    def stored_values(self) -> Array:
        """(positions, n_kv_heads, head_dim)"""
        values = self.values.transpose(0, 2, 1, 3)
        return values.reshape(-1, *values.shape[2:])[..., : self.head_dim]

    def state(self, start: int, scratch: Array | int = 0) -> dict[int, int | Array]:
        state: dict[int, int | Array] = {abi.CACHE: self.cache}
        state |= {abi.ANGLES: self.memory.copy(self.angles), abi.START: start}
        size = scratch.nbytes // 2 if isinstance(scratch, np.ndarray) else 0
        return state | {abi.SCRATCH: scratch, abi.SCRATCH_BYTES: size}

    def store(self, level: str, start: int, stop: int) -> Array:
        """Tokens start..stop-1 through the rope kernel; gives the turned queries."""
        parts = [x[start:stop].reshape(stop - start, -1) for x in (self.q, self.k, self.v)]
        wide = self.memory.copy(np.ascontiguousarray(np.concatenate(parts, axis=1)))
        widths = np.cumsum([0, *(p.shape[1] for p in parts)])
        at = [int(wide.ctypes.data + 4 * w) for w in widths[:3]]
        numbers = (wide.shape[1] * 4, self.heads, self.kv_heads, self.head_dim, self.pairs)
        units = (stop - start) * (self.heads + self.kv_heads)
        run(
            self.memory,
            level,
            "rope",
            (*at, *numbers, *self.where()),
            units,
            self.state(start),
            cuts=[units // 3],
        )
        return np.ascontiguousarray(wide[:, : widths[1]]).reshape(stop - start, self.heads, -1)

    def attend(
        self, level: str, q: Array, start: int, window: int = 0, *, parallel: bool = False
    ) -> Array:
        """Through the kernels; parallel: each split of the cache is a unit of its own."""
        n, group = len(q), self.heads // self.kv_heads
        source = self.memory.copy(np.ascontiguousarray(q, np.float32))
        out = self.memory.new(q.shape, np.float32)
        stride = self.heads * self.head_dim * 4
        size = part_bytes(self.head_dim)
        splits = -(-(start + n) // abi.ATTENTION_SPLIT)
        parallel_splits = splits if parallel else 1
        parts = self.memory.new(n * self.heads * parallel_splits * size)
        needed = abi.ATTENTION_BLOCK * 4 + group * (self.head_dim * 4 + size)
        state = self.state(start, self.memory.new((2, padded(needed, 64))))
        state |= {abi.SPLITS: splits, abi.PARALLEL: parallel_splits}
        numbers = (self.kv_heads, group, self.head_dim, *self.where())
        arguments = (source, stride, parts, size, *numbers, self.head_dim**-0.5, window)
        units = n * self.kv_heads * parallel_splits
        run(self.memory, level, "attention", arguments, units, state, cuts=[units // 2])
        arguments = (parts, size, out, stride, self.heads, self.head_dim)
        run(self.memory, level, "merge", arguments, n * self.heads, state, cuts=[1])
        return out

    def attention(self, q: Array, start: int, window: int = 0) -> tuple[Array, Array]:
        """The slow twin of `attend` on what the cache holds, and the sums of |terms|."""
        keys, values = self.stored_keys(), self.stored_values()
        result, size = np.empty(q.shape), np.empty(q.shape)
        for token in range(len(q)):
            high = start + token + 1
            low = max(0, high - window) if window else 0
            for head in range(self.heads):
                at = head // (self.heads // self.kv_heads)
                k = keys[low:high, at].astype(np.float64)
                v = values[low:high, at].astype(np.float64)
                scores = k @ q[token, head].astype(np.float64) / np.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                result[token, head], size[token, head] = weights @ v, weights @ np.abs(v)
        return result, size


def turned(x: Array, angles: Array, start: int, pairs: int) -> Array:
    """The slow twin of rope, in float32: (tokens, heads, head_dim)."""
    cos, sin = (angles[start : start + len(x), None, :, i] for i in (0, 1))
    y = x.copy()
    even, odd = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    y[..., 0 : 2 * pairs : 2] = even * cos - odd * sin
    y[..., 1 : 2 * pairs : 2] = even * sin + odd * cos
    return y


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("head_dim", "pairs"), [(16, 8), (20, 10), (64, 16), (100, 50)])
def test_rope_turns_and_stores(level: str, dtype: type, head_dim: int, pairs: int) -> None:
    n, start = 37, 21
    with arena() as memory:
        heads = Heads(memory, n, 4, 2, head_dim, dtype)
        heads.pairs, heads.angles = pairs, np.ascontiguousarray(heads.angles[:, :pairs])
        q = heads.store(level, start, n)
        expected = turned(heads.q[start:], heads.angles, start, pairs)
        assert np.array_equal(bits(q), bits(expected))
        keys, values = heads.stored_keys(), heads.stored_values()
        turned_keys = turned(heads.k[start:], heads.angles, start, pairs).astype(dtype)
        assert np.array_equal(keys[start:n], turned_keys)
        assert np.array_equal(values[start:n], heads.v[start:].astype(dtype))
        for cache in (keys, values):
            assert np.all(np.isnan(cache[:start])) and np.all(np.isnan(cache[n:]))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("position", [0, 1, 8191])
def test_rope_at_late_positions(level: str, position: int) -> None:
    with arena() as memory:
        heads = Heads(memory, position + 1, 2, 1, 16, np.float32)
        q = heads.store(level, position, position + 1)
        expected = turned(heads.q[position:], heads.angles, position, 8)
        assert np.array_equal(bits(q), bits(expected))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 100, 128])
@pytest.mark.parametrize("window", [0, 1, 8, 70])
def test_attention(level: str, dtype: type, head_dim: int, window: int) -> None:
    """Beyond what was stored the cache holds NaN, which must not come through."""
    shapes = [(2, 2), (4, 1)] if window == 0 else [(4, 2)]
    for n in (1, 15, 16, 17, 63, 64, 65, 200):
        for n_heads, kv_heads in shapes:
            with arena() as memory:
                heads = Heads(memory, n, n_heads, kv_heads, head_dim, dtype)
                q = heads.store(level, 0, n)
                tokens = min(n, 3)
                y = heads.attend(level, q[-tokens:], n - tokens, window)
                expected, size = heads.attention(q[-tokens:], n - tokens, window)
                assert np.all(np.abs(y - expected) <= 2e-6 * size)
                alone = heads.attend(level, q[-1:], n - 1, window)
                assert np.array_equal(bits(alone[0]), bits(y[-1]))


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("window", [0, 500])
def test_attention_over_several_splits_of_the_cache(level: str, window: int) -> None:
    """Whoever sums a split, and wherever a call begins, the bits are the same."""
    n = 2 * abi.ATTENTION_SPLIT + 70
    with arena() as memory:
        heads = Heads(memory, n, 4, 2, 16, np.float16)
        q = heads.store(level, 0, n)
        for first in (abi.ATTENTION_SPLIT - 1, 2 * abi.ATTENTION_SPLIT - 1, n - 2):
            two = heads.attend(level, q[first : first + 2], first, window)
            expected, size = heads.attention(q[first : first + 2], first, window)
            assert np.all(np.abs(two - expected) <= 2e-6 * size)
            for i in range(2):
                one = q[first + i : first + i + 1]
                for parallel in (False, True):
                    alone = heads.attend(level, one, first + i, window, parallel=parallel)
                    assert np.array_equal(bits(alone[0]), bits(two[i]))


@pytest.mark.parametrize("level", HERE)
def test_attention_to_scores_of_any_size(level: str) -> None:
    with arena() as memory:
        heads = Heads(memory, 130, 2, 1, 32, np.float32)
        q = heads.store(level, 0, 130)
        for factor in (0.0, 1e-30, 1e4, 1e30):
            large = q[-2:] * np.float32(factor)
            y = heads.attend(level, large, 128)
            expected, size = heads.attention(large, 128)
            assert np.all(np.abs(y - expected) <= 2e-6 * size)


@pytest.mark.parametrize("level", HERE)
def test_attention_loses_no_nan_that_it_sees(level: str) -> None:
    with arena() as memory:
        heads = Heads(memory, 70, 1, 1, 16, np.float16)
        q = heads.store(level, 0, 70)
        for cache in (heads.keys[0, 0, 1, :, 3], heads.values[0, 0, 19]):
            before = cache.copy()
            cache[:] = NAN
            assert np.all(np.isnan(heads.attend(level, q[-1:], 69)))
            cache[:] = before
        assert np.all(np.isfinite(heads.attend(level, q[-1:], 69)))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pages are protected through mprotect")
@pytest.mark.skipif(bool(GUARD), reason="this is the guarded run")
@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("level", HERE)
def test_kernels_stay_inside_their_buffers(side: str, level: str) -> None:
    """The other tests once more, with every buffer against a page that cannot be touched."""
    here = Path(__file__)
    files = [str(here), str(here.with_name("test_linear.py"))]
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
