"""Repacked weights: every bit of the file in its place, and zeros in the padding."""

import numpy as np
import pytest
from checked import Array, any_bits, quantized

from edgellama.ggml import BY_NAME, FLOATS
from edgellama.runtimes import abi, repack
from edgellama.runtimes.repack import LAYOUTS, column_blocks, padded, repacked_bytes

KINDS = list(LAYOUTS)


def raw_of(kind: str, rows: int, columns: int) -> Array:
    rng = np.random.default_rng(rows)
    if kind in FLOATS:
        return quantized(kind, rng.standard_normal((rows, columns)))
    return any_bits(kind, rng, (rows, columns // BY_NAME[kind].block))


def repacked(kind: str, raw: Array, columns: int) -> Array:
    """(groups, blocks, bytes of a block)."""
    out = np.full(repacked_bytes(kind, len(raw), columns), 0xFF, np.uint8)
    repack.repack(kind, raw, columns, out)
    return out.reshape(-1, column_blocks(kind, columns), LAYOUTS[kind].block_bytes)


def widths(kind: str) -> list[int]:
    if kind in FLOATS:
        return [1, 7, 8, 32, 33, 96]
    return [BY_NAME[kind].block * n for n in (1, 2, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    layout = LAYOUTS[kind]
    assert abi.BLOCK % layout.columns == 0 or layout.columns % abi.BLOCK == 0
    assert layout.integer == (kind not in FLOATS)
    for columns in widths(kind):
        wide = padded(columns, max(abi.BLOCK, layout.columns))
        assert column_blocks(kind, columns) * layout.columns == wide
        for rows, groups in ((1, 1), (16, 1), (17, 2), (160, 10)):
            n_bytes = groups * wide // layout.columns * layout.block_bytes
            assert repacked_bytes(kind, rows, columns) == n_bytes


def test_padded() -> None:
    assert [padded(n, 16) for n in (0, 1, 15, 16, 17, 2**40 + 1)] == [
        *(0, 16, 16, 16, 32),
        2**40 + 16,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_depend_on_each_other(kind: str) -> None:
    """A file streams in by pieces of whole groups; the last may be short."""
    for columns in widths(kind):
        raw = raw_of(kind, 37, columns)
        whole = repacked(kind, raw, columns)
        parts = [repacked(kind, raw[a:b], columns) for a, b in ((0, 16), (16, 32), (32, 37))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_lie_interleaved(kind: str) -> None:
    """One row alone in a group changes only bytes of its lane; 16 such groups make up the whole."""
    columns = widths(kind)[-1]
    raw = raw_of(kind, 16, columns)
    empty = repacked(kind, np.zeros_like(raw), columns)
    together = empty.copy()
    touched = np.zeros(empty.shape, bool)
    for row in range(16):
        alone = np.zeros_like(raw)
        alone[row] = raw[row]
        own = repacked(kind, alone, columns)
        changed = own != empty
        assert not np.any(touched & changed)
        touched |= changed
        together[changed] = own[changed]
    assert np.array_equal(together, repacked(kind, raw, columns))


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_left_alone(kind: str) -> None:
    raw = raw_of(kind, 20, widths(kind)[1])
    before = raw.copy()
    repacked(kind, raw, widths(kind)[1])
    assert np.array_equal(raw, before)


# --- the layouts by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "halves"), [("Q4_0", 1), ("Q4_1", 2), ("Q8_0", 1)])
def test_blocks_byte_by_byte(kind: str, halves: int) -> None:
    """16 scales (and 16 minima), then chunks of four bytes of each row in turn."""
    raw = raw_of(kind, 16, 64).reshape(16, 2, -1)
    packed = repacked(kind, raw.reshape(16, -1), 64)[0]
    flip = 128 if kind == "Q8_0" else 0  # codes become unsigned
    codes = raw.shape[2] - 2 * halves
    for block in range(2):
        for row in range(16):
            for half in range(halves):
                at = half * 32 + row * 2
                assert bytes(packed[block, at : at + 2]) == bytes(
                    raw[row, block, 2 * half : 2 * half + 2]
                )
            for i in range(codes):
                at = halves * 32 + i // 4 * 64 + row * 4 + i % 4
                assert packed[block, at] == raw[row, block, 2 * halves + i] ^ flip


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_lie_by_column(kind: str) -> None:
    size, columns = BY_NAME[kind].size, 33
    raw = raw_of(kind, 5, columns).reshape(5, columns, size)
    packed = repacked(kind, raw.reshape(5, -1), columns)
    by_column = packed.reshape(-1, 16, size)  # (padded columns, 16 rows, bytes)
    assert by_column.shape[0] == 64
    for column in range(64):
        for row in range(16):
            inside = column < columns and row < 5
            expected = bytes(raw[row, column]) if inside else bytes(size)
            assert bytes(by_column[column, row]) == expected
