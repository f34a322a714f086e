"""Every runtime computes the same model: against float64, and against itself, bit by bit.

One routine over all tiny models and weight types. The cpu runtime is compared with a float64
reference that rounds activations and the cache as the kernels do. Then all but a few tokens agree
to 1e-13: a value next to the middle between two codes may be rounded either way, which shows from
that token on.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import split_bytes
from tiny import tiny_config, tiny_weights, write_tiny

import edgellama
from edgellama.config import ModelConfig, Rope
from edgellama.ggml import BY_NAME, FLOATS, RUNNABLE
from edgellama.gguf import open_gguf
from edgellama.graph import Node, decoder
from edgellama.rope import llama3_factors
from edgellama.runtimes import levels
from edgellama.runtimes.base import Options
from edgellama.runtimes.program import product_kernels
from edgellama.runtimes.reference import Array, Reference, ReferenceSession
from edgellama.weights import model_config

Made = Callable[[str, str], Path]
EXACT = 1e-12  # normalized mean square error of float32 arithmetic; measured: up to 3.4e-13
HALF_CACHE = 1e-6  # of keys and values in half precision; measured: up to 1.6e-7
QUANTIZED = 6e-4  # of activations of 8 bits; measured: up to 1.8e-4
KEPT = 1e-8  # of a cache entry rounded the other way; measured: up to 1e-10
MOSTLY = 1e-8  # of the tokens before a code rounded the other way; measured: up to 2e-9
ROUNDED = 1e-4  # of those after it too; measured: up to 2e-5
N = 70  # tokens: more than a chunk of 64 and than a block of the attention

CONFIGS: dict[str, ModelConfig] = {
    "gqa": tiny_config(),
    "mha": tiny_config(n_kv_heads=4),
    "one_kv_head": tiny_config(n_kv_heads=1, n_layers=1),
    "odd_dims": tiny_config(
        dim=72, n_heads=3, n_kv_heads=1, head_dim=20, ffn_dim=40, rope=Rope(20), vocab_size=293
    ),
    "odd_heads": tiny_config(
        dim=96, n_heads=4, n_kv_heads=1, head_dim=20, ffn_dim=160, rope=Rope(20), vocab_size=261
    ),
    "wide": tiny_config(
        dim=256, n_heads=4, n_kv_heads=1, head_dim=64, ffn_dim=256, n_layers=1, rope=Rope(64)
    ),
    "partial_rope": tiny_config(rope=Rope(8)),
    "tied": tiny_config(tied_output=True, vocab_size=291),
    "narrow_ffn": tiny_config(ffn_dim=160, dim=96, n_heads=6, n_kv_heads=3),
    "window": tiny_config(sliding_window=8),
    "linear_rope": tiny_config(rope=Rope(16, scaling="linear", factor=4.0)),
    "yarn": tiny_config(
        rope=Rope(16, scaling="yarn", factor=4.0, original_context=32, attention_factor=0.9)
    ),
    "llama3_rope": tiny_config(rope=Rope(16, 500_000.0)),
}
MIXED = {"blk.0.attn_k": "Q8_0", "blk.0": "Q4_1", "blk.1.ffn_up": "F16", "blk.1": "Q4_0"}
MIXED |= {"token_embd": "Q8_0", "output.weight": "BF16"}
CASES = [(name, kind) for name in CONFIGS for kind in ("F32", "Q4_1")]
CASES.remove(("odd_dims", "Q4_1"))  # its rows are no multiple of a block
CASES += [("gqa", kind) for kind in RUNNABLE if BY_NAME[kind].block <= 32]
CASES += [("wide", kind) for kind in RUNNABLE if BY_NAME[kind].block > 32]
CASES += [("odd_dims", "F16"), ("odd_dims", "BF16"), ("gqa", "mixed"), ("window", "mixed")]
CASES = list(dict.fromkeys(CASES))


def ids(config: ModelConfig, n: int = N, seed: int = 11) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, config.vocab_size, n)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file of a config and a type, written once."""
    folder = tmp_path_factory.mktemp("tiny")

    def made(name: str, kind: str) -> Path:
        path = folder / f"{name}-{kind}.gguf"
        if not path.exists():
            factors = llama3_factors(Rope(16, 500_000.0), 8.0, 1.0, 4.0, 32)
            write_tiny(
                path,
                CONFIGS[name],
                MIXED if kind == "mixed" else kind,
                seed=3,
                rope_factors=factors if name == "llama3_rope" else None,
            )
        return path

    return made


class Rounded(ReferenceSession):
    """The reference, rounding where the cpu runtime rounds."""

    def __init__(self, model: Reference, types: dict[str, str], kv_type: str) -> None:
        super().__init__(model)
        self.kernels = product_kernels(model.graph, types)
        self.kept = {"f16": np.float16, "f32": np.float32}[kv_type]

    def linear(self, node: Node, x: Array) -> Array:
        how, _, kind = self.kernels[node.output].partition(":")
        if kind in FLOATS:
            return super().linear(node, x)
        high, low, scales = split_bytes(x)
        codes = high.astype(np.float64) + (low / 128 if how == "fine" else 0)
        return super().linear(node, (codes * scales[..., None]).reshape(x.shape))

    def _append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        return super()._append(layer, k.astype(self.kept), v.astype(self.kept))


