"""Converting: what comes out is as planned and near its source; weights that are no numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversions import WIDE, names_in, quantize, values
from killing import digest
from make_plan_fixture import quantized, silence
from tiny import tiny_config, tiny_weights, write_tiny

import edgellama
from edgellama.errors import NonFiniteError, ParameterError
from edgellama.gguf import open_gguf
from edgellama.quantize.blocks import decode
from edgellama.quantize.convert import prepared
from edgellama.quantize.plan import FILE_TYPES, plan
from edgellama.quantize.source import open_source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("models")
    write_tiny(at / "small.gguf")
    for kind in ("F32", "F16", "BF16"):
        write_tiny(at / f"{kind}.gguf", WIDE, kind)
    return at


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    found = {}
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            raw = bytearray(info.n_bytes)
            file.read_into(name, raw)
            found[name] = info.type.name, bytes(raw)
    return found


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_output_is_as_planned_and_near_the_source(models: Path, tmp_path: Path, kind: str) -> None:
    source, output = models / "F32.gguf", tmp_path / "out.gguf"
    report = quantize(source, output, kind.lower())
    with open_source(source) as opened:
        planned = plan(opened, kind)
    found = tensors(output)
    assert {name: type for name, (type, _) in found.items()} == {
        tensor.name: tensor.type for tensor in planned.tensors
    }
    with open_gguf(output) as file:
        assert not file.warnings
        assert file.metadata["general.file_type"] == FILE_TYPES[kind][0]
        assert file.metadata["general.quantization_version"] == 2
    for name, (type, raw) in found.items():
        exact = values(source, name)
        rows = np.frombuffer(raw, np.uint8).reshape(exact.shape[0] if exact.ndim > 1 else 1, -1)
        error = decode(type, rows).reshape(exact.shape) - exact
        assert np.square(error).sum() <= LARGEST_NMSE[type] * np.square(exact).sum(), name
    assert report.types == planned.types
    assert report.bits_per_weight == planned.bits_per_weight
    assert report.bytes == output.stat().st_size
    assert (report.type, report.source, report.output) == (kind, source, output)


LARGEST_NMSE = {  # of weights that are normally distributed, with room to spare
    "F32": 0.0,
    "F16": 1e-6,
    "BF16": 1e-5,
    "Q8_0": 1e-4,
    "Q6_K": 1e-3,
    "Q5_0": 4e-3,
    "Q5_1": 4e-3,
    "Q5_K": 3e-3,
    "Q4_0": 0.015,
    "Q4_1": 0.012,
    "Q4_K": 0.01,
    "IQ4_NL": 0.01,
    "Q3_K": 0.04,
    "Q2_K": 0.15,
}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_what_has_its_type_already_is_copied(models: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.gguf"
    quantize(models / f"{kind}.gguf", output, kind)
    assert tensors(output) == tensors(models / f"{kind}.gguf")
    wide = tmp_path / "wide.gguf"
    quantize(output, wide, "F32")
    for name in tensors(wide):
        assert np.array_equal(values(wide, name), values(output, name))


def test_requantizing_copies_blocks_bit_for_bit(tmp_path: Path) -> None:
    source, output = tmp_path / "a.gguf", tmp_path / "out.gguf"
    write_tiny(
        source, WIDE, {"blk": "Q4_K", "blk.0.attn_v": "Q6_K", "output": "Q6_K", "tok": "F16"}
    )
    report = quantize(source, output, "Q4_K_S")
    before, after = tensors(source), tensors(output)
    same = [name for name in before if before[name][0] == after[name][0]]
    assert all(before[name] == after[name] for name in same)
    changed = set(before) - set(same)
    assert changed == {"token_embd.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight"}
    assert any("starts from quantized weights" in note for note in report.notes)


def test_keys_are_kept_but_the_files_own(tmp_path: Path) -> None:
    own = {"general.file_type": 0, "edgellama.word": "old", "general.url": "x", "split.count": 1}
    source, output = write_tiny(tmp_path / "a.gguf", metadata=own), tmp_path / "out.gguf"
    quantize(source, output, "F16")
    with open_gguf(source) as before, open_gguf(output) as after:
        own_keys = {"general.file_type", "general.quantization_version"}
        kept = {k: v for k, v in before.metadata.items() if k not in {*own, "split.count"}}
        found = {k: v for k, v in after.metadata.items() if k not in own_keys}
        assert found == kept | {"general.url": "x"}
        assert {k: after.kinds[k] for k in kept} == {k: before.kinds[k] for k in kept}


def test_same_input_same_bytes(models: Path, tmp_path: Path) -> None:
    found = set()
    for threads in (1, 2, 3):
        for _ in range(2):
            output = tmp_path / "out.gguf"
            quantize(models / "F16.gguf", output, "Q4_K_M", threads=threads)
            found.add(digest(output))
    assert len(found) == 1


def test_output_runs_here(models: Path, tmp_path: Path) -> None:
    """Q8_0 changes little: the likeliest token stays."""
    output = tmp_path / "out.gguf"
    quantize(models / "F32.gguf", output, "Q8_0")
    logits = []
    for path in (models / "F32.gguf", output):
        with edgellama.load(path, runtime="reference") as model:
            logits.append(model.session().forward([1, 5, 9], all_logits=True))
    error = np.square(logits[0] - logits[1]).sum() / np.square(logits[0]).sum()
    assert 0 < error < 1e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q3_K_M", "Q4_K_M"])
def test_tensors_are_the_installed_llama_cpps(models: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra llamacpp")
    silence()
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    for name in ("F16", "small"):
        quantize(models / f"{name}.gguf", ours, kind)
        quantized(models / f"{name}.gguf", theirs, FILE_TYPES[kind][0])
        assert tensors(ours) == tensors(theirs)


def test_importance_changes_the_bytes(models: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    weights = np.linspace(0.01, 100, 256, dtype=np.float32)
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    quantize(models / "F32.gguf", plain, "Q4_K_S")
    quantize(models / "F32.gguf", weighted, "Q4_K_S", importance={name: weights})
    before, after = tensors(plain), tensors(weighted)
    assert [n for n in before if before[n] != after[n]] == [name]
    exact = values(models / "F32.gguf", name)
    errors = [np.square(values(path, name) - exact) @ weights for path in (plain, weighted)]
    assert errors[1].sum() < errors[0].sum()


def test_importance_of_another_model_is_refused(models: Path, tmp_path: Path) -> None:
    for wrong in (
        {"blk.9.ffn_up.weight": np.ones(256, np.float32)},
        {"blk.0.ffn_up.weight": np.ones(64, np.float32)},
        {"blk.0.ffn_up.weight": np.full(256, np.nan, np.float32)},
        {"blk.0.ffn_up.weight": np.full(256, -1, np.float32)},
    ):
        with pytest.raises(ParameterError, match=r"importance of .*another model"):
            quantize(models / "F32.gguf", tmp_path / "out.gguf", "Q4_0", importance=wrong)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K", "Q4_K_M", "Q6_K"])
def test_only_what_importances_are_to_each_other_counts(
    models: Path, tmp_path: Path, kind: str
) -> None:
    """Far beyond what the searches' sums can hold, too, where ggml writes zeros and NaNs."""
    weights = np.random.default_rng(5).random(256).astype(np.float32) + np.float32(0.01)
    source, found = models / "F32.gguf", {}
    for shift in (0, 24, 127, -110):
        importance = {UP: np.ldexp(weights, shift)}
        quantize(source, tmp_path / "out.gguf", kind, importance=importance)
        found[shift] = tensors(tmp_path / "out.gguf")[UP]
    assert found[24] == found[127] == found[-110] == found[0]
    quantize(source, tmp_path / "plain.gguf", kind)
    exact, plain = values(source, UP), values(tmp_path / "plain.gguf", UP)
    for even in (1e36, 3e38, 1e300):
        quantize(source, tmp_path / "out.gguf", kind, importance={UP: np.full(256, even)})
        error = np.square(values(tmp_path / "out.gguf", UP) - exact).sum()
        assert error <= 1.1 * np.square(plain - exact).sum()


