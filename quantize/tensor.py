"""One tensor of a checkpoint, read on demand by ranges of rows.

Knows the float types that checkpoints hold; nothing about files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import UnsupportedModelError, shown

Bits = NDArray[Any]
Floats = NDArray[np.float32]

STORED: dict[str, np.dtype[Any]] = {  # safetensors' name of a type -> how its bits are held here
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")  # the types of weights
UNPACKED = ("NF4", "FP4")  # weights whose values are computed as float32


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name, its shape as the checkpoint has it, and the type it is stored in.

    `dtype` is "F32", "F16" or "BF16", or "NF4" or "FP4" for bitsandbytes' 4-bit weights; other
    types cannot be read as floats. `fetch(first, last)` gives rows as `read_bits` does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fetch: Callable[[int, int], Bits] = field(repr=False, compare=False)

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def read(self, first: int = 0, last: int | None = None) -> Floats:
        """Rows first..last-1 as float32, (last - first, *shape[1:]); elements if one-dimensional.

        Exact: every stored type fits float32. Raises UnsupportedModelError for types that are not
        floats, ModelFormatError if the file has changed.
        """
        if self.dtype not in FLOATS + UNPACKED:
            raise unsupported_type(self.name, self.dtype)
        return widened(self.read_bits(first, last), self.dtype)

    def read_bits(self, first: int = 0, last: int | None = None) -> Bits:
        """The same rows as stored: float32, float16, or uint16 for BF16.

        NF4 and FP4 have no such form: they give float32 like `read`.
        """
        last = self.n_rows if last is None else last
        assert 0 <= first <= last <= self.n_rows, (self.name, first, last, self.shape)
        rows = self.fetch(first, last)
        return rows.reshape(last - first, *self.shape[1:]) if self.shape else rows.reshape(())


def widened(bits: Bits, dtype: str) -> Floats:
    """Stored floats as float32, exactly."""
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= 16  # bfloat16 is the upper half of float32
        return wide.view(np.float32)
    return bits.astype(np.float32, copy=False)


def unsupported_type(name: str, dtype: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"values of type {shown(dtype)} are not read as weights",
        where=f"tensor {shown(name)}",
        field="dtype",
        value=dtype,
        allowed=", ".join(FLOATS),
        hint="Save the model as float32, float16 or bfloat16 first",
    )
