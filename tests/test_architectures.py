"""Configurations and tensors of checkpoints: what is converted, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

from edgellama.config import config_from_gguf
from edgellama.errors import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsupportedModelError,
)
from edgellama.quantize.architectures import hf_metadata, hf_rope
from edgellama.quantize.names import gguf_names
from edgellama.quantize.source import Source, open_source
from edgellama.rope import inverse_frequencies
from edgellama.weights import expected_shapes

FOLDER = Path("model")
CONFIG = zoo.styles()["Llama-2 7B"]  # tiny: 4 heads of 16, 288 tokens
GROUPED = zoo.styles()["Llama-3 8B"]
Config = ModelConfigError
Unsupported = UnsupportedModelError
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR, YARN = {"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 2.0}

SCALINGS = (
    LINEAR,
    LLAMA3,
    {"type": "dynamic", "factor": 2.0},
    {"type": "truncate", "t": 100},
    YARN | {"original_max_position_embeddings": 64, "attention_factor": 1.0, "beta_fast": 8.0},
    YARN | {"beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True},
)


def metadata(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return hf_metadata({**config, **changes}, FOLDER, [])


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        metadata(CONFIG, **changes)
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 600


NASTY = [0, -1, 1, 2, 7, 2**31, 2**64, 10**300, 0.1, 0.5, 1e-300, 1e300, True, False, None]
NASTY += ["", "x", "\ud800", "1", [], [1], ["x"], [[]], {}, {"x": 1}, {"": {}}, {"a": [{}]}]


@pytest.mark.parametrize(
    "config",
    [
        *(zoo.styles()["Mistral-7B v0.1 (and Instruct)"] | {"rope_scaling": s} for s in SCALINGS),
        CONFIG | {"rope_parameters": LLAMA3 | {"rope_theta": 1e6}},
        CONFIG | {"num_key_value_heads": 2, "head_dim": 12, "abacus_scale": 4.0},
    ],
)
def test_any_value_anywhere_is_read_or_refused_with_an_error_of_ours(config):
    """No value of one key, nested ones too, raises anything else or gives an impossible model."""
    metadata(config)
    outer = {**config, "partial_rotary_factor": 1.0, "max_sequence_length": 9, "auto_map": {}}
    for key in (*outer, "num_local_experts", "attention_bias", "mlp_bias", "use_sliding_window"):
        for value in NASTY:
            _read_or_refused({**config, key: value})
    for section in ("rope_scaling", "rope_parameters"):
        for key in config.get(section) or {}:
            for value in NASTY:
                _read_or_refused({**config, section: {**config[section], key: value}})


def _read_or_refused(config: dict[str, Any]) -> None:
    try:
        keys = metadata(config)
        factors = hf_rope(config, FOLDER).factors
    except EdgeLlamaError as error:
        assert str(error).isascii() and len(str(error)) < 700
    else:
        stored = {k: float(np.float32(v)) if type(v) is float else v for k, v in keys.items()}
        rope = config_from_gguf(stored).rope  # what is accepted is a possible model
        assert np.isfinite(inverse_frequencies(rope, factors)).all()
        assert np.isfinite(np.array(factors or [1.0], np.float32)).all()


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"]


@pytest.mark.parametrize("key", [*SIZES, "num_attention_heads"])
@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (0, "0"),
        (-1, "-1"),
        (2**31, "2147483648"),
        (10**300, r"10{199}\.\.\."),
        (4096.0, r"4096\.0"),
        ("4096", '"4096"'),
        (True, "true"),
        (None, None),
        ([], r"\[\]"),
        ({"a": 1}, r"\{"),
    ],
)
def test_c3_sizes(key, value, spelled):
    found = rf"{key} = {spelled}" if spelled else rf"{key} is missing"
    refused(Config, rf"key '{key}': {found}.*; expected integer 1\.\.", **{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 5, "num_key_value_heads": 1},
            "num_attention_heads = 5; expected a divisor of hidden_size = 64",
        ),
        ({"num_attention_heads": 64}, "head_dim is missing; expected an even number"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads = 0; expected integer 1\.\.4"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads = 8; expected integer 1\.\.4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3; expected a divisor of"),
        ({"head_dim": 0}, "head_dim = 0; expected integer"),
        ({"head_dim": 15}, "head_dim = 15; expected an even number"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5"; expected number above 0'),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0; expected number above 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps = true; expected number above 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0; expected integer 1"),
        ({"max_position_embeddings": 10**12}, r"max_position_embeddings = 10+; expected integer 1"),
        ({"rope_theta": 0}, "rope_theta = 0; expected number above 1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; expected true or false"),
        ({"attention_bias": "no"}, 'attention_bias = "no"; expected true or false'),
        ({"model_type": 7}, "model_type = 7; expected a string"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = .*; expected a list"),
        ({"architectures": [1]}, "architectures = .*; expected a list"),
        ({"hidden_act": ["silu"]}, "hidden_act = .*; expected a string"),
    ],
)
def test_c4_c8_c9_values(changes, message, tmp_path):
    if "tie_word_embeddings" in changes:  # not part of the metadata
        with pytest.raises(Config, match=message):
            open_source(zoo.write_folder(tmp_path, CONFIG | changes))
    else:
        refused(Config, message, **changes)


def test_c4_null_counts_as_absent():
    config = config_from_gguf(metadata(CONFIG, num_key_value_heads=None, head_dim=None))
    assert (config.n_kv_heads, config.head_dim) == (4, 16)
    assert config_from_gguf(metadata(CONFIG, rope_scaling=None)).rope.scaling == "none"


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ({"type": "longrope", "factor": 2.0}, Unsupported, '"longrope" is not supported; supp'),
        ({"type": "su"}, Unsupported, '"su" is not supported'),
        ({"type": "linear"}, Config, r"rope_scaling\.factor is missing; expected number above 0"),
        ({"type": "yarn"}, Config, r"rope_scaling\.factor is missing"),
        ({"type": "dynamic"}, Config, r"rope_scaling\.factor is missing"),
        (LINEAR | {"factor": 0}, Config, r"rope_scaling\.factor = 0; expected number above 0"),
        (LINEAR | {"factor": "2"}, Config, r'rope_scaling\.factor = "2"; expected number'),
        ({"type": "dynamic", "factor": 0.5}, Config, r"rope_scaling\.factor = 0.5; expected"),
        ({"type": "dynamic", "factor": 1e6}, Config, r"rope_scaling\.factor = 1000000.0; expected"),
        (LLAMA3 | {"factor": None}, Config, r"rope_scaling\.factor is missing"),
        (LLAMA3 | {"low_freq_factor": 4.0}, Config, r"low_freq_factor = 4.0; expected .* below"),
        (LLAMA3 | {"high_freq_factor": 0}, Config, r"high_freq_factor = 0; expected number"),
        (
            LLAMA3 | {"original_max_position_embeddings": 8192.0},
            Config,
            r"original_max_position_embeddings = 8192\.0; expected integer",
        ),
        (YARN | {"beta_fast": -1}, Config, r"rope_scaling\.beta_fast = -1; expected"),
        (YARN | {"truncate": False}, Unsupported, "without rounding"),
        ("linear", Config, 'rope_scaling = "linear"; expected an object'),
        ([], Config, r"rope_scaling = \[\]; expected an object"),
        ({"full": LINEAR, "sliding": LINEAR}, Unsupported, "differ by layer"),
        ({"type": ["linear"]}, Config, r"rope_scaling\.type = .*; expected a string"),
    ],
)
def test_c7_rope_scaling(scaling, error, message):
    refused(error, message, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, 'activation "gelu" is not supported'),
        ({"hidden_act": "relu2"}, 'activation "relu2" is not supported'),
        ({"attention_bias": True}, "attention_bias = true: biases are not supported"),
        ({"mlp_bias": True}, "mlp_bias = true: biases are not supported"),
        ({"num_local_experts": 8}, "num_local_experts = 8: mixtures of experts"),
        ({"model_type": "mixtral"}, 'model_type "mixtral" is not supported; supported: llama, mis'),
        ({"model_type": "qwen2"}, 'model_type "qwen2" is not supported'),
        ({"model_type": None, "architectures": ["X"]}, "no model_type is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSeq"),
        ({"torch_dtype": "float8_e4m3fn"}, 'torch_dtype = "float8_e4m3fn" is not supported'),
        ({"torch_dtype": "banana"}, 'torch_dtype = "banana" is not supported'),
        ({"partial_rotary_factor": 0.5}, "only a part of each head turns"),
    ],
)
def test_c10_c11_c12_what_is_no_dense_llama(changes, message):
    refused(Unsupported, message, **changes)


def test_c11_custom_code_is_noted_and_never_run(tmp_path):
    code = tmp_path / "evil.py"
    code.write_text("raise SystemExit(1)")
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "trust_remote_code": True}
    with open_source(zoo.write_folder(tmp_path, config)) as source:
        assert any("custom code (auto_map), which is not run" in note for note in source.notes)


@pytest.mark.parametrize("scheme", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_c12_other_quantizations_are_named(tmp_path, scheme):
    config = CONFIG | {"quantization_config": {"quant_method": scheme, "bits": 4}}
    with pytest.raises(Unsupported, match=f"quantized by '{scheme}'.*[Oo]riginal|original"):
        open_source(zoo.write_folder(tmp_path, config))


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 288, "2", True, 1.0, [2, 288], [[2]], {}])
def test_c13_special_ids(key, value):
    refused(Config, rf"{key} = .*; expected integer 0\.\.287", **{key: value})


def test_c13_lists_and_null_are_legal():
    assert metadata(CONFIG, eos_token_id=[1, 2], bos_token_id=None)["llama.vocab_size"] == 288


def opened(folder: Path, config: dict[str, Any], **changes: Any) -> Source:
    return open_source(zoo.write_folder(folder, config, **changes))


def test_c5_head_dim_that_the_weights_contradict(tmp_path):
    message = (
        r"tensor 'model\.layers\.0\.self_attn\.q_proj\.weight': "
        r"shape \[64, 64\]; the config implies \[96, 64\]"
    )
    folder = zoo.write_folder(tmp_path, CONFIG)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 24}))
    with pytest.raises(Config, match=message):
        open_source(folder)


@pytest.mark.parametrize("vocab_size", [287, 300])
def test_c6_vocab_size_that_the_embedding_contradicts(tmp_path, vocab_size):
    folder = zoo.write_folder(tmp_path, CONFIG)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": vocab_size}))
    with pytest.raises(Config, match=rf"vocab_size = {vocab_size}; expected 288, the rows"):
        open_source(folder)


def test_c14_a_head_that_differs_wins_over_a_tie(tmp_path):
    head = np.ones((288, 64), np.float32)
    with opened(tmp_path, CONFIG | {"tie_word_embeddings": True}, **{"lm_head.weight": head}) as s:
        assert not s.config.tied_output
        assert (s.tensors["output.weight"].read() == 1).all()
        assert any("lm_head.weight differs" in note for note in s.notes)


def test_c14_a_head_that_is_the_embedding_is_stored_once(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    same = zoo.weights(config)["model.embed_tokens.weight"]
    with opened(tmp_path, config, **{"lm_head.weight": same}) as s:
        assert s.config.tied_output and "output.weight" not in s.tensors
        assert any("stored once" in note for note in s.notes)


def test_an_untied_model_keeps_both_heads(tmp_path):
    same = zoo.weights(CONFIG)["model.embed_tokens.weight"]
    with opened(tmp_path, CONFIG, **{"lm_head.weight": same}) as source:
        assert "output.weight" in source.tensors and not source.config.tied_output


def test_tensors_are_in_order_with_their_types_and_steps(tmp_path):
    halves = {n: v.astype(np.float16) for n, v in zoo.weights(GROUPED).items() if v.ndim == 2}
    with opened(tmp_path, GROUPED, **halves) as source:
        assert list(source.tensors) == list(expected_shapes(source.config))
        assert source.rope_convention == "half" and source.kind == "safetensors"
        steps = {name: tensor.row_step for name, tensor in source.tensors.items()}
        turning = [name for name, step in steps.items() if step > 1]
        assert turning == [f"blk.{i}.attn_{part}.weight" for i in (0, 1) for part in "qk"]
        assert {steps[name] for name in turning} == {16}
        query = source.tensors["blk.1.attn_q.weight"]
        stored = halves["model.layers.1.self_attn.q_proj.weight"]
        assert query.type == "F16" and source.tensors["output_norm.weight"].type == "F32"
        np.testing.assert_array_equal(query.read_bits(16, 48), stored[16:48])
        np.testing.assert_array_equal(query.read(16, 48), stored[16:48].astype(np.float32))
        pairs = stored[16:32].reshape(2, 8, -1).swapaxes(0, 1).reshape(16, -1)
        np.testing.assert_array_equal(query.arrange(query.read_bits(16, 32)), pairs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lm_head.weight": None}, ModelFormatError, r"lacks 'lm_head\.weight'"),
        ({"model.embed_tokens.weight": None}, ModelFormatError, r"lacks 'model\.embed_tokens\.w"),
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            ModelFormatError,
            r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)},
            Unsupported,
            r"'model\.layers\.0\.self_attn\.q_proj\.bias'.*Biases are not supported",
        ),
        ({"v_head.weight": np.zeros((1, 64), np.float32)}, Unsupported, r"v_head\.weight"),
        (
            {"base_model.model.lora_A.weight": np.zeros((2, 64), np.float32)},
            Unsupported,
            "This is an adapter; merge it",
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": np.zeros((8, 64), np.float32)},
            Config,
            r"has 2 layers; beyond them are 'model\.layers\.2\.mlp\.up_proj\.weight'",
        ),
        (
            {"model.layers.00.mlp.up_proj.weight": np.zeros((8, 64), np.float32)},
            Unsupported,
            r"model\.layers\.00\.mlp",
        ),
        (
            {"model.norm.weight": np.zeros(63, np.float32)},
            Config,
            r"shape \[63\]; the config implies \[64\]",
        ),
        (
            {"model.layers.1.mlp.up_proj.weight": np.zeros((), np.float32)},
            Config,
            r"shape \[\]; the config implies",
        ),
        (
            {"model.layers.1.mlp.up_proj.weight": np.zeros((8, 64), np.int32)},
            Unsupported,
            r"up_proj.*I32",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        opened(tmp_path, CONFIG, **changes)


def test_rotary_tables_are_ignored_silently():
    tables = [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rope.freqs",
        "layers.3.attention.inner_attention.rope.freqs",
    ]
    assert gguf_names(tables[:2], "pytorch", FOLDER) == {}
    assert gguf_names(tables[2:], "meta", FOLDER) == {}


def test_dynamic_ntk_is_fixed_at_full_length():
    rope = hf_rope(CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, FOLDER)
    assert rope.context == 4 * 4096
    assert rope.freq_base == pytest.approx(10_000.0 * 13 ** (16 / 14), rel=1e-12)
    assert len(rope.notes) == 1 and "dynamic NTK" in rope.notes[0]


def test_giraffes_private_key_is_linear_scaling():
    rope = hf_rope(CONFIG | {"abacus_scale": 8, "max_position_embeddings": 32768}, FOLDER)
    assert rope.keys == {"scaling.type": "linear", "scaling.factor": 8.0}
    assert rope.context == 32768 and "abacus_scale = 8" in rope.notes[0]


def test_mistrals_window_follows_transformers():
    mistral = zoo.styles()["Mistral-7B v0.1 (and Instruct)"]
    without = {key: value for key, value in mistral.items() if key != "sliding_window"}
    assert metadata(mistral)["llama.attention.sliding_window"] == 16
    assert metadata(without)["llama.attention.sliding_window"] == 4096
    assert "llama.attention.sliding_window" not in metadata(mistral, sliding_window=None)
    assert "llama.attention.sliding_window" not in metadata(CONFIG, sliding_window=16)
    with pytest.raises(Config, match="sliding_window = 0; expected integer"):
        metadata(mistral, sliding_window=0)
