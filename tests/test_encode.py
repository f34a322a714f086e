"""Encoders: every type's blocks are ggml's, to the bit, from ordinary rows and from hostile ones.

Against hashes of ggml's own output, against a slow twin that is written otherwise, and against
ggml itself where it is installed.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import arena
from encode_rows import COLUMNS, KINDS, WEIGHTED, ggml, importances, rows, sha256
from encode_twin import twin
from numpy.typing import NDArray

from edgellama import ParameterError, UnsupportedModelError
from edgellama.ggml import BY_NAME, HALVES
from edgellama.quantize import encode as encoder, packed
from edgellama.quantize.blocks import decode
from edgellama.quantize.encode import encode, first_overflow
from edgellama.runtimes import kernel_cache, levels

Array = NDArray[Any]
FIXTURE = json.loads((Path(__file__).parent / "data" / "encode.json").read_text("utf-8"))
BLOCKS = [kind for kind in KINDS if kind not in ("F16", "BF16")]
K_TYPES = {name: getattr(packed, name.lower()) for name in KINDS if name.endswith("_K")}
GENERIC = levels.LEVELS["generic"]


# --- against ggml ---------------------------------------------------------------------------------


def test_the_fixture_is_of_these_rows() -> None:
    assert sha256(rows()) == FIXTURE["rows"]
    assert [sha256(weights) for weights in importances()] == FIXTURE["importances"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_hashes(kind: str) -> None:
    assert sha256(encode(rows(), kind)) == FIXTURE["plain"][kind]


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weighted_hashes(kind: str) -> None:
    made = [sha256(encode(rows(), kind, importance=weights)) for weights in importances()]
    assert made == FIXTURE["weighted"][kind]


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K"])
def test_the_generic_level_gives_the_same_bytes(kind: str) -> None:
    assert sha256(encode(rows(), kind, level=GENERIC)) == FIXTURE["plain"][kind]


@pytest.mark.parametrize("kind", KINDS)
def test_ggml_itself(kind: str) -> None:
    """Other rows than the fixture's: 180,000 numbers a type, any finite bits among them."""
    theirs = ggml()
    if theirs is None:
        pytest.skip("needs llama-cpp-python")
    rng = np.random.default_rng(7)
    anything = rng.integers(0, 2**32, (40, COLUMNS), np.uint32).view(np.float32)
    heavy = rng.standard_cauchy((40, COLUMNS)).astype(np.float32)
    values = np.concatenate([rows(1), rows(2), np.where(np.isfinite(anything), anything, 0), heavy])
    assert np.array_equal(encode(values, kind), theirs(kind, values, None))
    if kind in WEIGHTED:
        weights = importances(1)[0]
        assert np.array_equal(
            encode(values, kind, importance=weights), theirs(kind, values, weights)
        )


# --- against the twin -----------------------------------------------------------------------------


