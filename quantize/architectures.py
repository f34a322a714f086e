"""Which model a `config.json` describes, in GGUF's terms; what is not converted is refused.

Sources: the `llama` and `mistral` configurations of `transformers`, the GGUF specification. Knows
nothing about tensors; `params.json` is the concern of `meta_params.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.config import MOST_CONTEXT, MOST_DIM, MOST_FFN, MOST_LAYERS, MOST_VOCAB
from edgellama.errors import shown
from edgellama.quantize.fields import Fields, spelled
from edgellama.quantize.rope_settings import RopeSettings, rope_settings

# `model_type`, and the class that each must name, in all spellings that were published.
CLASSES = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "LlaMAForCausalLM"),
    "mistral": ("MistralForCausalLM",),
    "longllama": ("LongLlamaForCausalLM",),
}
DTYPES = ("float32", "float16", "bfloat16", "auto")  # only checked: the tensors say what they are
LONGLLAMA_CONTEXT = 2048  # tokens its memory layers see as plain attention
MISTRAL_WINDOW = 4096  # when `sliding_window` is absent, as `transformers` has it
SMALLEST_EPS, LARGEST_EPS = 0.0, 0.0999  # float32 would round 0.1 up, out of range
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def hf_metadata(config: Mapping[str, Any], folder: Path, notes: list[str]) -> dict[str, Any]:
    """GGUF's `general.*` and `llama.*` keys for a parsed `config.json`; notes are appended.

    Raises ModelConfigError naming the key for a wrong value, UnsupportedModelError for what is no
    dense LLaMA.
    """
    fields = Fields(config, folder / "config.json")
    return _metadata(fields, folder, hf_rope(config, folder), notes)


def hf_rope(config: Mapping[str, Any], folder: Path) -> RopeSettings:
    """The rope settings and the context length that the config means."""
    fields = Fields(config, folder / "config.json")
    kind = _model_type(fields, [])
    default = fields.integer("max_sequence_length", 1, MOST_CONTEXT, 2048)
    context = fields.integer("max_position_embeddings", 1, MOST_CONTEXT, default)
    settings = rope_settings(fields, _heads(fields)[2], context)
    if kind == "longllama":
        settings.context = min(settings.context, LONGLLAMA_CONTEXT)
    if "max_sequence_length" in fields and settings.context < default:
        settings.context = default
    return settings


def is_tied(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the head is said to be the embedding."""
    return Fields(config, folder / "config.json").flag("tie_word_embeddings")


