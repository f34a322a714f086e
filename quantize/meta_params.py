"""Which model a `params.json` describes: checkpoints as Meta, and Mistral, publish them.

The file says less than a `config.json` does: no context length, no factor of the rope scaling, and
often no size of the vocabulary. What the tensors do not tell follows from which release has such
parameters, with a note. Source: the reference code of each release (`ModelArgs`). Knows nothing
about tensors but the rows of the embedding.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.config import MOST_CONTEXT, MOST_DIM, MOST_FFN, MOST_LAYERS, MOST_VOCAB, Rope
from edgellama.quantize.architectures import (
    LARGEST_EPS,
    SMALLEST_EPS,
    general_keys,
    llama_keys,
    window_note,
)
from edgellama.quantize.fields import Fields, spelled
from edgellama.quantize.rope_settings import LARGEST_BASE, LARGEST_FACTOR, RopeSettings
from edgellama.rope import llama3_factors

SCALED_CONTEXT, SCALED_ORIGINAL = 131_072, 8192  # Llama 3.1 and 3.2
SMALL_DIM = 3072  # up to here Llama 3.2 (factor 32), above Llama 3.1 (factor 8)
_REFUSED = {  # what the newer `ModelArgs` can hold beside a dense LLaMA
    "quantization_args": "quantized weights (SpinQuant, QLoRA)",
    "lora_args": "adapters",
    "moe_args": "mixtures of experts",
    "moe": "mixtures of experts",
    "vision_args": "images",
}


def meta_metadata(
    params: Mapping[str, Any], folder: Path, notes: list[str], *, vocab_rows: int
) -> dict[str, Any]:
    """GGUF's `general.*` and `llama.*` keys for a parsed `params.json`; notes are appended.

    `vocab_rows` are those of `tok_embeddings.weight`. Raises ModelConfigError naming the key for a
    wrong value, UnsupportedModelError for what is no dense LLaMA.
    """
    fields = Fields(params, folder / "params.json")
    _refuse(fields)
    dim, head_dim, n_heads, n_kv_heads = _heads(fields)
    rope = meta_rope(params, folder)
    notes += rope.notes
    keys = {
        "vocab_size": _vocab_size(fields, vocab_rows),
        "context_length": rope.context,
        "embedding_length": dim,
        "block_count": fields.integer("n_layers", 1, MOST_LAYERS),
        "feed_forward_length": _ffn_dim(fields, dim),
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": fields.number("norm_eps", SMALLEST_EPS, LARGEST_EPS),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if "sliding_window" in fields:
        window = fields.integer("sliding_window", 1, MOST_CONTEXT)
        keys["attention.sliding_window"] = window
        notes.append(window_note(window))
    return general_keys(folder) | llama_keys(keys, rope, head_dim)


def meta_rope(params: Mapping[str, Any], folder: Path) -> RopeSettings:
    """The rope settings and the context length of the release that has such parameters."""
    fields = Fields(params, folder / "params.json")
    _, head_dim, _, _ = _heads(fields)
    base = fields.number("rope_theta", 1.0, LARGEST_BASE, 10_000.0)
    if not fields.flag("use_scaled_rope"):
        context, release = _release(fields, base)
        note = f"params.json has no context length; {context} tokens taken, as {release} has"
        return RopeSettings(base, context, notes=[note])
    small = fields.integer("dim", 1, MOST_DIM) <= SMALL_DIM
    factor = fields.number("rope_scaling_factor", 0.0, LARGEST_FACTOR, 32.0 if small else 8.0)
    high = fields.number("rope_high_freq_factor", 1.0, LARGEST_FACTOR, 4.0)
    release = "Llama 3.2" if small else "Llama 3.1"
    note = (
        f"params.json has no context length; {SCALED_CONTEXT} tokens and a rope scaling of "
        f"{factor:g} taken, as {release} has"
    )
    factors = llama3_factors(Rope(head_dim, base), factor, 1.0, high, SCALED_ORIGINAL)
    return RopeSettings(base, SCALED_CONTEXT, factors=factors, notes=[note])


def _refuse(fields: Fields) -> None:
    for key, what in _REFUSED.items():
        if fields.get(key):
            hint = "Convert the original checkpoint"
            raise fields.unsupported(key, f"{key}: {what} are not supported", "none", hint)
    for key in fields.values:
        if key.startswith("vision_") and fields.get(key) not in (None, -1, 0, False):
            problem = f"{key} = {spelled(fields.get(key))}: images are not supported"
            raise fields.unsupported(key, problem, "a text model")


def _heads(fields: Fields) -> tuple[int, int, int, int]:
    """(dim, head_dim, n_heads, n_kv_heads)."""
    dim = fields.integer("dim", 1, MOST_DIM)
    n_heads = fields.integer("n_heads", 1, MOST_DIM)
    n_kv_heads = fields.integer("n_kv_heads", 1, n_heads, n_heads)
    if n_heads % n_kv_heads:
        raise fields.error("n_kv_heads", f"a divisor of n_heads = {n_heads}")
    head_dim = fields.integer("head_dim", 1, MOST_DIM, dim // n_heads or None)
    if "head_dim" not in fields and dim % (2 * n_heads):
        raise fields.error("n_heads", f"a divisor of dim / 2 = {dim / 2:g}")
    if head_dim % 2:
        raise fields.error("head_dim", "an even number: rope turns dimensions in pairs")
    return dim, head_dim, n_heads, n_kv_heads


def _ffn_dim(fields: Fields, dim: int) -> int:
    """Two thirds of 4 * dim, times a multiplier, up to a multiple; `hidden_dim` in Mistral's."""
    if "hidden_dim" in fields:
        return fields.integer("hidden_dim", 1, MOST_FFN)
    width = 2 * (4 * dim) // 3
    if "ffn_dim_multiplier" in fields:
        width = int(fields.number("ffn_dim_multiplier", 0.0, 64.0) * width)
    multiple = fields.integer("multiple_of", 1, MOST_FFN, 256)
    return multiple * math.ceil(width / multiple)


def _vocab_size(fields: Fields, vocab_rows: int) -> int:
    """-1 or absent: as many as the embedding has rows."""
    if fields.get("vocab_size") in (None, -1):
        return vocab_rows
    return fields.integer("vocab_size", 1, MOST_VOCAB)


def _release(fields: Fields, base: float) -> tuple[int, str]:
    """(context length, release). `norm_eps` tells LLaMA from Llama 2, but for the 65B model."""
    if "max_seq_len" in fields and fields.integer("max_seq_len", 1, MOST_CONTEXT) > 2048:
        return fields.integer("max_seq_len", 1, MOST_CONTEXT), "max_seq_len"
    if "hidden_dim" in fields:
        return 32_768, "Mistral 7B"
    if base == 1_000_000.0:
        return 16_384, "Code Llama"
    if base == 500_000.0:
        return 8192, "Llama 3"
    largest = fields.get("dim") == 8192 and "n_kv_heads" not in fields
    if fields.number("norm_eps", SMALLEST_EPS, LARGEST_EPS) < 1e-5 or largest:
        return 2048, "LLaMA"
    return 4096, "Llama 2"
