"""Hyper-parameters: what GGUF keys mean, what is refused, and how rope settings become angles."""

import math
import tracemalloc
from array import array
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

from edgellama import EdgeLlamaError, ModelConfigError, UnsupportedModelError
from edgellama.config import ModelConfig, Rope, config_from_gguf
from edgellama.gguf import open_gguf
from edgellama.rope import angles, inverse_frequencies, llama3_factors, magnitude
from edgellama.weights import model_config

KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Model",
    "llama.vocab_size": 32_000,
    "llama.context_length": 4096,
    "llama.embedding_length": 512,
    "llama.block_count": 22,
    "llama.feed_forward_length": 1408,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 500_000.0,
}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 8.0,
    "llama.rope.scaling.original_context_length": 512,
}


def test_config_of_plain_keys() -> None:
    expected = ModelConfig(
        vocab_size=32_000,
        n_layers=22,
        dim=512,
        ffn_dim=1408,
        n_heads=8,
        n_kv_heads=2,
        head_dim=64,
        context_length=4096,
        rope=Rope(64, 500_000.0),
        name="Model",
    )
    assert config_from_gguf(KEYS) == expected
    assert (expected.q_dim, expected.kv_dim) == (512, 128)


def test_absent_keys_have_the_format_s_defaults() -> None:
    absent = ("vocab_size", "attention.head_count_kv", "rope.dimension_count", "rope.freq_base")
    keys = {key: v for key, v in KEYS.items() if key.removeprefix("llama.") not in absent}
    config = config_from_gguf(keys | {"tokenizer.ggml.tokens": ["a"] * 77})
    assert (config.vocab_size, config.n_kv_heads, config.rope) == (77, 8, Rope(64, 10_000.0))
    assert config_from_gguf(keys, vocab_rows=78).vocab_size == 78


def test_head_dim_may_differ_from_the_quotient() -> None:
    keys = KEYS | {"llama.attention.key_length": 96, "llama.attention.value_length": 96}
    assert config_from_gguf(keys).q_dim == 8 * 96


