"""Rotary position embedding: from a model's rope settings to angles and their cosines.

All arithmetic is float64: at position 131,072 a float32 angle would be off by 0.008 radian.
Knows nothing about runtimes; each takes these tables as they are.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgellama.config import Rope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def inverse_frequencies(rope: Rope, factors: Sequence[float] | None = None) -> list[float]:
    """Radians per position of each rotated pair, (rope.dim / 2,).

    `factors` is the tensor `rope_freqs.weight` (one divisor a pair, how GGUF carries Llama 3.1's
    scaling); None means all ones.
    """
    pairs = rope.dim // 2
    base = [rope.freq_base ** (-2.0 * i / rope.dim) for i in range(pairs)]
    if factors is not None:
        base = [f / divisor for f, divisor in zip(base, factors, strict=True)]
    if rope.scaling == "none":
        return base
    if rope.scaling == "linear":
        return [f / rope.factor for f in base]
    return [
        f / rope.factor * (1.0 - keep) + f * keep
        for f, keep in zip(base, _yarn_ramp(rope), strict=True)
    ]


def _yarn_ramp(rope: Rope) -> list[float]:
    """How much of each pair's own frequency YaRN keeps: 1 for fast pairs, 0 for slow ones.

    Source: Peng et al. 2023 (arXiv:2309.00071), section 3.2; rounding as in `transformers`.
    """

    def pair_of(rotations: float) -> float:  # the pair that turns so often in the context
        turns = rope.original_context / (rotations * 2.0 * math.pi)
        return rope.dim * math.log(turns) / (2.0 * math.log(rope.freq_base))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), rope.dim - 1)
    width = max(high - low, 0.001)
    ramp = (min(max((i - low) / width, 0.0), 1.0) for i in range(rope.dim // 2))
    return [(1.0 - r) * rope.ext_factor for r in ramp]


def magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied by: 1, or YaRN's attention temperature."""
    if rope.scaling != "yarn" or rope.ext_factor == 0.0:
        return rope.attention_factor
    return rope.attention_factor * (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0)


def llama3_factors(
    rope: Rope, factor: float, low_freq: float, high_freq: float, original_context: int
) -> list[float]:
    """The divisors (`rope_freqs.weight`) that Llama 3.1's scaling means, (rope.dim / 2,).

    Slow pairs are stretched by `factor`, fast ones left, those between blended smoothly.
    Source: meta-llama/llama-models, `apply_scaling`.
    """
    factors = []
    for f in inverse_frequencies(Rope(rope.dim, rope.freq_base)):
        turns = original_context * f / (2.0 * math.pi)  # of this pair, in the original context
        smooth = min(max((turns - low_freq) / (high_freq - low_freq), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def angles(
    rope: Rope, start: int, stop: int, factors: Sequence[float] | None = None
) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Cosines and sines for positions start..stop-1, each (stop - start, rope.dim / 2)."""
    import numpy as np

    frequency = np.array(inverse_frequencies(rope, factors), np.float64)
    theta = np.arange(start, stop, dtype=np.float64)[:, None] * frequency
    scale = magnitude(rope)
    return np.cos(theta) * scale, np.sin(theta) * scale
