"""Meta's model-parallel shards, joined along the axis each tensor was cut along.

Knows the names and shapes of Meta's layout (`params.json`, `consolidated.NN.pth`); nothing about
files. Rows are joined as they are read, so that no tensor need be whole in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import (
    EdgeLlamaError,
    ModelConfigError,
    ModelFormatError,
    UnsupportedModelError,
    shown,
)
from edgellama.quantize.tensor import Bits, Tensor

MOST_SHARDS = 64
_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
_COLUMNS = ("wo.weight", "w2.weight")


@dataclass(frozen=True)
class _Sizes:
    """What of params.json decides how shards join."""

    dim: int
    heads: int
    kv_heads: int


def join_shards(
    shards: Sequence[Mapping[str, Tensor]], files: Sequence[Path], params: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a Meta model by Meta's names, each whole.

    Raises ModelConfigError for sizes in params.json that are impossible, ModelFormatError naming
    tensor and shards if shards disagree or one is missing.
    """
    sizes = _sizes(params, files[0].with_name("params.json"))
    for shard, path in zip(shards, files, strict=True):
        odd = sorted(shard.keys() ^ shards[0].keys())
        if odd:
            holder, other = (path, files[0]) if odd[0] in shard else (files[0], path)
            problem = f"{holder.name} has it and {other.name} has not"
            raise _refuse(path, odd[0], problem, "The shards are of different models")
    return {
        name: _joined(name, [shard[name] for shard in shards], files, sizes) for name in shards[0]
    }


def _refuse(path: Path, name: str, problem: str, hint: str | None = None) -> EdgeLlamaError:
    return ModelFormatError(problem, path=path, where=f"tensor {shown(name)}", hint=hint)


def _sizes(params: Mapping[str, Any], path: Path) -> _Sizes:
    if params.get("quantization_args") is not None:
        raise UnsupportedModelError(
            "the weights are quantized in Meta's own way",
            path=path,
            where="key 'quantization_args'",
            hint="Get the model's bfloat16 weights",
        )
    dim = _size(params, "dim", path, 2**17)
    heads = _size(params, "n_heads", path, dim)
    kv_heads = _size(params, "n_kv_heads", path, heads, heads)
    _size(params, "multiple_of", path, 2**20, 1)
    if dim % heads or heads % kv_heads:
        problem = f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads} do not divide each other"
        raise ModelConfigError(problem, path=path, field="n_heads", value=heads)
    return _Sizes(dim, heads, kv_heads)


def _size(
    params: Mapping[str, Any], key: str, path: Path, high: int, default: int | None = None
) -> int:
    value = params.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= high:
        text = shown(value) if isinstance(value, (str, int, float)) else type(value).__name__
        allowed = f"an integer 1..{high}"
        raise ModelConfigError(
            f"{key} = {text}; expected {allowed}",
            path=path,
            where=f"key '{key}'",
            field=key,
            value=value,
            allowed=allowed,
        )
    return value


def _joined(name: str, parts: list[Tensor], files: Sequence[Path], sizes: _Sizes) -> Tensor:
    """One tensor from its parts, in the order of the shards."""
    for part, path in zip(parts, files, strict=True):
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            problem = f"{part.dtype} {list(part.shape)} here, {parts[0].dtype} "
            problem += f"{list(parts[0].shape)} in {files[0].name}"
            raise _refuse(path, name, problem, "The shards are of different models")
    axis = _axis(name, parts[0], sizes)
    if axis is None:
        return parts[0]
    one_head = parts[0].n_rows * sizes.heads == sizes.dim
    if name.endswith((".wk.weight", ".wv.weight")) and one_head and len(parts) > sizes.kv_heads:
        parts = parts[:: len(parts) // sizes.kv_heads]  # each head was written several times
    _check_whole(name, parts, files, axis, sizes)
    if len(parts) == 1:
        return parts[0]
    rows, columns = parts[0].shape
    n = len(parts)
    if axis == 0:
        return Tensor(name, (rows * n, columns), parts[0].dtype, partial(_stacked, parts))
    return Tensor(name, (rows, columns * n), parts[0].dtype, partial(_beside, parts))


def _axis(name: str, part: Tensor, sizes: _Sizes) -> int | None:
    """The axis a tensor was cut along; None if every shard holds the whole."""
    if len(part.shape) != 2:
        return None
    if name.endswith(_ROWS):
        return 0
    if name.endswith(_COLUMNS):
        return 1
    if name.endswith("tok_embeddings.weight"):  # by columns up to Llama 2, by rows since Llama 3
        return 0 if part.shape[1] == sizes.dim else 1
    return None


def _check_whole(
    name: str, parts: list[Tensor], files: Sequence[Path], axis: int, sizes: _Sizes
) -> None:
    """The joined tensor must have the width that params.json gives the model."""
    rows, columns = parts[0].shape
    rows, columns = (rows * len(parts), columns) if axis == 0 else (rows, columns * len(parts))
    expected = {  # (what is compared, found, expected)
        "wq": ("rows", rows, sizes.dim),
        "wk": ("rows", rows, sizes.dim // sizes.heads * sizes.kv_heads),
        "wv": ("rows", rows, sizes.dim // sizes.heads * sizes.kv_heads),
        "wo": ("columns", columns, sizes.dim),
        "tok_embeddings": ("columns", columns, sizes.dim),
    }
    checks = [("rows", rows, sizes.dim)] if name.endswith(_COLUMNS) else []
    checks += [("columns", columns, sizes.dim)] if name.endswith(_ROWS) else []
    kind = name.split(".")[-2]
    checks += [expected[kind]] if kind in expected else []
    for what, found, wanted in checks:
        if found == wanted:
            continue
        problem = f"{found} {what} in {len(parts)} of Meta's shards; params.json says {wanted}"
        hint = "The shards are not of the model that params.json describes"
        n = len(parts)
        if found < wanted and wanted % (found // n) == 0:
            hint = f"Shards are missing, consolidated.{n:02d}.pth first; download them too"
        raise _refuse(files[0], name, problem, hint)


def _stacked(parts: list[Tensor], first: int, last: int) -> Bits:
    """Rows of parts that lie one below the other."""
    height = parts[0].n_rows
    if first == last:
        return parts[0].read_bits(0, 0)
    pieces = [
        parts[index].read_bits(max(first - index * height, 0), min(last - index * height, height))
        for index in range(first // height, (last - 1) // height + 1)
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _beside(parts: list[Tensor], first: int, last: int) -> Bits:
    """Rows of parts that lie side by side."""
    return np.concatenate([part.read_bits(first, last) for part in parts], axis=1)
