"""What `transformers` answers for every style of `zoo.py`, in float32: `data/zoo_logits.npz`.

    pip install torch transformers numpy
    python tests/make_zoo_fixture.py [models.json]

With a list of releases as an argument, `data/zoo.json` is made from it first.
"""

import json
import sys
from pathlib import Path

KEPT = (
    *("name", "family", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "bos_token_id"),
    *("eos_token_id", "params_exact", "sliding_window", "max_sequence_length", "custom_rope"),
)


def write_releases(source: Path) -> None:
    models = json.loads(source.read_text("utf-8"))["models"]
    rows = [json.dumps({key: m[key] for key in KEPT if key in m}) for m in models]
    target = Path(__file__).parent / "data" / "zoo.json"
    target.write_text("[\n" + ",\n".join(rows) + "\n]\n", "utf-8")


def logits(config):
    """(positions, vocab_size) in float32, through eager attention."""
    import torch
    import zoo
    from transformers import LlamaForCausalLM, MistralForCausalLM
    from transformers.models.llama import LlamaConfig
    from transformers.models.mistral import MistralConfig

    kinds = {"mistral": (MistralConfig, MistralForCausalLM)}
    make_config, make_model = kinds.get(config["model_type"], (LlamaConfig, LlamaForCausalLM))
    settings = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
    truncated = (settings.get("rope_scaling") or {}).get("type") == "truncate"
    if truncated:
        settings["rope_scaling"] = None
    if settings.get("rope_theta", 0) is None:
        del settings["rope_theta"]
    if settings.get("rope_parameters"):
        del settings["rope_scaling"]
    made = make_config(**settings, attn_implementation="eager")
    model = make_model(made).to(torch.float32).eval()
    state = {name: torch.from_numpy(values) for name, values in zoo.weights(config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    if truncated:
        model.model.rotary_emb.inv_freq = truncate(model.model.rotary_emb.inv_freq)
    with torch.no_grad():
        answer = model(torch.tensor([zoo.tokens(config)])).logits[0]
    return answer[list(zoo.POSITIONS)].numpy()


def truncate(frequencies):
    """Giraffe's basis by its rule: below the cutoff one frequency, below an eighth of it none."""
    import torch
    import zoo

    cutoff = 2 * torch.pi / zoo.GIRAFFE_CUT
    shared = torch.tensor(2 * torch.pi / (16 * zoo.GIRAFFE_CUT))
    kept = torch.where(frequencies < cutoff, shared, frequencies)
    return torch.where(frequencies < cutoff / 8, torch.tensor(0.0), kept)


def main() -> None:
    if len(sys.argv) > 1:
        write_releases(Path(sys.argv[1]))
    import numpy as np
    import zoo

    answers = {name: logits(config) for name, config in zoo.styles().items()}
    np.savez_compressed(zoo.DATA / "zoo_logits.npz", **answers)
    print(f"{len(answers)} styles of {len(zoo.RELEASES)} releases")


if __name__ == "__main__":
    main()
