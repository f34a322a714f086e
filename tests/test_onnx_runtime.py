"""The onnx runtime: the same model as the others, whatever its shape, type and order of calls."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accuracy import TEXT
from test_parity import CASES, CONFIGS, MIXED, ids
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.config import Rope
from edgellama.distance import agreement, divergence, log_probabilities, nmse
from edgellama.rope import llama3_factors

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

EXACT = 1e-11  # NMSE of float32 arithmetic; measured: up to 3.9e-13
ROUNDED = 2e-3  # of activations of 8 bits in a tiny model; measured: up to 4.8e-4
N = 70
Made = Callable[[str, str], Path]
CHOSEN = [c for c in CASES if c[1] != "Q4_1" or c[0] in ("gqa", "tied", "odd_heads", "window")]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tiny")

    def make(name: str, kind: str) -> Path:
        path = folder / f"{name}-{kind}.gguf"
        factors = llama3_factors(Rope(16, 500_000.0), 8.0, 1.0, 4.0, 32)
        if not path.exists():
            types = MIXED if kind == "mixed" else kind
            scaled = factors if name == "llama3_rope" else None
            write_tiny(path, CONFIGS[name], types, seed=3, rope_factors=scaled)
        return path

    return make


def load(path: Path, **options: Any) -> edgellama.Model:
    return edgellama.load(path, "onnx", **{"context": N, "threads": 1, "accuracy": 0} | options)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return ids(CONFIGS["gqa"], N)


@pytest.fixture(scope="module")
def model(made: Made) -> Iterator[edgellama.Model]:
    with load(made("gqa", "Q4_1"), context=128) as model:
        yield model


# --- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CHOSEN)
def test_computes_what_the_reference_does(made: Made, name: str, kind: str) -> None:
    path, tokens = made(name, kind), ids(CONFIGS[name], N)
    with edgellama.load(path, "reference", dtype="float64") as reference:
        wanted = reference.session().forward(tokens, all_logits=True)
    with load(path) as model:
        assert nmse(wanted, model.session().forward(tokens, all_logits=True)) < EXACT
        session = model.session()
        session.forward(tokens[:9])
        found = np.stack([session.forward([token]) for token in tokens[9:20]])
        assert nmse(wanted[9:20], found) < EXACT
    with load(path, accuracy=4) as model:
        assert nmse(wanted, model.session().forward(tokens, all_logits=True)) < ROUNDED


def test_last_logits_are_the_last_of_all(model: edgellama.Model, tokens: list[int]) -> None:
    every = model.session().forward(tokens, all_logits=True)
    last = model.session().forward(tokens)
    assert every.shape == (N, 288) and last.shape == (288,) and last.dtype == np.float32
    assert nmse(every[-1], last) < EXACT
    one = model.session().forward(tokens[:1], all_logits=True)
    assert one.shape == (1, 288) and nmse(every[0], one[0]) < EXACT


def test_logits_stay_what_they_are(model: edgellama.Model, tokens: list[int]) -> None:
    """The next step must not write into the array that the last one gave."""
    session = model.session()
    session.forward(tokens[:5])
    first = session.forward(tokens[5:6])
    kept = first.copy()
    session.forward(tokens[6:7])
    np.testing.assert_array_equal(first, kept)


def test_long_prompts_come_in_chunks(tmp_path: Path) -> None:
    config = tiny_config(context_length=700, n_layers=1)
    path, tokens = write_tiny(tmp_path / "long.gguf", config), ids(config, 600)
    with edgellama.load(path, "reference") as reference:
        wanted = reference.session().forward(tokens)
    with load(path, context=700) as model:
        assert nmse(wanted, model.session().forward(tokens)) < EXACT


def test_truncate_forgets(model: edgellama.Model, tokens: list[int]) -> None:
    session = model.session()
    session.forward(tokens[:40])
    session.truncate(10)
    assert session.position == 10
    wanted = model.session().forward(tokens[:11])
    assert nmse(wanted, session.forward(tokens[10:11])) < EXACT


def test_sessions_are_independent(model: edgellama.Model, tokens: list[int]) -> None:
    one, two = model.session(), model.session()
    one.forward(tokens[:20])
    two.forward(tokens[30:60])
    assert nmse(model.session().forward(tokens[:21]), one.forward(tokens[20:21])) < EXACT


def test_saved_and_restored(made: Made, tokens: list[int], tmp_path: Path) -> None:
    path = tmp_path / "session"
    with load(made("gqa", "Q8_0")) as model:
        session = model.session()
        session.forward(tokens[:30])
        session.truncate(20)
        session.save(path)
        wanted = session.forward(tokens[20:25])
    with load(made("gqa", "Q8_0")) as model:
        session = model.restore(path)
        assert session.position == 20
        np.testing.assert_array_equal(session.forward(tokens[20:25]), wanted)
    with load(made("gqa", "Q4_0")) as other, pytest.raises(edgellama.EdgeLlamaError):
        other.restore(path)


def test_a_full_context_is_refused_before_it_runs(made: Made, tokens: list[int]) -> None:
    with load(made("gqa", "Q4_1"), context=40) as model:
        session = model.session()
        session.forward(tokens[:40])
        with pytest.raises(edgellama.ContextOverflow):
            session.forward(tokens[:1])


def test_greedy_reply_is_the_references(made: Made) -> None:
    greedy, replies = edgellama.Sampling(temperature=0), []
    for runtime in ("onnx", "reference"):
        with edgellama.load(made("gqa", "F32"), runtime) as model:
            replies.append([c.token for c in model.generate([1, 9, 40], greedy, max_tokens=12)])
    assert replies[0] == replies[1]


def test_threads_at_once(model: edgellama.Model, tokens: list[int]) -> None:
    wanted = model.session().forward(tokens)
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.session().forward(tokens)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(wanted, other) for other in found)


# --- the default model ---------------------------------------------------------------------------


def test_default_model(default_model: Path) -> None:
    """Float32 arithmetic to 5e-4 of each logit; activations of 8 bits as near as llama.cpp's."""
    with edgellama.load(default_model, "reference", context=128) as reference:
        tokens = reference.tokenizer.encode(TEXT.read_text())[:97]
        wanted = reference.session().forward(tokens, all_logits=True)
    p = log_probabilities(wanted)
    with load(default_model, context=128, threads=2) as model:
        found = model.session().forward(tokens, all_logits=True)
    assert np.abs(found - wanted).max() <= 5e-4
    assert agreement(wanted, found) == 1
    assert divergence(p, log_probabilities(found)).mean() <= 1e-5
    with load(default_model, context=128, threads=2, accuracy=None) as model:
        found = model.session().forward(tokens, all_logits=True)
    assert divergence(p, log_probabilities(found)).mean() <= 5e-3


