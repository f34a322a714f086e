"""What kind of LLaMA a model is: its hyper-parameters, read from GGUF metadata and checked.

Knows nothing about files or tensors' bytes. `rope.py` turns the rope settings into angles,
`weights.py` compares the tensors with the shapes that follow from the config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgellama.errors import ModelConfigError, UnsupportedModelError, shown

ARCHITECTURES = ("llama",)
ROPE_SCALINGS = ("none", "linear", "yarn")

# Limits with at least 8 times the room of any released LLaMA relative.
MOST_LAYERS = 1024
MOST_CONTEXT = 16 * 2**20
MOST_VOCAB = 4 * 2**20
MOST_DIM = 131_072
MOST_FFN = 8 * MOST_DIM


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: which dimensions turn, how fast, and how the context is stretched.

    Sources: RoFormer (arXiv:2104.09864); linear interpolation (arXiv:2306.15595); YaRN
    (arXiv:2309.00071) with the constants of `transformers`; NTK is a larger `freq_base`.
    """

    dim: int  # leading dimensions of each head that turn, in pairs (2i, 2i + 1)
    freq_base: float = 10_000.0
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0  # how many times longer the context was made
    original_context: int = 0  # tokens before stretching; yarn only
    attention_factor: float = 1.0  # multiplies yarn's own scale of cos and sin, 0.1 ln(factor) + 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ext_factor: float = 1.0  # yarn: 0 is plain interpolation, 1 the full ramp


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The hyper-parameters of one decoder; every tensor shape follows from them."""

    vocab_size: int
    n_layers: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    rope: Rope
    norm_eps: float = 1e-5
    tied_output: bool = False
    sliding_window: int | None = None  # a token attends to this many, itself included; None: all
    name: str = ""

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_parameters(self) -> int:
        """Weights of the decoder; a tied head counts once."""
        per_layer = 2 * self.dim * (self.q_dim + self.kv_dim) + 3 * self.dim * self.ffn_dim
        norms = (2 * self.n_layers + 1) * self.dim
        heads = (1 if self.tied_output else 2) * self.vocab_size * self.dim
        return self.n_layers * per_layer + norms + heads


class _Reader:
    """Typed, range-checked access to one architecture's keys, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, path: str | Path | None) -> None:
        self.metadata, self.prefix, self.path = metadata, prefix, path

    def error(self, key: str, value: object, allowed: str) -> ModelConfigError:
        problem = f"{shown(value)} is not allowed; expected {allowed}"
        where = f"key '{key}'"
        return ModelConfigError(
            problem, path=self.path, where=where, field=key, value=value, allowed=allowed
        )

    def missing(self, key: str, allowed: str) -> ModelConfigError:
        return ModelConfigError(
            f"the key is missing; expected {allowed}",
            path=self.path,
            where=f"key '{key}'",
            field=key,
            allowed=allowed,
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        key = f"{self.prefix}.{key}"
        allowed = f"unsigned integer {low}..{high}"
        value = self.metadata.get(key, default)
        if value is None:
            raise self.missing(key, allowed)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{_kind(value)} {shown(value)}", allowed)
        if not low <= value <= high:
            raise self.error(key, value, allowed)
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite float in (low, high]."""
        key = f"{self.prefix}.{key}"
        allowed = f"finite number above {low:g}, up to {high:g}"
        value = self.metadata.get(key, default)
        if value is None:
            raise self.missing(key, allowed)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"{_kind(value)} {shown(value)}", allowed)
        if not (math.isfinite(value) and low < value <= high):
            raise self.error(key, value, allowed)
        return float(value)


def _kind(value: object) -> str:
    kinds = {bool: "bool", int: "integer", float: "float", str: "string"}
    return kinds.get(type(value), "array")


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    vocab_rows: int | None = None,
    tied_output: bool = False,
    path: str | Path | None = None,
) -> ModelConfig:
    """Read the config from GGUF metadata (keys as in the GGUF specification).

    `vocab_rows` is the number of rows of `token_embd.weight`; without it `llama.vocab_size` or
    the tokenizer's length is taken. Raises UnsupportedModelError for another architecture or a
    mixture of experts, ModelConfigError for a key that is missing, mistyped or out of range.
    """
    read = _Reader(metadata, _architecture(metadata, path), path)
    _refuse_experts(read)
    dim = read.integer("embedding_length", 1, MOST_DIM)
    n_heads, n_kv_heads, head_dim = _heads(read, dim)
    name = metadata.get("general.name")
    window = read.integer("attention.sliding_window", 0, MOST_CONTEXT, 0)
    context_length = read.integer("context_length", 1, MOST_CONTEXT)
    return ModelConfig(
        vocab_size=_vocab_size(read, vocab_rows),
        n_layers=read.integer("block_count", 1, MOST_LAYERS),
        dim=dim,
        ffn_dim=read.integer("feed_forward_length", 1, MOST_FFN),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        rope=_rope(read, head_dim, context_length),
        norm_eps=read.number("attention.layer_norm_rms_epsilon", 0.0, 0.1),
        tied_output=tied_output,
        sliding_window=window or None,
        name=name if isinstance(name, str) else "",
    )


def _architecture(metadata: Mapping[str, Any], path: str | Path | None) -> str:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        named = "no architecture" if architecture is None else f"architecture {shown(architecture)}"
        raise UnsupportedModelError(
            f"{named} is not supported; supported: " + ", ".join(ARCHITECTURES),
            path=path,
            where="key 'general.architecture'",
            field="general.architecture",
            value=architecture,
            allowed=", ".join(ARCHITECTURES),
        )
    return str(architecture)


def _vocab_size(read: _Reader, rows: int | None) -> int:
    """The number of logits; `rows` are those of the embedding, which every token must have."""
    tokens = read.metadata.get("tokenizer.ggml.tokens")
    default_vocab = rows or (len(tokens) if isinstance(tokens, list) else None)
    vocab_size = read.integer("vocab_size", 1, MOST_VOCAB, default_vocab)
    if rows is not None and rows != vocab_size:
        key = f"{read.prefix}.vocab_size"
        raise read.error(key, vocab_size, f"{rows}, the rows of token_embd.weight")
    if isinstance(tokens, list) and len(tokens) > vocab_size:  # fewer: the rest is padding
        allowed = f"at most {vocab_size} tokens, the rows of token_embd.weight"
        raise read.error("tokenizer.ggml.tokens", f"{len(tokens)} tokens", allowed)
    return vocab_size


def _refuse_experts(read: _Reader) -> None:
    for key in (f"{read.prefix}.expert_count", f"{read.prefix}.expert_used_count"):
        count = read.metadata.get(key, 0)
        if count == 0:
            continue
        raise UnsupportedModelError(
            f"a mixture of {shown(count)} experts is not supported; only dense models are",
            path=read.path,
            where=f"key '{key}'",
            field=key,
            value=count,
            allowed="0",
        )


def _heads(read: _Reader, dim: int) -> tuple[int, int, int]:
    """(n_heads, n_kv_heads, head_dim), which must divide each other as attention needs."""
    n_heads = read.integer("attention.head_count", 1, MOST_DIM)
    n_kv_heads = read.integer("attention.head_count_kv", 1, MOST_DIM, n_heads)
    if n_kv_heads > n_heads or n_heads % n_kv_heads:
        key = f"{read.prefix}.attention.head_count_kv"
        raise read.error(key, n_kv_heads, f"a divisor of head_count = {n_heads}")
    if f"{read.prefix}.attention.key_length" not in read.metadata and dim % n_heads:
        key = f"{read.prefix}.attention.head_count"
        raise read.error(key, n_heads, f"a divisor of embedding_length = {dim}")
    head_dim = read.integer("attention.key_length", 1, MOST_DIM, dim // n_heads or None)
    value_dim = read.integer("attention.value_length", 1, MOST_DIM, head_dim)
    if value_dim != head_dim:
        key = f"{read.prefix}.attention.value_length"
        raise read.error(key, value_dim, f"{head_dim}, the same as attention.key_length")
    return n_heads, n_kv_heads, head_dim


def _rope(read: _Reader, head_dim: int, context_length: int) -> Rope:
    dim = read.integer("rope.dimension_count", 2, head_dim, head_dim)
    if dim % 2:
        key = f"{read.prefix}.rope.dimension_count"
        raise read.error(key, dim, f"an even number, at most {head_dim}")
    freq_base = read.number("rope.freq_base", 1.0, 1e15, 10_000.0)  # yarn divides by its log
    key = f"{read.prefix}.rope.scaling.type"
    scaling = read.metadata.get(key, "linear")  # as llama.cpp has it; with a factor of 1 none
    if scaling not in ROPE_SCALINGS:
        raise UnsupportedModelError(
            f"rope scaling {shown(scaling)} is not supported; supported: "
            + ", ".join(ROPE_SCALINGS),
            path=read.path,
            where=f"key '{key}'",
            field=key,
            value=scaling,
            allowed=", ".join(ROPE_SCALINGS),
        )
    if scaling == "none":
        return Rope(dim, freq_base)
    if scaling == "linear":
        return _linear_rope(read, dim, freq_base)
    return Rope(
        dim,
        freq_base,
        "yarn",
        read.number("rope.scaling.factor", 0.0, 1e6),
        original_context=read.integer(
            "rope.scaling.original_context_length", 1, MOST_CONTEXT, context_length
        ),
        attention_factor=read.number("rope.scaling.attn_factor", 0.0, 1e3, 1.0),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 0.0, 1e6, 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 0.0, 1e6, 1.0),
        ext_factor=read.number("rope.scaling.yarn_ext_factor", -1e-9, 1.0, 1.0),
    )


def _linear_rope(read: _Reader, dim: int, freq_base: float) -> Rope:
    """The factor's older key is `rope.scale_linear`; a file without either does not scale."""
    older = read.number("rope.scale_linear", 0.0, 1e6, 1.0)
    factor = read.number("rope.scaling.factor", 0.0, 1e6, older)
    return Rope(dim, freq_base, "none" if factor == 1.0 else "linear", factor)
