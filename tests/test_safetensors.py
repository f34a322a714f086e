"""The safetensors reader: what it gives, and hostile files refused with their reasons.

Ids S1 to S12 are rows of the project's catalogue of bad inputs; S10 and S11 are in
`test_checkpoint.py`, for they concern indexes.
"""

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchfiles import safetensors_file

from edgellama import EdgeLlamaError, ModelFormatError, UnsupportedModelError
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.safetensors import read_safetensors


def framed(
    header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None
) -> bytes:
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(tmp_path: Path, raw: bytes, kind: type[EdgeLlamaError] = ModelFormatError) -> str:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with RawFile(path) as file, pytest.raises(kind) as caught:
        read_safetensors(file)
    assert caught.value.path == path
    return str(caught.value)


def test_rows_of_every_float_type(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(6, 4) / 4
    bf16 = (rows.view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / "good.safetensors"
    path.write_bytes(safetensors_file({"a": rows, "b": rows.astype(np.float16), "c": bf16}))
    with RawFile(path) as file:
        tensors = read_safetensors(file)
        assert [(t.name, t.dtype, t.shape) for t in tensors.values()] == [
            ("a", "F32", (6, 4)),
            ("b", "F16", (6, 4)),
            ("c", "BF16", (6, 4)),
        ]
        for tensor in tensors.values():
            assert tensor.read().dtype == np.float32
            np.testing.assert_array_equal(tensor.read(), rows)
            np.testing.assert_array_equal(tensor.read(2, 5), rows[2:5])
            assert tensor.read(3, 3).shape == (0, 4)
        assert tensors["b"].read_bits(1, 2).dtype == np.float16
        np.testing.assert_array_equal(tensors["c"].read_bits(1, 3), bf16[1:3])


HEADER_LENGTHS = [0, 1, 2**63, 100_000_001, 2**64 - 1, 600]


@pytest.mark.parametrize("length", HEADER_LENGTHS)
def test_s1_header_length(tmp_path: Path, length: int) -> None:
    message = refusal(tmp_path, framed({"a": one()}, bytes(24), length))
    assert f"header length {length}" in message


@pytest.mark.parametrize("size", range(8))
def test_s1_shorter_than_the_length_itself(tmp_path: Path, size: int) -> None:
    assert f"the file has {size} bytes" in refusal(tmp_path, bytes(size))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b" {}", "byte 8"),
        (b"[1]", "byte 8"),
        (b"\xef\xbb\xbf{}", "byte 8"),
        (b'{"a\xff": 1}', "UTF-8"),
        (b"{nonsense}", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b"{} {}", "not JSON"),
    ],
)
def test_s2_header_is_no_json_object(tmp_path: Path, header: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, framed(header))


def test_s2_spaces_after_the_header_are_legal(tmp_path: Path) -> None:
    path = tmp_path / "padded.safetensors"
    path.write_bytes(framed(json.dumps({"a": one()}) + " " * 13, bytes(24)))
    with RawFile(path) as file:
        assert read_safetensors(file)["a"].read().sum() == 0


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "5000 characters"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e400}', "1e400"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"a": [' + "[]," * 1_100_000 + "[]]}", "more than"),
    ],
)
def test_s3_json_bombs(tmp_path: Path, header: str, reason: str) -> None:
    assert reason in refusal(tmp_path, framed(header))


@pytest.mark.parametrize("metadata", [[], 1, {"a": 1}, {"a": None}, {"a": {}}])
def test_s4_metadata_must_be_strings(tmp_path: Path, metadata: object) -> None:
    header = {"__metadata__": metadata, "a": one()}
    assert "__metadata__" in refusal(tmp_path, framed(header, bytes(24)))


def test_s4_large_metadata_costs_a_few_times_its_size(tmp_path: Path) -> None:
    size = 8_000_000
    path = tmp_path / "large.safetensors"
    header = {"__metadata__": {"notes": "x" * size}, "a": one()}
    path.write_bytes(framed(header, bytes(24)))
    del header
    tracemalloc.start()
    with RawFile(path) as file:
        read_safetensors(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size + 64 * 2**20


@pytest.mark.parametrize("dtype", ["F7", "f32", "", "FLOAT", None, 5, ["F32"], {"a": 1}])
def test_s5_unknown_dtype(tmp_path: Path, dtype: object) -> None:
    message = refusal(tmp_path, framed({"a": one(dtype)}, bytes(24)))
    assert "'a'" in message and "dtype" in message and "BF16" in message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "F64", "BOOL", "C64"])
