"""A second opinion on the goldens: the same weights in `transformers`' LlamaForCausalLM.

Rope is `transformers`' own from the rule's parameters, so it checks the frequencies too.
"""

from typing import Any

import numpy as np
import torch

from gpu.decoder import Decoder
from gpu.models import LLAMA3

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@torch.no_grad()
def logits(source: Decoder, ids: list[int]) -> np.ndarray:
    """float32 (tokens, vocab_size) of the weights that `source` holds."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama import LlamaConfig

    config = LlamaConfig(**_settings(source), attn_implementation="eager")
    model = LlamaForCausalLM(config).to(source.device, torch.float32).eval()
    missing, unexpected = model.load_state_dict(_state(source), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    answer = model(torch.tensor([ids], device=source.device)).logits[0]
    return answer.float().cpu().numpy()


def _settings(source: Decoder) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if "rope_freqs.weight" in source.tensors:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        rope = {"rope_type": "llama3"} | dict(zip(names, LLAMA3[:3], strict=True))
        rope["original_max_position_embeddings"] = LLAMA3[3]
    elif source.key("rope.scaling.type", "none") == "yarn":
        rope = {"rope_type": "yarn", "factor": source.key("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = source.key(
            "rope.scaling.original_context_length"
        )
    rope["rope_theta"] = source.key("rope.freq_base", 10000.0)
    return {
        "vocab_size": len(source.weights["token_embd.weight"]),
        "hidden_size": source.dim,
        "intermediate_size": source.key("feed_forward_length"),
        "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.kv_heads,
        "head_dim": source.head_dim,
        "rms_norm_eps": source.eps,
        "max_position_embeddings": source.key("context_length"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in source.weights,
    }


def _state(source: Decoder) -> dict[str, torch.Tensor]:
    state = {
        "model.embed_tokens.weight": source.weights["token_embd.weight"],
        "model.norm.weight": source.weights["output_norm.weight"],
    }
    if "output.weight" in source.weights:
        state["lm_head.weight"] = source.weights["output.weight"]
    for name, weight in source.weights.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, _ = name.split(".")
        halves = part in ("attn_q", "attn_k")
        target = f"model.layers.{layer}.{NAMES[part]}.weight"
        state[target] = _halves(weight, source.head_dim) if halves else weight
    return state


def _halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows from pairs side by side to pairs half a head apart."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
    return heads.transpose(1, 2).reshape(weight.shape)
