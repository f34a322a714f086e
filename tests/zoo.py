"""Every published LLaMA relative as a tiny model: its config's exact style, seeded weights.

`data/zoo.json` holds what the releases' configs say. A style is a tiny config; releases whose
tiny configs are equal share it. `make_zoo_fixture.py` computes what `transformers` answers.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

DATA = Path(__file__).parent / "data"
RELEASES: list[dict[str, Any]] = json.loads((DATA / "zoo.json").read_text("utf-8"))
LENGTH = 48  # tokens
POSITIONS = (0, 15, 47)  # whose logits are kept
LAYERS = 2
GIRAFFE_CUT = 100  # Giraffe's truncated basis: 3 of 8 pairs stay, 2 are shared, 3 stand still

_OLD = ("llama-1", "openllama", "alpaca", "vicuna", "koala", "wizardlm", "belle", "longllama")


def published_config(release: dict[str, Any]) -> dict[str, Any]:
    """The release's `config.json` in full size, without keys that its age did not know."""
    kind = release["model_type"]
    classes = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    config = {
        "architectures": [classes.get(kind, "LongLlamaForCausalLM")],
        "model_type": kind,
        "hidden_act": release["hidden_act"],
        "torch_dtype": "float16",
        "use_cache": True,
        **{key: release[key] for key in _COPIED},
    }
    for key in ("sliding_window", "max_sequence_length"):
        if key in release:
            config[key] = release[key]
    old = release["family"] in _OLD and release["rope_scaling"] is None
    if not old:
        for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias"):
            config[key] = release[key]
    elif release["num_key_value_heads"] != release["num_attention_heads"]:
        config["num_key_value_heads"] = release["num_key_value_heads"]
    if old and release["rope_theta"] != 10000.0:
        config["rope_theta"] = release["rope_theta"]
    if kind == "longllama":
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling_longllama.X"}, "mem_layers": [6]}
    if "custom_rope" in release:
        config["rope_scaling"] = {"type": "truncate", "t": GIRAFFE_CUT}
    if release["family"].startswith("llama-3") or release["family"] == "smollm2":
        config["head_dim"] = release["head_dim"]
    return config


_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "max_position_embeddings", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id"),
)


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with few and small heads: what is odd about it stays odd."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    group = heads // kv_heads
    few = {1: 4 if kv_heads % 3 else 3, 3: 3, 16: 1}.get(group, 2)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    small = {128: 16, 64: 8}.get(head_dim, head_dim)
    if head_dim == 100:  # stays: no power of two divides it far
        few = 2
    hidden = few * group * small
    width = config["intermediate_size"] * hidden // config["hidden_size"] // 8 * 8
    vocab_size = 288 + config["vocab_size"] % 32
    made = config | {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": few * group,
        "bos_token_id": _tiny_id(config["bos_token_id"], vocab_size),
        "eos_token_id": _tiny_id(config["eos_token_id"], vocab_size),
    }
    if "num_key_value_heads" in config:
        made["num_key_value_heads"] = few
    if "head_dim" in config:
        made["head_dim"] = small
    if config.get("sliding_window"):
        made["sliding_window"] = 16  # shorter than the texts here
    if (config.get("rope_scaling") or {}).get("type") == "dynamic":
        made["max_position_embeddings"] = LENGTH // int(config["rope_scaling"]["factor"])
    return made


def _tiny_id(value: Any, vocab_size: int) -> Any:
    if isinstance(value, list):
        return [_tiny_id(item, vocab_size) for item in value]
    return value if value is None or value < vocab_size else vocab_size - 1 - value % 8


_LLAMA2 = next(release for release in RELEASES if release["name"] == "Llama-2 7B")
EXTRAS = {  # what relatives beyond the list do
    "yarn": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "finetuned": True,
        },
        "max_position_embeddings": 65536,
    },
    "yarn with every setting": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 0.9,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
        },
        "max_position_embeddings": 4096,
    },
    "rope_parameters": {
        "rope_parameters": {"rope_theta": 2000.0, "rope_type": "linear", "factor": 2.0},
        "rope_scaling": None,
        "rope_theta": None,
    },
    "head_dim other than the quotient": {"head_dim": 12, "num_key_value_heads": 8},
}


@cache
def styles() -> dict[str, dict[str, Any]]:
    """Tiny configs by the name of the first release that has them, then the extras.

    Special tokens' ids do not count as a difference: no logit depends on them.
    """
    firsts: dict[str, str] = {}
    for release in RELEASES:
        firsts.setdefault(_key(release), release["name"])
    by_name = {release["name"]: release for release in RELEASES}
    found = {name: tiny(published_config(by_name[name])) for name in firsts.values()}
    return found | {name: _extra(changes) for name, changes in EXTRAS.items()}


def style_of(release: dict[str, Any]) -> str:
    """The name of the style that a release shares."""
    return next(other["name"] for other in RELEASES if _key(other) == _key(release))


def _key(release: dict[str, Any]) -> str:
    config = tiny(published_config(release)) | {"bos_token_id": 1, "eos_token_id": 2}
    return json.dumps(config, sort_keys=True)


def _extra(changes: dict[str, Any]) -> dict[str, Any]:
    return tiny(published_config(_LLAMA2)) | {"num_attention_heads": 8} | changes


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes of a model's weights; a tied head is not among them."""
    dim, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or dim // heads
    kv_dim = (config.get("num_key_value_heads") or heads) * head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (dim,),
            "self_attn.q_proj": (heads * head_dim, dim),
            "self_attn.k_proj": (kv_dim, dim),
            "self_attn.v_proj": (kv_dim, dim),
            "self_attn.o_proj": (dim, heads * head_dim),
            "post_attention_layernorm": (dim,),
            "mlp.gate_proj": (width, dim),
            "mlp.up_proj": (width, dim),
            "mlp.down_proj": (dim, width),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    found["model.norm.weight"] = (dim,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], dim)
    return found


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 weights that depend on names and shapes alone."""
    made = {}
    for name, shape in shapes(config).items():
        values = np.random.default_rng(crc32(name.encode())).standard_normal(shape, np.float32)
        if len(shape) == 1:
            made[name] = 1 + np.float32(0.1) * values
        elif name == "model.embed_tokens.weight" and not config["tie_word_embeddings"]:
            made[name] = np.float32(0.02) * values  # so small that the norm's epsilon matters
        else:
            made[name] = values * np.float32(2 / np.sqrt(shape[1]))
    return made


def tokens(config: dict[str, Any]) -> list[int]:
    rng = np.random.default_rng(config["vocab_size"])
    return rng.integers(0, config["vocab_size"], LENGTH).tolist()


def write_folder(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.model.

    `changes` replace tensors by name, with dots as in the file; None leaves one out.
    """
    from tokenizerfiles import sentencepiece  # needs edgellama, which the generator does not

    made = {name: v for name, v in (weights(config) | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "model.safetensors").write_bytes(safetensors(made))
    (folder / "tokenizer.model").write_bytes(sentencepiece())
    return folder


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, values in tensors.items():
        kind = {"f4": "F32", "f2": "F16", "i4": "I32"}[values.dtype.str[1:]]
        end = len(data) + values.nbytes
        shape = list(values.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), end]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