UP = "blk.0.ffn_up.weight"


def test_importance_of_nothing_but_zeros_is_none(models: Path, tmp_path: Path) -> None:
    """ggml writes a tensor of zeros."""
    source, zeros, ones = models / "F32.gguf", np.zeros(256, np.float32), np.ones(256, np.float32)
    found = []
    for name, weights in (("none", None), ("one", {UP: zeros}), ("all", {UP: zeros, Q: ones})):
        quantize(source, tmp_path / f"{name}.gguf", "Q4_K_S", importance=weights)
        found.append(tensors(tmp_path / f"{name}.gguf"))
    assert found[0] == found[1] and [n for n in found[0] if found[0][n] != found[2][n]] == [Q]


Q = "blk.1.attn_q.weight"


def test_what_importance_leads_to_is_looked_at(models: Path, tmp_path: Path) -> None:
    """Weights of importance that no caller can bring here: the search comes to scales of NaN."""
    source = models / "F32.gguf", tmp_path / "out.gguf", "Q4_0"
    with prepared(*source, certificate="none") as job:
        wrong = replace(job, importance={UP: np.full(256, 3e38, np.float32)})
        with pytest.raises(NonFiniteError, match=rf"'{UP}': row 1: "):
            wrong.run()
    assert names_in(tmp_path) == []


