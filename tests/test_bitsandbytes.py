"""Weights of bitsandbytes in 4 bits: equal to its own unpacking, and hostile parts refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchfiles import safetensors_file, torch_file, write

from edgellama import EdgeLlamaError, ModelFormatError, UnsupportedModelError
from edgellama.quantize.bitsandbytes import unpack_4bit
from edgellama.quantize.checkpoint import open_checkpoint
from edgellama.quantize.raw_file import RawFile
from edgellama.quantize.safetensors import read_safetensors
from edgellama.quantize.tensor import Tensor

FILE = Path(__file__).parent / "data" / "bnb_4bit.safetensors"
CASES = ["nf4", "nf4_nested", "fp4", "fp4_nested", "odd", "in_bf16"]


@pytest.fixture
def stored() -> Iterator[dict[str, Tensor]]:
    with RawFile(FILE) as file:
        yield read_safetensors(file)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_bitsandbytes(stored: dict[str, Tensor], case: str) -> None:
    """Bit for bit, whole and by rows that begin inside bytes and blocks."""
    name = f"{case}.weight"
    tensor = unpack_4bit(stored, FILE)[name]
    expected = stored[f"{name}.expected"].read()
    assert tensor.shape == expected.shape
    assert tensor.dtype == ("FP4" if case.startswith("fp4") else "NF4")
    read = tensor.read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(tensor.read_bits(), expected)
    for first in range(tensor.n_rows):
        for last in (first, first + 1, min(first + 5, tensor.n_rows)):
            np.testing.assert_array_equal(tensor.read(first, last), expected[first:last])


def test_as_a_checkpoint(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    """The statistics vanish, the weight has its name and shape, and a note says so."""
    parts = {n: t.read_bits() for n, t in stored.items() if n.startswith("nf4_nested.")}
    parts["norm.weight"] = np.ones(4, np.float32)
    expected = parts.pop("nf4_nested.weight.expected")
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config = {"config.json": json.dumps({"quantization_config": section})}
    for name, data in (
        ("model.safetensors", safetensors_file(parts)),
        ("pytorch_model.bin", torch_file(parts)),
    ):
        with open_checkpoint(write(tmp_path / name, {name: data, **config})) as checkpoint:
            assert sorted(checkpoint.tensors) == ["nf4_nested.weight", "norm.weight"]
            np.testing.assert_array_equal(checkpoint.tensors["nf4_nested.weight"].read(), expected)
            assert checkpoint.notes == ["1 weights were unpacked from bitsandbytes' NF4 (4 bits)"]


def in_memory(name: str, values: "np.ndarray[Any, Any]") -> Tensor:
    dtype = {"uint8": "U8", "float32": "F32", "int64": "I64"}[values.dtype.name]
    return Tensor(name, values.shape, dtype, lambda first, last: values[first:last])


def parts(stored: dict[str, Tensor], case: str = "nf4_nested") -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stored.items() if name.startswith(f"{case}.")}


def refusal(tensors: dict[str, Tensor], kind: type[EdgeLlamaError] = ModelFormatError) -> str:
    with pytest.raises(kind) as caught:
        unpack_4bit(tensors, FILE)
    assert "weight" in str(caught.value)
    return str(caught.value)


STATE = "nf4_nested.weight.quant_state.bitsandbytes__nf4"


def described(tensors: dict[str, Tensor], **changes: object) -> dict[str, Tensor]:
    """The parts with some fields of the description changed; None removes one."""
    state = json.loads(tensors[STATE].read_bits().tobytes())
    state = {key: value for key, value in (state | changes).items() if value is not None}
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {**tensors, STATE: in_memory(STATE, raw)}


CHANGES: list[tuple[dict[str, object], str]] = [
    ({"blocksize": 0}, "blocksize = 0"),
    ({"blocksize": -64}, "blocksize"),
    ({"blocksize": 64.0}, "blocksize"),
    ({"blocksize": True}, "blocksize"),
    ({"blocksize": 2**40}, "blocksize"),
    ({"blocksize": 65}, "blocksize"),
    ({"blocksize": 128}, "expected U8 [140]"),
    ({"blocksize": [64]}, "a list"),
    ({"nested_blocksize": 0}, "nested_blocksize"),
    ({"nested_blocksize": None}, "nested_blocksize"),
    ({"nested_blocksize": 128}, "nested_absmax"),
    ({"nested_offset": "x"}, "nested_offset"),
    ({"nested_offset": True}, "nested_offset"),
    ({"nested_offset": None}, "nested_offset"),
    ({"nested_offset": 10**399}, "nested_offset is 'an integer of 1326 bits'"),
    ({"nested_offset": -(10**39)}, "nested_offset is -1000"),
    ({"nested_offset": 1e300}, "nested_offset is 1e+300; expected a number that float32 holds"),
    ({"shape": None}, "shape"),
    ({"shape": []}, "shape"),
    ({"shape": [40, 449]}, "do not take"),
    ({"shape": [-40, -448]}, "shape"),
    ({"shape": [2**31, 2]}, "shape"),
    ({"shape": [2**30, 2**30]}, "elements"),
    ({"shape": [1] * 5}, "shape"),
    ({"shape": 17920}, "shape"),
    ({"quant_type": "fp4"}, "quant_type is 'fp4', the name says nf4"),
]


@pytest.mark.parametrize(("changes", "reason"), CHANGES)
def test_descriptions_that_lie(
    stored: dict[str, Tensor], changes: dict[str, object], reason: str
) -> None:
    assert reason in refusal(described(parts(stored), **changes))


def test_scales_that_overflow_are_infinite(stored: dict[str, Tensor]) -> None:
    """In silence: what reads weights looks for infinities, and names the row."""
    scales, levels = "nf4_nested.weight.nested_absmax", "nf4_nested.weight.nested_quant_map"
    tensors = parts(stored)
    for name in (scales, levels):
        huge = np.full(stored[name].shape, 3e38, np.float32)
        tensors[name] = in_memory(name, huge)
        changed = described(tensors, nested_offset=3.4e38)
        found = unpack_4bit(changed, FILE)["nf4_nested.weight"].read()
        assert found.shape == (40, 448) and not np.isfinite(found).all()


def test_description_is_no_json(stored: dict[str, Tensor]) -> None:
    raw = np.frombuffer(b"{", np.uint8)
    assert "not JSON" in refusal({**parts(stored), STATE: in_memory(STATE, raw)})
    for values in (
        np.zeros(70_000, np.uint8),
        np.zeros((2, 2), np.uint8),
        np.zeros(8, np.float32),
    ):
        tensors = {**parts(stored), STATE: in_memory(STATE, values)}
        assert "bytes of JSON" in refusal(tensors)


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".nested_quant_map"])
def test_missing_parts(stored: dict[str, Tensor], part: str) -> None:
    tensors = parts(stored)
    del tensors[f"nf4_nested.weight{part}"]
    assert "missing" in refusal(tensors)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        (".absmax", np.zeros(279, np.uint8)),
        (".absmax", np.zeros(280, np.float32)),
        (".absmax", np.zeros((280, 1), np.uint8)),
        (".quant_map", np.zeros(15, np.float32)),
        (".quant_map", np.zeros(16, np.uint8)),
        (".quant_map", np.full(16, np.nan, np.float32)),
        (".nested_quant_map", np.zeros(255, np.float32)),
        (".nested_quant_map", np.full(256, np.inf, np.float32)),
        (".nested_absmax", np.zeros(3, np.float32)),
        ("", np.zeros((8959, 1), np.uint8)),
        ("", np.zeros((0, 1), np.uint8)),
    ],
)
def test_parts_of_other_sizes(
    stored: dict[str, Tensor], part: str, values: "np.ndarray[Any, Any]"
) -> None:
    name = f"nf4_nested.weight{part}"
    refusal({**parts(stored), name: in_memory(name, values)})


def test_packed_in_a_type_that_is_not_read(stored: dict[str, Tensor]) -> None:
    name = "nf4_nested.weight"
    odd = replace(stored[name], dtype="F8_E4M3")
    assert "of type F8_E4M3" in refusal({**parts(stored), name: odd})


def test_other_variants(stored: dict[str, Tensor]) -> None:
    state = stored[STATE]
    other = STATE.replace("nf4", "int3")
    tensors = {**parts(stored), other: replace(state, name=other)}
    assert "int3" in refusal(tensors, UnsupportedModelError)
    eight = {"a.weight": in_memory("a.weight", np.zeros((2, 2), np.uint8))}
    eight["a.weight.SCB"] = in_memory("a.weight.SCB", np.zeros(2, np.float32))
    assert "8-bit" in refusal(eight, UnsupportedModelError)


def test_reading_stays_within_the_rows_asked_for(stored: dict[str, Tensor]) -> None:
    """Few rows fetch few bytes of the packed weight."""
    tensors, seen = parts(stored), []
    packed = tensors["nf4_nested.weight"]

    def fetch(first: int, last: int) -> Any:
        seen.append(last - first)
        return packed.fetch(first, last)

    tensors["nf4_nested.weight"] = replace(packed, fetch=fetch)
    unpack_4bit(tensors, FILE)["nf4_nested.weight"].read(3, 5)
    assert sum(seen) == 2 * 448 // 2
