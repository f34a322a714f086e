"""Keys and values kept as Q8_0: a slow twin, and the same bits however they are computed."""

from pathlib import Path

import numpy as np
import pytest
from checked import HERE, Arena, Array, arena, run
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.runtimes import abi
from edgellama.runtimes.places import part_bytes

KIND = abi.KV_Q8_0


def rounded(x: Array) -> Array:
    """The slow twin of keeping: (tokens, columns) in blocks of 32 with an f16 scale each."""
    wide = np.zeros((len(x), -(-x.shape[1] // 32), 32), np.float32)
    wide.reshape(len(x), -1)[:, : x.shape[1]] = x
    scales = (np.abs(wide).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)
    wide_scales = scales.astype(np.float32)
    inverse = np.divide(1, wide_scales, out=np.zeros_like(wide_scales), where=wide_scales > 0)
    codes = np.rint(wide * inverse.astype(np.float32))
    return (codes * wide_scales).reshape(len(x), -1)[:, : x.shape[1]].astype(np.float64)


def attend(memory: Arena, level: str, q: Array, k: Array, v: Array) -> Array:
    """One head, no rotation: keep k and v, then the last token's attention to all of them."""
    n, head_dim = k.shape
    block = 4 * abi.key_bytes(KIND, head_dim) + 64 * abi.value_bytes(KIND, head_dim)
    cache = memory.new((-(-n // 64), block))
    cache[:] = 0x7F  # stale bytes
    wide = memory.copy(np.concatenate([np.broadcast_to(q, k.shape), k, v], axis=1))
    angles = memory.new((n, head_dim // 2, 2), np.float32)
    angles[..., 0], angles[..., 1] = 1, 0
    scratch = memory.new((2, 16384))
    state: dict[int, int | Array] = {abi.CACHE: cache, abi.ANGLES: angles, abi.START: 0}
    state |= {abi.SCRATCH: scratch, abi.SCRATCH_BYTES: 16384, abi.N_TOKENS: 1}
    at, step = int(wide.ctypes.data), head_dim * 4
    where = (KIND, 0, block)
    arguments = (at, at + step, at + 2 * step, 3 * step, 1, 1, head_dim, head_dim // 2, *where)
    run(memory, level, "rope", arguments, 2 * n, state, cuts=[n])
    out, size = memory.new((1, head_dim), np.float32), part_bytes(head_dim)
    parts = memory.new(size)
    state |= {abi.START: n - 1, abi.SPLITS: -(-n // abi.ATTENTION_SPLIT), abi.PARALLEL: 1}
    arguments = (at, step, parts, size, 1, 1, head_dim, *where[1:], head_dim**-0.5, 0)
    run(memory, level, "attention:q8_0", arguments, 1, state)
    run(memory, level, "merge", (parts, size, out, step, 1, head_dim), 1, state)
    return out[0]


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("head_dim", [16, 20, 32, 64, 100])
@pytest.mark.parametrize("n", [1, 17, 64, 200])
def test_attention_over_rounded_keys_and_values(level: str, head_dim: int, n: int) -> None:
    rng = np.random.default_rng(n)
    q, k, v = (rng.standard_normal((m, head_dim), np.float32) for m in (1, n, n))
    k[0], v[n // 2] = 0, 0  # scales of zero
    scores = rounded(k) @ q[0].astype(np.float64) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    with arena() as memory:
        y = attend(memory, level, q, k, v)
    assert np.all(np.abs(y - weights @ rounded(v)) <= 3e-6 * (weights @ np.abs(v)).max() + 1e-12)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(head_dim=20, dim=80, context_length=256)
    return write_tiny(tmp_path_factory.mktemp("q8") / "tiny.gguf", config, "F32")


def logits(path: Path, ids: list[int], chunk: int, threads: int = 2, kv: str = "q8_0") -> Array:
    with edgellama.load(path, threads=threads, kv_type=kv) as model:
        session = model.session()
        for start in range(0, len(ids), chunk):
            last = session.forward(ids[start : start + chunk])
    return last


def test_same_bits_and_near_an_exact_cache(path: Path) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(3, 288, 150)]
    whole = logits(path, ids, 150)
    for chunk, threads in ((1, 2), (7, 1), (64, 3)):
        assert logits(path, ids, chunk, threads).tobytes() == whole.tobytes()
    exact = logits(path, ids, 150, kv="f32")
    error = float(((whole - exact) ** 2).sum() / (exact**2).sum())
    assert 0 < error <= 1e-3  # measured: 3e-5


def test_it_takes_half_of_half_precision(path: Path) -> None:
    sizes = {}
    for kv in ("f32", "f16", "q8_0"):
        with edgellama.load(path, kv_type=kv, context=256) as model:
            sizes[kv] = model.info.memory["kv_cache"]
    assert sizes["q8_0"] < sizes["f16"] < sizes["f32"]
