"""The operators that take each token by itself, but for matrix products; and packing.

Every kernel has one signature, (instruction, state, first, last, thread): it does the units of
work first..last-1, which any thread may be given, and nothing it computes depends on who does
them. Rows are float32, padded with zeros to a multiple of 32. The slow twins are the methods of
`reference.py`.

Knows nothing about threads, types of weights or Python objects: addresses and numbers only.
"""

from typing import Any

from numba import float32, int32

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline

WORD, ARGS = abi.WORD, abi.ARGS
BLOCK, LANES = abi.BLOCK, abi.LANES
KEYS_AT_ONCE = abi.ATTENTION_BLOCK


@inline
def argument(instruction: int, index: int) -> Any:
    """Word `index` of the kernel's own arguments."""
    return memory.load_i64(instruction + (ARGS + index) * WORD)


@inline
def exp(x: Any) -> Any:
    """e ** x for sixteen lanes within 2 units in the last place; minus infinity gives 0.

    x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial for e ** r (Cephes' expf).
    """
    clamped = simd.maximum(x, simd.splat_f32(float32(-104.0)))
    clamped = simd.sub(simd.splat_f32(float32(0.0)), clamped)
    clamped = simd.maximum(clamped, simd.splat_f32(float32(-89.0)))
    clamped = simd.sub(simd.splat_f32(float32(0.0)), clamped)
    n = simd.round_i32(simd.mul(clamped, simd.splat_f32(float32(1.44269504088896341))))
    whole = simd.to_f32(n)
    r = simd.fma(whole, simd.splat_f32(float32(-0.693359375)), clamped)
    r = simd.fma(whole, simd.splat_f32(float32(2.12194440e-4)), r)
    p = simd.splat_f32(float32(1.9875691500e-4))
    p = simd.fma(p, r, simd.splat_f32(float32(1.3981999507e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(8.3334519073e-3)))
    p = simd.fma(p, r, simd.splat_f32(float32(4.1665795894e-2)))
    p = simd.fma(p, r, simd.splat_f32(float32(1.6666665459e-1)))
    p = simd.fma(p, r, simd.splat_f32(float32(5.0000001201e-1)))
    p = simd.fma(p, simd.mul(r, r), simd.add(r, simd.splat_f32(float32(1.0))))
    # 2 ** n in two steps: n reaches -150, below the smallest exponent.
    half = simd.shift_right(n, 1)
    rest = simd.sub(n, half)
    return simd.mul(simd.mul(p, simd.power_of_two(half)), simd.power_of_two(rest))


# --- packing -------------------------------------------------------------------------------------


@inline
def pack_q8_half(x: Any, record: int, half: int) -> Any:
    """16 float32 as high and low bytes with one scale; (almost) zeros get scale 0.

    Gives scale * sum of the high bytes, and of high + low / 128.
    """
    largest = simd.max_f32(simd.absolute(x))
    scale = largest / float32(127.0)
    inverse = float32(127.0 * 128.0) / largest
    if largest < float32(1e-30):  # its inverse could overflow
        scale, inverse = float32(0.0), float32(0.0)
    both = simd.round_i32(simd.mul(x, simd.splat_f32(inverse)))
    high = simd.shift_right(simd.add(both, simd.splat_i32(int32(64))), 7)
    low = simd.sub(both, simd.shift_left(high, 7))  # -64..63
    memory.store_as_i8x16(record + half * LANES, high)
    memory.store_as_i8x16(record + abi.Q8_LOW + half * LANES, low)
    coarse = scale * float32(simd.sum_i32(high))
    fine = coarse + scale * float32(simd.sum_i32(low)) * float32(1.0 / 128.0)
    memory.store_f32(record + abi.Q8_SCALES + half * 4, scale)
    memory.store_f32(record + abi.Q8_SUMS + half * 4, coarse)
    memory.store_f32(record + abi.Q8_FINE_SUMS + half * 4, fine)
    return coarse, fine


@inline
def pack_q8(a: Any, b: Any, record: int) -> None:
    """32 columns as one record for integer products."""
    first, first_fine = pack_q8_half(a, record, 0)
    second, second_fine = pack_q8_half(b, record, 1)
    memory.store_f32(record + abi.Q8_SUM, first + second)
    memory.store_f32(record + abi.Q8_FINE_SUM, first_fine + second_fine)


@inline
def padded_tokens(n_tokens: int) -> Any:
    """How many tokens records for tiles have room for."""
    return (n_tokens + abi.TILE - 1) // abi.TILE * abi.TILE


@inline
def pack(
    a: Any, b: Any, block: int, token: int, n_tokens: int, q8: int, f32: int, bf16: int
) -> None:
    """Store 32 columns in each format that has an address."""
    if bf16 != 0:
        record = block * padded_tokens(n_tokens) + token
        memory.store_bf16x32(bf16 + record * abi.BF16_RECORD, a, b)
    if q8 != 0:
        pack_q8(a, b, q8 + (block * n_tokens + token) * abi.Q8_RECORD)
    if f32 != 0:
        step = n_tokens * abi.F32_RECORD
        record = f32 + 4 * block * step + token * abi.F32_RECORD
        memory.store_low8(record, a)
        memory.store_high8(record + step, a)
        memory.store_low8(record + 2 * step, b)
        memory.store_high8(record + 3 * step, b)


def pack_rows(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Pack rows for a matrix product. Unit: a token.

    Arguments: rows, stride, blocks, q8, f32, bf16.
    """
    rows, stride = argument(instruction, 0), argument(instruction, 1)
    blocks, q8, f32 = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
    bf16 = argument(instruction, 5)
    n_tokens = memory.load_i64(state + abi.N_TOKENS * WORD)
    for token in range(first, last):
        for block in range(blocks):
            x = rows + token * stride + block * BLOCK * 4
            a, b = memory.load_f32x16(x), memory.load_f32x16(x + 64)
            pack(a, b, block, token, n_tokens, q8, f32, bf16)


def norm(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """RMS norm of rows, packed. Unit: a token.

    Arguments: rows, stride, blocks, q8, f32, weight, eps (float64), 1 / columns (float64), the
    state word that counts the tokens, bf16. The mean square is float64: squares of 1e20 fit.
    """
    rows, stride = argument(instruction, 0), argument(instruction, 1)
    blocks, q8, f32 = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
    weight, bf16 = argument(instruction, 5), argument(instruction, 9)
    eps = memory.load_f64(instruction + (ARGS + 6) * WORD)
    share = memory.load_f64(instruction + (ARGS + 7) * WORD)
    n_tokens = memory.load_i64(state + argument(instruction, 8) * WORD)
    for token in range(first, last):
        x = rows + token * stride
        total = simd.widen(simd.splat_f32(float32(0.0)))
        for i in range(2 * blocks):
            wide = simd.widen(memory.load_f32x16(x + i * 64))
            total = simd.add(total, simd.mul(wide, wide))
        scale = simd.splat_f32(float32(1.0 / simd.sqrt_f64(simd.sum_f64(total) * share + eps)))
        for block in range(blocks):
            p, w = x + block * BLOCK * 4, weight + block * BLOCK * 4
            a = simd.mul(simd.mul(memory.load_f32x16(p), scale), memory.load_f32x16(w))
            b = simd.mul(simd.mul(memory.load_f32x16(p + 64), scale), memory.load_f32x16(w + 64))
            pack(a, b, block, token, n_tokens, q8, f32, bf16)


@inline
def silu_mul(gate: Any, up: Any) -> Any:
    """gate / (1 + exp(-gate)) * up."""
    one = simd.splat_f32(float32(1.0))
    grown = exp(simd.sub(simd.splat_f32(float32(0.0)), gate))
    return simd.mul(simd.div(gate, simd.add(one, grown)), up)


def swiglu(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """silu(gate) * up, packed. Unit: 32 columns of one token.

    Arguments: gate, up, stride, blocks, q8, f32, how many times 16 columns there are (0: all that
    the blocks have room for), bf16. What lies behind them is another's and is taken as zeros.
    """
    gate, up, stride = argument(instruction, 0), argument(instruction, 1), argument(instruction, 2)
    blocks, q8, f32 = argument(instruction, 3), argument(instruction, 4), argument(instruction, 5)
    vectors, bf16 = argument(instruction, 6), argument(instruction, 7)
    n_tokens = memory.load_i64(state + abi.N_TOKENS * WORD)
    for unit in range(first, last):
        token, block = unit // blocks, unit % blocks
        at = token * stride + block * BLOCK * 4
        a = silu_mul(memory.load_f32x16(gate + at), memory.load_f32x16(up + at))
        b = simd.splat_f32(float32(0.0))
        if vectors == 0 or 2 * block + 1 < vectors:
            b = silu_mul(memory.load_f32x16(gate + at + 64), memory.load_f32x16(up + at + 64))
        pack(a, b, block, token, n_tokens, q8, f32, bf16)


def select(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Copy the rows whose logits are wanted. Arguments: from, to, stride. Unit: a row."""
    source, target, stride = (
        argument(instruction, 0),
        argument(instruction, 1),
        argument(instruction, 2),
    )
    rows = memory.load_i64(state + abi.ROWS * WORD)
    for row in range(first, last):
        x = source + memory.load_i64(rows + row * WORD) * stride
        for at in range(0, stride, 64):
            memory.store_f32x16(target + row * stride + at, memory.load_f32x16(x + at))
