"""Tensor types: the bits mean what ggml's reference says, to the last bit."""

import gguf
import numpy as np
import pytest
from tiny import INVENTED

from edgellama import UnsupportedModelError
from edgellama.ggml import BY_ID, BY_NAME, FLOATS, HALVES, RUNNABLE
from edgellama.quantize.blocks import FORMATS, decode


def reference(kind: str, raw: np.ndarray) -> np.ndarray:
    form = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        raw = raw.view({"F32": np.float32, "F16": np.float16}[kind])
    return gguf.quants.dequantize(raw, form).astype(np.float32)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("kind", [kind for kind in RUNNABLE if kind not in INVENTED])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (3, 4096)])
def test_decodes_what_the_reference_encodes(kind: str, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape, np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    decoded = decode(kind, raw)
    assert decoded.dtype == np.float32 and decoded.shape == shape
    assert np.array_equal(bits(decoded), bits(reference(kind, raw)))
    worst = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02}.get(kind, 0.5)
    assert np.max(np.abs(decoded - values)) <= worst


@pytest.mark.parametrize("kind", RUNNABLE)
def test_decodes_any_bits_as_the_reference_does(kind: str) -> None:
    """Random bytes: every quant, every finite scale, subnormal ones too."""
    raw = np.random.default_rng(2).integers(0, 256, (64, BY_NAME[kind].size * 8), np.uint8)
    blocks = raw.reshape(-1, BY_NAME[kind].size)
    for at in HALVES.get(kind, ()):  # no infinite scale
        blocks[:, at + 1] &= 0xBB
    with np.errstate(all="ignore"):
        ours, theirs = decode(kind, raw), reference(kind, raw)
    assert np.array_equal(bits(ours)[~np.isnan(ours)], bits(theirs)[~np.isnan(theirs)])
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))


def test_by_hand() -> None:
    """One block of each quantized type, decoded on paper: scale 2, minimum -1."""
    two, minus_one = b"\x00\x40", b"\x00\xbc"
    nibbles = bytes(i | (15 - i) << 4 for i in range(16))
    rising, falling = np.arange(16.0), 15.0 - np.arange(16.0)
    q = np.concatenate((rising, falling))

    def decoded(kind: str, raw: bytes) -> np.ndarray:
        return decode(kind, np.frombuffer(raw, np.uint8)[None, :])[0]

    assert np.array_equal(decoded("Q4_0", two + nibbles), 2 * (q - 8))
    assert np.array_equal(decoded("Q4_1", two + minus_one + nibbles), 2 * q - 1)
    assert np.array_equal(decoded("Q8_0", two + bytes(range(240, 256)) + bytes(range(16))),
                          2 * np.arange(-16.0, 16.0))  # fmt: skip
    assert np.array_equal(decoded("BF16", b"\x80\x3f\x00\xc0"), [1.0, -2.0])
    assert np.array_equal(decoded("F16", two + minus_one), [2.0, -1.0])


@pytest.mark.parametrize("kind", RUNNABLE)
def test_rows_need_not_be_contiguous_and_are_not_changed(kind: str) -> None:
    wide = np.random.default_rng(3).integers(0, 60, (6, BY_NAME[kind].size * 4), np.uint8)
    before = wide.copy()
    assert np.array_equal(decode(kind, wide[::2]), decode(kind, wide[::2].copy()))
    assert np.array_equal(wide, before)


def test_runnable_types_are_those_with_a_decoder() -> None:
    assert tuple(FORMATS) == RUNNABLE
    assert set(HALVES) == set(RUNNABLE) - set(FLOATS)


def test_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    for form in BY_ID.values():
        assert form.id == gguf.GGMLQuantizationType[form.name].value
        assert (form.block, form.size) == theirs[form.name]


@pytest.mark.parametrize("kind", ["IQ1_S", "I32", "q4_0", "\x1b[31m"])
def test_types_without_a_decoder_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="supported: F32, F16, BF16") as caught:
        decode(kind, np.zeros((1, 32), np.uint8))
    assert str(caught.value).isprintable()