REFUSED = [  # id, changed key (None drops it), value, part of the message
    ("G19-absent", "general.architecture", None, "no architecture is not supported"),
    ("G19-empty", "general.architecture", "", "architecture '' is not supported; supported: llama"),
    ("G19-number", "general.architecture", 7, "architecture 7 is not supported"),
    ("G19-array", "general.architecture", ["llama"], "is not supported; supported: llama"),
    ("G19-bert", "general.architecture", "bert", "architecture 'bert' is not supported"),
    ("G19-long", "general.architecture", "x" * 10**7, "xxx... is not supported"),
    ("G20-absent", "block_count", None, "the key is missing; expected unsigned integer 1..1024"),
    ("G20-f32", "block_count", 22.0, "expected unsigned integer"),
    ("G20-string", "block_count", "22", "string '22'"),
    ("G20-bool", "block_count", True, "bool True"),
    ("G20-array", "block_count", array("I", [22]), "array"),
    ("G20-eps-string", "attention.layer_norm_rms_epsilon", "1e-5", "string '1e-5'"),
    ("G20-negative", "block_count", -1, "-1 is not allowed"),
    ("G21-0", "block_count", 0, "0 is not allowed; expected unsigned integer 1..1024"),
    ("G21-2^32-1", "block_count", 2**32 - 1, "4294967295 is not allowed"),
    ("G22-heads-0", "attention.head_count", 0, "0 is not allowed"),
    ("G22-heads-7", "attention.head_count", 7, "expected a divisor of head_count = 7"),
    ("G22-heads-6", "attention.head_count", 6, "expected a divisor of embedding_length = 512"),
    ("G22-kv-0", "attention.head_count_kv", 0, "0 is not allowed"),
    ("G22-kv-16", "attention.head_count_kv", 16, "16 is not allowed; expected a divisor of head"),
    ("G22-kv-3", "attention.head_count_kv", 3, "expected a divisor of head_count = 8"),
    ("G22-kv-layers", "attention.head_count_kv", array("I", [2] * 22), "array"),
    ("G22-value-length", "attention.value_length", 32, "expected 64, the same as"),
    ("G23-dim-0", "embedding_length", 0, "0 is not allowed"),
    ("G23-dim-2^31", "embedding_length", 2**31, "expected unsigned integer 1..131072"),
    ("G23-ffn-0", "feed_forward_length", 0, "0 is not allowed"),
    ("G23-ffn-2^31", "feed_forward_length", 2**31, "2147483648 is not allowed"),
    ("G23-context-0", "context_length", 0, "0 is not allowed"),
    ("G23-context-2^31", "context_length", 2**31, "expected unsigned integer 1..16777216"),
    ("G24-odd", "rope.dimension_count", 63, "63 is not allowed; expected an even number, at most"),
    ("G24-0", "rope.dimension_count", 0, "0 is not allowed"),
    ("G24-66", "rope.dimension_count", 66, "expected unsigned integer 2..64"),
    ("G25-0", "rope.freq_base", 0.0, "0.0 is not allowed; expected finite number above"),
    ("G25-negative", "rope.freq_base", -1e4, "-10000.0 is not allowed"),
    ("G25-nan", "rope.freq_base", math.nan, "nan is not allowed; expected finite"),
    ("G25-inf", "rope.freq_base", math.inf, "inf is not allowed; expected finite"),
    ("G25-tiny", "rope.freq_base", 1e-40, "1e-40 is not allowed"),
    ("G25-one", "rope.freq_base", 1.0, "1.0 is not allowed"),
    ("G26-0", "attention.layer_norm_rms_epsilon", 0.0, "expected finite number above 0, up to 0.1"),
    ("G26-negative", "attention.layer_norm_rms_epsilon", -1e-5, "-1e-05 is not allowed"),
    ("G26-nan", "attention.layer_norm_rms_epsilon", math.nan, "nan is not allowed"),
    ("G26-1e10", "attention.layer_norm_rms_epsilon", 1e10, "10000000000.0 is not allowed"),
    ("G27-unknown", "rope.scaling.type", "spiral", "supported: none, linear, yarn"),
    ("G27-number", "rope.scaling.type", 1, "rope scaling 1 is not supported"),
    ("G27-factor-0", "rope.scaling.factor", 0.0, "0.0 is not allowed"),
    ("G27-factor-nan", "rope.scaling.factor", math.nan, "nan is not allowed"),
    ("G27-factor-minus-1", "rope.scaling.factor", -1.0, "-1.0 is not allowed"),
    ("G27-factor-absent", "rope.scaling.factor", None, "the key is missing"),
    ("G27-context-0", "rope.scaling.original_context_length", 0, "0 is not allowed"),
    ("G27-beta-0", "rope.scaling.yarn_beta_fast", 0.0, "0.0 is not allowed"),
    ("G27-old-key-0", "rope.scale_linear", 0.0, "0.0 is not allowed"),
    ("T17-rows", "vocab_size", 31_999, "expected 32000, the rows of token_embd.weight"),
    ("T24-experts", "expert_count", 8, "a mixture of 8 experts is not supported"),
    ("T24-used", "expert_used_count", 2, "a mixture of 2 experts is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fragment"), [r[1:] for r in REFUSED],
                         ids=[r[0] for r in REFUSED])  # fmt: skip
def test_bad_keys_are_refused_by_name(key: str, value: object, fragment: str) -> None:
    full = key if key.startswith("general") else f"llama.{key}"
    yarn = key.startswith("rope.scaling.")
    keys = KEYS | (YARN if yarn else {})
    keys[full] = value
    if value is None:
        del keys[full]
    with pytest.raises(EdgeLlamaError) as caught:
        config_from_gguf(keys, vocab_rows=32_000, path="/models/m.gguf")
    error = caught.value
    unsupported = key in ("general.architecture", "rope.scaling.type") or "expert" in key
    assert type(error) is (UnsupportedModelError if unsupported else ModelConfigError)
    assert str(error).startswith("m.gguf: key '") and fragment in str(error)
    assert len(str(error)) < 500
    assert error.where and error.field and error.allowed is not None


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count",
                                 "llama.rope.scaling.type", "llama.expert_count"])  # fmt: skip
def test_long_arrays_are_not_spelled_out(key: str) -> None:
    """U2: the message of a wrong value must not cost many times the value."""
    value = array("B", bytes(4 * 2**20))
    tracemalloc.start()
    with pytest.raises(EdgeLlamaError, match="not") as caught:
        config_from_gguf(KEYS | {key: value})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [22, 2**3])
