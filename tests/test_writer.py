"""GGUF files written here, read back by our reader and by the `gguf` package."""

import io
from array import array
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgellama.errors import ModelFormatError
from edgellama.gguf import open_gguf
from edgellama.quantize.plan import PlannedTensor
from edgellama.quantize.writer import Writer

VALUES: dict[str, tuple[Any, str]] = {  # key: a value, and how it is stored if nothing is said
    "count": (7, "u32"),
    "largest": (2**32 - 1, "u32"),
    "wide": (2**32, "u64"),
    "negative": (-1, "i32"),
    "low": (-(2**31) - 1, "i64"),
    "real": (0.5, "f32"),
    "flag": (True, "bool"),
    "text": ("añ\n\0🙂", "string"),
    "nothing": ("", "string"),
    "texts": (["a", "", "ü"], "array of string"),
    "no_texts": ([], "array of string"),
    "flags": ([True, False], "array of bool"),
    "integers": ([1, -2, 3], "array of i32"),
    "long": ([2**31], "array of i64"),
    "reals": ([0.5, -1.0], "array of f32"),
    "mixed": ([1, 0.5], "array of f32"),
    "bytes": (array("B", [0, 255]), "array of u8"),
    "scores": (np.array([1.5, 2.5], np.float32), "array of f32"),
    "types": (np.array([1, 2], np.int32), "array of i32"),
    "doubles": (np.array([0.1]), "array of f64"),
    "longs": (np.array([2**40], np.int64), "array of i64"),
}
KINDS = ["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"]


def planned(name: str, type: str, *shape: int) -> PlannedTensor:
    return PlannedTensor(name, shape, type, type, "")


def written(path: Path, metadata: dict[str, Any], **how: Any) -> Path:
    with open(path, "wb") as file:
        writer = Writer(file, metadata, [], **how)
        assert writer.n_bytes == file.tell()
    return path


def test_values_come_back(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", {key: value for key, (value, _) in VALUES.items()})
    with open_gguf(path) as file:
        assert list(file.metadata) == list(VALUES)
        assert file.kinds == {key: kind for key, (_, kind) in VALUES.items()}
        for key, (value, _) in VALUES.items():
            if isinstance(value, np.ndarray):
                value = value.tolist()
            found = file.metadata[key]
            assert (list(found) if isinstance(found, array) else found) == (
                list(value) if isinstance(value, array) else value
            ), key
    theirs = gguf.GGUFReader(path)
    for key, (value, _) in VALUES.items():
        if len(value) if isinstance(value, (list, np.ndarray)) else True:
            assert theirs.fields[key].contents() == (
                value.tolist() if isinstance(value, (np.ndarray, array)) else value
            ), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    bits, low = int(kind[1:]), -1 if kind[0] == "i" else 0
    high = 2 ** (bits - 1 if low else bits) - 1
    low *= high + 1
    kinds = {"low": kind, "high": kind, "both": f"array of {kind}"}
    values = {"low": low, "high": high, "both": [low, high]}
    with open_gguf(written(tmp_path / "a.gguf", values, kinds=kinds)) as file:
        assert file.kinds == kinds
        assert [file.metadata["low"], file.metadata["high"]] == [low, high]
        assert list(file.metadata["both"]) == [low, high]
    for wrong in (low - 1, high + 1):
        for value, how in ((wrong, kind), ([wrong], f"array of {kind}")):
            with pytest.raises(ModelFormatError, match=r"key 'k.v': .* cannot be stored as"):
                Writer(io.BytesIO(), {"k.v": value}, [], kinds={"k.v": how})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1e300, "f32"),
        ("\ud800", "string"),
        (array("I", [2**31]), "array of i32"),
        (np.array([0.5]), "array of i32"),
    ],
)
def test_what_cannot_be_stored(value: Any, kind: str) -> None:
    with pytest.raises(ModelFormatError, match="key 'a'"):
        Writer(io.BytesIO(), {"a": value}, [], kinds={"a": kind})


def test_tensors_lie_where_the_table_says(tmp_path: Path) -> None:
    tensors = [
        planned("a.weight", "F32", 3),
        planned("b.weight", "Q8_0", 2, 64),
        planned("c.weight", "F16", 5, 7),
    ]
    data = [np.random.default_rng(i).bytes(t.n_bytes) for i, t in enumerate(tensors)]
    with open(tmp_path / "a.gguf", "wb") as stream:
        writer = Writer(stream, {"general.architecture": "llama"}, tensors)
        for tensor, raw in zip(tensors, data, strict=True):
            writer.write(raw[:5])
            writer.write(np.frombuffer(raw[5:], np.uint8).data)
            writer.end_tensor(tensor)
        assert stream.tell() == writer.n_bytes
    with open_gguf(tmp_path / "a.gguf") as file:
        assert not file.warnings
        for tensor, raw in zip(tensors, data, strict=True):
            found = bytearray(file.tensors[tensor.name].n_bytes)
            file.read_into(tensor.name, found)
            assert bytes(found) == raw
            assert file.tensors[tensor.name].shape == tensor.shape
    for tensor, raw, theirs in zip(
        tensors, data, gguf.GGUFReader(tmp_path / "a.gguf").tensors, strict=True
    ):
        assert theirs.data.tobytes() == raw and theirs.name == tensor.name
        assert tuple(reversed(theirs.shape.tolist())) == tensor.shape


def test_a_reserved_key_is_filled_at_last(tmp_path: Path) -> None:
    tensor = planned("a.weight", "F32", 8)
    for text in ("", "ünï", "x" * 40):
        with open(tmp_path / "a.gguf", "wb") as stream:
            writer = Writer(stream, {"first": 1}, [tensor], reserved=("word", 40))
            writer.write(bytes(range(32)))
            writer.end_tensor(tensor)
            writer.fill(text)
            assert stream.tell() == writer.n_bytes
        with open_gguf(tmp_path / "a.gguf") as file:
            word = file.metadata["word"]
            assert isinstance(word, str) and word.rstrip() == text and len(word.encode()) == 40
            found = bytearray(32)
            file.read_into("a.weight", found)
            assert found == bytes(range(32))
