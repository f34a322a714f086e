"""What CUDA runs, on the CPU provider: the half-precision graph, buffers of the device, its steps.

The captured graph itself needs CUDA; see tests/gpu.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.config import Rope
from edgellama.distance import agreement, divergence, log_probabilities, nmse
from edgellama.gguf import open_gguf
from edgellama.graph import decoder
from edgellama.runtimes.base import Options
from edgellama.weights import model_config

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

HALF = 2e-5  # NMSE of half precision; measured on these models: up to 2.6e-6
EIGHT = 1e-3  # the same with minima rounded to 8-bit codes
TOKENS = [int(i) for i in np.random.default_rng(4).integers(3, 288, 40)]
CONFIGS = {
    "gqa": tiny_config(),
    "odd": tiny_config(dim=96, n_kv_heads=1, head_dim=20, ffn_dim=160, rope=Rope(20)),
}
Made = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An opened runtime with CUDA's manner of lowering, on the CPU provider."""
    folder = tmp_path_factory.mktemp("steps")

    def make(name: str, kind: str, dtype: str = "float16") -> Any:
        from edgellama.runtimes.onnx_cache import transcoded
        from edgellama.runtimes.onnx_containers import EIGHT_BIT
        from edgellama.runtimes.onnx_lowering import Manner
        from edgellama.runtimes.ort import Ort

        path = write_tiny(folder / f"{name}-{kind}.gguf", CONFIGS[name], kind, seed=9)
        options, manner = Options(context=64, threads=1), Manner(dtype, candidates=8)
        with open_gguf(path) as file:
            graph = decoder(model_config(file))
            source, _ = transcoded(file, graph, options, EIGHT_BIT)
            source.close()
            return Ort(source, graph, options, replace(manner, accuracy=0)), path

    return make


