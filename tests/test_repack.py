"""Repacked weights: every bit of the file in its place, and zeros in the padding."""

from collections.abc import Callable

import numpy as np
import pytest
from checked import Array, any_bits, quantized

from edgellama.ggml import BY_NAME, FLOATS, HALVES
from edgellama.quantize import packed
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


# --- what is taken apart, beside a slow twin ------------------------------------------------------

PLANES = {  # bits of a code: nibbles, pairs and single bits, the lowest ones first
    "Q5_0": (4, 1),
    "Q5_1": (4, 1),
    "Q2_K": (2,),
    "Q3_K": (2, 1),
    "Q4_K": (4,),
    "Q5_K": (4, 1),
    "Q6_K": (4, 2),
}
PLACES = {  # column -> (word of a row, bit of byte `column % 4`)
    1: lambda column: (0, column // 4),
    2: lambda column: (column // 16, column % 16 // 4 * 2),
    4: lambda column: (column % 16 // 4, column // 16 * 4),
}


def planes(kind: str, codes: Array) -> bytes:
    """Codes of (16 rows, 32 columns), one after the other put into their places."""
    parts, shift = b"", 0
    for bits in PLANES[kind]:
        out = np.zeros((bits, 16, 4), np.uint8)  # (words of a row, rows, bytes)
        for column in range(32):
            word, place = PLACES[bits](column)
            fields = codes[:, column] >> shift & (2**bits - 1)
            out[word, :, column % 4] |= (fields << place).astype(np.uint8)
        parts, shift = parts + out.tobytes(), shift + bits
    return parts


def integers(kind: str, blocks: Array) -> packed.Packed:
    if kind in ("Q5_0", "Q5_1"):
        start = 2 * len(HALVES[kind])
        return packed.q5(blocks[:, start : start + 4], blocks[:, start + 4 :])
    unpack: Callable[[Array], packed.Packed] = getattr(packed, kind.lower())
    return unpack(blocks)


def twin(kind: str, blocks: Array) -> bytes:
    """One repacked block of 16 rows, (16, bytes of a block)."""
    head = b"".join(blocks[:, at : at + 2].tobytes() for at in HALVES[kind])
    whole = integers(kind, blocks)
    small = [a.view(np.uint8) for a in (whole.scales, whole.minima) if a is not None]
    if kind == "Q2_K":  # both fit one byte
        small = [small[0] | small[1] << np.uint8(4)]
    parts, n = [], BY_NAME[kind].block // 32
    for part in range(n):
        of_part = [a.reshape(16, n, -1)[:, part].T.tobytes() for a in small]
        parts.append(b"".join(of_part) + planes(kind, whole.codes.reshape(16, n, 32)[:, part]))
    return head + b"".join(parts)


@pytest.mark.parametrize("kind", PLANES)
def test_codes_go_into_planes(kind: str) -> None:
    """At every position of a piece large enough to be repacked in several steps."""
    block, size = BY_NAME[kind].block, BY_NAME[kind].size
    blocks = repack.AT_ONCE // 32 // size
    raw = raw_of(kind, 48, blocks * block)  # one and a half times what is repacked at once
    out = repacked(kind, raw, blocks * block)
    of_file = raw.reshape(3, 16, blocks, size)
    rng = np.random.default_rng(0)
    for group in range(3):
        for at in (0, 1, blocks - 1, *rng.integers(0, blocks, 5)):
            assert out[group, at].tobytes() == twin(kind, of_file[group, :, at])


@pytest.mark.parametrize("kind", PLANES)
def test_every_bit_of_a_block_has_its_place(kind: str) -> None:
    """Blocks of a single set bit, each in turn."""
    size = BY_NAME[kind].size
    alone = np.packbits(np.eye(size * 8, dtype=np.uint8), axis=1)  # (bits, size)
    raw = np.concatenate([alone, np.zeros((-len(alone) % 16, size), np.uint8)])
    out = repacked(kind, raw, BY_NAME[kind].block)
    for group, blocks in enumerate(raw.reshape(-1, 16, size)):
        assert out[group, 0].tobytes() == twin(kind, blocks)
