"""The encoders' slow twin: ggml's arithmetic in plain NumPy, one element of all blocks at a time.

Gives what is stored in a block, not how it is packed: `packed.py` takes it out of the kernels'
bytes. Everything is float32, in the order of ggml's loops.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellama.ggml import BY_NAME, IQ4_NL

F = np.float32
Array = NDArray[Any]
TINY = F(1e-15)


class Parts(NamedTuple):
    codes: Array  # (n, block)
    halves: Array  # (n, number of float16) as uint16, in HALVES' order
    scales: Array | None = None  # (n, sub-blocks)
    minima: Array | None = None


def twin(kind: str, rows: Array, importance: Array | None = None) -> Parts:
    """What the blocks of float32 rows hold."""
    block = BY_NAME[kind].block
    x = rows.reshape(-1, block)
    with np.errstate(all="ignore"):
        if importance is None:
            return K_TYPES[kind](x, None) if block == 256 else PLAIN[kind](x)
        qw = np.tile(importance, len(rows)).reshape(-1, block)
        if block == 256:
            return K_TYPES[kind](x, qw)
        variance = serial(rows * rows) / F(rows.shape[1])
        if kind == "IQ4_NL":
            variance = serial(x * x) * F(2 / 32)
        else:
            variance = np.repeat(variance, rows.shape[1] // block)
        return WEIGHTED[kind](x, qw * np.sqrt(variance[:, None] + x * x))


# --- arithmetic -----------------------------------------------------------------------------------


def serial(values: Array) -> Array:
    """Sums along the last axis, first to last."""
    total = np.zeros(values.shape[:-1], F)
    for i in range(values.shape[-1]):
        total = total + values[..., i]
    return total


def nearest(x: Array) -> Array:
    return ((x + F(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def truncated(x: Array) -> Array:
    return np.where(np.abs(x) < 2**22, x, 0).astype(np.int32)


def half(x: Array) -> tuple[Array, Array]:
    """(bits, value) of float16."""
    rounded = x.astype(np.float16)
    return rounded.view(np.uint16), rounded.astype(F)


def inverse(d: Array) -> Array:
    return np.where(d == 0, F(0), F(1) / d)


def largest(x: Array) -> tuple[Array, Array]:
    """(largest magnitude, the first value that has it); NaN is passed over."""
    size = most = np.zeros(x.shape[:-1], F)
    for i in range(x.shape[-1]):
        larger = np.abs(x[..., i]) > size
        size = np.where(larger, np.abs(x[..., i]), size)
        most = np.where(larger, x[..., i], most)
    return size, most


def limits(x: Array) -> tuple[Array, Array]:
    """(the first least value, the first largest one)"""
    low = high = x[..., 0]
    for i in range(1, x.shape[-1]):
        v = x[..., i]
        low, high = np.where(v < low, v, low), np.where(v > high, v, high)
    return low, high


def stack(*halves: Array) -> Array:
    return np.stack(halves, axis=-1)


# --- blocks of 32, without importance -------------------------------------------------------------


def q8_0(x: Array) -> Parts:
    d = np.abs(x).max(axis=-1) / F(127)
    v = x * inverse(d)[:, None]
    v = np.where(np.abs(v) < 2**22, v, F(0))
    away = truncated(v)
    away += np.where(np.abs(v - away) >= 0.5, np.sign(v), 0).astype(np.int32)
    return Parts(away.astype(np.int8).view(np.uint8), stack(half(d)[0]))


def by_largest(x: Array, top: int) -> Parts:
    d = largest(x)[1] / F(-top)
    codes = truncated(x * inverse(d)[:, None] + F(top + 0.5))
    return Parts(np.minimum(codes, 2 * top - 1).astype(np.uint8), stack(half(d)[0]))


def by_limits(x: Array, top: int) -> Parts:
    low, high = limits(x)
    d = (high - low) / F(top)
    codes = truncated((x - low[:, None]) * inverse(d)[:, None] + F(0.5))
    return Parts(np.minimum(codes, top).astype(np.uint8), stack(half(d)[0], half(low)[0]))


# --- searches: x and w are (..., numbers of a sub-block) ------------------------------------------


def fit_symmetric(x: Array, w: Array, top: int) -> tuple[Array, Array]:
    """(scale, codes 0..2 * top - 1)"""
    size, most = largest(x)
    best = scale = codes = None
    for i in (0, *range(-9, 0), *range(1, 10)):
        s = F(-top) / most if i == 0 else -(F(top) + F(0.1) * F(i)) / most
        code = np.clip(nearest(s[..., None] * x), -top, top - 1)
        f = code.astype(F)
        xl, l2 = serial(w * x * f), serial(w * f * f)
        if best is None:
            scale, codes = np.where(l2 == 0, F(0), xl / l2), code
            best = scale * xl
            continue
        better = (l2 > 0) & (xl * xl > best * l2)
        scale = np.where(better, xl / l2, scale)
        best = np.where(better, scale * xl, best)
        codes = np.where(better[..., None], code, codes)
    none = size < TINY
    return np.where(none, F(0), scale), np.where(none[..., None], 0, codes + top)


def fit_minimum(
    x: Array, w: Array, top: int, first: float, step: float, steps: int, mean: bool = False
) -> tuple[Array, Array, Array]:
    """(scale, -minimum, codes)"""
    sum_w, sum_x = serial(w), serial(w * x)
    low, high = limits(x)
    low = np.where(low > 0, F(0), low)
    flat, start = high == low, low

    def error(scale: Array, code: Array, low: Array) -> Array:
        difference = scale[..., None] * code.astype(F) + low[..., None] - x
        return serial(w * (np.abs(difference) if mean else difference * difference))

    s = F(top) / (high - low)
    codes = np.clip(nearest(s[..., None] * (x - low[..., None])), 0, top)
    scale = F(1) / s
    best = error(scale, codes, low)
    for i in range(steps + 1):
        s = (F(first) + F(step) * F(i) + F(top)) / (high - low)
        code = np.clip(nearest(s[..., None] * (x - low[..., None])), 0, top)
        f = code.astype(F)
        l1, l2, xl = serial(w * f), serial(w * f * f), serial(w * f * x)
        d = sum_w * l2 - l1 * l1
        a, b = (sum_w * xl - sum_x * l1) / d, (l2 * sum_x - l1 * xl) / d
        a, b = np.where(b > 0, xl / l2, a), np.where(b > 0, F(0), b)
        now = error(a, code, b)
        better = (d > 0) & (now < best)
        best, scale = np.where(better, now, best), np.where(better, a, scale)
        low = np.where(better, b, low)
        codes = np.where(better[..., None], code, codes)
    codes = np.where(flat[..., None], 0, codes)
    return np.where(flat, F(0), scale), -np.where(flat, start, low), codes


def _turns(x: Array, w: Array, codes: Array, low: int, top: int, early: bool) -> Array:
    """Change codes, (..., n) int32, one at a time; gives the scale."""
    f = codes.astype(F)
    xl, l2 = serial(w * x * f), serial(w * f * f)
    for _ in range(5):
        for i in range(x.shape[-1]):
            v, u, old = x[..., i], w[..., i], codes[..., i].astype(F)
            a, b = xl - u * v * old, l2 - u * old * old
            can = (a > 0) & (b > 0) if early else a > 0
            new = np.clip(nearest(v * b / a), low, top)
            can &= new != codes[..., i]
            a, b = a + u * v * new.astype(F), b + u * new.astype(F) * new.astype(F)
            better = can & (a * a * l2 > xl * xl * b) & (b > 0 if not early else True)
            codes[..., i] = np.where(better, new, codes[..., i])
            xl, l2 = np.where(better, a, xl), np.where(better, b, l2)
    return np.where(l2 > 0, xl / l2, F(0))


def fit_by_turns(x: Array, top: int) -> tuple[Array, Array]:
    size, most = largest(x)
    codes = np.clip(nearest((F(-top) / most)[..., None] * x), -top, top - 1)
    scale = _turns(x, x * x, codes, -top, top - 1, False)
    none = size < TINY
    return np.where(none, F(0), scale), np.where(none[..., None], 0, codes + top)


def fit_positive(x: Array, w: Array, top: int) -> tuple[Array, Array]:
    most = np.maximum(x.max(axis=-1), 0)
    s = F(top) / most
    best = None
    for i in (0, *range(-4, 0), *range(1, 5)):
        other = s if i == 0 else (F(0.1) * F(i) + F(top)) / most
        code = nearest(other[..., None] * x)
        code = code & 255 if i == 0 else np.minimum(code, top)
        difference = x - (F(1) / other)[..., None] * code.astype(F)
        now = serial(w * difference * difference)
        if best is None:
            best = now
        better = now < best
        best, s = np.where(better, now, best), np.where(better, other, s)
    codes = np.minimum(nearest(s[..., None] * x), top)
    scale = _turns(x, w, codes, -(2**31), top, True)
    none = most < TINY
    return np.where(none, F(0), scale), np.where(none[..., None], 0, codes)


def table_codes(x: Array) -> Array:
    middles = (np.array(IQ4_NL[:-1], F) + np.array(IQ4_NL[1:], F)) / F(2)
    return (~(x[..., None] < middles)).sum(axis=-1)


def fit_table(x: Array, w: Array) -> Parts:
    table = np.array(IQ4_NL, F)
    size, most = largest(x)
    best = d = None
    for i in (None, *range(-7, 8)):
        s = F(1) / (-most / table[0]) if i is None else F(i + IQ4_NL[0]) / most
        q = table[table_codes(s[:, None] * x)]
        qx, q2 = serial(w * q * x), serial(w * q * q)
        if best is None:
            d = np.where(q2 > 0, qx / q2, F(0))
            best = d * qx
        better = (q2 > 0) & (qx * qx > best * q2)
        d = np.where(better, qx / q2, d)
        best = np.where(better, d * qx, best)
    d = np.where(size < TINY, F(0), d)
    return Parts(table_codes(inverse(d)[:, None] * x).astype(np.uint8), stack(half(d)[0]))


def _symmetric(x: Array, w: Array, top: int) -> Parts:
    d, codes = fit_symmetric(x, w, top)
    return Parts(codes.astype(np.uint8), stack(half(d)[0]))


def _minimum(x: Array, w: Array, top: int) -> Parts:
    d, minus, codes = fit_minimum(x, w, top, -0.9, 0.05, 36)
    return Parts(codes.astype(np.uint8), stack(half(d)[0], half(-minus)[0]))


PLAIN = {
    "Q8_0": q8_0,
    "Q4_0": lambda x: by_largest(x, 8),
    "Q5_0": lambda x: by_largest(x, 16),
    "Q4_1": lambda x: by_limits(x, 15),
    "Q5_1": lambda x: by_limits(x, 31),
    "IQ4_NL": lambda x: fit_table(x, x * x),
}
WEIGHTED = {
    "Q4_0": lambda x, w: _symmetric(x, w, 8),
    "Q5_0": lambda x, w: _symmetric(x, w, 16),
    "Q4_1": lambda x, w: _minimum(x, w, 15),
    "Q5_1": lambda x, w: _minimum(x, w, 31),
    "IQ4_NL": fit_table,
}


# --- K types --------------------------------------------------------------------------------------


def _recoded(x: Array, d: Array, least: Array, low: int, top: int, codes: Array) -> Array:
    """Codes 0..top - low of the rounded scales; those of the search where a scale is 0."""
    new = np.clip(nearest((x + least[..., None]) / d[..., None]), low, top) - low
    return np.where((d == 0)[..., None], codes, new).reshape(len(x), -1)


def _by_largest_scale(scales: Array, top: int) -> tuple[Array, Array]:
    most = np.maximum(scales.max(axis=-1), 0)
    some = most > 0
    inverse = np.where(some, F(top) / most, F(0))
    small = np.minimum(nearest(inverse[:, None] * scales) & 255, top)
    return small, np.where(some, most / F(top), F(0))


def with_minima(x: Array, qw: Array | None, n: int, top: int, search: Any, limit: int) -> Parts:
    sub = x.reshape(len(x), -1, n)
    if qw is None:
        w = np.abs(sub)
        if n == 32:
            w = np.sqrt(serial(sub * sub) / F(32))[..., None] + w
        scales, minima, codes = fit_minimum(sub, w, top, *search, mean=n == 16)
        small, d = _by_largest_scale(scales, limit)
        least, dmin = _by_largest_scale(minima, limit)
    else:
        variance = serial(x * x) * (F(2) if n == 32 else F(1)) / F(256)
        w = qw.reshape(sub.shape) * np.sqrt(variance[:, None, None] + sub * sub)
        scales, minima, codes = fit_minimum(sub, w, top, -0.9, 0.05, 36)
        d, small = fit_positive(scales, serial(w), limit)
        dmin, least = fit_positive(minima, serial(w), limit)
    (bits, value), (min_bits, min_value) = half(d), half(dmin)
    scale, offset = value[:, None] * small.astype(F), min_value[:, None] * least.astype(F)
    codes = _recoded(sub, scale, offset, 0, top, codes)
    return Parts(codes.astype(np.uint8), stack(bits, min_bits), small, least)


def q6_k(x: Array, qw: Array | None) -> Parts:
    sub = x.reshape(len(x), 16, 16)
    scales, codes = fit_symmetric(sub, sub * sub if qw is None else qw.reshape(sub.shape), 32)
    size, most = largest(scales)
    nothing = (size < TINY)[:, None]
    s = F(-128) / most
    bits, value = half(np.where(nothing[:, 0], F(0), F(1) / s))
    small = np.where(nothing, 0, np.minimum(127, nearest(s[:, None] * scales)))
    d = value[:, None] * small.astype(F)
    codes = np.where(nothing, 0, _recoded(sub, d, np.zeros_like(d), -32, 31, codes))
    return Parts(codes.astype(np.uint8), stack(bits), small)


def q3_k(x: Array, qw: Array | None) -> Parts:
    sub = x.reshape(len(x), 16, 16)
    if qw is None:
        scales, codes = fit_by_turns(sub, 4)
        most = largest(scales)[1]
        s = F(-32) / most
        small = np.clip(nearest(s[:, None] * scales), -32, 31)
        small = np.where(most[:, None] == 0, -32, small)
        bits, value = half(np.where(most == 0, F(0), F(1) / s))
    else:
        variance = F(2) * serial(x * x) / F(256)
        w = qw.reshape(sub.shape) * np.sqrt(variance[:, None, None] + sub * sub)
        scales, codes = fit_symmetric(sub, w, 4)
        d, small = fit_symmetric(scales, serial(w), 32)
        small = small - 32
        bits, value = half(d)
    d = value[:, None] * small.astype(F)
    codes = _recoded(sub, d, np.zeros_like(d), -4, 3, codes)
    return Parts(codes.astype(np.uint8), stack(bits), small)


K_TYPES = {
    "Q2_K": lambda x, w: with_minima(x, w, 16, 3, (-0.5, 0.1, 15), 15),
    "Q3_K": q3_k,
    "Q4_K": lambda x, w: with_minima(x, w, 32, 15, (-1.0, 0.1, 20), 63),
    "Q5_K": lambda x, w: with_minima(x, w, 32, 31, (-0.5, 0.1, 15), 63),
    "Q6_K": q6_k,
}
