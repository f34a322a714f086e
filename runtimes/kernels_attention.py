"""Attention over the key/value cache: how it lies there, `kernels_cache.py` says.

Queries that see the same keys, those of a key head's group and of some tokens, go through the
cache together, block by block, four at a time: see `attention_block.py`.

Units, signature and slow twins as in `kernels.py`.
"""

from collections.abc import Callable
from typing import Any

from numba import float32, int64

from edgellama.runtimes import abi, memory, simd
from edgellama.runtimes.attention_block import (
    BEGIN,
    END,
    PART,
    QUERY,
    ROW,
    WEIGHTS,
    attend,
    exp2,
)
from edgellama.runtimes.compiler import inline
from edgellama.runtimes.kernels import argument
from edgellama.runtimes.kernels_cache import padded_head

WORD, ARGS, LANES = abi.WORD, abi.ARGS, abi.LANES
key_bytes, value_bytes = inline(abi.key_bytes), inline(abi.value_bytes)
KEYS_AT_ONCE, SPLIT, TOKENS = abi.ATTENTION_BLOCK, abi.ATTENTION_SPLIT, abi.ATTENTION_TOKENS
LEAST = -3.0e38  # below every score, and still a number
Kernel = Callable[[int, int, int, int, int], None]
LOG2_E = 1.4426950408889634  # queries are scaled so that weights are powers of 2


