"""Meta's checkpoints: `params.json` of each release, and the same model as elsewhere."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

from edgellama.config import config_from_gguf
from edgellama.errors import ModelConfigError, UnsupportedModelError
from edgellama.quantize.checkpoint import Checkpoint
from edgellama.quantize.checkpoint_source import checkpoint_source
from edgellama.quantize.meta_params import meta_metadata, meta_rope
from edgellama.quantize.source import open_source
from edgellama.quantize.tensor import Tensor

FOLDER = Path("model")
GROUPED = zoo.styles()["Llama-3 8B"]
Config = ModelConfigError
Unsupported = UnsupportedModelError

# Meta's params.json, as released: (dim, n_layers, n_heads, n_kv_heads, multiple_of,
# ffn_dim_multiplier, norm_eps, rope_theta, use_scaled_rope) -> (ffn_dim, context).
META = {
    "LLaMA 7B": ((4096, 32, 32, None, 256, None, 1e-6, None, None), (11008, 2048)),
    "LLaMA 33B": ((6656, 60, 52, None, 256, None, 1e-6, None, None), (17920, 2048)),
    "LLaMA 65B": ((8192, 80, 64, None, 256, None, 1e-5, None, None), (22016, 2048)),
    "Llama 2 13B": ((5120, 40, 40, None, 256, None, 1e-5, None, None), (13824, 4096)),
    "Llama 2 70B": ((8192, 80, 64, 8, 4096, 1.3, 1e-5, None, None), (28672, 4096)),
    "Code Llama 34B": ((8192, 48, 64, 8, 256, 1.0, 1e-5, 1e6, None), (22016, 16384)),
    "Code Llama 70B Python": ((8192, 80, 64, 8, 4096, 1.3, 1e-5, 10000, None), (28672, 4096)),
    "Llama 3 8B": ((4096, 32, 32, 8, 1024, 1.3, 1e-5, 5e5, None), (14336, 8192)),
    "Llama 3.1 405B": ((16384, 126, 128, 8, 4096, 1.2, 1e-5, 5e5, True), (53248, 131072)),
    "Llama 3.2 1B": ((2048, 16, 32, 8, 256, 1.5, 1e-5, 5e5, True), (8192, 131072)),
    "Llama 3.2 3B": ((3072, 28, 24, 8, 256, 1.0, 1e-5, 5e5, True), (8192, 131072)),
}
META_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier")
META_KEYS += ("norm_eps", "rope_theta", "use_scaled_rope")


def meta_params(name: str) -> dict[str, Any]:
    values = dict(zip(META_KEYS, META[name][0], strict=True))
    return {key: value for key, value in values.items() if value is not None} | {"vocab_size": -1}


@pytest.mark.parametrize("name", META)
def test_params_json_of_each_release(name):
    notes: list[str] = []
    keys = meta_metadata(meta_params(name), FOLDER, notes, vocab_rows=32000)
    config = config_from_gguf(keys)
    assert (config.ffn_dim, config.context_length) == META[name][1]
    assert config.vocab_size == 32000 and len(notes) == 1 and "no context length" in notes[0]


def test_mistrals_params_json():
    params = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32}
    params |= {"n_kv_heads": 8, "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000}
    notes: list[str] = []
    config = config_from_gguf(meta_metadata(params, FOLDER, notes, vocab_rows=32000))
    assert config.n_parameters == 7_241_732_096
    assert (config.context_length, config.sliding_window) == (32_768, 4096)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("Llama 3.1 405B", {16: 0.03760603093, 29: 0.002166570764, 63: 3.068925989e-07}),
        ("Llama 3.2 1B", {8: 0.03760603093, 15: 0.001290547928, 31: 9.418306725e-08}),
        ("Llama 3.2 3B", {29: 0.002118406997, 63: 7.672314972e-08}),
    ],
)
def test_scaled_rope_of_metas_checkpoints(name, samples):
    rope = meta_rope(meta_params(name), FOLDER)
    assert rope.factors is not None
    dim = 2 * len(rope.factors)
    for i, expected in samples.items():
        frequency = 5e5 ** (-2 * i / dim) / rope.factors[i]
        assert frequency == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": None}, Config, "dim is missing; expected integer"),
        ({"dim": 4096.0}, Config, r"dim = 4096\.0; expected integer"),
        ({"n_heads": 0}, Config, "n_heads = 0; expected integer"),
        ({"n_heads": 4096}, Config, "n_heads = 4096; expected a divisor of dim / 2"),
        ({"n_kv_heads": 64}, Config, r"n_kv_heads = 64; expected integer 1\.\.32"),
        ({"n_kv_heads": 5}, Config, "n_kv_heads = 5; expected a divisor of n_heads = 32"),
        ({"norm_eps": None}, Config, "norm_eps is missing; expected number"),
        ({"norm_eps": "1e-5"}, Config, 'norm_eps = "1e-5"; expected number'),
        ({"multiple_of": 0}, Config, "multiple_of = 0; expected integer"),
        ({"ffn_dim_multiplier": 1e9}, Config, "ffn_dim_multiplier = 1000000000.0; expected num"),
        ({"use_scaled_rope": 1}, Config, "use_scaled_rope = 1; expected true or false"),
        ({"vocab_size": 0}, Config, "vocab_size = 0; expected integer"),
        ({"quantization_args": {"scheme": "x"}}, Unsupported, "quantized weights .SpinQuant"),
        ({"lora_args": {"rank": 16}}, Unsupported, "lora_args: adapters"),
        ({"moe": {"num_experts": 8}}, Unsupported, "moe: mixtures of experts"),
        ({"vision_chunk_size": 448}, Unsupported, "vision_chunk_size = 448: images"),
    ],
)
def test_params_json_refused(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        meta_metadata(meta_params("Llama 3 8B") | changes, FOLDER, [], vocab_rows=32000)
    assert "params.json" in str(caught.value)


def meta_checkpoint(folder: Path, *, tied: bool = False) -> Checkpoint:
    """The weights of `GROUPED` under Meta's names, in Meta's order of rows, held in memory."""
    parts = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    weights = zoo.weights(GROUPED)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    tensors = {}
    for name, values in weights.items():
        theirs = name.removeprefix("model.")
        for ours, part in parts.items():
            theirs = theirs.replace(ours, part)
        if "wq" in theirs or "wk" in theirs:  # row 2i of a head is Hugging Face's row i
            values = values.reshape(-1, 2, 8, 128).swapaxes(1, 2).reshape(values.shape)
        tensors[theirs] = Tensor(theirs, values.shape, "F32", lambda a, b, v=values: v[a:b])
    params = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "norm_eps": 1e-5}
    params |= {
        "rope_theta": 500000.0,
        "max_seq_len": 8192,
        "hidden_dim": GROUPED["intermediate_size"],
    }
    return Checkpoint(folder, "meta", tensors, params, [], ExitStack())


def test_metas_checkpoint_becomes_the_same_model(tmp_path):
    with open_source(zoo.write_folder(tmp_path, GROUPED)) as source:
        meta = checkpoint_source(meta_checkpoint(tmp_path), lambda rows: {})
        assert (meta.kind, meta.rope_convention) == ("meta", "interleaved")
        assert list(meta.tensors) == list(source.tensors)
        for name, tensor in source.tensors.items():
            other = meta.tensors[name]
            assert other.row_step == 1
            np.testing.assert_array_equal(
                other.arrange(other.read()), tensor.arrange(tensor.read())
            )
        assert meta.config == source.config


def test_metas_head_that_equals_the_embedding_is_stored_once(tmp_path):
    source = checkpoint_source(meta_checkpoint(tmp_path, tied=True), lambda rows: {})
    assert source.config.tied_output and "output.weight" not in source.tensors
