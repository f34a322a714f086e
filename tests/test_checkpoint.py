"""Opening checkpoints: folders and files of every kind, and what is refused.

Ids S10, S11, P15, C1 and C12 are rows of the project's catalogue of bad inputs.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchfiles import safetensors_file, torch_file, write

from edgellama import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsafeModelError,
    UnsupportedModelError,
)
from edgellama.quantize.checkpoint import open_checkpoint

DATA = Path(__file__).parent / "data"
Array = np.ndarray[Any, Any]
A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = A[:2] + 100
CONFIG = '{"model_type": "llama"}'


def weights(folder: Path) -> dict[str, Array]:
    with open_checkpoint(folder) as checkpoint:
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def index(**files: str) -> str:
    return json.dumps({"metadata": {"total_size": 2**62}, "weight_map": files})


def refusal(path: Path, kind: type[EdgeLlamaError] = ModelFormatError) -> str:
    with pytest.raises(EdgeLlamaError) as caught:
        open_checkpoint(path)
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def test_single_files(tmp_path: Path) -> None:
    for name, data, kind in (
        ("model.safetensors", safetensors_file({"a.weight": A}), "safetensors"),
        ("pytorch_model.bin", torch_file({"a.weight": A}), "pytorch"),
        ("other.safetensors", safetensors_file({"a.weight": A}), "safetensors"),
        ("weights", torch_file({"a.weight": A}), "pytorch"),
    ):
        folder = write(tmp_path / name, {name: data, "config.json": CONFIG})
        for path in (folder, folder / name) if name != "weights" else (folder / name,):
            with open_checkpoint(path) as checkpoint:
                assert checkpoint.kind == kind and checkpoint.path == path
                assert checkpoint.config == {"model_type": "llama"} and not checkpoint.notes
                np.testing.assert_array_equal(checkpoint.tensors["a.weight"].read(1), A[1:])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files(tmp_path: Path, suffix: str) -> None:
    made = safetensors_file if suffix == "safetensors" else torch_file
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    one, two = (f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2))
    half = A.astype(np.float16)
    files = {one: made({"a.weight": A}), two: made({"b.weight": B, "c.weight": half})}
    listed = index(**{"a.weight": one, "b.weight": two, "c.weight": two})
    folder = write(tmp_path, {**files, f"{stem}.{suffix}.index.json": listed, "config.json": "{}"})
    for path in (folder, folder / f"{stem}.{suffix}.index.json"):
        read = weights(path)
        assert list(read) == ["a.weight", "b.weight", "c.weight"]
        np.testing.assert_array_equal(read["b.weight"], B)
        np.testing.assert_array_equal(read["c.weight"], A)
    assert "one of several" in refusal(folder / one)
    (folder / f"{stem}.{suffix}.index.json").unlink()
    assert "index.json" in refusal(folder)


def sharded(tmp_path: Path, weight_map: Any, *shards: str) -> Path:
    files: dict[str, bytes | str] = {name: safetensors_file({"a.weight": A}) for name in shards}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map})
    return write(tmp_path / "model", {**files, "config.json": "{}"})


OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "a\\b",
    "C:x",
    "a\0b",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_s10_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path, {"a.weight": name})
    assert "plain file names" in refusal(folder, UnsafeModelError)


def test_s10_links(tmp_path: Path) -> None:
    """A link may lead to a neighbour or into a cache of downloads, and nowhere else."""
    folder = sharded(tmp_path, {"a.weight": "one.safetensors"})
    (tmp_path / "secret").write_bytes(safetensors_file({"a.weight": A}))
    link = folder / "one.safetensors"
    link.symlink_to("../secret")
    assert "leaves the folder" in refusal(folder, UnsafeModelError)
    link.unlink()
    link.symlink_to("one.safetensors")  # a loop
    assert "cannot be found" in refusal(folder)
    link.unlink()
    link.symlink_to("gone")
    assert "cannot be found" in refusal(folder)
    link.unlink()
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "secret").rename(blobs / "0123")
    link.symlink_to(blobs / "0123")
    np.testing.assert_array_equal(weights(folder)["a.weight"], A)


def test_s10_missing_and_differing_case(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a.weight": "One.safetensors"}, "one.safetensors")
    message = refusal(folder)
    assert "'One.safetensors'" in message and "There is 'one.safetensors'" in message
    folder = sharded(tmp_path, {"a.weight": "two.safetensors"}, "one.safetensors")
    assert "'two.safetensors' that it names is missing" in refusal(folder)


def test_s10_tensors_and_index_disagree(tmp_path: Path) -> None:
    one, two = "one.safetensors", "two.safetensors"
    folder = sharded(tmp_path, {"a.weight": one, "b.weight": two}, one, two)
    message = refusal(folder)
    assert "'a.weight'" in message and one in message and two in message
    folder = sharded(tmp_path, {"a.weight": one, "b.weight": one}, one)
    message = refusal(folder)
    assert "'b.weight'" in message and "does not hold it" in message


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}, {"a": ["x"]}, "x"])
def test_s10_maps_that_are_none(tmp_path: Path, weight_map: Any) -> None:
    refusal(sharded(tmp_path, weight_map))


def test_s11_other_files_are_ignored_and_noted(tmp_path: Path) -> None:
    other = "model-00009-of-00009.safetensors"
    folder = sharded(tmp_path, {"a.weight": "one.safetensors"}, "one.safetensors", other)
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        assert any(other in note for note in checkpoint.notes)


def test_p15_names_that_lie(tmp_path: Path) -> None:
    good = {"torch": torch_file({"a.weight": A}), "safe": safetensors_file({"a.weight": A})}
    gguf, onnx = b"GGUF" + bytes(60), b"\x08\x07\x12\x04onnx" + bytes(60)
    cases = [
        ("model.safetensors", good["torch"], ["a safetensors file", "a PyTorch file"]),
        ("pytorch_model.bin", good["safe"], ["a safetensors file", "a PyTorch file"]),
        ("a.gguf", good["torch"], ["a GGUF file", "a PyTorch file"]),
        ("a.onnx", good["safe"], ["an ONNX file", "a safetensors file"]),
        ("model.safetensors", gguf, ["a GGUF file", "not a checkpoint"]),
        ("model.safetensors", onnx, ["an ONNX file", "not a checkpoint"]),
    ]
    for number, (name, data, reasons) in enumerate(cases):
        folder = write(tmp_path / str(number), {name: data, "config.json": CONFIG})
        message = refusal(folder / name)
        assert all(reason in message for reason in reasons), message


def test_old_formats_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "member").write_bytes(b"x")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(tmp_path / "member", "storages")
    old = {"pytorch_model.bin": (DATA / "torch_legacy.bin").read_bytes()}
    old |= {"plain.pkl": b"\x80\x02}.", "old.pth": (tmp_path / "old.pth").read_bytes()}
    for name, data in old.items():
        folder = write(tmp_path / "old", {name: data, "config.json": CONFIG})
        assert "save it as safetensors" in refusal(folder / name, UnsupportedModelError)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    folder = write(tmp_path, {"model.safetensors": pointer, "config.json": CONFIG})
    assert "git lfs pull" in refusal(folder)


def test_folders_without_a_model(tmp_path: Path) -> None:
    assert "no weights" in refusal(tmp_path)
    write(tmp_path, {"a.bin": torch_file({"a.weight": A}), "b.bin": b"x"})
    assert "2 .bin files" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "gone" / "model.bin", EdgeLlamaError)
    assert "No such file" in refusal(tmp_path / "gone.bin", EdgeLlamaError)
    assert "not a file name" in refusal(Path("a\0b"), EdgeLlamaError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_c1_pipes_and_folders_instead_of_files(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": CONFIG})
    os.mkfifo(folder / "model.safetensors")
    assert "not a regular file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "folder" in refusal(folder)


def test_c1_config_is_missing_or_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.safetensors": safetensors_file({"a.weight": A})})
    message = refusal(folder, ModelConfigError)
    assert "config.json" in message and "missing" in message
    for text in ("", "[]", '{"a": NaN}', '{"a": 1, "a": 2}'):
        write(folder, {"config.json": text})
        assert "config.json" in refusal(folder, ModelConfigError)


QUANTIZED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "awq"}, "awq"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
    ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
    ({"quant_method": 5}, "without a name"),
    ({"bits": 4}, "unnamed"),
]


@pytest.mark.parametrize(("section", "scheme"), QUANTIZED)
def test_c12_other_quantizations(tmp_path: Path, section: dict[str, Any], scheme: str) -> None:
    config = json.dumps({"quantization_config": section})
    model = safetensors_file({"a.weight": A})
    folder = write(tmp_path, {"model.safetensors": model, "config.json": config})
    message = refusal(folder, UnsupportedModelError)
    assert scheme in message and "original" in message


def test_c12_quantizations_that_the_config_hides(tmp_path: Path) -> None:
    packed = np.zeros((4, 4), np.int64)
    config = {"config.json": CONFIG}
    for name in ("a.qweight", "a.weight", "a.SCB"):
        model = {"model.safetensors": safetensors_file({name: packed})}
        message = refusal(write(tmp_path, {**model, **config}), UnsupportedModelError)
        assert {"a.qweight": "gptq or awq", "a.weight": "I64", "a.SCB": "8-bit"}[name] in message
    write(tmp_path, {"config.json": '{"quantization_config": []}'})
    refusal(tmp_path, ModelConfigError)


def test_buffers_of_integers_are_left_aside(tmp_path: Path) -> None:
    tensors = {"a.weight": A, "position_ids": np.arange(4), "rope.freqs": A[0]}
    model = {"model.safetensors": safetensors_file(tensors), "config.json": CONFIG}
    with open_checkpoint(write(tmp_path, {**model})) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight", "rope.freqs"]
        assert checkpoint.notes == ["tensor 'position_ids' of type I64 was ignored"]