def _metadata(fields: Fields, folder: Path, rope: RopeSettings, notes: list[str]) -> dict[str, Any]:
    kind = _model_type(fields, notes)
    _refuse(fields)
    vocab_size = fields.integer("vocab_size", 1, MOST_VOCAB)
    _check_special_ids(fields, vocab_size)
    n_heads, n_kv_heads, head_dim = _heads(fields)
    keys: dict[str, Any] = {
        "vocab_size": vocab_size,
        "context_length": rope.context,
        "embedding_length": fields.integer("hidden_size", 1, MOST_DIM),
        "block_count": fields.integer("num_hidden_layers", 1, MOST_LAYERS),
        "feed_forward_length": fields.integer("intermediate_size", 1, MOST_FFN),
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.layer_norm_rms_epsilon": _epsilon(fields, notes),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    window = _window(fields, kind, notes)
    if window is not None:
        keys["attention.sliding_window"] = window
        notes.append(window_note(window))
    notes += rope.notes
    return general_keys(folder) | llama_keys(keys, rope, head_dim)


def general_keys(folder: Path) -> dict[str, Any]:
    """`general.*`: the folder's name is the model's; paths in a config are nobody's business."""
    name = folder.resolve().name.encode("utf-8", "replace").decode()
    return {"general.architecture": "llama", "general.type": "model", "general.name": name}


def llama_keys(keys: dict[str, Any], rope: RopeSettings, head_dim: int) -> dict[str, Any]:
    rope_keys = {"dimension_count": head_dim, "freq_base": rope.freq_base, **rope.keys}
    keys = keys | {f"rope.{key}": value for key, value in rope_keys.items()}
    return {f"llama.{key}": value for key, value in keys.items()}


def window_note(window: int) -> str:
    return f"attention looks back {window} tokens (sliding_window); llama.cpp ignores it"


def _model_type(fields: Fields, notes: list[str]) -> str:
    """ "llama", "mistral" or "longllama", by `model_type` and `architectures`."""
    classes = fields.get("architectures")
    if classes is None:
        classes = []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise fields.error("architectures", "a list of class names")
    kind = fields.text("model_type") or _kind_of(classes)
    supported = ", ".join(CLASSES)
    if kind is None or kind not in CLASSES:
        named = f"model_type {spelled(kind)}" if kind else "no model_type"
        problem = f"{named} is not supported; supported: {supported}"
        raise fields.unsupported("model_type", problem, supported)
    if classes and not set(classes) & set(CLASSES[kind]):
        problem = f"architecture {shown(classes[0])} is not supported"
        raise fields.unsupported("architectures", problem, ", ".join(CLASSES[kind]))
    if kind == "longllama":
        notes.append(
            f"LongLLaMA is converted as plain LLaMA for {LONGLLAMA_CONTEXT} tokens: its memory "
            "layers are code of its own, which is not run"
        )
    elif "auto_map" in fields:
        notes.append("the checkpoint brings custom code (auto_map), which is not run")
    return kind


def _kind_of(classes: list[str]) -> str | None:
    return next((kind for kind, names in CLASSES.items() if set(names) & set(classes)), None)


def _refuse(fields: Fields) -> None:
    """What would change the model's output, and is not part of a dense LLaMA."""
    activation = fields.text("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        problem = f"activation {spelled(activation)} is not supported; supported: silu"
        raise fields.unsupported("hidden_act", problem, "silu")
    for key in ("attention_bias", "mlp_bias", "qkv_bias", "use_bias"):
        if fields.flag(key):
            problem = f"{key} = true: biases are not supported; a LLaMA has none"
            raise fields.unsupported(key, problem, "false")
    for key in _EXPERTS:
        if fields.get(key):
            problem = f"{key} = {spelled(fields.get(key))}: mixtures of experts are not supported"
            raise fields.unsupported(key, problem, "a dense model")
    key = "dtype" if "dtype" in fields else "torch_dtype"
    dtype = fields.text(key)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        problem = f"{key} = {spelled(dtype)} is not supported; supported: {', '.join(DTYPES)}"
        raise fields.unsupported(key, problem, ", ".join(DTYPES))


def _heads(fields: Fields) -> tuple[int, int, int]:
    """(n_heads, n_kv_heads, head_dim)."""
    dim = fields.integer("hidden_size", 1, MOST_DIM)
    n_heads = fields.integer("num_attention_heads", 1, MOST_DIM)
    n_kv_heads = fields.integer("num_key_value_heads", 1, n_heads, n_heads)
    if n_heads % n_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
    if "head_dim" not in fields and dim % n_heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size = {dim}")
    head_dim = fields.integer("head_dim", 1, MOST_DIM, dim // n_heads or None)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number: rope turns dimensions in pairs")
    return n_heads, n_kv_heads, head_dim


def _epsilon(fields: Fields, notes: list[str]) -> float:
    if "rms_norm_eps" not in fields:
        notes.append("rms_norm_eps is missing; 1e-06 taken, as transformers does")
    return fields.number("rms_norm_eps", SMALLEST_EPS, LARGEST_EPS, 1e-6)


def _window(fields: Fields, kind: str, notes: list[str]) -> int | None:
    """Mistral's sliding window: a token attends to so many, itself included."""
    if kind != "mistral" or not fields.flag("use_sliding_window", True):
        return None
    if "sliding_window" not in fields.values:
        notes.append(f"sliding_window is missing; {MISTRAL_WINDOW} taken, as transformers does")
        return MISTRAL_WINDOW
    if fields.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", 1, MOST_CONTEXT)


def _check_special_ids(fields: Fields, vocab_size: int) -> None:
    """Begin and end of text: an id, a list of ids or null, each with a row in the embedding."""
    for key in ("bos_token_id", "eos_token_id"):
        value = fields.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        good = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if not good or any(i >= vocab_size for i in ids):
            allowed = f"integer 0..{vocab_size - 1}, a list of such, or null"
            raise fields.error(key, allowed)
