"""Weights that bitsandbytes stored in 4 bits, NF4 or FP4, as tensors of float32.

A weight `W` is kept as packed nibbles under its own name and its statistics under
`W.absmax`, `W.quant_map`, `W.quant_state.bitsandbytes__nf4` (JSON as bytes), and, if the statistics
are quantized themselves, `W.nested_absmax` and `W.nested_quant_map`. Source: bitsandbytes'
`QuantState` and its CPU kernels, which the arithmetic here matches to the bit. Knows nothing about
files; every value is bounded before it is used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import EdgeLlamaError, ModelFormatError, UnsupportedModelError, shown
from edgellama.quantize.strict_json import parse_json
from edgellama.quantize.tensor import STORED, Bits, Floats, Tensor

STATE = ".quant_state.bitsandbytes__"
TYPES = {"nf4": "NF4", "fp4": "FP4"}
LONGEST_STATE = 65_536  # bytes of JSON
MOST_ELEMENTS = 2**40
LARGEST_OFFSET = float(np.finfo(np.float32).max)
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class _Packed:
    """A weight's parts, of sizes that fit each other."""

    weight: Tensor
    shape: tuple[int, ...]
    block: int
    absmax: Tensor
    values: Bits  # for each byte the two float32 of its nibbles, high one first, as one 64-bit word
    nested_block: int = 0  # 0: absmax holds the scales themselves
    nested_absmax: Floats | None = None
    nested_values: Floats | None = None
    offset: float = 0.0


