"""The searches for scales, sixteen sub-blocks at once: one in each lane.

Each follows ggml's function of the same purpose operation by operation, so that every lane holds
the same bits as the scalar program. What they return besides the scale lets `codes` give the codes
that go with it. Values and weights are vectors in memory, 64 bytes apart.

Knows nothing about how blocks are laid out: see `encode_simple.py` and `encode_k.py`.
"""

from typing import Any

from numba import float32, int32

from edgellama.ggml import IQ4_NL
from edgellama.quantize.encode_lanes import (
    choose,
    choose_int,
    clamp,
    differ,
    equal,
    hidden,
    lanes_set,
    less,
    load_codes,
    nearest,
    nearest_entry,
    negative,
    root,
)
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.memory import (
    load_f32,
    load_f32x16 as load,
    store_as_i8x16,
    store_f32x16 as store,
)
from edgellama.runtimes.simd import absolute, splat_f32, splat_i32, to_f32

TINY = 1e-15  # ggml's GROUP_MAX_EPS: what lies below counts as zero
V = 64  # bytes of a vector


@inline
def number(value: float) -> Any:
    return splat_f32(float32(value))


@inline
def codes(scale: Any, least: Any, value: Any, low: int, high: int) -> Any:
    """The code of a value between low and high, by a search's inverse scale and minimum."""
    return clamp(nearest(scale * (value - least)), int32(low), int32(high))


@inline
def largest(x: int, n: int) -> Any:
    """(the largest magnitude, the first value that has it)."""
    size = most = number(0.0)
    for i in range(n):
        v = load(x + i * V)
        larger = less(size, absolute(v))
        size, most = choose(larger, absolute(v), size), choose(larger, v, most)
    return size, most


@inline
def sum_of_squares(x: int, n: int) -> Any:
    total = number(0.0)
    for i in range(n):
        v = load(x + i * V)
        total = total + v * v
    return total


@inline
def root_mean_square(x: int, n: int) -> Any:
    return root(sum_of_squares(x, n) / number(float(n)))


@inline
def same(address: int) -> Any:
    """One number in all lanes."""
    return splat_f32(load_f32(address))


@inline
def weigh(x: int, importance: int, variance: Any, w: int, n: int) -> Any:
    """Store the weights importance * sqrt(variance + x * x), and give their sum."""
    total = number(0.0)
    for i in range(n):
        v = load(x + i * V)
        weight = same(importance + i * 4) * root(variance + v * v)
        store(w + i * V, weight)
        total = total + weight
    return total


@inline
def _limits_and_sums(x: int, w: int, n: int) -> Any:
    low = high = load(x)
    sum_w = load(w)
    sum_x = sum_w * low
    for i in range(1, n):
        v, weight = load(x + i * V), load(w + i * V)
        low, high = choose(less(v, low), v, low), choose(less(high, v), v, high)
        sum_w, sum_x = sum_w + weight, sum_x + weight * v
    low = choose(less(number(0.0), low), number(0.0), low)
    return low, high, sum_w, sum_x


def _minimum_sums(n: int, top: int) -> Any:
    @inline
    def sums(x: int, w: int, room: int, scale: Any, least: Any) -> Any:
        """Store the codes, and give the weighted sums of codes, their squares, codes * values."""
        sum_l = sum_l2 = sum_xl = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            code = to_f32(codes(scale, least, v, 0, top))
            store(room + i * V, code)
            weighted = load(w + i * V) * code
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * code
            sum_xl = sum_xl + weighted * v
        return sum_l, sum_l2, sum_xl

    return sums


def _minimum_error(n: int, mean: bool) -> Any:
    @inline
    def size(difference: Any) -> Any:
        if mean:
            return absolute(difference)
        return difference * difference

    @inline
    def error(x: int, w: int, room: int, scale: Any, least: Any) -> Any:
        """The weighted error of the codes in the room."""
        total = number(0.0)
        for i in range(n):
            difference = scale * load(room + i * V) + least - load(x + i * V)
            total = total + load(w + i * V) * size(difference)
        return total

    return error


@inline
def _solve(sum_w: Any, sum_x: Any, sum_l: Any, sum_l2: Any, sum_xl: Any) -> Any:
    """Least squares: (scale, a minimum not above 0, the determinant, which must be positive)."""
    zero = number(0.0)
    d = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / d
    least = (sum_l2 * sum_x - sum_l * sum_xl) / d
    positive = less(zero, least)
    return choose(positive, sum_xl / sum_l2, scale), choose(positive, zero, least), d


