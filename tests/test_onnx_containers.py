"""GGUF's blocks as ONNX Runtime's arrays: the same values, to the bit where that can be had."""

import numpy as np
import pytest
from tiny import encoded

from edgellama.ggml import BY_NAME, FLOATS, HALVES, RUNNABLE
from edgellama.quantize.blocks import decode
from edgellama.runtimes.onnx_containers import (
    EIGHT_BIT,
    EXACT,
    container,
    parts,
    values,
)

BITWISE = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "Q3_K", "Q6_K", *FLOATS)
MINIMA = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
COLUMNS = 512


def raw(kind: str, rows: int = 24, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).standard_normal((rows, COLUMNS)).astype(np.float32) * 0.05
    return encoded(kind, weights).view(np.uint8).reshape(rows, -1)


@pytest.mark.parametrize("how", [EXACT, EIGHT_BIT])
@pytest.mark.parametrize("kind", BITWISE)
def test_to_the_bit(kind: str, how: str) -> None:
    blocks = raw(kind)
    found = values(parts(kind, blocks, how), container(kind, how))
    np.testing.assert_array_equal(found, decode(kind, blocks))


@pytest.mark.parametrize("kind", [*MINIMA, "Q2_K"])
def test_corrections_lose_a_rounding_at_most(kind: str) -> None:
    blocks = raw(kind)
    wanted = decode(kind, blocks)
    found = values(parts(kind, blocks), container(kind))
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", MINIMA)
def test_eight_bits_round_the_zero_point(kind: str) -> None:
    """By at most half a step of the finer codes: a 32nd of the type's own, a 16th of Q5's."""
    blocks, form = raw("Q4_1" if kind == "Q4_1" else kind), container(kind, EIGHT_BIT)
    opened = parts(kind, blocks, EIGHT_BIT)
    error = np.abs(values(opened, form) - decode(kind, blocks)).reshape(24, -1, 32)
    assert form.bits == 8 and not form.correction
    within = (opened["zero_points"] > 0) & (opened["zero_points"] < 255)
    assert within.mean() > 0.5
    step = opened["scales"][..., None]
    assert (error <= 0.501 * np.abs(step) + 1e-7)[within].all()


@pytest.mark.parametrize("how", [EXACT, EIGHT_BIT])
@pytest.mark.parametrize("kind", MINIMA)
def test_blocks_of_equal_weights(kind: str, how: str) -> None:
    """Scale 0: all that is left is the minimum."""
    blocks = raw(kind).copy()
    size, (d, m) = BY_NAME[kind].size, HALVES[kind]
    each = blocks.reshape(-1, size)
    each[:, d : d + 2] = 0
    each[:, m : m + 2] = np.array([0.25], np.float16).view(np.uint8)
    wanted = decode(kind, blocks)
    assert np.ptp(wanted.reshape(-1, 32), axis=1).max() == 0 and np.abs(wanted).max() > 0
    found = values(parts(kind, blocks, how), container(kind, how))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("shift", [-40.0, 3.0, 40.0])
def test_blocks_far_from_zero(kind: str, shift: float) -> None:
    """Their zero is no code of theirs: they get a 255th of what they span together with zero."""
    blocks = raw(kind).copy()
    each, m = blocks.reshape(-1, BY_NAME[kind].size), HALVES[kind][1]
    d = each[:, 0:2].copy().view(np.float16).astype(np.float32)
    each[:, m : m + 2] = (d * shift).astype(np.float16).view(np.uint8)
    wanted = decode(kind, blocks).reshape(-1, 32)
    found = values(parts(kind, blocks, EIGHT_BIT), container(kind, EIGHT_BIT)).reshape(-1, 32)
    span = np.maximum(wanted.max(axis=1), 0) - np.minimum(wanted.min(axis=1), 0)
    assert (np.abs(found - wanted).max(axis=1) <= 1.01 * span / 255 * 1.2).all()


@pytest.mark.parametrize("kind", RUNNABLE)
@pytest.mark.parametrize("how", [EXACT, EIGHT_BIT])
def test_pieces_are_rows_of_the_whole(kind: str, how: str) -> None:
    blocks = raw(kind)
    whole, piece = parts(kind, blocks, how), parts(kind, blocks[5:9], how)
    assert whole.keys() == piece.keys()
    for name, rows in whole.items():
        np.testing.assert_array_equal(rows[5:9], piece[name])
        assert len(rows) == 24


def test_scales_are_stored_in_the_smallest_type_that_holds_them() -> None:
    for kind in RUNNABLE:
        found = parts(kind, raw(kind))
        if kind in FLOATS:
            assert set(found) == {"values"} and found["values"].nbytes == raw(kind).nbytes
        else:
            wanted = "float32" if kind.endswith("_K") else "float16"
            assert found["scales"].dtype.name == wanted