# --- the cache -----------------------------------------------------------------------------------


def test_a_file_is_transcoded_once_and_again_when_it_changed(tmp_path: Path) -> None:
    def entries() -> dict[str, int]:
        cache = Path(os.environ["EDGELLAMA_CACHE"]) / "models" / ".onnx"
        return {f.name: f.stat().st_ino for f in cache.iterdir()}

    def last(path: Path) -> np.ndarray:
        with load(path) as model:
            return model.session().forward([1, 2, 3])

    path = write_tiny(tmp_path / "tiny.gguf", seed=1)
    first = last(path)
    before = entries()
    np.testing.assert_array_equal(last(path), first)
    assert entries() == before
    write_tiny(path, seed=2)
    assert nmse(first, last(path)) > 0.1
    after = entries()
    assert len(before.keys() - after.keys()) == 1 == len(after.keys() - before.keys())
    path.unlink()
    last(write_tiny(tmp_path / "other.gguf"))  # what nobody can ask for again goes
    assert len(after.keys() - entries().keys()) == 1


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", seed=7)
    with load(path) as model:
        wanted = model.session().forward([1, 2, 3])
    cache = Path(os.environ["EDGELLAMA_CACHE"]) / "models" / ".onnx"
    newest = max(cache.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    (newest / "model.onnx").write_bytes(b"")
    with load(path) as model:
        np.testing.assert_array_equal(model.session().forward([1, 2, 3]), wanted)


def test_transcoding_tells_of_progress(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    path = write_tiny(tmp_path / "tiny.gguf", seed=8)
    load(path, progress=lambda *report: told.append(report)).close()
    assert {what for _, _, what in told} == {"preparing the model for ONNX Runtime"}
    assert told[-1][0] == told[-1][1] and sorted(told) == told


def test_not_finite_weights_are_refused(tmp_path: Path) -> None:
    weights = {"blk.0.ffn_up.weight": np.full((96, 64), np.nan, np.float32)}
    path = write_tiny(tmp_path / "nan.gguf", weights=weights)
    with pytest.raises(edgellama.NonFiniteError, match=r"blk\.0\.ffn_up"):
        load(path)


# --- manners -------------------------------------------------------------------------------------


def test_cancelled_before_it_starts(model: edgellama.Model, tokens: list[int]) -> None:
    session, token = model.session(), edgellama.CancelToken()
    session.forward(tokens[:5])
    token.cancel()
    for count in (1, 30):
        with pytest.raises(edgellama.Cancelled):
            session.forward(tokens[5 : 5 + count], cancel=token)
    assert session.position == 5
    wanted = model.session().forward(tokens[:6])
    assert nmse(wanted, session.forward(tokens[5:6])) < EXACT


def test_cancelled_in_the_middle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Within a chunk: the whole of this prompt takes seconds."""
    config = tiny_config(dim=512, ffn_dim=2048, n_layers=24, context_length=4096)
    path, tokens = write_tiny(tmp_path / "slow.gguf", config, "Q8_0"), ids(config, 4000)
    with load(path, context=4096) as model:
        session, token = model.session(), edgellama.CancelToken()
        timer = threading.Timer(0.1, token.cancel)
        timer.start()
        start = time.monotonic()
        with pytest.raises(edgellama.Cancelled):
            session.forward(tokens, cancel=token)
        assert time.monotonic() - start < 10  # a hang bound, not a timing
        assert session.position == 0
        assert np.isfinite(session.forward([1, 2, 3])).all()
    assert capfd.readouterr() == ("", "")


def test_cancelled_load(made: Made) -> None:
    token = edgellama.CancelToken()
    token.cancel()
    for path in (made("gqa", "Q8_0"), made("gqa", "Q4_1")):  # to be transcoded, and in the cache
        with pytest.raises(edgellama.Cancelled):
            load(path, cancel=token)


def test_closed_twice_and_in_any_order(made: Made) -> None:
    model = load(made("gqa", "Q4_1"))
    session, other = model.session(), model.session()
    session.close()
    session.close()
    model.close()
    model.close()
    other.close()
    with pytest.raises(edgellama.ParameterError, match="closed"):
        other.forward([1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_type": "q8_0"}, "kv_type = 'q8_0'; allowed: f16, f32"),
        ({"accuracy": 1}, "accuracy = 1; allowed: 0 or 4"),
        ({"accuracy": True}, "accuracy = True"),
        ({"dtype": "float16"}, "dtype"),
        ({"deterministic": True}, "deterministic is for the cpu runtime only"),
    ],
)
def test_what_cannot_be_had_is_refused(made: Made, options: dict[str, Any], message: str) -> None:
    with pytest.raises(edgellama.ParameterError, match=message):
        load(made("gqa", "Q4_1"), **options)


def test_accuracy_means_onnx(made: Made) -> None:
    with pytest.raises(edgellama.ParameterError, match="accuracy is for the onnx runtime only"):
        edgellama.load(made("gqa", "Q4_1"), "cpu", accuracy=0)
    with edgellama.load(made("gqa", "Q4_1"), accuracy=0) as model:
        assert model.device["runtime"] == "onnx"


def test_device_receipt(model: edgellama.Model) -> None:
    receipt = model.device
    assert receipt["runtime"] == "onnx" and receipt["device"] == "cpu"
    assert receipt["providers"] == ["CPUExecutionProvider"]
    assert set(receipt["nodes"]) == {"CPUExecutionProvider"} and receipt["accuracy"] == 0
    assert receipt["nodes"]["CPUExecutionProvider"] > 10
    assert receipt["reason"] == "auto is the CPU"
    assert receipt["kv_type"] == "f32" and receipt["version"]
    assert "Q4_1 is kept as 4-bit codes and corrections" in receipt["weights"][0]
    assert model.info.memory["kv_cache"] == 2 * 2 * 2 * 16 * 128 * 4


def test_says_nothing_to_the_host(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    with load(made("gqa", "Q4_1")) as model:
        model.session().forward([1, 2, 3])
    assert capfd.readouterr() == ("", "")


def test_no_thread_works_between_two_calls(model: edgellama.Model, tokens: list[int]) -> None:
    session = model.session()
    session.forward(tokens)
    time.sleep(0.05)  # threads may still be on their way to sleep
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


TELEMETRY = """
import os, sys
import edgellama
assert "onnxruntime" not in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ
if {first!r}: import onnxruntime
with edgellama.load({path!r}, "onnx") as model:
    print(model.device["telemetry"], os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize(
    ("first", "said"), [(False, "off before the import 1"), (True, "off by its interface None")]
)
def test_telemetry_is_off(made: Made, first: bool, said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    code = TELEMETRY.format(first=first, path=str(made("gqa", "Q4_1")))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said and done.stderr == ""
