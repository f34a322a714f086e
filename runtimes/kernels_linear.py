"""Matrix products with repacked weights, and the embedding's row lookup, for every weight type.

A repacked matrix (`repack.py`) holds 16 rows interleaved, so one vector register holds 16 rows'
results and a block's 16 scales are converted at once. What a type's bits mean is in `pieces.py`
and `pieces_quants.py`; here are the loops around them. The order of a row's additions depends on
its length alone: one token or many, any thread, the same bits.

The slow twin is `Reference.linear` on weights decoded by `quantize/blocks.py`.
"""

from collections.abc import Callable
from typing import Any

from numba import float32

from edgellama.runtimes import abi, memory, pieces, pieces_quants, simd
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument
from edgellama.runtimes.repack import LAYOUTS, Layout

WORD, LANES, TILE = abi.WORD, abi.LANES, abi.TILE
AHEAD = 5120  # bytes; where prefetching pays most on the machines measured

Kernel = Callable[[int, int, int, int, int], None]


@inline
def put(total: Any, y: int, accumulate: int) -> None:
    """16 sums to their place, or added to what is there."""
    if accumulate != 0:
        total = simd.add(memory.load_f32x16(y), total)
    memory.store_f32x16(y, total)


def _linear(load: Any, dot: Any, layout: Layout, fine: int) -> Kernel:
    """The matrix product of one weight type, from its pieces."""
    block_bytes, record_bytes, records = layout.block_bytes, layout.record_bytes, layout.records
    share = block_bytes // records

    @inline
    def one_token(w: int, blocks: int, x: int) -> Any:
        """16 rows times one record row; the running total never leaves its register."""
        total = simd.splat_f32(float32(0.0))
        for block in range(blocks):
            p = w + block * block_bytes
            for i in range(records):
                for line in range(0, share, 64):  # a few at a time: many would wait for each other
                    memory.prefetch(p + AHEAD + i * share + line)
                record = x + (block * records + i) * record_bytes
                total = dot(load(p, i), record, total, fine)
        return total

    @inline
    def tile(w: int, blocks: int, x: int, n_tokens: int, count: int, totals: int) -> None:
        """16 rows times `count` tokens: each block is unpacked once for all of them."""
        for t in range(count):
            memory.store_f32x16(totals + t * 64, simd.splat_f32(float32(0.0)))
        for i in range(blocks * records):
            weights = load(w + i // records * block_bytes, i % records)
            record = x + i * n_tokens * record_bytes
            for t in range(count):
                total = memory.load_f32x16(totals + t * 64)
                total = dot(weights, record + t * record_bytes, total, fine)
                memory.store_f32x16(totals + t * 64, total)

    def linear(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """x @ weight.T. Unit: 16 rows of the weight.

        Arguments: weight, column blocks, packed x, y, y stride, 1 to add to what y holds,
        and the state word that counts the tokens.
        """
        weight, blocks = argument(instruction, 0), argument(instruction, 1)
        x, y, stride = argument(instruction, 2), argument(instruction, 3), argument(instruction, 4)
        accumulate = argument(instruction, 5)
        n_tokens = memory.load_i64(state + argument(instruction, 6) * WORD)
        totals = memory.load_i64(state + abi.SCRATCH * WORD)
        totals += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
        for group in range(first, last):
            w, out = weight + group * blocks * block_bytes, y + group * LANES * 4
            if n_tokens == 1:
                put(one_token(w, blocks, x), out, accumulate)
                continue
            for begin in range(0, n_tokens, TILE):
                count = min(TILE, n_tokens - begin)
                tile(w, blocks, x + begin * record_bytes, n_tokens, count, totals)
                for t in range(count):
                    total = memory.load_f32x16(totals + t * 64)
                    put(total, out + (begin + t) * stride, accumulate)

    return linear


def _embed(decode: Any, layout: Layout) -> Kernel:
    """Row lookup of one weight type; `decode(block, lane, column)` gives one weight."""
    block_bytes, columns = layout.block_bytes, layout.columns

    def embed(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """Rows of the weight by token id. Unit: a token.

        Arguments: weight, column blocks, y, y stride. Columns of padding decode to zero.
        """
        weight, blocks = argument(instruction, 0), argument(instruction, 1)
        y, stride = argument(instruction, 2), argument(instruction, 3)
        ids = memory.load_i64(state + abi.TOKENS * WORD)
        for token in range(first, last):
            row = memory.load_i64(ids + token * WORD)
            w, lane = weight + row // LANES * blocks * block_bytes, row % LANES
            for block in range(blocks):
                for column in range(columns):
                    value = decode(w + block * block_bytes, lane, column)
                    at = y + token * stride + (block * columns + column) * 4
                    memory.store_f32(at, value)

    return embed


PIECES = pieces.PIECES | pieces_quants.PIECES


def linear(type_name: str, *, fine: bool = False) -> Kernel:
    """The matrix product for weights of one type; fine: with activations of 15 bits, not 8."""
    load, dot, _ = PIECES[type_name]
    return _linear(load, dot, LAYOUTS[type_name], int(fine))


def embed(type_name: str) -> Kernel:
    """The row lookup for weights of one type."""
    return _embed(PIECES[type_name][2], LAYOUTS[type_name])
