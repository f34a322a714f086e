"""Every runtime against golden logits: torch in full float32, made and described by `tests/gpu`.

The goldens come from an implementation that shares nothing with the runtimes but the decoding of
blocks; `transformers` agreed with it when they were made.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accuracy import POSITIONS, TEXT
from gpu import fixtures, models
from make_llamacpp_fixture import sha256
from tiny import write_tiny

import edgellama
from edgellama.config import Rope
from edgellama.runtimes import levels

EXACT = 1e-9  # NMSE of float32 arithmetic and cache; measured: up to 2e-12
ROUNDED = 6e-4  # NMSE where activations are rounded to 8 bits; measured: up to 3e-4
HALF = 2e-6  # NMSE of keys and values in half precision; measured: up to 3e-7
SAME = 1e-9  # mean KL of the default model's float32 reference; measured: 2e-11
FEW = 64  # positions of the default model for comparisons whose bounds are far above
FLOATS = ("F32", "F16")
LEVELS = {0: 1e-5, 4: 5e-3}  # of ONNX Runtime's accuracy: mean KL; measured: 2e-11 and 4e-3
CASES = [(name, kind) for name in models.TINY for kind in models.KINDS]
Written = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def tiny() -> fixtures.Golden:
    return fixtures.read(fixtures.FOLDER / fixtures.TINY_FILE)


@pytest.fixture(scope="module")
def default(default_model: Path) -> fixtures.Golden:
    golden = fixtures.read(fixtures.FOLDER / fixtures.DEFAULT_FILE)
    assert golden.about["text_sha256"] == sha256(TEXT), "the text is not the fixture's"
    if golden.about["model_sha256"] != sha256(default_model):
        pytest.skip("the goldens were made from another model than this one")
    return golden


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("golden")
    return lambda name, kind: models.write(folder, name, kind)


@pytest.fixture
def onnx(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Options of the onnx runtime on the CPU; transcoded files go to a cache of their own."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
    return {"runtime": "onnx", "device": "cpu"}


def logits(path: Path, ids: list[int], **options: Any) -> np.ndarray:
    with edgellama.load(path, context=POSITIONS, **options) as model:
        return model.session().forward(ids, all_logits=True)


def far(golden: fixtures.Golden, path: Path, name: str, kind: str, **options: Any) -> float:
    """NMSE of a tiny model's logits."""
    got = logits(path, models.ids(name), **options)[list(models.rows(kind))]
    return fixtures.from_logits(golden.arrays[f"{name}.{kind}"], got)["nmse"]


# --- the goldens themselves ----------------------------------------------------------------------


def test_the_goldens_say_where_they_come_from(tiny: fixtures.Golden) -> None:
    default = fixtures.read(fixtures.FOLDER / fixtures.DEFAULT_FILE)
    for about in (tiny.about, default.about):
        assert about["tf32"] is False
        assert about["known_product_error"] < about["would_be_off_with_tf32"] / 4
        assert about["second_opinion"].startswith("transformers ")
        assert about["second_opinion_nmse"] <= EXACT
        assert {"device", "torch", "date"} <= set(about)
        assert about["device"] == "cpu" or {"driver", "cuda", "cudnn"} <= set(about)
    n_bytes = sum(path.stat().st_size for path in fixtures.FOLDER.iterdir())
    assert n_bytes < 10**6


def test_the_goldens_are_of_these_weights_and_tokens(
    tiny: fixtures.Golden, written: Written
) -> None:
    hashes = {f"{a}.{b}": models.weights_sha256(written(a, b)) for a, b in CASES}
    assert hashes == tiny.about["weights_sha256"], "the generators changed: make the goldens again"
    for name in models.TINY:
        assert tiny.arrays[f"{name}.ids"].tolist() == models.ids(name)


