"""GGUF's blocks as the arrays that ONNX Runtime multiplies by: codes, scales, corrections.

A weight is (code - zero point) * scale + correction; a block of columns shares the last three.
`exact` containers keep every type's values to a float32 rounding; for half precision, types with
a minimum are kept in 8-bit codes whose zero point is rounded. Knows nothing about files or graphs.

Source: the operators MatMulNBits and GatherBlockQuantized of ONNX Runtime's contrib operators.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.ggml import BY_NAME, FLOATS, HALVES, IQ4_NL
from edgellama.quantize import packed

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Parts = dict[str, NDArray[Any]]

VALUES, CODES, SCALES, CORRECTIONS = "values", "codes", "scales", "corrections"
ZERO_POINTS = "zero_points"
FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_STEP = {"Q4_1": 16, "Q4_K": 16, "Q5_1": 8, "Q5_K": 8}  # in 8-bit codes, of one of theirs


@dataclass(frozen=True)
class Container:
    """How a matrix of one type is kept; `bits` is 0 for plain numbers."""

    bits: int
    block: int = 0  # columns that share a scale
    scale: str = ""  # dtype of scales, the smallest that holds them exactly
    correction: str = ""  # dtype of what is added to each weight of a block, "" for nothing
    zero_points: bool = False  # whether they differ from block to block; else 2 ** (bits - 1)

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)


_CONTAINERS = {
    "Q4_0": Container(4, 32, "float16"),
    "Q5_0": Container(8, 32, "float16"),
    "Q8_0": Container(8, 32, "float16"),
    "IQ4_NL": Container(8, 32, "float16"),
    "Q3_K": Container(4, 16, "float32"),
    "Q6_K": Container(8, 16, "float32"),
    "Q4_1": Container(4, 32, "float16", "float32"),
    "Q5_1": Container(8, 32, "float16", "float32"),
    "Q2_K": Container(4, 16, "float32", "float32"),
    "Q4_K": Container(4, 32, "float32", "float32"),
    "Q5_K": Container(8, 32, "float32", "float32"),
}
EXACT, EIGHT_BIT = "exact", "8-bit"  # how types with a minimum are kept


def container(type_name: str, how: str = EXACT) -> Container:
    """Of a type that edgellama runs. `how`: "exact", or "8-bit" without corrections."""
    if type_name in FLOATS:
        return Container(0)
    found = _CONTAINERS[type_name]
    if how == EIGHT_BIT and type_name in _STEP:
        return Container(8, 32, "float32", zero_points=True)
    return found


def parts(type_name: str, raw: Bytes, how: str = EXACT) -> Parts:
    """Whole rows of blocks, (rows, row_bytes), as the arrays of their container.

    codes (rows, columns * bits / 8), the first column in the lowest bits; scales and corrections
    (rows, blocks); zero_points (rows, blocks); values (rows, columns) of plain numbers.
    """
    form = container(type_name, how)
    if form.bits == 0:
        return {VALUES: np.ascontiguousarray(raw).view(_STORED[type_name])}
    rows = len(raw)
    blocks = np.ascontiguousarray(raw).reshape(-1, BY_NAME[type_name].size)
    scales, codes, corrections = _opened(type_name, blocks, form)
    found: Parts = {}
    if form.zero_points:
        found = _eight_bit(type_name, scales, codes, corrections)
        scales, codes = found[SCALES], found[CODES]
    found[SCALES] = scales.astype(form.scale).reshape(rows, -1)
    if form.correction:
        found[CORRECTIONS] = corrections.astype(form.correction).reshape(rows, -1)
    if form.zero_points:
        found[ZERO_POINTS] = found[ZERO_POINTS].reshape(rows, -1)
    codes = codes.reshape(rows, -1)
    found[CODES] = codes if form.bits == 8 else codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return found


def values(found: Parts, form: Container) -> Floats:
    """The weights that parts stand for, (rows, columns): what the operators compute with."""
    if form.bits == 0:
        plain = found[VALUES]
        if plain.dtype == np.uint16:
            return (plain.astype(np.uint32) << 16).view(np.float32)
        return plain.astype(np.float32)
    codes = found[CODES]
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    rows, blocks = found[SCALES].shape
    centred = codes.reshape(rows, blocks, form.block).astype(np.float32)
    zero = found[ZERO_POINTS][..., None] if form.zero_points else form.zero
    weights = (centred - np.asarray(zero, np.float32)) * found[SCALES].astype(np.float32)[..., None]
    if form.correction:
        weights = weights + found[CORRECTIONS][..., None]
    return weights.reshape(rows, -1)


def _half(blocks: Bytes, at: int) -> Floats:
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)  # (n, 1)


def _opened(type_name: str, blocks: Bytes, form: Container) -> tuple[Floats, Bytes, Floats]:
    """(scales, codes, corrections) of n blocks: (n, subs), (n, columns), (n, subs)."""
    d = _half(blocks, HALVES[type_name][0])
    none = np.zeros((0, 0), np.float32)
    match type_name:
        case "Q4_0":
            return d, packed.q4(blocks[:, 2:]).codes, none
        case "Q8_0":
            return d, blocks[:, 2:] ^ np.uint8(128), none  # two's complement plus 128
        case "Q5_0":
            return d, packed.q5(blocks[:, 2:6], blocks[:, 6:]).codes + np.uint8(112), none
        case "IQ4_NL":
            table = (np.array(IQ4_NL) + 128).astype(np.uint8)
            return d, table[packed.q4(blocks[:, 2:]).codes], none
        case "Q6_K" | "Q3_K":
            opened = packed.q6_k(blocks) if type_name == "Q6_K" else packed.q3_k(blocks)
            assert opened.scales is not None
            offset = np.uint8(96 if type_name == "Q6_K" else 4)
            return d * opened.scales.astype(np.float32), opened.codes + offset, none
    return _with_minimum(type_name, blocks, d, form)


def _with_minimum(
    type_name: str, blocks: Bytes, d: Floats, form: Container
) -> tuple[Floats, Bytes, Floats]:
    """Types whose weights are d * q + m. With a correction, codes are centred around zero."""
    second = _half(blocks, HALVES[type_name][1])
    if type_name in ("Q4_1", "Q5_1"):
        four = type_name == "Q4_1"
        opened = packed.q4(blocks[:, 4:]) if four else packed.q5(blocks[:, 4:8], blocks[:, 8:])
        scales, minima = d, second
    else:
        opened = {"Q2_K": packed.q2_k, "Q4_K": packed.q4_k, "Q5_K": packed.q5_k}[type_name](blocks)
        assert opened.scales is not None and opened.minima is not None
        scales = d * opened.scales.astype(np.float32)
        minima = -(second * opened.minima.astype(np.float32))
    if form.zero_points:
        return scales, opened.codes, minima
    middle = {"Q2_K": 2, "Q4_1": 8, "Q4_K": 8, "Q5_1": 16, "Q5_K": 16}[type_name]
    codes = opened.codes + np.uint8(form.zero - middle)
    return scales, codes, minima + np.float32(middle) * scales


def _eight_bit(type_name: str, scales: Floats, codes: Bytes, minima: Floats) -> Parts:
    """Codes `step` times as fine, so that the minimum is nearly a whole number of them.

    A block's zero that lies outside 0..255 cannot be kept: such a block is fitted by its largest
    weight instead. A block of equal weights has scale m and codes one above a zero point of 0.
    """
    step, top = _STEP[type_name], np.float32((1 << int(type_name[1])) - 1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = np.rint(np.where(scales != 0, -minima * step / scales, 0))
    flat = (scales == 0) | ~np.isfinite(zero)
    outside = ~flat & ((zero < 0) | (zero > 255))
    n, subs = scales.shape
    fine = codes.reshape(n, subs, -1) * np.uint8(step)
    fine = np.where(flat[..., None], np.uint8(1), fine)
    if outside.any():
        grown = codes.reshape(n, subs, -1) * scales[..., None] + minima[..., None]
        ends = np.stack([minima, scales * top + minima])  # all weights of the block are between
        spread = np.maximum(ends.max(axis=0), 0) - np.minimum(ends.min(axis=0), 0)
        unit = np.where(outside, spread / 255, 1).astype(np.float32)
        new_zero = np.clip(np.rint(-np.minimum(ends.min(axis=0), 0) / unit), 0, 255)
        refit = np.clip(np.rint(grown / unit[..., None]) + new_zero[..., None], 0, 255)
        fine = np.where(outside[..., None], refit.astype(np.uint8), fine)
        zero = np.where(outside, new_zero, zero)
    else:
        unit = scales
    new = np.where(flat, minima, np.where(outside, unit, scales / np.float32(step)))
    zero = np.where(flat, 0, zero).astype(np.uint8)
    return {SCALES: new.astype(np.float32), CODES: fine.reshape(n, -1), ZERO_POINTS: zero}
