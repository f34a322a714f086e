"""Seeded tiny models, written with the `gguf` package so that our reader meets another's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import numpy as np

from edgellama.config import ModelConfig, Rope
from edgellama.ggml import BY_NAME, HALVES
from edgellama.weights import expected_shapes

UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6  # token types of the GGUF specification
INVENTED = ("IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # gguf has no encoder for them
PIECES = ("▁the", "▁a", "▁and", "ing", "er", "▁t", "he", "in", "on", "▁")


def tiny_config(**overrides: Any) -> ModelConfig:
    """A config of two small layers; `rope` defaults to all dimensions of a head."""
    config = ModelConfig(
        vocab_size=288,
        n_layers=2,
        dim=64,
        ffn_dim=96,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        context_length=128,
        rope=Rope(overrides.get("head_dim", 16)),
        name="tiny",
    )
    return replace(config, **overrides)


def vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, types): three special tokens, 256 bytes, then normal pieces up to `size`."""
    assert size >= 259, size
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    normal = [*PIECES, *letters, *(a + b for a in letters for b in letters)]
    normal = list(dict.fromkeys(normal))
    n_normal = size - 259
    normal += [f"filler{i}" for i in range(n_normal - len(normal))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += normal[:n_normal]
    scores = [0.0] * 259 + [-1.0 - i for i in range(n_normal)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * n_normal
    return pieces, scores, types


def tiny_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by name: norms near 1, matrices N(0, 1/k), so activations stay O(1)."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            weights[name] = 1 + np.float32(0.1) * values
        elif name == "token_embd.weight" and not config.tied_output:
            weights[name] = values
        else:
            weights[name] = values / np.float32(np.sqrt(shape[1]))
    return weights


def encoded(kind: str, values: np.ndarray) -> np.ndarray:
    """`values` as a file holds them, for types that the `gguf` package can write.

    For the others, any legal bits whose values spread as wide as `values` do.
    """
    form = gguf.GGMLQuantizationType[kind]
    if kind not in INVENTED:
        return gguf.quants.quantize(values.astype(np.float32), form)
    rows, columns = values.shape
    size = columns // BY_NAME[kind].block * BY_NAME[kind].size
    raw = np.random.default_rng(crc32(values.tobytes())).integers(0, 256, (rows, size), np.uint8)
    blocks = raw.reshape(-1, BY_NAME[kind].size)
    _set_scales(kind, blocks, 1.0)
    spread = gguf.quants.dequantize(raw, form).std()
    _set_scales(kind, blocks, float(values.std() / spread))
    return raw


def _set_scales(kind: str, blocks: np.ndarray, scale: float) -> None:
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)


def write_tiny(
    path: str | Path,
    config: ModelConfig | None = None,
    types: str | dict[str, str] = "F32",
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    rope_factors: list[float] | None = None,
    weights: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model of `config`; the same arguments give the same bytes.

    `types` is one type name for all matrices, or a mapping from a tensor name's prefix to a type
    (the longest prefix wins; F32 without one). Norms are F32 unless a prefix names one. A row that
    is no multiple of the type's block becomes F16. `metadata` adds keys or replaces them; None as
    a value leaves the key out. `weights` replaces some of the seeded values.
    """
    config = config or tiny_config()
    path = Path(path)
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, _keys(config) | _tokenizer_keys(config.vocab_size) | (metadata or {}))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    for name, values in (tiny_weights(config, seed) | (weights or {})).items():
        kind = _type_of(name, values, types)
        writer.add_tensor(name, encoded(kind.name, values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type_of(
    name: str, values: np.ndarray, types: str | dict[str, str]
) -> gguf.GGMLQuantizationType:
    if isinstance(types, str):
        chosen = "F32" if values.ndim == 1 else types
    else:
        prefixes = [prefix for prefix in types if name.startswith(prefix)]
        chosen = types[max(prefixes, key=len)] if prefixes else "F32"
        if values.ndim == 1 and name not in prefixes:
            chosen = "F32"
    if values.shape[-1] % BY_NAME[chosen].block:
        chosen = "F16"
    return gguf.GGMLQuantizationType[chosen]


def _keys(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.name": config.name,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.rope.dim,
        "llama.rope.freq_base": config.rope.freq_base,
    }
    if config.dim != config.n_heads * config.head_dim:
        keys["llama.attention.key_length"] = config.head_dim
        keys["llama.attention.value_length"] = config.head_dim
    if config.sliding_window is not None:
        keys["llama.attention.sliding_window"] = config.sliding_window
    return keys | _rope_keys(config.rope)


def _rope_keys(rope: Rope) -> dict[str, Any]:
    if rope.scaling == "none":
        return {}
    keys: dict[str, Any] = {
        "llama.rope.scaling.type": rope.scaling,
        "llama.rope.scaling.factor": float(rope.factor),
    }
    if rope.scaling == "yarn":
        keys |= {
            "llama.rope.scaling.original_context_length": rope.original_context,
            "llama.rope.scaling.attn_factor": float(rope.attention_factor),
            "llama.rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "llama.rope.scaling.yarn_beta_slow": float(rope.beta_slow),
            "llama.rope.scaling.yarn_ext_factor": float(rope.ext_factor),
        }
    return keys


def _tokenizer_keys(vocab_size: int) -> dict[str, Any]:
    pieces, scores, types = vocabulary(vocab_size)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _write_keys(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
