"""Every published LLaMA relative: its parameters, and its logits after conversion.

Expected logits are those of `transformers` on the same weights (`make_zoo_fixture.py`).
"""

from pathlib import Path

import numpy as np
import pytest
import zoo

import edgellama
from edgellama.config import ModelConfig, config_from_gguf
from edgellama.quantize import quantize
from edgellama.quantize.architectures import hf_metadata

NMSE = 1e-9  # promised; measured: up to 1.3e-11
EXPECTED = np.load(zoo.DATA / "zoo_logits.npz")
BY_NAME = {release["name"]: release for release in zoo.RELEASES}


def full_size(release) -> tuple[ModelConfig, list[str]]:
    notes: list[str] = []
    config = zoo.published_config(release)
    metadata = hf_metadata(config, Path("model"), notes)
    tied = config["tie_word_embeddings"]
    return config_from_gguf(metadata, vocab_rows=config["vocab_size"], tied_output=tied), notes


def test_the_list_is_whole():
    assert len(BY_NAME) == len(zoo.RELEASES) == 93
    assert BY_NAME["Llama-2 13B"]["params_exact"] == 13_015_864_320
    assert BY_NAME["Llama-3 70B"]["params_exact"] == 70_553_706_496


@pytest.mark.parametrize("name", BY_NAME)
def test_parameters_are_the_published_count(name):
    config, _ = full_size(BY_NAME[name])
    assert config.n_parameters == BY_NAME[name]["params_exact"]
    assert zoo.style_of(BY_NAME[name]) in EXPECTED  # its logits are compared below


@pytest.mark.parametrize("name", zoo.styles())
def test_logits_are_those_of_transformers(name, tmp_path):
    config = zoo.styles()[name]
    output = tmp_path / "model.gguf"
    quantize(zoo.write_folder(tmp_path, config), output, "F32", certificate="none")
    for runtime in ("cpu", "reference"):
        with edgellama.load(output, runtime, kv_type="f32", threads=1, context=48) as model:
            got = model.session().forward(zoo.tokens(config), all_logits=True)
        got, expected = got[list(zoo.POSITIONS)], EXPECTED[name]
        error = np.square(got - expected).sum() / np.square(expected).sum()
        assert error <= NMSE, (runtime, error)


def test_no_expected_logits_are_left_over():
    assert set(EXPECTED) == set(zoo.styles())


@pytest.mark.parametrize(
    ("name", "context", "window", "base", "note"),
    [
        ("LLaMA-1 7B", 2048, None, 10_000.0, None),
        ("Llama-2 70B", 4096, None, 10_000.0, None),
        ("Llama-3.1 405B", 131_072, None, 500_000.0, None),
        ("Mistral-7B v0.1 (and Instruct)", 32_768, 4096, 10_000.0, "looks back 4096 tokens"),
        ("Mistral-7B v0.2 (Instruct)", 32_768, None, 1_000_000.0, None),
        ("Vicuna 7B v1.5-16k", 16_384, None, 10_000.0, "stretched 4 times"),
        ("Giraffe-v1-delta-13b-scaled-16 (linear)", 32_768, None, 10_000.0, "stretched 16 times"),
        ("Giraffe-v2-13b-32k / Giraffe-13b-32k-v3 (linear)", 32_768, None, 10_000.0, None),
        ("Giraffe-v2-70b-32k (linear)", 32_768, None, 10_000.0, "stretched 8 times"),
        # 500000 * (4 * 4 - 3) ** (128 / 126)
        ("Llama-3-Giraffe-70B", 32_768, None, 6_770_098.65, "dynamic NTK"),
        ("LongLLaMA 3B v1.1", 2048, None, 10_000.0, "plain LLaMA for 2048 tokens"),
        ("LongLLaMA-Code 7B", 2048, None, 1_000_000.0, "plain LLaMA for 2048 tokens"),
    ],
)
def test_context_window_and_base(name, context, window, base, note):
    config, notes = full_size(BY_NAME[name])
    assert (config.context_length, config.sliding_window) == (context, window)
    assert config.rope.freq_base == pytest.approx(base, rel=1e-7)
    assert any(note in line for line in notes) if note else not notes