def test_a_wrong_position_is_far_from_the_goldens(tiny: fixtures.Golden) -> None:
    for name, kind in CASES:
        golden = tiny.arrays[f"{name}.{kind}"]
        off = fixtures.from_logits(golden, np.roll(golden, 1, axis=0))
        assert off["nmse"] > 0.1 and off["kl_mean"] > 0.05 and off["same_top"] < 0.5


@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_the_goldens_know_each_rope(name: str, tiny: fixtures.Golden, tmp_path: Path) -> None:
    """The same weights without the rope's scaling are far from the goldens."""
    config = models.TINY[name]
    config = replace(config, rope=Rope(config.rope.dim, config.rope.freq_base))
    path = write_tiny(tmp_path / "plain.gguf", config, "F32", seed=models.SEED)
    assert far(tiny, path, name, "F32", runtime="reference") > 1000 * EXACT


# --- tiny models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_reference(name: str, kind: str, tiny: fixtures.Golden, written: Written) -> None:
    assert far(tiny, written(name, kind), name, kind, runtime="reference") <= EXACT


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("level", levels.available())
@pytest.mark.parametrize("name", models.TINY)
def test_cpu(
    name: str,
    level: str,
    deterministic: bool,
    tiny: fixtures.Golden,
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGELLAMA_ISA", level)
    options = {"runtime": "cpu", "deterministic": deterministic}
    for kind in models.KINDS:
        bound = EXACT if kind in FLOATS else ROUNDED
        assert far(tiny, written(name, kind), name, kind, kv_type="f32", **options) <= bound, kind
    assert far(tiny, written(name, "F32"), name, "F32", kv_type="f16", **options) <= HALF


@pytest.mark.parametrize("accuracy", LEVELS)
@pytest.mark.parametrize("name", models.TINY)
def test_onnx(
    name: str, accuracy: int, tiny: fixtures.Golden, written: Written, onnx: dict[str, str]
) -> None:
    for kind in models.KINDS:
        bound = EXACT if kind in FLOATS or accuracy == 0 else 2 * ROUNDED  # 6e-4
        found = far(tiny, written(name, kind), name, kind, accuracy=accuracy, **onnx)
        assert found <= bound, kind


# --- the default model ---------------------------------------------------------------------------


def test_the_reference_on_the_default_model(default: fixtures.Golden, default_model: Path) -> None:
    ids = default.arrays["tokens"].tolist()
    assert ids == models.text_ids(default_model)
    got = logits(default_model, ids[:FEW], runtime="reference")
    found = fixtures.from_likeliest(default.arrays, got)
    assert found["kl_mean"] <= SAME and found["nmse"] <= EXACT and found["same_top"] == 1


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("level", levels.available())
def test_cpu_on_the_default_model(
    level: str,
    deterministic: bool,
    default: fixtures.Golden,
    default_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGELLAMA_ISA", level)
    ids = default.arrays["tokens"].tolist()[:FEW]
    got = logits(default_model, ids, runtime="cpu", deterministic=deterministic)
    found = fixtures.from_likeliest(default.arrays, got)
    assert found["kl_mean"] <= 3e-3 and found["same_top"] >= 0.9, found  # 8e-4, 0.94


@pytest.mark.parametrize(("accuracy", "bound"), LEVELS.items())
def test_onnx_on_the_default_model(
    accuracy: int,
    bound: float,
    default: fixtures.Golden,
    default_model: Path,
    onnx: dict[str, str],
) -> None:
    ids = default.arrays["tokens"].tolist()[:FEW]
    got = logits(default_model, ids, accuracy=accuracy, **onnx)
    found = fixtures.from_likeliest(default.arrays, got)
    assert found["kl_mean"] <= bound and found["same_top"] >= (0.9 if accuracy else 1), found


def test_another_text_is_far_from_the_default_models_goldens(
    default: fixtures.Golden, default_model: Path
) -> None:
    ids = default.arrays["tokens"].tolist()[1:FEW]
    found = fixtures.from_likeliest(default.arrays, logits(default_model, ids, runtime="cpu"))
    assert found["kl_mean"] > 1 and found["same_top"] < 0.5