def unpack_4bit(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors with every 4-bit weight as one tensor of its true shape, read as float32.

    Raises ModelFormatError naming the weight and the part that is missing or does not fit,
    UnsupportedModelError for 8-bit weights and other variants.
    """
    result = dict(tensors)
    for key, state in tensors.items():
        if key.endswith(".SCB") or key.endswith(".weight_format"):
            raise UnsupportedModelError(
                "bitsandbytes 8-bit weights are not read",
                path=path,
                where=f"tensor {shown(key)}",
                hint="Get the original model, or a 4-bit one",
            )
        name, found, quant_type = key.partition(STATE)
        if not found:
            continue
        packed = _packed(tensors, name, state, quant_type, path)
        for suffix in _STATISTICS:
            result.pop(f"{name}.{suffix}", None)
        del result[key]
        fetch = partial(_quiet_rows, packed)
        result[name] = Tensor(name, packed.shape, TYPES[quant_type], fetch)
    return result


def _refuse(path: Path, name: str, problem: str, field: str | None = None) -> EdgeLlamaError:
    return ModelFormatError(problem, path=path, where=f"tensor {shown(name)}", field=field)


def _packed(
    tensors: Mapping[str, Tensor], name: str, state: Tensor, quant_type: str, path: Path
) -> _Packed:
    if quant_type not in TYPES:
        problem = f"4-bit type {shown(quant_type)}; allowed: {', '.join(TYPES)}"
        raise UnsupportedModelError(problem, path=path, where=f"tensor {shown(name)}")
    described = _state(state, name, quant_type, path)
    shape, block = described["shape"], described["blocksize"]
    count = math.prod(shape)
    blocks = -(-count // block)
    weight = _part(tensors, name, "", path)
    have = math.prod(weight.shape) * STORED[weight.dtype].itemsize
    if have != (count + 1) // 2:
        problem = f"{count} values of 4 bits do not take {have} bytes"
        raise _refuse(path, name, problem, "shape")
    absmax = _part(tensors, name, "absmax", path)
    nested = f"{name}.nested_absmax" in tensors
    _expect(absmax, blocks, ("U8",) if nested else ("F32",), path)
    codes, byte = _small(tensors, name, "quant_map", 16, path), np.arange(256)
    values = np.stack([codes[byte >> 4], codes[byte & 15]], axis=1).view(np.uint64).reshape(-1)
    if not nested:
        return _Packed(weight, shape, block, absmax, values)
    nested_block = _number(described, "nested_blocksize", name, path)
    offset = _offset(described, name, path)
    scales = _small(tensors, name, "nested_absmax", -(-blocks // nested_block), path)
    levels = _small(tensors, name, "nested_quant_map", 256, path)
    return _Packed(weight, shape, block, absmax, values, nested_block, scales, levels, offset)


def _state(state: Tensor, name: str, quant_type: str, path: Path) -> dict[str, Any]:
    """The JSON that describes a weight, with `shape` as a tuple; checked."""
    where = f"tensor {shown(state.name)}"
    if state.dtype != "U8" or len(state.shape) != 1 or state.shape[0] > LONGEST_STATE:
        problem = f"{state.dtype} {state.shape}; expected at most {LONGEST_STATE} bytes of JSON"
        raise ModelFormatError(problem, path=path, where=where)
    described = parse_json(state.read_bits().tobytes(), path, where)
    if described.get("quant_type") != quant_type:
        problem = f"quant_type is {_kind(described.get('quant_type'))}, the name says {quant_type}"
        raise _refuse(path, name, problem, "quant_type")
    shape = described.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
        raise _refuse(path, name, "shape must be a list of 1 to 4 sizes", "shape")
    if any(type(size) is not int or not 1 <= size < 2**31 for size in shape):
        raise _refuse(path, name, "shape holds what is not a size", "shape")
    if math.prod(shape) > MOST_ELEMENTS:
        raise _refuse(path, name, f"more than {MOST_ELEMENTS} elements", "shape")
    _number(described, "blocksize", name, path)
    return {**described, "shape": tuple(shape)}


def _number(described: dict[str, Any], field: str, name: str, path: Path) -> int:
    value = described.get(field)
    if type(value) is not int or not 16 <= value <= 2**20 or value & (value - 1):
        problem = f"{field} = {_kind(value)}; allowed: a power of two, 16..{2**20}"
        raise _refuse(path, name, problem, field)
    return value


def _offset(described: dict[str, Any], name: str, path: Path) -> float:
    value: Any = described.get("nested_offset")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -LARGEST_OFFSET <= value <= LARGEST_OFFSET:
        problem = f"nested_offset is {_kind(value)}; expected a number that float32 holds"
        raise _refuse(path, name, problem, "nested_offset")
    return float(value)


def _kind(value: object) -> str:
    return shown(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _part(tensors: Mapping[str, Tensor], name: str, suffix: str, path: Path) -> Tensor:
    full = f"{name}.{suffix}" if suffix else name
    part = tensors.get(full)
    if part is None:
        raise _refuse(path, name, f"{shown(full)} is missing, without which it cannot be unpacked")
    if part.dtype not in STORED:
        raise _refuse(path, name, f"{shown(full)} is of type {part.dtype}")
    return part


def _expect(part: Tensor, count: int, dtypes: tuple[str, ...], path: Path) -> None:
    if part.shape != (count,) or part.dtype not in dtypes:
        problem = f"{part.dtype} {list(part.shape)}; expected {dtypes[0]} [{count}]"
        raise _refuse(path, part.name, problem)


def _small(tensors: Mapping[str, Tensor], name: str, suffix: str, count: int, path: Path) -> Floats:
    """A table that is kept in memory; finite."""
    part = _part(tensors, name, suffix, path)
    _expect(part, count, ("F32",), path)
    values = part.read()
    if not np.isfinite(values).all():
        raise _refuse(path, part.name, "it holds a NaN or an infinity")
    return values


def _bytes(tensor: Tensor, first: int, last: int) -> Bits:
    """Bytes of a packed tensor, whatever type its one column was stored as."""
    item = STORED[tensor.dtype].itemsize * math.prod(tensor.shape[1:])
    row = first // item
    rows = np.ascontiguousarray(tensor.read_bits(row, -(-last // item)))
    return rows.reshape(-1).view(np.uint8)[first - row * item : last - row * item]


def _quiet_rows(packed: _Packed, first: int, last: int) -> Floats:
    """`_rows`, without a word of infinities: whoever reads weights refuses them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _rows(packed, first, last)


def _rows(packed: _Packed, first: int, last: int) -> Floats:
    """Rows as float32: the value of each nibble, high one first, times its block's scale."""
    columns = math.prod(packed.shape[1:])
    start, end = first * columns, last * columns
    if start == end:
        return np.empty(0, np.float32)
    pairs = _bytes(packed.weight, start // 2, (end + 1) // 2)
    out = np.take(packed.values, pairs).view(np.float32)[start % 2 :][: end - start]
    first_block, block = start // packed.block, packed.block
    scales = _scales(packed, first_block, -(-end // block))
    head = min(-start % block, end - start)  # elements before the first whole block
    body = (end - start - head) // block * block
    out[:head] *= scales[0]
    used = 1 if head else 0
    out[head : head + body].reshape(-1, block)[...] *= scales[used : used + body // block, None]
    out[head + body :] *= scales[-1]
    return out


def _scales(packed: _Packed, first: int, last: int) -> Floats:
    """The scale of each block, unpacked if the scales are quantized too."""
    if packed.nested_absmax is None or packed.nested_values is None:
        return packed.absmax.read(first, last)
    scales: Floats = packed.nested_values[packed.absmax.read_bits(first, last)]
    scales *= packed.nested_absmax[np.arange(first, last) // packed.nested_block]
    scales += np.float32(packed.offset)
    return scales
