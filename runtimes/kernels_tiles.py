"""Matrix products of many tokens in bfloat16, 32 tokens by 32 rows at a time.

For machines with a unit that multiplies tiles of matrices (level `amx`). 32 rows of the weight are
unpacked into a panel of bfloat16, which every token of the call then meets; sums are float32. No
scale has to be applied on the way, and rounding costs a fifth of the error of 8-bit activations,
but not the same bits as `kernels_linear.py` gives: `deterministic=True` does without this module.

The slow twin is `plain_block`, in arithmetic that every machine has.
"""

from typing import Any

from numba import float32

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument, padded_tokens
from edgellama.runtimes.kernels_linear import AHEAD, PIECES, Kernel, put
from edgellama.runtimes.repack import LAYOUTS, Layout

WORD, LANES, TILE, PANEL, RECORD = abi.WORD, abi.LANES, abi.TILE, abi.PANEL, abi.BF16_RECORD
TOTALS = TILE * TILE * 4  # bytes of the sums of one block

# --- weights as code * scale + least, for columns 0..15 and 16..31 of a block ---------------------


def _offset_by(offset: int) -> Any:
    @inline
    def affine(weights: Any) -> Any:
        codes, scales = weights
        least = simd.mul(scales, simd.splat_f32(float32(-offset)))
        return codes, scales, scales, least, least

    return affine


def _halves_offset_by(offset: int) -> Any:
    @inline
    def affine(weights: Any) -> Any:
        codes, first, second = weights
        minus = simd.splat_f32(float32(-offset))
        return codes, first, second, simd.mul(first, minus), simd.mul(second, minus)

    return affine


@inline
def _with_minimum(weights: Any) -> Any:
    codes, scales, minima = weights
    return codes, scales, scales, minima, minima


@inline
def _with_minima(weights: Any) -> Any:
    return weights


AFFINE = {
    "Q4_0": _offset_by(8),
    "Q5_0": _offset_by(16),
    "Q8_0": _offset_by(128),
    "IQ4_NL": _offset_by(128),
    "Q4_1": _with_minimum,
    "Q5_1": _with_minimum,
    "Q4_K": _with_minimum,
    "Q5_K": _with_minimum,
    "Q6_K": _halves_offset_by(32),
    "Q3_K": _halves_offset_by(4),
    "Q2_K": _with_minima,
}


@inline
def unpack_four(codes: Any, scale: Any, least: Any, panel: int) -> None:
    """Four columns of 16 rows as two rows of a tile, each pairs of neighbouring columns."""
    for pair in range(2):
        even = simd.fma(simd.byte_of_lanes(codes, 2 * pair), scale, least)
        odd = simd.fma(simd.byte_of_lanes(codes, 2 * pair + 1), scale, least)
        at = panel + pair * RECORD
        memory.store_bf16x32(at, simd.zip_low(even, odd), simd.zip_high(even, odd))


@inline
def unpack(weights: Any, panel: int) -> None:
    """32 columns of 16 rows as one tile of 16 rows of 64 bytes."""
    codes, first, second, least, other_least = weights
    unpack_four(codes[0], first, least, panel)
    unpack_four(codes[1], first, least, panel + 2 * RECORD)
    unpack_four(codes[2], first, least, panel + 4 * RECORD)
    unpack_four(codes[3], first, least, panel + 6 * RECORD)
    unpack_four(codes[4], second, other_least, panel + 8 * RECORD)
    unpack_four(codes[5], second, other_least, panel + 10 * RECORD)
    unpack_four(codes[6], second, other_least, panel + 12 * RECORD)
    unpack_four(codes[7], second, other_least, panel + 14 * RECORD)


# --- products ------------------------------------------------------------------------------------


@inline
def plain_block(panel: int, x: int, x_step: int, c: int, steps: int) -> None:
    """32 tokens times 32 rows: float32 sums at c, (32 tokens, 32 rows).

    panel: (steps, 2 tiles of 16 rows, 16 pairs of columns, 16 rows, 2); x: records of 32 columns,
    those of one step side by side, x_step bytes from one step to the next.
    """
    for token in range(TILE):
        for tile in range(2):
            total = simd.splat_f32(float32(0.0))
            for i in range(steps * 16):
                record = x + i // 16 * x_step + token * RECORD + i % 16 * 4
                w = panel + i // 16 * PANEL + tile * (PANEL // 2) + i % 16 * RECORD
                even = simd.splat_f32(memory.load_bf16(record))
                odd = simd.splat_f32(memory.load_bf16(record + 2))
                total = simd.fma(memory.load_even_bf16x16(w), even, total)
                total = simd.fma(memory.load_odd_bf16x16(w), odd, total)
            memory.store_f32x16(c + token * (TILE * 4) + tile * 64, total)


@inline
def nothing() -> None:
    """Where there are no tile registers to set up."""


def _tiles(load: Any, affine: Any, layout: Layout, unit: tuple[Any, Any, Any]) -> Kernel:
    """The product of one weight type, by a unit's (begin, block, end)."""
    block_bytes, records = layout.block_bytes, layout.records
    begin, block, end = unit

    @inline
    def unpack_group(w: int, blocks: int, panel: int) -> None:
        """All columns of 16 rows, as every other tile of a panel."""
        for i in range(blocks * records):
            p = w + i // records * block_bytes
            for line in range(0, block_bytes // records, 64):
                memory.prefetch(p + i % records * (block_bytes // records) + AHEAD + line)
            weights = load(p, i % records)
            unpack(affine(weights), panel + i * PANEL)

    def tiles(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """x @ weight.T. Unit: 32 rows of the weight.

        Arguments: weight, column blocks, packed x, y, y stride, 1 to add to what y holds,
        the state word that counts the tokens, and how many times 16 rows there are.
        """
        weight, blocks = argument(instruction, 0), argument(instruction, 1)
        x, y, stride = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
        accumulate, groups = argument(instruction, 5), argument(instruction, 7)
        n_tokens = memory.load_i64(state + argument(instruction, 6) * WORD)
        c = memory.load_i64(state + abi.SCRATCH * WORD)
        c += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
        panel, x_step = c + TOTALS, padded_tokens(n_tokens) * RECORD
        begin()
        for pair in range(first, last):
            n_groups = min(2, groups - 2 * pair)
            w = weight + 2 * pair * blocks * block_bytes
            for group in range(n_groups):
                unpack_group(w + group * blocks * block_bytes, blocks, panel + group * (PANEL // 2))
            for token in range(0, n_tokens, TILE):
                block(panel, x + token * RECORD, x_step, c, blocks * records)
                for i in range(min(TILE, n_tokens - token) * n_groups):
                    row, group = i // n_groups, i % n_groups
                    at = y + (token + row) * stride + (2 * pair + group) * (LANES * 4)
                    total = memory.load_f32x16(c + row * (TILE * 4) + group * (LANES * 4))
                    put(total, at, accumulate)
        end()

    return tiles


_UNITS = {
    "tiles": (memory.tile_begin, memory.tile_block, memory.tile_end),
    "plain_tiles": (nothing, plain_block, nothing),
}


def tiles(type_name: str, unit: str = "tiles") -> Kernel:
    """The product for weights of one type; unit: `tiles` (level amx) or `plain_tiles`."""
    load, _, _ = PIECES[type_name]
    return _tiles(load, AFFINE[type_name], LAYOUTS[type_name], _UNITS[unit])
