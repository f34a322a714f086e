"""Weights must be finite numbers: NaN and infinity are refused, by tensor and row.

Knows nothing about files.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellama.errors import NonFiniteError, shown
from edgellama.ggml import BY_NAME, FLOATS, HALVES

LARGEST_HALF = 65504.0  # float16's; no type's scale overflows while weights stay below
_MAGNITUDE = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFF_FFFF)}  # all bits but the sign
_INFINITY = {"F32": 0x7F80_0000, "BF16": 0x7F80}  # NaNs lie above it; else float16's


def largest(rows: NDArray[np.float32], tensor: str, first: int, path: Path) -> float:
    """The largest magnitude in rows of weights; `first` is the number of the first of them.

    Raises NonFiniteError if a weight is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN
        low, high = float(rows.min(initial=0)), float(rows.max(initial=0))
    if not (np.isfinite(low) and np.isfinite(high)):
        hint = "The checkpoint is damaged, or its training diverged"
        what = "a weight is NaN or infinite"
        raise _refusal(~np.isfinite(rows), tensor, first, path, what, hint)
    return max(-low, high)


def check_bits(
    bits: NDArray[Any], type: str, tensor: str, first: int, path: Path, *, stored: bool
) -> None:
    """Rows as a file holds them: floats, or blocks, of which only the scales can go wrong.

    `stored`: whether the source has them so; otherwise the type cannot hold its weights.
    """
    raw = np.ascontiguousarray(bits).view(np.uint8).reshape(len(bits), -1)  # (rows, row bytes)
    if type in FLOATS:
        values = raw.view(f"<u{BY_NAME[type].size}")
    else:
        halves = raw.reshape(len(raw), -1, BY_NAME[type].size).view("<u2")
        values = halves[:, :, [at // 2 for at in HALVES[type]]]  # (rows, blocks, scales)
    wrong = values & _MAGNITUDE[values.itemsize] >= _INFINITY.get(type, 0x7C00)
    if not wrong.any():
        return
    if stored:
        what, hint = "a number is NaN or infinite", "The file is damaged"
    else:
        what = f"a weight is too large for {type}"
        hint = "Types BF16 and F32 hold every weight"
    raise _refusal(wrong, tensor, first, path, what, hint)


def _refusal(
    wrong: NDArray[np.bool_], tensor: str, first: int, path: Path, what: str, hint: str
) -> NonFiniteError:
    bad = wrong.reshape(len(wrong), -1).any(axis=1)
    row, rows = first + int(bad.argmax()), int(bad.sum())
    problem = f"row {row}: {what}; {rows} such row{'s' * (rows > 1)} in this part"
    return NonFiniteError(
        problem,
        path=path,
        where=f"tensor {shown(tensor)}",
        field="row",
        value=row,
        allowed="finite numbers",
        hint=hint,
    )