def test_s5_legal_types_that_are_no_weights_cannot_be_read_as_such(
    tmp_path: Path, dtype: str
) -> None:
    size = {"F8_E4M3": 1, "BOOL": 1}.get(dtype, 8) * 6
    path = tmp_path / "typed.safetensors"
    path.write_bytes(framed({"a": one(dtype, (2, 3), (0, size))}, bytes(size)))
    with RawFile(path) as file, pytest.raises(UnsupportedModelError, match=dtype) as caught:
        read_safetensors(file)["a"].read()
    assert "F32, F16, BF16" in str(caught.value.allowed)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((-2, -3), "-2"),
        ((2.0, 3), "2.0"),
        ((True, 6), "True"),
        (("2", 3), "2"),
        ((2**63, 1), str(2**63)),
        ((2**31, 1), str(2**31)),
        ((1,) * 10_000, "at most 8"),
        ((2**31 - 1,) * 2, "elements"),
        (6, "a list"),
        (None, "a list"),
        (([], 3), "list"),
    ],
)
def test_s6_shapes(tmp_path: Path, shape: object, reason: str) -> None:
    message = refusal(tmp_path, framed({"a": one("F32", shape)}, bytes(24)))
    assert "shape" in message or "elements" in message
    assert reason in message


@pytest.mark.parametrize(
    "offsets", [(24, 0), (-24, 0), (0.0, 24.0), (0, 24, 48), (0,), "0", None, (True, 25), ([], {})]
)
def test_s7_offsets_that_are_none(tmp_path: Path, offsets: object) -> None:
    assert "data_offsets" in refusal(tmp_path, framed({"a": one(offsets=offsets)}, bytes(24)))


def test_s7_past_the_end(tmp_path: Path) -> None:
    message = refusal(tmp_path, framed({"a": one()}, bytes(23)))
    assert "'a'" in message and "23 bytes" in message and "incomplete" in message


def test_s7_hole_overlap_and_trailing_bytes(tmp_path: Path) -> None:
    hole = {"a": one(), "b": one(offsets=(32, 56))}
    message = refusal(tmp_path, framed(hole, bytes(56)))
    assert "'b'" in message and "hole after tensor 'a'" in message
    overlap = {"a": one(), "b": one(offsets=(16, 40))}
    message = refusal(tmp_path, framed(overlap, bytes(40)))
    assert "'b'" in message and "overlaps tensor 'a'" in message
    late = {"a": one(offsets=(8, 32))}
    assert "hole after the header" in refusal(tmp_path, framed(late, bytes(32)))
    assert "has 25 bytes" in refusal(tmp_path, framed({"a": one()}, bytes(25)))


def test_s7_overlap_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = {f"t{i}": one("U8", (2**30,), (0, 2**30)) for i in range(1000)}
    path = tmp_path / "bomb.safetensors"
    raw = framed(bomb)
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate(len(raw) + 2**30)  # sparse
    start = time.monotonic()
    with RawFile(path) as file, pytest.raises(ModelFormatError, match="overlaps"):
        read_safetensors(file)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (0, 3), ()])
def test_s8_size_and_shape_disagree(tmp_path: Path, shape: tuple[int, ...]) -> None:
    message = refusal(tmp_path, framed({"a": one("F32", shape)}, bytes(24)))
    assert f"{int(np.prod(shape))} x 32 bits do not fill data_offsets 0..24" in message


def test_s8_empty_and_scalar_tensors_are_legal(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    header = {"e": one("F32", (0, 3), (0, 0)), "s": one("F32", (), (0, 4))}
    path.write_bytes(framed(header, struct.pack("<f", 1.5)))
    with RawFile(path) as file:
        tensors = read_safetensors(file)
        assert tensors["e"].read().shape == (0, 3)
        assert tensors["s"].read().shape == () and tensors["s"].read() == 1.5


def test_s9_unaligned_data(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    for padding in range(1, 5):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(framed(json.dumps({"a": one()}) + " " * padding, rows.tobytes()))
        with RawFile(path) as file:
            np.testing.assert_array_equal(read_safetensors(file)["a"].read(), rows)


def test_s12_values_are_given_as_they_are(tmp_path: Path) -> None:
    """NaN, infinities and bfloat16 beyond float16's range reach the caller, who must judge."""
    bits = np.array([0x7F80, 0xFF80, 0x7FC0, 0x4780, 0x7F7F], np.uint16)
    path = tmp_path / "wide.safetensors"
    path.write_bytes(safetensors_file({"w": bits}))
    with RawFile(path) as file:
        values = read_safetensors(file)["w"].read()
    assert values[0] == np.inf and values[1] == -np.inf and np.isnan(values[2])
    assert values[3] == 65536 and 3.3e38 < values[4] < np.inf


@pytest.mark.parametrize("more", ["extra", "dtype"])
def test_a_record_has_three_fields(tmp_path: Path, more: str) -> None:
    record = one() | {"extra": 1} if more == "extra" else {"shape": [], "data_offsets": []}
    assert "'a'" in refusal(tmp_path, framed({"a": record}, bytes(24)))
    assert "'a'" in refusal(tmp_path, framed({"a": []}, bytes(24)))


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(safetensors_file({"a": np.zeros((64, 64), np.float32)}))
    with RawFile(path) as file:
        tensor = read_safetensors(file)["a"]
        with path.open("r+b") as other:
            other.truncate(400)
        with pytest.raises(ModelFormatError, match="changed since it was opened"):
            tensor.read()


def test_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    header = {f"t{number}": 0 for number in range(65_537)}
    assert "65537 tensors; at most 65536" in refusal(tmp_path, framed(header))