def unpacked(kind: str, blocks: Array) -> packed.Packed:
    if kind in K_TYPES:
        return K_TYPES[kind](blocks)
    begin = 2 * len(HALVES[kind])
    if kind in ("Q5_0", "Q5_1"):
        return packed.q5(blocks[:, begin : begin + 4], blocks[:, begin + 4 :])
    return packed.Packed(blocks[:, 2:]) if kind == "Q8_0" else packed.q4(blocks[:, begin:])


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_twin(kind: str) -> None:
    values = rows(3)
    for weights in (None, *(importances(3) if kind in WEIGHTED else ())):
        blocks = encode(values, kind, importance=weights).reshape(-1, BY_NAME[kind].size)
        expected, found = twin(kind, values, weights), unpacked(kind, blocks)
        halves = [blocks[:, at : at + 2].copy().view("<u2") for at in HALVES[kind]]
        assert np.array_equal(np.concatenate(halves, axis=1), expected.halves)
        assert np.array_equal(found.codes, expected.codes)
        if expected.scales is not None:
            assert np.array_equal(found.scales, expected.scales)
        if expected.minima is not None:
            assert np.array_equal(found.minima, expected.minima)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_floats_are_rounded_to_nearest_even(kind: str) -> None:
    values = np.concatenate([rows(4).ravel(), np.float32([1 + 2**-11, 1 + 2**-8, 65519, 65520])])
    words = encode(values[None, :], kind).view("<u2")[0]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view("<u2")
    if kind == "BF16":
        wide = values.view(np.uint32).astype(np.uint64)
        expected = (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype(np.uint16)
    assert np.array_equal(words, expected)


def test_f32_is_copied() -> None:
    values = rows(5)
    made = encode(values, "F32")
    assert made.tobytes() == values.tobytes() and not np.shares_memory(made, values)


# --- pieces, threads, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("kind, weighted", [("Q8_0", False), ("Q6_K", False), ("Q4_0", True)])
def test_how_rows_are_cut_does_not_matter(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, weights = rows(6), importances(6)[1] if weighted else None
    whole = encode(values, kind, importance=weights)
    for n in (1, 15, 16, 17, 31):
        some = encode(values[5 : 5 + n], kind, importance=weights)
        assert np.array_equal(some, whole[5 : 5 + n])
    monkeypatch.setattr(encoder, "PIECE", 1)
    for threads in (1, 2, 5):
        assert np.array_equal(encode(values, kind, importance=weights, threads=threads), whole)
    slanted = np.asfortranarray(values)
    assert np.array_equal(encode(slanted, kind, importance=weights), whole)


@pytest.mark.parametrize("kind, weighted", [("Q5_0", False), ("BF16", False), ("Q3_K", True)])
def test_kernels_stay_in_their_memory(kind: str, weighted: bool) -> None:
    block = BY_NAME[kind].block
    weights = importances()[0] if weighted else None
    kernel = encoder._kernel(f"{'weighted' if weighted else 'encode'}:{kind}", None)
    with arena() as memory:
        for n in (1, 16, 37):
            lanes = rows()[:n] if weighted else rows()[:1].reshape(-1, block)[:n]
            source = memory.copy(lanes)
            out = memory.new((len(lanes), lanes.shape[1] // block * BY_NAME[kind].size))
            guarded = None if weights is None else memory.copy(weights)
            encoder._encode_lanes(kernel, source, out, block, guarded)
            expected = encode(lanes, kind, importance=weights)
            assert np.array_equal(out, expected)


def test_nothing_to_encode() -> None:
    assert encode(np.zeros((0, 256), np.float32), "Q4_K").shape == (0, 144)
    assert encode(np.zeros((3, 0), np.float32), "Q4_0").shape == (3, 0)
    nothing = np.zeros(0, np.float32)
    assert encode(np.zeros((3, 0), np.float32), "Q6_K", importance=nothing).shape == (3, 0)


# --- what it is good for --------------------------------------------------------------------------

ERRORS = {  # of the root mean square of ordinary weights
    **{"F16": 3e-4, "BF16": 2e-3, "Q8_0": 6e-3, "Q4_0": 0.09, "Q4_1": 0.08, "Q5_0": 0.05},
    **{"Q5_1": 0.04, "IQ4_NL": 0.08, "Q2_K": 0.31, "Q3_K": 0.16, "Q4_K": 0.08, "Q5_K": 0.04},
    "Q6_K": 0.02,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_is_near(kind: str) -> None:
    values = np.random.default_rng(8).standard_normal((16, COLUMNS), np.float32)
    for weights in (None, np.ones(COLUMNS, np.float32)):
        back = decode(kind, encode(values, kind, importance=weights))
        assert 0 < np.sqrt(np.mean((back - values) ** 2)) < ERRORS[kind]


def test_importance_makes_important_columns_nearer() -> None:
    values = np.random.default_rng(9).standard_normal((32, COLUMNS), np.float32)
    weights = np.ones(COLUMNS, np.float32)
    weights[::8] = 50
    for kind in WEIGHTED:
        plain, weighted = (
            decode(kind, encode(values, kind, importance=w)) for w in (None, weights)
        )
        error, better = (np.mean((v - values)[:, ::8] ** 2) for v in (plain, weighted))
        assert better < error, kind


# --- refusals and checks --------------------------------------------------------------------------


def test_refusals() -> None:
    values = np.zeros((2, 96), np.float32)
    with pytest.raises(UnsupportedModelError, match=r"'IQ1_S'.* supported: F32"):
        encode(values, "IQ1_S")
    with pytest.raises(ParameterError, match=r"\(2, 96\) cannot be encoded as Q4_K.* 256 columns"):
        encode(values, "Q4_K")
    with pytest.raises(ParameterError, match=r"shape \(96,\) cannot"):
        encode(values[0], "Q4_0")
    for wrong in (np.ones(95, np.float32), np.ones((2, 96), np.float32)):
        with pytest.raises(ParameterError, match="does not fit 96 columns"):
            encode(values, "Q4_0", importance=wrong)


@pytest.mark.parametrize("kind", ["F32", *KINDS])
def test_overflow_is_found(kind: str) -> None:
    values = np.ones((5, COLUMNS), np.float32)
    values[:, ::2] = -1
    assert first_overflow(encode(values, kind), kind) is None
    large = {"F32": np.inf, "BF16": -3.4028235e38}  # which bfloat16 rounds up
    values[3, 300] = large.get(kind, 1e10)
    assert first_overflow(encode(values, kind), kind) == 3
    assert first_overflow(encode(values[:3], kind), kind) is None


def test_a_warm_process_does_not_import_numba() -> None:
    encode(np.zeros((16, 32), np.float32), "Q8_0")
    code = """
import sys
import numpy as np
from edgellama.quantize.encode import encode
print(encode(np.ones((1, 32), np.float32), "Q8_0").sum(), "numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_kernels_are_kept_by_all_their_sources() -> None:
    code = """
import sys
import edgellama.quantize.encode_k
print(*(name for name in sys.modules if name.startswith("edgellama.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [name.split(".") for name in done.stdout.split()]
    encoders = {name[-1] for name in names if name[1] == "quantize" and len(name) == 3}
    assert encoders == set(kernel_cache._ENCODERS)
    runtimes = {name[-1] for name in names if name[1] == "runtimes" and len(name) == 3}
    assert runtimes <= set(kernel_cache._SOURCES)
