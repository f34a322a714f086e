"""The certificate: each kind of damage is really done, and must be caught and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.errors import EdgeLlamaError, ModelFormatError
from edgellama.gguf import open_gguf
from edgellama.quantize import quantize
from edgellama.quantize.certificate import KEY, PROMPTS, key_checksums, read_certificate
from edgellama.quantize.source import SourceTensor
from edgellama.quantize.verify import verify

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_bos_token": True}
    path = tmp_path_factory.mktemp("verify") / "source.gguf"
    return write_tiny(path, tiny_config(vocab_size=300), metadata=metadata)


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    output = source.with_name("file.gguf")
    quantize(source, output, "F16")
    return output


def damaged(file: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A copy in which some bytes are others, where they first occur."""
    data = file.read_bytes()
    assert len(old) == len(new) and old in data
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(old, new, 1))
    return other


def test_a_sound_file_holds(file: Path) -> None:
    for runtime in ("cpu", "reference"):
        verdict = verify(file, runtime)
        assert verdict.problems == () and verdict.runtime == runtime
        assert verdict.prompts == len(PROMPTS) and verdict.tensors == 21
        assert verdict.deviation is not None and verdict.deviation < 0.005


def test_every_key_and_tensor_has_a_checksum(file: Path) -> None:
    with open_gguf(file) as opened:
        certificate = read_certificate(opened.metadata, file)
        assert set(certificate.tensors) == set(opened.tensors)
        assert set(certificate.keys) == set(opened.metadata) - {KEY}
        assert certificate.keys == key_checksums(opened.metadata)


def test_a_changed_byte_of_a_tensor_is_named(file: Path, tmp_path: Path) -> None:
    with open_gguf(file) as opened:
        start = opened.tensors["blk.1.ffn_up.weight"].offset
    other = tmp_path / "other.gguf"
    shutil.copy(file, other)
    with other.open("r+b") as data:
        data.seek(start + 101)
        byte = data.read(1)[0]
        data.seek(start + 101)
        data.write(bytes([byte ^ 1]))
    assert verify(other).problems == ("tensor 'blk.1.ffn_up.weight' was changed",)


def test_an_edited_template_is_named(file: Path, tmp_path: Path) -> None:
    other = damaged(file, tmp_path, b"<{{ m.role }}>", b"[{{ m.role }}]")
    assert verify(other).problems == ("key 'tokenizer.chat_template' was changed",)


def test_a_dropped_bos_is_named(file: Path, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.add_bos_token\x07\x00\x00\x00"
    problems = verify(damaged(file, tmp_path, key + b"\1", key + b"\0")).problems
    assert problems[0] == "key 'tokenizer.ggml.add_bos_token' was changed"
    assert problems[1].endswith("token 1, BOS, is no longer put in front")


def test_an_added_key_is_named(file: Path, tmp_path: Path) -> None:
    other = damaged(file, tmp_path, b"general.name", b"general.nome")
    problems = verify(other).problems
    assert problems == ("key 'general.name' is missing", "key 'general.nome' was added")


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_a_wrong_order_of_rows_is_named(
    type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that leaves the rows of a Hugging Face checkpoint as they are."""
    folder = zoo.write_folder(tmp_path, next(iter(zoo.styles().values())))
    quantize(folder, tmp_path / "right.gguf", type)
    assert verify(tmp_path / "right.gguf").problems == ()
    monkeypatch.setattr(SourceTensor, "arrange", lambda self, rows: rows)
    quantize(folder, tmp_path / "wrong.gguf", type)
    problems = verify(tmp_path / "wrong.gguf").problems
    for name in ("blk.0.attn_q", "blk.0.attn_k", "blk.1.attn_q", "blk.1.attn_k"):
        expected = f"tensor '{name}.weight' was not converted right: error "
        (problem,) = (found for found in problems if found.startswith(expected))
        assert problem.endswith("its rows may be in the wrong order for rope")
    if type != "Q4_0":  # whose noise is as large
        assert problems[-1].endswith("attn_q and attn_k are in the wrong order for rope")


def test_wrong_weights_under_right_sums_are_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that turns a tensor round: the checksums are those of what it wrote."""
    fetch = SourceTensor.read_bits

    def mixed(self: SourceTensor, first: int = 0, last: int | None = None) -> Any:
        bits = fetch(self, first, last)
        return bits[::-1].copy() if self.name == "blk.0.attn_v.weight" else bits

    monkeypatch.setattr(SourceTensor, "read_bits", mixed)
    quantize(source, tmp_path / "file.gguf", "F32")
    problems = verify(tmp_path / "file.gguf").problems
    assert problems[0].startswith("tensor 'blk.0.attn_v.weight' was not converted right: error ")
    assert problems[1].startswith("the answers differ by")
    assert "the weights do not answer so" in problems[1]


def test_the_certificate_can_be_left_out(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "file.gguf", "F16", certificate="none")
    with pytest.raises(EdgeLlamaError, match="has no certificate"):
        verify(tmp_path / "file.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"prompts": []},
        {"prompts": [[[1], [2], [], 1.0]]},
        {"prompts": [[[1], [-2], [0.5], 1.0]]},
        {"prompts": [[[1], [2], [0.5], 0.0]]},
        {"prompts": 7},
        {"tensors": {"a": 1}},
        {"keys": []},
        {"errors": {"a": "b"}},
        {"errors": {"a": "1"}},
        {"errors": {"a": True}},
        {"errors": {"a": 10**400}},
        {"errors": {"a": -0.5}},
        {"errors": {"a": float("nan")}},
        {"errors": {"a": float("inf")}},
        {"version": 10**400},
        {"version": ["x" * 10_000]},
        {"rope": "third"},
    ],
)
def test_a_certificate_of_another_kind_is_refused(file: Path, change: dict[str, Any]) -> None:
    with open_gguf(file) as opened:
        text = opened.metadata[KEY]
    assert isinstance(text, str)
    other = json.dumps(json.loads(text) | change)
    with pytest.raises(ModelFormatError, match="certificate cannot be read") as caught:
        read_certificate({KEY: other}, file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[", "7", "[]", "{}", "[" * 100_000, "NaN"])
def test_no_certificate_at_all_is_refused(file: Path, text: str) -> None:
    with pytest.raises(ModelFormatError, match="certificate cannot be read"):
        read_certificate({KEY: text}, file)


def test_values_have_the_same_sum_before_and_after_a_file() -> None:
    before = {"a": 0.1, "b": [1.5, 0.1], "c": np.array([1, 2], np.int32), "d": ["x", "é"], "e": []}
    after = {"a": float(np.float32(0.1)), "b": np.array([1.5, 0.1], np.float32)}
    after |= {"c": [1, 2], "d": ["x", "é"], "e": []}
    assert key_checksums(before) == key_checksums(after)
    assert key_checksums({"a": True}) != key_checksums({"a": 1}) != key_checksums({"a": "1"})


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(file), "--quiet"]) == 0
    assert "holds what its certificate says: 21 tensors" in capsys.readouterr().out
    other = damaged(file, tmp_path, b"<{{ m.role }}>", b"[{{ m.role }}]")
    assert run(["verify", str(other), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["holds"] and told["problems"] == ["key 'tokenizer.chat_template' was changed"]


def test_cancelling(file: Path) -> None:
    token = edgellama.CancelToken()
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        verify(file, cancel=token)
