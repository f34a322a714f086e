"""The kernels of rope and attention against slow twins, at every level this machine has."""

import numpy as np
import pytest
from checked import HERE, Arena, Array, arena, compiled, run

from edgellama.runtimes import abi, attention_block, memory
from edgellama.runtimes.places import attention_bytes, part_bytes
from edgellama.runtimes.repack import padded


def bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint32)


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
        needed = attention_bytes(group, self.head_dim)
        state = self.state(start, self.memory.new((2, padded(needed, 64))))
        state |= {abi.SPLITS: splits, abi.PARALLEL: parallel_splits, abi.N_TOKENS: n}
        numbers = (self.kv_heads, group, self.head_dim, *self.where()[1:])
        arguments = (source, stride, parts, size, *numbers, self.head_dim**-0.5, window)
        units = -(-n // abi.ATTENTION_TOKENS) * self.kv_heads * parallel_splits
        kernel = "attention:f16" if self.half else "attention:f32"
        run(self.memory, level, kernel, arguments, units, state, cuts=[units // 2])
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
    shapes = [(2, 2), (4, 1)] if window == 0 else [(6, 2)]
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
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_queries_come_to_the_same_bits_in_any_company(level: str, dtype: type, group: int) -> None:
    """One to seven tokens at once, whose heads go four by four, against each by itself."""
    n = 67
    with arena() as memory:
        heads = Heads(memory, n, 2 * group, 2, 48, dtype)
        q = heads.store(level, 0, n)
        expected, size = heads.attention(q, 0)
        for first, window in ((60, 0), (0, 0), (61, 5)):
            alone = [heads.attend(level, q[i : i + 1], i, window)[0] for i in range(first, n)]
            assert window or np.all(
                np.abs(np.array(alone) - expected[first:]) <= 2e-6 * size[first:]
            )
            for count in range(2, 8):
                together = heads.attend(level, q[first : first + count], first, window)
                assert np.array_equal(bits(together), bits(np.array(alone[: len(together)])))


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
        ones = np.full_like(q[-2:], np.sqrt(32))
        for factor in (0.0, 1e-30, 1e4, 1e30):
            large = q[-2:] * np.float32(factor)
            y = heads.attend(level, large, 128)
            expected, size = heads.attention(large, 128)
            assert np.all(np.abs(y - expected) <= 2e-6 * size)
        for rise in (0.1, 3, 9, 50):  # every block's scores a little or much above the one before
            heads.keys[..., :, :] = 0
            steps = np.arange(3, dtype=np.float32)[:, None, None] * np.float32(rise)
            heads.keys[:, 0, :, 0] = np.minimum(steps, 100)
            y = heads.attend(level, ones, 128)
            expected, size = heads.attention(ones, 128)
            assert np.all(np.abs(y - expected) <= 2e-6 * size)


def _exp2(x: int, y: int, n: int) -> None:
    for i in range(0, n, 16):
        memory.store_f32x16(y + i * 4, attention_block.exp2(memory.load_f32x16(x + i * 4)))


@pytest.mark.parametrize("level", HERE)
def test_powers_of_two(level: str) -> None:
    edges = np.array([0, -0.0, 8, -0.5, -125.4, -127, -1e38, -np.inf, np.nan], np.float32)
    x = np.concatenate([np.linspace(-126, 8, 8183), edges]).astype(np.float32)
    assert len(x) % 16 == 0
    with arena() as room:
        source, out = room.copy(x), room.new(len(x), np.float32)
        compiled(level, "_exp2", _exp2)(source.ctypes.data, out.ctypes.data, len(x))
        expected = np.exp2(x.astype(np.float64))
        normal = x >= -126
        assert np.all(np.abs(out - expected)[normal] <= 2.4e-7 * expected[normal])
        assert np.all(out[-4:-1] == 0.0) and np.isnan(out[-1])


@pytest.mark.parametrize("level", HERE)
def test_attention_loses_no_nan_that_it_sees(level: str) -> None:
    with arena() as memory:
        heads = Heads(memory, 70, 1, 1, 16, np.float16)
        q = heads.store(level, 0, 70)
        for cache in (heads.keys[0, 0, 1, :, 3], heads.values[0, 0, 19]):
            before = cache.copy()
            cache[:] = np.nan
            assert np.all(np.isnan(heads.attend(level, q[-1:], 69)))
            cache[:] = before
        assert np.all(np.isfinite(heads.attend(level, q[-1:], 69)))