def fit_minimum(n: int, top: int, first: float, step: float, steps: int, mean: bool = False) -> Any:
    """Scale and minimum, codes 0..top: ggml's make_qkx2_quants and make_qkx3_quants.

    `mean`: errors count by their size, not by their squares.
    """
    sums, error = _minimum_sums(n, top), _minimum_error(n, mean)

    @inline
    def search(x: int, w: int, room: int) -> Any:
        """(scale, -minimum, and for `codes`: inverse scale, minimum); room: n vectors."""
        least, high, sum_w, sum_x = _limits_and_sums(x, w, n)
        flat = equal(high, least)
        zero = number(0.0)
        flat_least = least
        inverse = number(top) / (high - least)
        code_scale, code_least = inverse, least
        scale = number(1.0) / inverse
        sums(x, w, room, inverse, least)
        best = error(x, w, room, scale, least)
        for i in range(steps + 1):
            inverse = splat_f32(float32(first) + float32(step) * float32(i) + float32(top))
            inverse = inverse / (high - least)
            sum_l, sum_l2, sum_xl = sums(x, w, room, inverse, least)
            new_scale, new_least, d = _solve(sum_w, sum_x, sum_l, sum_l2, sum_xl)
            now = error(x, w, room, new_scale, new_least)
            better = less(zero, d) & less(now, best)
            best = choose(better, now, best)
            code_scale = choose(better, inverse, code_scale)
            code_least = choose(better, least, code_least)
            scale, least = choose(better, new_scale, scale), choose(better, new_least, least)
        scale, code_scale = choose(flat, zero, scale), choose(flat, zero, code_scale)
        least = choose(flat, flat_least, least)
        return scale, negative(least), code_scale, code_least

    return search


def fit_symmetric(n: int, top: int) -> Any:
    """Scale, codes -top..top - 1: ggml's make_qx_quants with rmse_type 1.

    Of values x with weights w; where w is 0, an address that is none, by the values' squares.
    """

    @inline
    def sums(x: int, w: int, inverse: Any) -> Any:
        sum_xl = sum_l2 = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            weight = v * v if w == 0 else load(w + i * V)
            code = to_f32(clamp(nearest(inverse * v), int32(-top), int32(top - 1)))
            sum_xl = sum_xl + weight * v * code
            sum_l2 = sum_l2 + weight * code * code
        return sum_xl, sum_l2

    @inline
    def search(x: int, w: int) -> Any:
        """(scale, the inverse scale that gives the codes, mask of lanes that are all zero)."""
        size, most = largest(x, n)
        none = less(size, number(TINY))
        zero = number(0.0)
        code_scale = number(-top) / most
        sum_xl, sum_l2 = sums(x, w, code_scale)
        scale = choose(equal(sum_l2, zero), zero, sum_xl / sum_l2)
        best = scale * sum_xl
        for i in range(-9, hidden(10)):
            if i == 0:
                continue
            inverse = splat_f32(-(float32(top) + float32(0.1) * float32(i))) / most
            sum_xl, sum_l2 = sums(x, w, inverse)
            better = less(zero, sum_l2) & less(best * sum_l2, sum_xl * sum_xl)
            scale = choose(better, sum_xl / sum_l2, scale)
            best = choose(better, scale * sum_xl, best)
            code_scale = choose(better, inverse, code_scale)
        return choose(none, zero, scale), choose(none, zero, code_scale), none

    return search


@inline
def symmetric_codes(found: Any, value: Any, top: int) -> Any:
    """The codes, 0..2 * top - 1, that go with a scale of `fit_symmetric`; 0 in zero lanes."""
    _, scale, none = found
    code = clamp(nearest(scale * value), int32(-top), int32(top - 1)) + splat_i32(int32(top))
    return choose_int(none, splat_i32(int32(0)), code)


def _turns(n: int, low: int, high: int, byte: int) -> Any:
    """Change one code at a time while that helps, five times over at most."""

    @inline
    def one(v: Any, weight: Any, q: int, sum_xl: Any, sum_l2: Any, strict: bool) -> Any:
        zero = number(0.0)
        old = load_codes(q) & splat_i32(int32(byte))
        f = to_f32(old)
        slx, sl2 = sum_xl - weight * v * f, sum_l2 - weight * f * f
        new = clamp(nearest(v * sl2 / slx), int32(low), int32(high))
        can = less(zero, slx) & differ(new, old)
        g = to_f32(new)
        if strict:
            can = can & less(zero, sl2)
        slx, sl2 = slx + weight * v * g, sl2 + weight * g * g
        if not strict:
            can = can & less(zero, sl2)
        better = can & less(sum_xl * sum_xl * sl2, slx * slx * sum_l2)
        store_as_i8x16(q, choose_int(better, new, old))
        return choose(better, slx, sum_xl), choose(better, sl2, sum_l2), lanes_set(better)

    @inline
    def improve(x: int, w: int, q: int, sum_xl: Any, sum_l2: Any, strict: bool) -> Any:
        for _ in range(hidden(5)):
            changed = i = 0
            while i < n:
                v = load(x + i * V)
                weight = v * v if w == 0 else load(w + i * V)
                sum_xl, sum_l2, lanes = one(v, weight, q + i * 16, sum_xl, sum_l2, strict)
                changed |= lanes
                i = hidden(i + 1)
            if changed == 0:
                break
        zero = number(0.0)
        return choose(less(zero, sum_l2), sum_xl / sum_l2, zero)

    return improve