def reference(path: Path) -> np.ndarray:
    with edgellama.load(path, "reference") as model:
        return model.session().forward(TOKENS, all_logits=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_half_precision(made: Made, name: str, kind: str) -> None:
    runtime, path = made(name, kind)
    wanted, session = reference(path), runtime.session()
    most = EIGHT if kind == "Q4_1" else HALF
    assert nmse(wanted, session.forward(TOKENS, all_logits=True)) < most
    session = runtime.session()
    session.forward(TOKENS[:9])
    found = np.stack([session.forward([token]) for token in TOKENS[9:]])
    assert nmse(wanted[9:], found) < most
    session.truncate(20)
    assert nmse(wanted[20], session.forward(TOKENS[20:21])) < most


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_finds_the_likeliest(made: Made, name: str) -> None:
    runtime, _ = made(name, "Q8_0", "float32")
    one, other = runtime.session(), runtime.session()
    one.forward(TOKENS[:9])
    other.forward(TOKENS[:9])
    for token in TOKENS[9:14]:
        logits, found = one.forward([token]), other.step(token)
        order = np.argsort(-logits, kind="stable")[:8]
        np.testing.assert_array_equal(found.ids, order)
        np.testing.assert_array_equal(found.logits, logits[order])
        wanted = log_probabilities(logits[None])[0, order[0]]
        assert found.log_p == pytest.approx(wanted, abs=1e-5)
        np.testing.assert_array_equal(other.logits(), logits)
    assert one.position == other.position == 14 and other.choices == 8


def fed(session: Any, token: int, n: int) -> list[int]:
    """The likeliest token again and again."""
    found = []
    for _ in range(n):
        token = int(session.step(token).ids[0])
        found.append(token)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_feeding_itself_is_stepping(made: Made, name: str) -> None:
    """A token that is on the device already is not sent; after any other call it may not be."""
    runtime, _ = made(name, "Q8_0")
    one, other = runtime.session(), runtime.session()
    token = int(one.forward(TOKENS[:9]).argmax())
    other.forward(TOKENS[:9])
    steps, at = [], token
    for _ in range(20):
        at = int(one.forward([at]).argmax())
        steps.append(at)
    assert fed(other, token, 12) == steps[:12]
    other.truncate(15)
    other.forward(TOKENS[:7])  # as long again, but not what it was
    other.truncate(15)
    assert fed(other, steps[5], 14) == steps[6:]
    assert other.position == one.position == 29
    np.testing.assert_array_equal(one.forward([7]), other.forward([7]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("before", [57, 59, 60, 61, 63])
def test_up_to_the_last_position(made: Made, name: str, before: int) -> None:
    """Capturing a step takes a few positions more than the step: there may be none left."""
    runtime, _ = made(name, "Q8_0")
    tokens = [*TOKENS, *TOKENS][:64]
    wanted = runtime.session().forward(tokens, all_logits=True)
    session = runtime.session()
    session.forward(tokens[:before])
    found = []
    for token in tokens[before:]:
        session.step(token)
        found.append(session.logits())
    assert session.position == 64 and nmse(wanted[before:], np.stack(found)) < HALF


@pytest.mark.parametrize("count", [2, 15, 16, 17, 40, 63, 64])
def test_chunks_are_padded_where_there_is_room(made: Made, count: int) -> None:
    runtime, path = made("gqa", "Q8_0")
    tokens = [*TOKENS, *TOKENS][:count]
    with edgellama.load(path, "reference") as model:
        wanted = model.session().forward(tokens)
    session = runtime.session()
    assert nmse(wanted, session.forward(tokens)) < HALF and session.position == count
    session.truncate(1)
    assert nmse(wanted, session.forward(tokens[1:])) < HALF and session.position == count


def test_a_session_leaves_its_buffers_to_the_next(made: Made) -> None:
    """A graph is captured for them, and ONNX Runtime never lets go of it."""
    runtime, _ = made("gqa", "Q8_0")
    one, two = runtime.session(), runtime.session()
    places = [id(session.kept) for session in (one, two)]
    assert places[0] != places[1]
    one.forward(TOKENS)
    wanted = fed(two, 5, 12)
    one.close()
    one.close()
    with pytest.raises(edgellama.ParameterError, match="closed"):
        one.step(5)
    next_one = runtime.session()
    assert id(next_one.kept) == places[0] and next_one.position == 0
    del two  # not closed
    other = runtime.session()
    assert id(other.kept) == places[1] and id(runtime.session().kept) not in places
    assert fed(next_one, 5, 12) == fed(other, 5, 12) == wanted
    runtime.close()
    other.close()
    assert runtime.spare == []


def test_no_session_on_a_closed_model(made: Made) -> None:
    runtime, _ = made("gqa", "Q8_0")
    session = runtime.session()
    runtime.close()
    for call in (runtime.session, lambda: session.step(5), lambda: session.forward([5, 6])):
        with pytest.raises(edgellama.ParameterError, match="the model is closed"):
            call()


def test_cancelled_while_feeding_itself(made: Made) -> None:
    runtime, _ = made("gqa", "Q8_0")
    session, token = runtime.session(), edgellama.CancelToken()
    session.forward(TOKENS[:9])
    wanted = runtime.session()
    wanted.forward(TOKENS[:9])
    first = int(session.step(1).ids[0])
    token.cancel()
    with pytest.raises(edgellama.Cancelled):
        session.step(first, cancel=token)
    assert session.position == 10
    assert fed(session, first, 5) == fed(wanted, int(wanted.step(1).ids[0]), 5)


def test_default_model_in_half_precision(default_model: Path) -> None:
    """CUDA's graph: minima in 8-bit codes, the rest to the bit."""
    from edgellama.runtimes.onnx_cache import transcoded
    from edgellama.runtimes.onnx_containers import EIGHT_BIT
    from edgellama.runtimes.onnx_lowering import Manner
    from edgellama.runtimes.ort import Ort

    with edgellama.load(default_model, "onnx", context=64) as model:
        tokens = model.tokenizer.encode("The capital of France is Paris, and that of Italy is")
        wanted = model.session().forward(tokens, all_logits=True)
    options = Options(context=64, threads=2)
    with open_gguf(default_model) as file:
        graph = decoder(model_config(file))
        source, _ = transcoded(file, graph, options, EIGHT_BIT)
        source.close()
    assert "8-bit codes" in source.notes[0]
    runtime = Ort(source, graph, options, Manner("float16", candidates=64))
    found = runtime.session().forward(tokens, all_logits=True)
    assert agreement(wanted, found) >= 0.9
    p, q = log_probabilities(wanted), log_probabilities(found)
    assert divergence(p, q).mean() < 2e-2  # activations are rounded to 8 bits in both
    assert len(fed(runtime.session(), tokens[0], 3)) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_leave_and_come_back(made: Made, name: str) -> None:
    """As bytes, between sessions in the device's memory."""
    runtime, _ = made(name, "Q8_0")
    one, other = runtime.session(), runtime.session()
    one.forward(TOKENS[:20])
    one.truncate(12)
    pieces = [piece.copy() for piece in one.export()]
    assert sum(map(len, pieces)) == one.cache_bytes(12)

    def fill(room: np.ndarray) -> None:
        room[:] = pieces.pop(0)

    other.adopt(12, fill)
    assert other.position == 12 and not pieces
    np.testing.assert_array_equal(one.forward([5]), other.forward([5]))
