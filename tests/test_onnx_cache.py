"""GGUF files in the cache of ONNX folders: what counts as the same file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

TOKENS = [5, 6, 7]


def split(source: Path, stem: Path) -> list[Path]:
    """The file in two parts, as llama.cpp's tool makes them."""
    reader = gguf.GGUFReader(source)
    half = len(reader.tensors) // 2
    parts = [stem.with_name(f"{stem.name}-{number:05d}-of-00002.gguf") for number in (1, 2)]
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = gguf.GGUFWriter(parts[number], "llama")
        fields = reader.fields.values() if number == 0 else ()
        for field in fields:
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def logits(path: Path, runtime: str) -> np.ndarray:
    with edgellama.load(path, runtime, context=64, threads=1) as model, model.session() as session:
        return np.array(session.forward(TOKENS))


def test_a_split_model_is_another_when_any_of_its_parts_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "models" / ".onnx"
    wholes = [write_tiny(tmp_path / f"{n}.gguf", tiny_config(), seed=n) for n in (1, 2)]
    first, second = split(wholes[0], tmp_path / "m")
    before = logits(first, "onnx")
    made = {folder.name: folder.stat().st_ino for folder in cache.iterdir()}
    np.testing.assert_array_equal(logits(first, "onnx"), before)
    assert {folder.name: folder.stat().st_ino for folder in cache.iterdir()} == made

    other = split(wholes[1], tmp_path / "other")[1]
    assert other.stat().st_size == second.stat().st_size
    other.replace(second)
    after = logits(first, "onnx")
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, logits(first, "reference"), atol=1e-4)
    assert len(list(cache.iterdir())) == 1  # what the file was is not kept