# --- weights that are no numbers ----------------------------------------------------------------


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number(tmp_path: Path, stored: str, kind: str, value: float) -> None:
    name = "blk.1.ffn_down.weight"
    bad = tiny_weights(tiny_config())[name]
    bad[37, 11] = bad[40, 0] = value
    with np.errstate(invalid="ignore"):
        source = write_tiny(tmp_path / "a.gguf", types=stored, weights={name: bad})
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    with pytest.raises(NonFiniteError, match=rf"a\.gguf: tensor '{name}': row 37: .*2 such rows"):
        quantize(source, output, kind)
    assert output.read_bytes() == b"old" and names_in(tmp_path) == ["a.gguf", "out.gguf"]


def test_a_vector_that_is_no_number(tmp_path: Path) -> None:
    bad = np.ones(64, np.float32)
    bad[63] = np.nan
    source = write_tiny(tmp_path / "a.gguf", weights={"blk.0.attn_norm.weight": bad})
    with pytest.raises(NonFiniteError, match=r"'blk.0.attn_norm.weight': row 63"):
        quantize(source, tmp_path / "out.gguf", "Q8_0")


def test_a_block_whose_scale_is_no_number(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.gguf", types="Q8_0")
    with open_gguf(source) as file:
        info = file.tensors["blk.0.attn_q.weight"]
    with source.open("r+b") as raw:
        raw.seek(info.offset + 5 * info.row_bytes + 34)  # the second block of row 5
        raw.write(b"\x00\x7c")
    with pytest.raises(NonFiniteError, match=r"'blk.0.attn_q.weight': row 5: .*damaged"):
        quantize(source, tmp_path / "out.gguf", "Q8_0")


@pytest.mark.parametrize(("kind", "size"), [("F16", 7e4), ("Q8_0", 1e8), ("Q4_0", 1e7)])
def test_a_weight_too_large_for_its_type(tmp_path: Path, kind: str, size: float) -> None:
    name = "blk.0.attn_q.weight"
    big = tiny_weights(tiny_config())[name]
    big[9, 9] = size
    source = write_tiny(tmp_path / "a.gguf", types="BF16", weights={name: big})
    with pytest.raises(NonFiniteError, match=rf"'{name}': row 9: .*too large for {kind}.*BF16"):
        quantize(source, tmp_path / "out.gguf", kind)
    quantize(source, tmp_path / "out.gguf", "F32")
    assert values(tmp_path / "out.gguf", name)[9, 9] == pytest.approx(size, rel=0.01)
