"""The names of a LLaMA's tensors: Hugging Face's and Meta's, in GGUF's terms.

Knows nothing about shapes and bytes.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from edgellama.errors import EdgeLlamaError, ModelFormatError, UnsupportedModelError, shown

LISTED = 5  # names that an error lists at most

_HF_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_HF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_META_OUTER = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
_META_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_LAYER = re.compile(r"(model\.)?layers\.(0|[1-9][0-9]{0,4})\.(.+)\.weight")
_TABLES = re.compile(  # rotary tables that follow from the config
    r"(model\.)?(layers\.[0-9]+\.(self_attn|attention\.inner_attention)\.)?"
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs)"
)
_HINTS = (  # what a surplus tensor's name gives away, and what to do
    (r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv)$", "The weights are quantized"
     "; convert the original checkpoint"),
    (r"lora_|^base_model\.", "This is an adapter; merge it into its base model first"),
    (r"\.bias$", "Biases are not supported; a LLaMA has none"),
    (r"experts|block_sparse_moe", "Mixtures of experts are not supported"),
    (r"^(vision|visual|multi_modal|language_model)", "Only text models are supported"),
)  # fmt: skip


def gguf_names(names: Iterable[str], kind: str, path: Path) -> dict[str, str]:
    """GGUF name -> the checkpoint's own name; `kind` is that of the checkpoint.

    Rotary tables are left out. Raises UnsupportedModelError naming tensors that no LLaMA has,
    ModelFormatError if two names mean the same.
    """
    found: dict[str, str] = {}
    surplus = []
    for name in names:
        if _TABLES.fullmatch(name):
            continue
        translated = gguf_name(name, kind)
        if translated is None:
            surplus.append(name)
        elif translated in found:
            problem = f"both {shown(found[translated])} and {shown(name)} are {translated}"
            raise ModelFormatError(problem, path=path, where=f"tensor {shown(name)}")
        else:
            found[translated] = name
    if surplus:
        raise _not_a_llama(surplus, path)
    return found


def gguf_name(name: str, kind: str) -> str | None:
    """The GGUF name of one tensor, or None for one that a LLaMA does not have."""
    outer, block = (_META_OUTER, _META_BLOCK) if kind == "meta" else (_HF_OUTER, _HF_BLOCK)
    if name in outer:
        return outer[name]
    match = _LAYER.fullmatch(name)
    if match is None or bool(match[1]) == (kind == "meta") or match[3] not in block:
        return None
    return f"blk.{match[2]}.{block[match[3]]}.weight"


def own_name(name: str, kind: str) -> str:
    """What the checkpoint would call a GGUF tensor, for messages about missing ones."""
    outer, block = (_META_OUTER, _META_BLOCK) if kind == "meta" else (_HF_OUTER, _HF_BLOCK)
    for theirs, ours in outer.items():
        if ours == name:
            return theirs
    _, number, part, _ = name.split(".")
    theirs = next(theirs for theirs, ours in block.items() if ours == part)
    prefix = "layers" if kind == "meta" else "model.layers"
    return f"{prefix}.{number}.{theirs}.weight"


def listed(names: Iterable[str]) -> str:
    """The first few names, safe to print."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return ", ".join(shown(name) for name in names[:LISTED]) + more


def _not_a_llama(surplus: list[str], path: Path) -> EdgeLlamaError:
    hint = next((h for pattern, h in _HINTS if re.search(pattern, surplus[0])), None)
    return UnsupportedModelError(
        f"the checkpoint holds tensors that a LLaMA does not have: {listed(surplus)}",
        path=path,
        where=f"tensor {shown(surplus[0])}",
        field="name",
        value=surplus[0],
        hint=hint,
    )
