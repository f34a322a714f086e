"""Which type each tensor gets: compared with what llama.cpp chose for the same models."""

import json
from pathlib import Path

import pytest
from make_plan_fixture import FIXTURE, MODELS, packed, quantized, silence, types
from tiny import tiny_config, write_tiny

from edgellama.errors import ParameterError
from edgellama.ggml import BY_NAME
from edgellama.quantize.plan import ALIASES, FILE_TYPES, Plan, plan, type_name
from edgellama.quantize.source import open_source

LLAMA_CPP = json.loads(FIXTURE.read_text())


def planned(path: Path, kind: str, **how: bool) -> Plan:
    with open_source(path) as source:
        return plan(source, kind, **how)


def by_role(found: Plan) -> dict[str, list[str]]:
    return packed({tensor.name: tensor.type for tensor in found.tensors})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("models")
    return {name: write_tiny(at / f"{name}.gguf", config) for name, config in MODELS.items()}


def test_every_type_is_compared() -> None:
    assert set(LLAMA_CPP) == {*MODELS, "default"}
    assert all(list(kept) == list(FILE_TYPES) for kept in LLAMA_CPP.values())


@pytest.mark.parametrize("name", MODELS)
def test_types_are_llama_cpps(models: dict[str, Path], name: str) -> None:
    with open_source(models[name]) as source:
        for kind, expected in LLAMA_CPP[name].items():
            assert by_role(plan(source, kind)) == expected, kind


def test_types_of_the_default_model_are_llama_cpps(default_model: Path) -> None:
    with open_source(default_model) as source:
        for kind, expected in LLAMA_CPP["default"].items():
            assert by_role(plan(source, kind)) == expected, kind


@pytest.mark.parametrize("kind", ["Q3_K_M", "Q4_K_M", "IQ4_NL"])
def test_types_are_the_installed_llama_cpps(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra llamacpp")
    silence()
    for name in ("tied, rows of 96", "four heads share"):
        theirs = types(quantized(models[name], tmp_path / "out.gguf", FILE_TYPES[kind][0]))
        assert by_role(planned(models[name], kind)) == packed(theirs)


def test_importance_moves_bits(models: dict[str, Path]) -> None:
    """Sources: the rules for ffn_down in llama.cpp's `llama_tensor_get_type`."""

    def down(kind: str, importance: bool) -> list[str]:
        found = planned(models["untied"], kind, importance=importance)
        return [t.type for t in found.tensors if "ffn_down" in t.name]

    assert down("Q4_0", True) == ["Q4_1"] + ["Q4_0"] * 8
    assert down("Q5_0", True) == ["Q5_1"] + ["Q5_0"] * 8
    assert down("IQ4_NL", True) == ["IQ4_NL"] * 9
    assert down("IQ4_NL", False) == ["Q5_K"] + ["IQ4_NL"] * 8


def test_reasons_and_bits(models: dict[str, Path]) -> None:
    found = planned(models["tied, rows of 96"], "q4_k")
    assert found.type == "Q4_K_M" and found.file_type == 15
    tensors = {tensor.name: tensor for tensor in found.tensors}
    embedding, query = tensors["token_embd.weight"], tensors["blk.4.attn_q.weight"]
    assert embedding.type == "Q8_0" and embedding.fallback
    assert embedding.reason == "rows of 96 are no multiple of 256, as Q6_K needs"
    assert query.type == "Q5_0" and query.fallback
    assert query.reason == "rows of 96 are no multiple of 256, as Q4_K needs"
    assert query.n_bytes == 96 * 3 * 22 and query.row_bytes == 3 * 22
    down = tensors["blk.0.ffn_down.weight"]
    assert (down.type, down.reason, down.fallback) == ("Q6_K", "part of the mix Q4_K_M", False)
    assert tensors["blk.7.ffn_down.weight"].reason == ""
    assert tensors["output_norm.weight"].reason == "one dimension"
    stored = sum(
        t.n_elements // BY_NAME[t.type].block * BY_NAME[t.type].size for t in found.tensors
    )
    assert found.n_bytes == stored
    weights = sum(tensor.n_elements for tensor in found.tensors)
    assert found.bits_per_weight == 8 * stored / weights
    assert sum(found.types.values()) == len(found.tensors) == 30 * 9 + 2


def test_strict_refuses_fallbacks(models: dict[str, Path]) -> None:
    with pytest.raises(ParameterError, match=r"Q4_K_M: .*a larger type.*rows of 96") as caught:
        planned(models["tied, rows of 96"], "Q4_K_M", strict=True)
    assert "Q4_0" in str(caught.value.allowed) and "Q4_K" not in str(caught.value.allowed)
    assert not planned(models["untied"], "Q4_K_M", strict=True).fallbacks


def test_names() -> None:
    for alias, name in ALIASES.items():
        assert type_name(alias.lower()) == name
    for name in FILE_TYPES:
        assert type_name(name.lower()) == name
    for wrong in ("", "Q4", "IQ1_S", 4, None):
        with pytest.raises(ParameterError, match="allowed: F32, F16"):
            type_name(wrong)  # type: ignore[arg-type]


def test_vectors_become_f32(tmp_path: Path) -> None:
    norms = {"blk.0.attn_norm.weight": "F16", "blk": "F16"}
    path = write_tiny(tmp_path / "a.gguf", tiny_config(), norms, rope_factors=[1.0] * 8)
    found = {tensor.name: tensor for tensor in planned(path, "F16").tensors}
    assert found["blk.0.attn_norm.weight"].source_type == "F16"
    assert found["blk.0.attn_norm.weight"].type == found["rope_freqs.weight"].type == "F32"
