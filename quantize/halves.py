"""float16 to float32, several times as fast as a cast: bits moved a whole array at a time.

Knows nothing about tensors.
"""

import numpy as np
from numpy.typing import NDArray

_MOVED = np.int32(13)  # bits that float32's fraction has more than float16's
_KEPT = np.int32(-0x7000_0001)  # all but the copies of the sign that the move leaves
_BIAS = np.int32((127 - 15) << 23)  # between the exponents' zeros
_EXPONENT = np.int16(0x7C00)
_FEW = 8  # subnormal numbers are cast one by one; more than one in so many, and all are


def widened(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    """Finite float16 numbers as float32, exactly; contiguous, any shape."""
    bits = halves.view(np.int16)
    subnormal = np.flatnonzero((bits & _EXPONENT) == 0)  # zeros too
    if len(subnormal) * _FEW > bits.size:
        return halves.astype(np.float32)
    words = bits.astype(np.int32)
    words <<= _MOVED
    words &= _KEPT
    words += _BIAS
    values = words.view(np.float32)
    values.reshape(-1)[subnormal] = halves.reshape(-1)[subnormal]
    return values
