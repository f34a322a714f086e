"""The real model's logits on a fixed English text: how close, and always the same bits.

What is near enough is set by llama.cpp's own distance from the float32 reference on this text
(see make_llamacpp_fixture.py), so rounding activations to 8 bits is allowed, and no more.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from accuracy import POSITIONS, REFERENCE_POSITIONS, TEXT, bucketed, with_rest
from make_llamacpp_fixture import FIXTURE, sha256

import edgellama
from edgellama.distance import distance, divergence, log_probabilities, nmse

EXACT_POSITIONS = 64  # enough for the comparisons whose bounds are far above what is measured
BITS_POSITIONS = 100  # more than a block of 64, and no multiple of anything
COPIED = ("general.", "llama.", "tokenizer.")


def logits(path: Path, ids: list[int], **options: Any) -> np.ndarray:
    with edgellama.load(path, context=POSITIONS, **options) as model:
        return model.session().forward(ids, all_logits=True)


@pytest.fixture(scope="module")
def ids(default_model: Path) -> list[int]:
    with edgellama.load(default_model, context=POSITIONS) as model:
        tokens = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    assert len(tokens) >= POSITIONS
    return tokens[:POSITIONS]


@pytest.fixture(scope="module")
def reference(default_model: Path, ids: list[int]) -> np.ndarray:
    return logits(default_model, ids, runtime="reference")


@pytest.fixture(scope="module")
def cpu(default_model: Path, ids: list[int]) -> np.ndarray:
    return logits(default_model, ids, runtime="cpu")


@pytest.fixture(scope="module")
def stored(default_model: Path) -> dict[str, Any]:
    """What llama.cpp and the float64 reference gave for the same text and model."""
    with np.load(FIXTURE) as arrays:
        about = json.loads(str(arrays["about"]))
        kept = {name: arrays[name] for name in arrays if name != "about"}
    assert about["text_sha256"] == sha256(TEXT), "the text is not the fixture's: make it again"
    if about["model_sha256"] != sha256(default_model):
        pytest.skip("the fixture was made from another model than this one")
    return about | kept


# --- near the reference -------------------------------------------------------------------------


def test_as_near_the_reference_as_llama_cpp(
    reference: np.ndarray, cpu: np.ndarray, stored: dict[str, Any]
) -> None:
    ours = distance(log_probabilities(reference), log_probabilities(cpu))
    assert ours.mean <= max(5e-3, 1.1 * stored["mean_kl"]), ours
    assert ours.top1 >= stored["top1"] - 0.015, ours


def test_the_reference_is_what_it_was(reference: np.ndarray, stored: dict[str, Any]) -> None:
    """Live in float32 against stored in float64."""
    before = with_rest(stored["reference_logprobs"])
    assert before.shape == (POSITIONS // 8, 129)
    now = log_probabilities(reference[REFERENCE_POSITIONS])
    assert divergence(before, bucketed(now, stored["reference_ids"])).max() <= 1e-9
    assert np.array_equal(now.argmax(axis=-1), stored["reference_ids"][:, 0])


def test_near_llama_cpp_as_it_was_stored(cpu: np.ndarray, stored: dict[str, Any]) -> None:
    theirs = with_rest(stored["logprobs"])
    ours = bucketed(log_probabilities(cpu), stored["ids"])
    assert divergence(theirs, ours).mean() <= 1e-2


def test_near_llama_cpp_as_it_is_here(
    default_model: Path, cpu: np.ndarray, ids: list[int], stored: dict[str, Any]
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    theirs = log_probabilities(logits(default_model, ids, runtime="llama.cpp"))
    assert divergence(theirs, log_probabilities(cpu)).mean() <= 1e-2
    here = bucketed(theirs, stored["ids"])  # kernels differ from machine to machine, models do not
    assert divergence(with_rest(stored["logprobs"]), here).mean() <= 1e-2


def test_the_measure_sees_a_difference(reference: np.ndarray, cpu: np.ndarray) -> None:
    """Logits one position off are far outside the bounds above."""
    off = distance(log_probabilities(reference), log_probabilities(np.roll(cpu, 1, axis=0)))
    assert off.mean > 1 and off.top1 < 0.5


def test_the_capital_of_france(default_model: Path) -> None:
    greedy = edgellama.Sampling(temperature=0)
    with edgellama.load(default_model, context=POSITIONS) as model:
        chunks = model.generate("The capital of France is", greedy, max_tokens=8)
        assert "".join(chunk.text for chunk in chunks).startswith(" Paris")


# --- without rounding, equal --------------------------------------------------------------------


@pytest.fixture(scope="module")
def unquantized(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as float32: some 540 MB, removed when the tests are done with it."""
    path = tmp_path_factory.mktemp("unquantized") / "f32.gguf"
    write_as_float32(gguf.GGUFReader(default_model), path)
    yield path
    path.unlink()


def write_as_float32(source: gguf.GGUFReader, path: Path) -> None:
    """Tensor by tensor, so that only one is decoded at a time."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if name.startswith(COPIED) and name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    shapes = [[int(n) for n in reversed(tensor.shape)] for tensor in source.tensors]
    f32 = np.dtype(np.float32)
    for tensor, shape in zip(source.tensors, shapes, strict=True):
        writer.add_tensor_info(tensor.name, shape, f32, 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, shape in zip(source.tensors, shapes, strict=True):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(values.reshape(shape).astype(np.float32, copy=False))
    writer.close()


@pytest.mark.parametrize(("kv_type", "bound"), [("f32", 1e-9), ("f16", 1e-6)])
def test_float32_weights_give_the_references_logits(
    kv_type: str, bound: float, unquantized: Path, reference: np.ndarray, ids: list[int]
) -> None:
    got = logits(unquantized, ids[:EXACT_POSITIONS], runtime="cpu", kv_type=kv_type)
    assert nmse(reference[:EXACT_POSITIONS], got) <= bound


# --- always the same bits -----------------------------------------------------------------------


def test_same_bits_for_any_number_of_threads(default_model: Path, ids: list[int]) -> None:
    first, *others = (
        logits(default_model, ids[:BITS_POSITIONS], threads=threads).tobytes()
        for threads in (1, 2, 3)
    )
    assert all(other == first for other in others)


def test_same_bits_for_any_chunks(default_model: Path, ids: list[int]) -> None:
    """Prefill in pieces, or all at once, then one more token: decode."""
    with edgellama.load(default_model, context=POSITIONS, deterministic=True) as model:
        ends = {
            size: last_two(model.session(), ids[:BITS_POSITIONS], size) for size in (1, 7, 32, 512)
        }
        every = model.session().forward(ids[:BITS_POSITIONS], all_logits=True)
    ends[0] = every[-2].tobytes(), every[-1].tobytes()
    assert all(end == ends[1] for end in ends.values())


def last_two(session: edgellama.Session, ids: list[int], size: int) -> tuple[bytes, bytes]:
    """The bits after all ids but the last, given `size` at a time, and after the last one."""
    *prompt, last = ids
    for start in range(0, len(prompt), size):
        before = session.forward(prompt[start : start + size])
    return before.tobytes(), session.forward([last]).tobytes()
