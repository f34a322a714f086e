"""Meta's checkpoints: shards joined as they were cut, and what is refused.

Ids P13 and P14 are rows of the project's catalogue of bad inputs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchfiles import safetensors_file, torch_file, write

from edgellama import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsupportedModelError,
)
from edgellama.quantize.checkpoint import open_checkpoint

Array = np.ndarray[Any, Any]


def weights(folder: Path) -> dict[str, Array]:
    with open_checkpoint(folder) as checkpoint:
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def refusal(path: Path, kind: type[EdgeLlamaError] = ModelFormatError) -> str:
    with pytest.raises(EdgeLlamaError) as caught:
        open_checkpoint(path)
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


DIM, HEADS, KV, FFN, VOCAB = 8, 4, 2, 12, 20
PARAMS = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV, "n_layers": 1, "vocab_size": -1}


def meta_tensors() -> dict[str, Array]:
    draw = np.random.default_rng(3)
    head = DIM // HEADS
    shapes = {
        "tok_embeddings.weight": (VOCAB, DIM),
        "layers.0.attention.wq.weight": (DIM, DIM),
        "layers.0.attention.wk.weight": (KV * head, DIM),
        "layers.0.attention.wv.weight": (KV * head, DIM),
        "layers.0.attention.wo.weight": (DIM, DIM),
        "layers.0.feed_forward.w1.weight": (FFN, DIM),
        "layers.0.feed_forward.w2.weight": (DIM, FFN),
        "layers.0.feed_forward.w3.weight": (FFN, DIM),
        "layers.0.attention_norm.weight": (DIM,),
        "norm.weight": (DIM,),
        "output.weight": (VOCAB, DIM),
    }
    return {key: draw.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()}


def cut(tensors: dict[str, Array], n: int, embedding_axis: int) -> list[dict[str, Array]]:
    """As Meta's model-parallel code cuts them."""
    shards: list[dict[str, Array]] = [{} for _ in range(n)]
    for key, array in tensors.items():
        axis = 1 if "wo." in key or "w2." in key else 0
        axis = embedding_axis if "embeddings" in key else axis
        parts = [array] * n if array.ndim == 1 else np.split(array, n, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[key] = np.ascontiguousarray(part)
    return shards


def meta_folder(folder: Path, shards: list[dict[str, Array]], params: Any = PARAMS) -> Path:
    files: dict[str, bytes | str] = {
        f"consolidated.{number:02d}.pth": torch_file(shard) for number, shard in enumerate(shards)
    }
    return write(folder, {**files, "params.json": json.dumps(params)})


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("n", [1, 2])
def test_meta_shards_join(tmp_path: Path, n: int, embedding_axis: int) -> None:
    """Llama 2 cut the embedding by columns, Llama 3 cuts it by rows."""
    tensors = meta_tensors()
    folder = meta_folder(tmp_path, cut(tensors, n, embedding_axis))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "meta" and checkpoint.config == PARAMS
        assert checkpoint.tensors.keys() == tensors.keys()
        for key, tensor in checkpoint.tensors.items():
            assert tensor.shape == tensors[key].shape and tensor.dtype == "F16"
            np.testing.assert_array_equal(tensor.read_bits(), tensors[key])
            for first in range(tensor.n_rows + 1):
                for last in (first, min(first + 3, tensor.n_rows), tensor.n_rows):
                    np.testing.assert_array_equal(
                        tensor.read_bits(first, last), tensors[key][first:last]
                    )
    with open_checkpoint(folder / "consolidated.00.pth") as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()


def test_meta_parameters_one_level_deeper_and_one_file(tmp_path: Path) -> None:
    tensors = meta_tensors()
    nested = write(tmp_path / "nested", {"params.json": json.dumps({"model": PARAMS})})
    (nested / "consolidated.00.pth").write_bytes(torch_file(tensors))
    with open_checkpoint(nested) as checkpoint:
        assert checkpoint.config == PARAMS
    one = write(tmp_path / "one", {"params.json": json.dumps(PARAMS)})
    (one / "consolidated.safetensors").write_bytes(safetensors_file(tensors))
    with open_checkpoint(one) as checkpoint:
        assert checkpoint.kind == "meta" and checkpoint.tensors.keys() == tensors.keys()


def test_meta_repeated_key_heads(tmp_path: Path) -> None:
    """More files than key heads: each head was written several times."""
    tensors = meta_tensors()
    shards = cut(tensors, 2, 0)
    four = cut(tensors, 4, 0)
    for number, shard in enumerate(four):
        for kind in ("wk", "wv"):
            key = f"layers.0.attention.{kind}.weight"
            shard[key] = shards[number // 2][key]
    read = weights(meta_folder(tmp_path, four))
    for key, values in tensors.items():
        np.testing.assert_array_equal(read[key], values.astype(np.float32))


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_p13_missing_shards(tmp_path: Path, missing: int) -> None:
    folder = meta_folder(tmp_path, cut(meta_tensors(), 4, 1), PARAMS | {"n_kv_heads": 4})
    (folder / f"consolidated.{missing:02d}.pth").unlink()
    message = refusal(folder)
    assert f"consolidated.{missing:02d}.pth" in message and "missing" in message


def test_p13_last_shards_missing(tmp_path: Path) -> None:
    for kept in (1, 2):
        folder = meta_folder(tmp_path / str(kept), cut(meta_tensors(), 4, 1)[:kept])
        message = refusal(folder)
        assert f"consolidated.{kept:02d}.pth" in message and "missing" in message


def test_p13_shards_that_do_not_fit(tmp_path: Path) -> None:
    shards = cut(meta_tensors(), 2, 1)
    key = "layers.0.attention.wq.weight"
    shards[1][key] = shards[1][key][:3]
    message = refusal(meta_folder(tmp_path / "a", shards))
    assert key in message and "[3, 8]" in message and "consolidated.00.pth" in message
    del shards[1][key]
    message = refusal(meta_folder(tmp_path / "b", shards))
    assert "consolidated.00.pth has it and consolidated.01.pth has not" in message
    other = meta_folder(tmp_path / "c", cut(meta_tensors(), 2, 1), PARAMS | {"dim": 12})
    assert "params.json says 12" in refusal(other)


def test_p13_many_shards(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"consolidated.{n:02d}.pth": b"" for n in range(100)}
    assert "at most 64" in refusal(write(tmp_path, {**files, "params.json": "{}"}))


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 3},
        {"n_heads": 0},
        {"n_heads": "4"},
        {"n_kv_heads": 3},
        {"n_kv_heads": 8},
        {"n_kv_heads": -1},
        {"dim": 8.0},
        {"dim": True},
        {"dim": None},
        {"dim": 2**40},
        {"multiple_of": 0},
        {"ffn_dim_multiplier": float("nan")},
    ],
)
def test_p14_parameters(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = meta_folder(tmp_path, [meta_tensors()], PARAMS | change)
    message = refusal(folder, ModelConfigError)
    assert "params.json" in message
    assert next(iter(change)) in message or "NaN" in message


def test_p14_metas_own_quantization(tmp_path: Path) -> None:
    params = PARAMS | {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}}
    folder = meta_folder(tmp_path, [meta_tensors()], params)
    assert "quantized in Meta's own way" in refusal(folder, UnsupportedModelError)


def test_p14_absent_key_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    tensors = meta_tensors()
    square = tensors["layers.0.attention.wq.weight"]
    for kind in ("wk", "wv"):
        tensors[f"layers.0.attention.{kind}.weight"] = square
    params = {key: value for key, value in PARAMS.items() if key != "n_kv_heads"}
    assert weights(meta_folder(tmp_path, cut(tensors, 2, 1), params)).keys() == tensors.keys()


def test_meta_without_its_parameters(tmp_path: Path) -> None:
    folder = write(tmp_path, {"consolidated.00.pth": torch_file(meta_tensors())})
    for path in (folder / "consolidated.00.pth", folder):
        message = refusal(path, ModelConfigError)
        assert "params.json: the file is missing" in message