@inline
def clear(part: int, width: int) -> None:
    """A sum over no positions: see `attention_block.soften`."""
    for i in range(0, width, LANES):
        memory.store_f32x16(part + i * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32x16(part + width * 4, simd.splat_f32(float32(0.0)))
    memory.store_f32(part + width * 4 + 64, float32(LEAST))


@inline
def attend_split(
    rows: int, n_rows: int, cache: int, block_bytes: int, head: int, n_kv_heads: int,
    head_dim: int, kind: int, weights: int,
) -> None:  # fmt: skip
    """Sums over the positions that the rows say, for queries of one key head."""
    key, value = key_bytes(kind, head_dim), value_bytes(kind, head_dim)
    begin, end = memory.load_i64(rows + BEGIN), memory.load_i64(rows + END)
    for i in range(n_rows):
        clear(memory.load_i64(rows + i * ROW + PART), padded_head(head_dim))
        begin = min(begin, memory.load_i64(rows + i * ROW + BEGIN))
        end = max(end, memory.load_i64(rows + i * ROW + END))
    turns = (n_rows + 3) // 4
    for block in range(begin // KEYS_AT_ONCE, (end + KEYS_AT_ONCE - 1) // KEYS_AT_ONCE):
        at, to = block * KEYS_AT_ONCE, cache + block * block_bytes
        keys = to + head * 4 * key
        values = to + n_kv_heads * 4 * key + head * KEYS_AT_ONCE * value
        low, high = max(int64(0), begin - at), min(int64(KEYS_AT_ONCE), end - at)
        for i in range(turns):  # the block stays in the nearest cache meanwhile
            row, count = rows + 4 * i * ROW, min(int64(4), n_rows - 4 * i)
            ahead = block_bytes if i == 0 else int64(0)
            attend(row, count, keys, values, at, low, high, head_dim, kind, ahead, weights)


# --- kernels -------------------------------------------------------------------------------------


@inline
def join(part: int, other: int, width: int) -> None:
    """Add the other part's sums, both brought to the higher of the two origins."""
    mine, theirs = memory.load_f32(part + width * 4 + 64), memory.load_f32(other + width * 4 + 64)
    peak = simd.maximum(simd.splat_f32(mine), simd.splat_f32(theirs))
    shrink = exp2(simd.sub(simd.splat_f32(mine), peak))
    other_shrink = exp2(simd.sub(simd.splat_f32(theirs), peak))
    for i in range(0, width + LANES, LANES):
        both = simd.mul(memory.load_f32x16(part + i * 4), shrink)
        both = simd.fma(memory.load_f32x16(other + i * 4), other_shrink, both)
        memory.store_f32x16(part + i * 4, both)
    memory.store_f32(part + width * 4 + 64, simd.max_f32(peak))


@inline
def copy_scaled(x: int, to: int, n: int, scale: Any) -> None:
    for i in range(n):
        memory.store_f32(to + i * 4, memory.load_f32(x + i * 4) * scale)


@inline
def query_number(token: int, n_kv_heads: int, head: int, group: int, i: int) -> Any:
    """Of all tokens' query heads, row i of those from `token` on that share a key head."""
    return ((token + i // group) * n_kv_heads + head) * group + i % group


@inline
def set_row(row: int, query: int, part: int, stop: int, window: int, split: int) -> None:
    """A query that sees the `window` positions before `stop` (0: all), those of a split alone."""
    least = max(int64(0), stop - window) if window > 0 else int64(0)
    memory.store_i64(row + QUERY, query)
    memory.store_i64(row + PART, part)
    memory.store_i64(row + BEGIN, max(least, split * SPLIT))
    memory.store_i64(row + END, min(stop, (split + 1) * SPLIT))


def attention(kv_type: str) -> Kernel:
    """The kernel for a cache of one type: f32, f16 or q8_0."""
    kind = abi.KV_TYPES[kv_type]

    def kernel(instruction: int, state: int, first: int, last: int, thread: int) -> None:
        """Causal attention of up to 4 tokens' query heads that share keys.

        The cache is summed in splits of 1,024 positions, which are joined from the first on: the
        order of sums depends on positions alone. A unit is a key head of the tokens; where there
        is one token only, each split of it is a unit of its own, so that all threads share a long
        cache, and `merge` joins them.

        Arguments: q, q stride, parts, bytes of a part, n_kv_heads, heads per key head, head_dim; of
        the cache: bytes from its block to this layer, bytes of a block; scale (float64); window
        (positions, 0: all).
        """
        q, q_stride = argument(instruction, 0), argument(instruction, 1)
        parts, part_bytes = argument(instruction, 2), argument(instruction, 3)
        n_kv_heads, group = argument(instruction, 4), argument(instruction, 5)
        head_dim, block_bytes = argument(instruction, 6), argument(instruction, 8)
        cache = memory.load_i64(state + abi.CACHE * WORD) + argument(instruction, 7)
        scale = float32(memory.load_f64(instruction + (ARGS + 9) * WORD) * LOG2_E)
        window = argument(instruction, 10)
        n_tokens = memory.load_i64(state + abi.N_TOKENS * WORD)
        start = memory.load_i64(state + abi.START * WORD)
        splits = memory.load_i64(state + abi.SPLITS * WORD)
        parallel = memory.load_i64(state + abi.PARALLEL * WORD)
        weights = memory.load_i64(state + abi.SCRATCH * WORD)
        weights += thread * memory.load_i64(state + abi.SCRATCH_BYTES * WORD)
        rows = weights + 2 * abi.QUERIES * WEIGHTS
        queries = rows + TOKENS * group * ROW
        others = queries + TOKENS * group * head_dim * 4
        for unit in range(first, last):
            token, head = unit // parallel // n_kv_heads * TOKENS, unit // parallel % n_kv_heads
            n_rows = min(int64(TOKENS), n_tokens - token) * group
            for i in range(0, n_rows, group):
                x = q + (token + i // group) * q_stride + head * group * head_dim * 4
                copy_scaled(x, queries + i * head_dim * 4, group * head_dim, scale)
            for split in range(unit % parallel, splits, parallel):
                for i in range(n_rows):
                    query = query_number(token, n_kv_heads, head, group, i)
                    part = parts + (query * parallel + unit % parallel) * part_bytes
                    to = part if split < parallel else others + i * part_bytes
                    stop = start + token + i // group + 1
                    set_row(rows + i * ROW, queries + i * head_dim * 4, to, stop, window, split)
                attend_split(
                    rows, n_rows, cache, block_bytes, head, n_kv_heads, head_dim, kind, weights
                )
                for i in range(n_rows if split >= parallel else int64(0)):
                    query = query_number(token, n_kv_heads, head, group, i)
                    join(parts + query * part_bytes, others + i * part_bytes, padded_head(head_dim))

    return kernel


def merge(instruction: int, state: int, first: int, last: int, thread: int) -> None:
    """Join the splits that were units of their own, and divide by the weights. Unit: a head.

    Arguments: parts, bytes of a part, out, out stride, n_heads, head_dim.
    """
    parts, part_bytes = argument(instruction, 0), argument(instruction, 1)
    out, out_stride = argument(instruction, 2), argument(instruction, 3)
    n_heads, head_dim = argument(instruction, 4), argument(instruction, 5)
    parallel = memory.load_i64(state + abi.PARALLEL * WORD)
    width = padded_head(head_dim)
    for unit in range(first, last):
        part = parts + unit * parallel * part_bytes
        for split in range(1, parallel):
            join(part, part + split * part_bytes, width)
        share = float32(1.0) / simd.sum_f32(memory.load_f32x16(part + width * 4))
        y = out + unit // n_heads * out_stride + unit % n_heads * head_dim * 4
        copy_scaled(part, y, head_dim, share)