def expected(path: Path, tokens: list[int], kv_type: str) -> Array:
    """float64 logits of every token."""
    with open_gguf(path) as file:
        options = Options(context=N, threads=1, dtype="float64")
        runtime = Reference(file, decoder(model_config(file)), options)
        types = {name: info.type.name for name, info in file.tensors.items()}
        return Rounded(runtime, types, kv_type).forward(tokens, all_logits=True)


def nmse(a: Array, b: Array) -> float:
    """Normalized mean square error of a against b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sum((a - b) ** 2) / np.sum(b**2))


def logits(path: Path, tokens: list[int], **options: Any) -> Array:
    if "runtime" not in options:
        options = {"deterministic": True} | options
    with edgellama.load(path, context=N, **options) as model:
        return model.session().forward(tokens, all_logits=True)


def same(a: Array, b: Array) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


# --- against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", levels.available())
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cpu_against_float64(
    tiny_model: Made,
    name: str,
    kind: str,
    kv_type: str,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGELLAMA_ISA", level)
    path, tokens = tiny_model(name, kind), ids(CONFIGS[name])
    wanted = expected(path, tokens, kv_type)
    found = logits(path, tokens, kv_type=kv_type)
    by_token = [nmse(a, b) for a, b in zip(found, wanted, strict=True)]
    most, mostly = ROUNDED, MOSTLY
    if kind in FLOATS:
        most = mostly = EXACT if kv_type == "f32" else KEPT
    assert nmse(found, wanted) <= most
    assert np.quantile(by_token, 0.1) <= mostly


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_runtime_against_plain_float64(tiny_model: Made, name: str, kind: str) -> None:
    """What rounding activations costs; float32 NumPy rounds only in its arithmetic."""
    path, tokens = tiny_model(name, kind), ids(CONFIGS[name])
    wanted = logits(path, tokens, runtime="reference", dtype="float64")
    assert nmse(logits(path, tokens, runtime="reference"), wanted) <= EXACT
    for deterministic in (True, False):
        found = logits(path, tokens, deterministic=deterministic)
        assert nmse(found, wanted) <= (HALF_CACHE if kind in FLOATS else QUANTIZED)


# --- against itself ------------------------------------------------------------------------------

BITWISE = [
    ("gqa", "Q4_1"),
    ("odd_dims", "F16"),
    ("window", "mixed"),
    ("odd_heads", "Q4_1"),
    ("wide", "Q4_K"),
]


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("level", levels.available())
@pytest.mark.parametrize(("name", "kind"), BITWISE)
def test_the_same_bits_however_tokens_come(
    tiny_model: Made,
    name: str,
    kind: str,
    level: str,
    kv_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill or decode, any chunks, any threads, all logits or the last, fresh or reused."""
    monkeypatch.setenv("EDGELLAMA_ISA", level)
    path, tokens = tiny_model(name, kind), ids(CONFIGS[name])
    wanted = logits(path, tokens, kv_type=kv_type, threads=1)
    for threads in (1, 2, 3):
        options = {"kv_type": kv_type, "threads": threads, "deterministic": True}
        with edgellama.load(path, context=N, **options) as model:
            session = model.session()
            for size in (1, 7, 33, N):
                session.truncate(0)
                for start in range(0, N, size):
                    last = session.forward(tokens[start : start + size])
                    assert same(last, wanted[session.position - 1]), (threads, size, start)
            session.truncate(40)
            session.forward(tokens[:5])
            session.truncate(40)
            assert same(session.forward(tokens[40:], all_logits=True), wanted[40:])
            assert same(model.session().forward(tokens, all_logits=True), wanted)


@pytest.mark.skipif(len(levels.available()) < 3, reason="needs two levels with fused multiply-add")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_levels_with_fused_multiply_add_agree_to_the_bit(
    tiny_model: Made, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = tiny_model(name, kind), ids(CONFIGS[name])
    results = []
    for level in levels.available()[:-1]:
        monkeypatch.setenv("EDGELLAMA_ISA", level)
        results.append(logits(path, tokens))
    for other in results[1:]:
        assert same(other, results[0])


def test_the_same_bits_after_a_cancelled_call(tiny_model: Made) -> None:
    path, tokens = tiny_model("gqa", "Q4_1"), ids(CONFIGS["gqa"])
    wanted = logits(path, tokens)
    with edgellama.load(path, context=N, deterministic=True) as model:
        session, token = model.session(), edgellama.CancelToken()
        session.forward(tokens[:10])
        token.cancel()
        with pytest.raises(edgellama.Cancelled):
            session.forward(tokens[::-1][:50], cancel=token)
        assert same(session.forward(tokens[10:], all_logits=True), wanted[10:])


def test_a_session_that_overflowed_does_no_harm_to_others(tmp_path: Path) -> None:
    """Token 5 drives an FFN whose width is no multiple of 32 to infinity; buffers are shared."""
    config = tiny_config(ffn_dim=40, n_layers=1)
    weights = tiny_weights(config)
    weights["token_embd.weight"][:, 0] = 0
    weights["token_embd.weight"][5] = [1] + [0] * 63
    weights["blk.0.attn_output.weight"][:] = 0  # other tokens keep a zero in column 0
    for name in ("gate", "up"):
        weights[f"blk.0.ffn_{name}.weight"][:, 0] = 3e38
    path = write_tiny(tmp_path / "huge.gguf", config, weights=weights)
    with edgellama.load(path) as model:
        healthy = model.session().forward([1])
        assert np.all(np.isfinite(healthy))
        with suppress(edgellama.NonFiniteError):
            assert not np.all(np.isfinite(model.session().forward([1, 5, 5])))
        assert same(model.session().forward([1]), healthy)
