"""G29: models split into several GGUF files."""

import hashlib
import os
from pathlib import Path

import badfiles as bad
import pytest
from badfiles import good, scalar, string

from edgellama import EdgeLlamaError, ModelFormatError
from edgellama.gguf import GGUF, open_gguf


def refusal(path: Path) -> EdgeLlamaError:
    with pytest.raises(ModelFormatError) as caught:
        open_gguf(path)
    return caught.value


def split(folder: Path, lies: dict[str, dict[int, int]] | None = None, count: int = 3) -> Path:
    """The good file in `count` parts; `lies` maps a split key to other values by part."""
    spec, lies = good(), lies or {}
    per_part = -(-len(spec.tensors) // count)
    for number in range(count):
        keys = {"count": count, "no": number, "tensors_count": len(spec.tensors)}
        keys |= {key: values[number] for key, values in lies.items() if number in values}
        part = bad.Spec(
            [
                *(spec.keys if number == 0 else []),
                ("split.no", scalar(bad.U16, keys["no"])),
                ("split.count", scalar(bad.U16, keys["count"])),
                ("split.tensors.count", scalar(bad.I32, keys["tensors_count"])),
            ],
            spec.tensors[number * per_part : (number + 1) * per_part],
        )
        part.write(folder / part_name(number, count))
    return folder / part_name(0, count)


def part_name(number: int, count: int = 3) -> str:
    return f"m-{number + 1:05d}-of-{count:05d}.gguf"


def contents(file: GGUF) -> dict[str, str]:
    found = {}
    for name, info in file.tensors.items():
        raw = bytearray(info.n_bytes)
        file.read_into(name, raw)
        found[name] = hashlib.sha256(raw).hexdigest()
    return found


def test_split_file_reads_as_the_whole(tmp_path: Path) -> None:
    with open_gguf(good().write(tmp_path / "whole.gguf")) as whole, open_gguf(split(tmp_path)) as f:
        assert contents(f) == contents(whole)
        assert {info.part for info in f.tensors.values()} == {0, 1, 2}
        assert f.n_bytes == sum(p.stat().st_size for p in tmp_path.glob("m-*"))
        assert f.metadata.items() >= whole.metadata.items()


def test_split_file_with_a_part_missing(tmp_path: Path) -> None:
    first = split(tmp_path)
    (tmp_path / part_name(1)).unlink()
    assert f"{part_name(1)}: part 2 of 3 is missing" in str(refusal(first))


def test_split_file_with_a_damaged_part_names_the_part(tmp_path: Path) -> None:
    first = split(tmp_path)
    os.truncate(tmp_path / part_name(2), 100)
    assert str(refusal(first)).startswith(f"{part_name(2)}: ")


def test_later_part_points_to_the_first(tmp_path: Path) -> None:
    split(tmp_path)
    message = str(refusal(tmp_path / part_name(2)))
    assert "this is part 3 of 3" in message and part_name(0) in message


def test_renamed_part(tmp_path: Path) -> None:
    first = split(tmp_path)
    assert "its name does not say so" in str(refusal(first.rename(tmp_path / "m.gguf")))


def test_duplicate_part(tmp_path: Path) -> None:
    first = split(tmp_path)
    (tmp_path / part_name(1)).write_bytes((tmp_path / part_name(2)).read_bytes())
    assert "key 'split.no': 2, expected 1" in str(refusal(first))


SPLIT_LIES = {
    "number": ({"no": {1: 0}}, "key 'split.no': 0, expected 1"),
    "count": ({"count": {1: 4}}, "key 'split.count': 4, expected 3"),
    "first-count": ({"count": {0: 4}}, "its name does not say so"),
    "total": ({"tensors_count": {0: 12}}, "12 tensors declared, but the parts hold 11"),
}


@pytest.mark.parametrize("lies, fragment", SPLIT_LIES.values(), ids=SPLIT_LIES)
def test_split_keys_that_contradict(tmp_path: Path, lies: dict, fragment: str) -> None:
    assert fragment in str(refusal(split(tmp_path, lies)))


def test_same_tensor_in_two_parts(tmp_path: Path) -> None:
    first = split(tmp_path)
    keys = [(f"split.{k}", scalar(bad.U16, v)) for k, v in (("no", 1), ("count", 3))]
    bad.Spec(keys, good().tensors[:1]).write(tmp_path / part_name(1))
    message = str(refusal(first))
    assert "tensor 'token_embd.weight': the tensor is also in " + part_name(0) in message


@pytest.mark.parametrize("value", [scalar(bad.I32, -1), string("3"), scalar(bad.U32, 2**31)])
def test_split_count_of_another_kind(tmp_path: Path, value: bytes) -> None:
    spec = good().set("split.count", value)
    assert "key 'split.count'" in str(refusal(spec.write(tmp_path / part_name(0))))