def fit_by_turns(n: int, top: int) -> Any:
    """Scale, codes -top..top - 1, stored as bytes at q: ggml's make_q3_quants with do_rmse.

    A lane that is all zero has codes -top, as there.
    """
    improve = _turns(n, -top, top - 1, -1)

    @inline
    def search(x: int, q: int) -> Any:
        size, most = largest(x, n)
        none = less(size, number(TINY))
        inverse = number(-top) / most
        sum_xl = sum_l2 = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            code = clamp(nearest(inverse * v), int32(-top), int32(top - 1))
            code = choose_int(none, splat_i32(int32(-top)), code)
            store_as_i8x16(q + i * 16, code)
            f, weight = to_f32(code), v * v
            sum_xl = sum_xl + weight * v * f
            sum_l2 = sum_l2 + weight * f * f
        # in zero lanes nothing may change: there slx > 0 must be false
        sum_xl = choose(none, number(float("nan")), sum_xl)
        return choose(none, number(0.0), improve(x, 0, q, sum_xl, sum_l2, False))

    return search


def fit_positive(n: int, top: int) -> Any:
    """Scale of values that are not negative, codes up to top as bytes: ggml's make_qp_quants."""
    improve = _turns(n, -(2**31), top, 255)

    @inline
    def error(x: int, w: int, scale: Any, inverse: Any, least: int, high: int, byte: int) -> Any:
        total = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            code = clamp(nearest(inverse * v), int32(least), int32(high))
            difference = v - scale * to_f32(code & splat_i32(int32(byte)))
            total = total + load(w + i * V) * difference * difference
        return total

    @inline
    def search(x: int, w: int, q: int) -> Any:
        most = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            most = choose(less(v, most), most, v)
        none = less(most, number(TINY))
        low, high = -(2**31), 2**31 - 1
        inverse = number(top) / most
        best = error(x, w, number(1.0) / inverse, inverse, low, high, 255)
        for i in range(-4, hidden(5)):
            if i == 0:
                continue
            other = splat_f32(float32(0.1) * float32(i) + float32(top)) / most
            now = error(x, w, number(1.0) / other, other, low, top, -1)
            better = less(now, best)
            best, inverse = choose(better, now, best), choose(better, other, inverse)
        sum_xl = sum_l2 = number(0.0)
        for i in range(n):
            v, weight = load(x + i * V), load(w + i * V)
            code = clamp(nearest(inverse * v), int32(low), int32(top))
            store_as_i8x16(q + i * 16, choose_int(none, splat_i32(int32(0)), code))
            f = to_f32(code)
            sum_xl = sum_xl + weight * v * f
            sum_l2 = sum_l2 + weight * f * f
        sum_xl = choose(none, number(float("nan")), sum_xl)  # nothing may change there
        return choose(none, number(0.0), improve(x, w, q, sum_xl, sum_l2, True))

    return search


# --- IQ4_NL: codes number the entries of a table --------------------------------------------------


def fit_table(n: int, tries: int) -> Any:
    """Scale of values x with weights w: the search of ggml's quantize_row_iq4_nl_impl."""

    @inline
    def sums(x: int, w: int, inverse: Any) -> Any:
        sum_qx = sum_q2 = number(0.0)
        for i in range(n):
            v = load(x + i * V)
            q = nearest_entry(inverse * v)
            weighted = load(w + i * V) * q
            sum_qx = sum_qx + weighted * v
            sum_q2 = sum_q2 + weighted * q
        return sum_qx, sum_q2

    @inline
    def search(x: int, w: int) -> Any:
        size, most = largest(x, n)
        zero = number(0.0)
        inverse = number(1.0) / (negative(most) / number(IQ4_NL[0]))
        sum_qx, sum_q2 = sums(x, w, inverse)
        scale = choose(less(zero, sum_q2), sum_qx / sum_q2, zero)
        best = scale * sum_qx
        for i in range(-tries, hidden(tries + 1)):
            inverse = splat_f32(float32(i + IQ4_NL[0])) / most
            sum_qx, sum_q2 = sums(x, w, inverse)
            better = less(zero, sum_q2) & less(best * sum_q2, sum_qx * sum_qx)
            scale = choose(better, sum_qx / sum_q2, scale)
            best = choose(better, scale * sum_qx, best)
        return choose(less(size, number(TINY)), zero, scale)

    return search