def test_any_integer_that_fits_is_taken(value: int) -> None:
    """G20: how wide or signed the file stores it does not matter."""
    assert config_from_gguf(KEYS | {"llama.block_count": value}).n_layers == value


def test_name_of_another_kind_is_left_out() -> None:
    assert config_from_gguf(KEYS | {"general.name": array("B", [0] * 1000)}).name == ""


CONFIGS = {
    "plain": tiny_config(),
    "tied": tiny_config(tied_output=True, vocab_size=301),
    "head_dim": tiny_config(head_dim=24, rope=Rope(20)),
    "window": tiny_config(sliding_window=16),
    "linear": tiny_config(rope=Rope(16, 10_000.0, "linear", 4.0)),
    "yarn": tiny_config(
        rope=Rope(16, 1e6, "yarn", 4.0, original_context=64, attention_factor=0.5, beta_fast=16.0)
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_survives_the_file(tmp_path, config: ModelConfig) -> None:
    with open_gguf(write_tiny(tmp_path / "t.gguf", config)) as file:
        read = model_config(file)
    assert read.norm_eps == np.float32(config.norm_eps)
    assert read == type(config)(**{**asdict(config), "norm_eps": read.norm_eps})


def asdict(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


# vocab, dim, ffn, layers, heads, kv heads, head_dim, tied, parameters as published
MODELS = {
    "LLaMA-1 7B": (32_000, 4096, 11_008, 32, 32, 32, 128, False, 6_738_415_616),
    "LLaMA-1 65B": (32_000, 8192, 22_016, 80, 64, 64, 128, False, 65_285_660_672),
    "Llama-2 13B": (32_000, 5120, 13_824, 40, 40, 40, 128, False, 13_015_864_320),
    "Llama-2 70B": (32_000, 8192, 28_672, 80, 64, 8, 128, False, 68_976_648_192),
    "Llama-3 8B": (128_256, 4096, 14_336, 32, 32, 8, 128, False, 8_030_261_248),
    "Llama-3 70B": (128_256, 8192, 28_672, 80, 64, 8, 128, False, 70_553_706_496),
    "Llama-3.1 405B": (128_256, 16_384, 53_248, 126, 128, 8, 128, False, 405_853_388_800),
    "Llama-3.2 1B": (128_256, 2048, 8192, 16, 32, 8, 64, True, 1_235_814_400),
    "OpenLLaMA 3B": (32_000, 3200, 8640, 26, 32, 32, 100, False, 3_426_473_600),
    "TinyLlama 1.1B": (32_000, 2048, 5632, 22, 32, 4, 64, False, 1_100_048_384),
    "SmolLM2 135M": (49_152, 576, 1536, 30, 9, 3, 64, True, 134_515_008),
    "Mistral 7B v0.3": (32_768, 4096, 14_336, 32, 32, 8, 128, False, 7_248_023_552),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_released_models(name: str) -> None:
    vocab, dim, ffn, layers, heads, kv_heads, head_dim, tied, parameters = MODELS[name]
    keys = KEYS | {
        "llama.vocab_size": vocab,
        "llama.embedding_length": dim,
        "llama.feed_forward_length": ffn,
        "llama.block_count": layers,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.dimension_count": head_dim,
    }
    config = config_from_gguf(keys, tied_output=tied)
    assert (config.head_dim, config.n_parameters) == (head_dim, parameters)


# --- rope ---


def plain(dim: int, base: float) -> np.ndarray:
    return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


@pytest.mark.parametrize(("dim", "base"), [(128, 10_000.0), (64, 500_000.0), (100, 1e6), (2, 2.0)])
def test_plain_frequencies(dim: int, base: float) -> None:
    """RoFormer, equation 15: theta_i = base^(-2 (i - 1) / d)."""
    np.testing.assert_allclose(inverse_frequencies(Rope(dim, base)), plain(dim, base), rtol=1e-14)


def test_linear_scaling_divides_positions() -> None:
    """Position m of a model stretched 4 times turns as position m / 4 did."""
    rope = Rope(64, 10_000.0, "linear", 4.0)
    stretched, original = angles(rope, 8, 9), angles(Rope(64), 2, 3)
    np.testing.assert_allclose(stretched, original, atol=1e-14)
    assert magnitude(rope) == 1.0


def yarn(dim: int, base: float, factor: float, context: int, fast: float, slow: float):
    """Section 3.2 of the paper by wavelengths; the pair numbers are rounded outwards."""
    frequency = plain(dim, base)

    def pair_with(turns: float) -> float:  # turns = context * base^(-2i/dim) / 2 pi, solved for i
        return dim / 2 * math.log(context / (2 * math.pi * turns), base)

    first, last = max(math.floor(pair_with(fast)), 0), min(math.ceil(pair_with(slow)), dim - 1)
    gamma = 1 - np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
    return (1 - gamma) * frequency / factor + gamma * frequency


@pytest.mark.parametrize(
    ("dim", "base", "factor", "context", "fast", "slow"),
    [
        (128, 10_000.0, 16.0, 4096, 32.0, 1.0),  # YaRN's Llama 2, 64k
        (128, 10_000.0, 32.0, 4096, 32.0, 1.0),
        (64, 1e6, 4.0, 32_768, 32.0, 1.0),
        (64, 100.0, 4.0, 8, 32.0, 1.0),  # every pair slower than beta_fast
        (32, 10_000.0, 2.0, 2048, 1.0, 1.0),
    ],
)
def test_yarn_frequencies(dim, base, factor, context, fast, slow) -> None:
    rope = Rope(dim, base, "yarn", factor, context, beta_fast=fast, beta_slow=slow)
    expected = yarn(dim, base, factor, context, fast, slow)
    np.testing.assert_allclose(inverse_frequencies(rope), expected, rtol=1e-12)
    assert magnitude(rope) == pytest.approx(0.1 * math.log(factor) + 1.0, rel=1e-15)


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    rope = Rope(128, 10_000.0, "yarn", 16.0, 4096)
    ratio = np.array(inverse_frequencies(Rope(128))) / inverse_frequencies(rope)
    np.testing.assert_allclose(ratio[[0, -1]], [1.0, 16.0], rtol=1e-12)
    assert np.all(np.diff(ratio) >= -1e-12)


def test_yarn_without_its_ramp_is_linear() -> None:
    rope = Rope(64, 10_000.0, "yarn", 4.0, 2048, ext_factor=0.0, attention_factor=1.5)
    linear = inverse_frequencies(Rope(64, 10_000.0, "linear", 4.0))
    np.testing.assert_allclose(inverse_frequencies(rope), linear, rtol=1e-15)
    assert magnitude(rope) == 1.5


def llama3(dim: int, base: float, factor: float, low: float, high: float, context: int):
    """Llama 3.1's scaling of frequencies, by wavelengths and cases."""
    frequency = plain(dim, base)
    wavelength = 2 * np.pi / frequency
    blend = (context / wavelength - low) / (high - low)
    between = (1 - blend) * frequency / factor + blend * frequency
    slow, fast = wavelength > context / low, wavelength < context / high
    return np.where(slow, frequency / factor, np.where(fast, frequency, between))


@pytest.mark.parametrize(("dim", "factor"), [(128, 8.0), (64, 32.0)])
def test_llama3_factors(dim: int, factor: float) -> None:
    rope = Rope(dim, 500_000.0)
    factors = llama3_factors(rope, factor, 1.0, 4.0, 8192)
    expected = llama3(dim, 500_000.0, factor, 1.0, 4.0, 8192)
    np.testing.assert_allclose(inverse_frequencies(rope, factors), expected, rtol=1e-12)
    assert (factors[0], factors[-1]) == (1.0, factor)


def test_angles_are_those_of_their_positions() -> None:
    rope = Rope(64, 500_000.0)
    cos, sin = angles(rope, 131_000, 131_004)
    assert cos.shape == sin.shape == (4, 32) and cos.dtype == np.float64
    theta = np.arange(131_000, 131_004)[:, None] * plain(64, 500_000.0)
    np.testing.assert_allclose(cos + 1j * sin, np.exp(1j * theta), atol=1e-9)


def test_angles_carry_yarn_s_magnitude() -> None:
    rope = Rope(64, 10_000.0, "yarn", 4.0, 2048, attention_factor=2.0)
    cos, sin = angles(rope, 0, 3)
    np.testing.assert_allclose(np.hypot(cos, sin), 2.0 * (0.1 * math.log(4.0) + 1.0), rtol=1e-12)
