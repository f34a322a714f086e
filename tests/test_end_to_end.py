"""The default model, converted: what comes out runs here and in llama.cpp, and both agree."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import edgellama
from edgellama.gguf import open_gguf
from edgellama.quantize import quantize

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "To make tea, heat the water, warm the pot and wait three minutes.",
    "In 1969 two men walked on the Moon for the first time.",
    "She opened the letter slowly, for she knew the handwriting.",
)
KINDS = ("Q8_0", "Q4_0", "Q4_K_M")
LEAST_CLEAR = 0.4  # of the positions
LEAST_SAME = {"Q8_0": 0.95, "Q4_0": 0.7, "Q4_K_M": 0.85}


@pytest.fixture(scope="module")
def converted(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the default model as F16, and from there as each of KINDS."""
    folder = tmp_path_factory.mktemp("converted")
    source = folder / "F16.gguf"
    quantize(default_model, source, "F16", certificate="none")
    for kind in KINDS:
        quantize(source, folder / f"{kind}.gguf", kind, certificate="none")
    return folder


@cache
def logits(path: Path, runtime: str) -> np.ndarray:
    """float32 (positions, vocab_size): after each token of each prompt, said three times over:
    what a model has read before it predicts with confidence."""
    with edgellama.load(path, runtime=runtime, context=256) as model:
        ids = [model.tokenizer.encode("\n".join([prompt] * 3)) for prompt in PROMPTS]
        return np.concatenate([model.session().forward(i, all_logits=True) for i in ids])


def test_f16_holds_what_the_source_held(default_model: Path, converted: Path) -> None:
    """Blocks of Q4_1 and Q8_0 as float16: no number is off by more than its rounding."""
    from edgellama.quantize.source import open_source

    with open_source(default_model) as before, open_source(converted / "F16.gguf") as after:
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"):
            exact, found = before.tensors[name].read(), after.tensors[name].read()
            assert np.abs(found - exact).max() <= np.abs(exact).max() * 2**-11


@pytest.mark.parametrize("kind", KINDS)
def test_both_runtimes_agree(converted: Path, kind: str) -> None:
    """The likeliest token is the same wherever it leads clearly.

    Both round activations to 8 bits, llama.cpp more coarsely: a position's logits differ by up to
    about 0.7, and a lead of twice as much must be enough.
    """
    pytest.importorskip("llama_cpp", reason="needs the extra llamacpp")
    path = converted / f"{kind}.gguf"
    ours, theirs = logits(path, "cpu"), logits(path, "llama.cpp")
    first, second = -np.partition(-theirs, 1, axis=1)[:, :2].T
    clear = first - second >= 2 * np.median(np.abs(ours - theirs).max(axis=1))
    assert clear.mean() > LEAST_CLEAR
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("kind", KINDS)
def test_little_is_lost(converted: Path, kind: str) -> None:
    """Against F16, the likeliest token stays at most positions."""
    exact, found = logits(converted / "F16.gguf", "cpu"), logits(converted / f"{kind}.gguf", "cpu")
    assert (exact.argmax(axis=1) == found.argmax(axis=1)).mean() > LEAST_SAME[kind]


def test_header_says_what_it_is(converted: Path) -> None:
    for kind, number in (("F16", 1), ("Q8_0", 7), ("Q4_0", 2), ("Q4_K_M", 15)):
        with open_gguf(converted / f"{kind}.gguf") as file:
            assert file.metadata["general.file_type"] == number
            assert file.metadata["general.name"] == "Smollm2 135M 8k Lc100K Mix1 Ep2"
