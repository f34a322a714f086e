"""Where rope settings come from when a config or a file names them twice, halfway, or elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from tiny import write_tiny

import edgellama
from edgellama.config import config_from_gguf
from edgellama.distance import nmse
from edgellama.errors import ModelConfigError, UnsupportedModelError
from edgellama.gguf import open_gguf
from edgellama.quantize.architectures import hf_metadata, hf_rope
from edgellama.rope import inverse_frequencies
from edgellama.weights import model_config

FOLDER = Path("model")
CONFIG = zoo.styles()["Llama-2 7B"]  # tiny: heads of 16, 4096 positions, base 10,000
LINEAR, YARN = {"type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OWN, BASE = "original_max_position_embeddings", {"rope_theta": 500_000.0}

# Frequencies of the 8 pairs, from LlamaRotaryEmbedding of transformers 5.23.
HALVED = (0.5, 0.158114, 0.05, 0.0158114, 0.005, 0.00158114, 0.0005, 0.000158114)
OF_70_000 = (0.5, 0.123975, 0.0307394, 0.00762181, 0.00188982, 0.00046858, 0.000116184, 2.88077e-5)
OF_500_000 = (0.5, 0.0969614, 0.018803, 0.00364633, 7.07107e-4, 1.37124e-4, 2.65915e-5, 5.15669e-6)
FROM_256 = (1.0, 0.276699, 0.075, 0.0197642, 0.005, 0.00158114, 0.0005, 0.000158114)
LLAMA3_256 = (1.0, 0.316228, 0.1, 0.00661311, 0.00125, 3.95285e-4, 0.000125, 3.95285e-5)


@pytest.mark.parametrize(
    ("changes", "frequencies"),
    [
        ({"rope_parameters": BASE, "rope_scaling": LINEAR}, HALVED),
        ({"rope_theta": 7e4, "rope_parameters": LLAMA3, "rope_scaling": LINEAR}, OF_70_000),
        ({"rope_parameters": LINEAR | BASE, "rope_scaling": {}}, OF_500_000),
        ({OWN: 256, "rope_scaling": YARN}, FROM_256),
        ({OWN: 256, "rope_parameters": YARN}, FROM_256),
        ({OWN: 256, "rope_scaling": YARN | {OWN: 2048}}, FROM_256),
        ({OWN: None, "rope_scaling": YARN | {OWN: 256}}, FROM_256),
        ({OWN: 256, "rope_scaling": LLAMA3 | {OWN: 8192}}, LLAMA3_256),
        ({OWN: 256, "rope_scaling": LLAMA3}, LLAMA3_256),
        ({OWN: 256, "rope_scaling": LINEAR}, HALVED),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR | {"partial_rotary_factor": 1}},
            HALVED,
        ),
    ],
)
def test_the_place_that_counts_is_transformers(
    changes: dict[str, Any], frequencies: tuple[float, ...]
) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "rope_theta"} | changes
    rope = config_from_gguf(hf_metadata(config, FOLDER, [])).rope
    got = inverse_frequencies(rope, hf_rope(config, FOLDER).factors)
    np.testing.assert_allclose(got, frequencies, rtol=1e-5)


@pytest.mark.parametrize("section", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", [LINEAR, {"rope_type": "default"}])
def test_a_part_of_each_head_is_refused_wherever_it_stands(
    section: str, kind: dict[str, Any]
) -> None:
    config = CONFIG | {section: kind | {"partial_rotary_factor": 0.5}}
    message = rf"key '{section}\.partial_rotary_factor': only a part of each head turns"
    with pytest.raises(UnsupportedModelError, match=message):
        hf_rope(config, FOLDER)


@pytest.mark.parametrize("value", [0, -1, 2.0, "256", True, [256], 10**12])
def test_a_wrong_length_is_named_where_it_stands(value: object) -> None:
    with pytest.raises(ModelConfigError, match=rf"key '{OWN}': {OWN} = .*; expected integer 1"):
        hf_rope(CONFIG | {OWN: value, "rope_scaling": YARN}, FOLDER)


# GGUF: a factor without a type is linear scaling, as llama.cpp has it


FILES: dict[str, tuple[dict[str, Any], float]] = {  # keys below llama.rope., the factor they mean
    "factor alone": ({"scaling.factor": 4.0}, 4.0),
    "older key alone": ({"scale_linear": 4.0}, 4.0),
    "both": ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
    "type and older key": ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
    "type alone": ({"scaling.type": "linear"}, 1.0),
    "no scaling": ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
    "no scaling, older key": ({"scaling.type": "none", "scale_linear": 4.0}, 1.0),
}


def in_file(path: Path, keys: dict[str, Any]) -> Path:
    return write_tiny(path, metadata={f"llama.rope.{key}": value for key, value in keys.items()})


@pytest.mark.parametrize(("keys", "factor"), FILES.values(), ids=FILES)
def test_a_factor_without_a_type(tmp_path: Path, keys: dict[str, Any], factor: float) -> None:
    with open_gguf(in_file(tmp_path / "t.gguf", keys)) as file:
        rope = model_config(file).rope
    assert (rope.factor, rope.scaling) == (factor, "none" if factor == 1.0 else "linear")


def test_llama_cpp_reads_the_same_factors(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ids = list(range(3, 43))
    for name, (keys, _) in FILES.items():
        path = in_file(tmp_path / "t.gguf", keys)
        with edgellama.load(path, runtime="reference") as model:
            ours = model.session().forward(ids)
        with edgellama.load(path, runtime="llama.cpp", threads=1, kv_type="f32") as model:
            assert nmse(ours, model.session().forward(ids)) < 1e-5, name
