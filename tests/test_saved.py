"""Conversations on the disk: the same bits after restoring, and files that are written whole."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from savedfiles import CONFIG, CONTEXT, IDS, load, saved
from tiny import write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, Model, OutputError, ParameterError, Sampling
from edgellama.quantize import quantize
from edgellama.saved import DIGEST, HEADER

WAYS = {
    "f16": {"deterministic": True},
    "f32": {"kv_type": "f32"},
    "q8_0": {"kv_type": "q8_0"},
    "float64": {"runtime": "reference", "dtype": "float64"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("saved") / "tiny.gguf", CONFIG, "Q4_1")


@pytest.fixture(scope="module", params=WAYS)
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, **WAYS[request.param]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with load(path) as loaded:
        yield loaded


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 15, 64, 65, CONTEXT - 1])
def test_a_restored_session_goes_on_with_the_same_bits(
    model: Model, tmp_path: Path, tokens: int
) -> None:
    session = model.session()
    if tokens:
        session.forward(IDS[:tokens])
    session.save(tmp_path / "a")
    restored = model.restore(str(tmp_path / "a"))
    assert restored.position == tokens and restored.ids == session.ids == tuple(IDS[:tokens])
    rest = IDS[tokens:]
    for ids in (rest[:1], rest[1:4], rest[4:]):
        if ids:
            a, b = session.forward(ids, all_logits=True), restored.forward(ids, all_logits=True)
            assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_another_load_of_the_model_goes_on_too(path: Path, tmp_path: Path) -> None:
    with load(path, deterministic=True) as first:
        session = first.session()
        before = list(first.generate(IDS[:70], Sampling(seed=1), max_tokens=9, session=session))
        session.save(tmp_path / "a")
        went_on = [c.token for c in first.generate(session.ids, Sampling(seed=1), session=session)]
    with load(path, deterministic=True, threads=2, context=256) as second:
        session = second.restore(tmp_path / "a")
        chunks = list(
            second.generate(session.ids, Sampling(seed=1), session=session, max_tokens=len(went_on))
        )
        fresh = list(
            second.generate(session.ids[:78], Sampling(seed=1), max_tokens=len(went_on) + 1)
        )
    assert [c.token for c in chunks] == went_on and before[-1].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None and usage.reused_tokens == usage.prompt_tokens - 1 == 77
    assert [c.token for c in fresh][: len(went_on)] == went_on


def test_what_was_forgotten_is_not_written(model: Model, tmp_path: Path) -> None:
    for tokens in (0, 5, 64, 101):
        session = model.session()
        session.forward(IDS[-70:])
        session.truncate(0)
        for ids in (IDS[:tokens], IDS[tokens : tokens + 40]):
            if ids:
                session.forward(ids)
        session.truncate(tokens)
        session.save(tmp_path / "used")
        never = saved(model, tmp_path / "never", tokens)
        assert (tmp_path / "used").read_bytes() == never.read_bytes()


def test_only_what_is_in_use_is_written(path: Path, tmp_path: Path) -> None:
    with load(path, kv_type="f32") as cpu, load(path, runtime="reference") as reference:
        per_token = 2 * CONFIG.n_layers * CONFIG.kv_dim * 4
        size = saved(reference, tmp_path / "a", 70).stat().st_size
        assert size == HEADER.size + 2 * DIGEST + 70 * (4 + per_token)
        sizes = [saved(cpu, tmp_path / "b", n).stat().st_size for n in (64, 65, 128, 129)]
        assert sizes[1] + 63 * 4 == sizes[2] < sizes[3] and sizes[0] < sizes[1]  # blocks of 64


def test_a_chat_that_was_restored_computes_new_tokens_only(plain: Model, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "the and the"}]
    session = plain.session()
    last = list(plain.chat(messages, max_tokens=0, template=template, session=session))[-1]
    session.save(tmp_path / "a")
    messages += [{"role": "user", "content": " and a"}]
    again = plain.restore(tmp_path / "a")
    use = list(plain.chat(messages, max_tokens=1, template=template, session=again))[-1].usage
    assert last.usage is not None and use is not None
    assert use.reused_tokens >= last.usage.prompt_tokens - 1 > 3


def test_the_default_model_goes_on_too(default_model: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    with edgellama.load(default_model, context=256, deterministic=True) as model:
        session = model.session()
        list(model.chat(messages, Sampling(temperature=0), max_tokens=5, session=session))
        session.save(tmp_path / "a")
        ids, logits = session.ids, session.forward([10, 20, 30])
    with edgellama.load(default_model, context=512, deterministic=True) as model:
        restored = model.restore(tmp_path / "a")
        assert restored.ids == ids
        fresh = model.session().forward([*ids, 10, 20, 30])
        again = restored.forward([10, 20, 30])
    assert np.array_equal(again.view(np.uint32), logits.view(np.uint32))
    assert np.array_equal(fresh.view(np.uint32), logits.view(np.uint32))


# --- writing ------------------------------------------------------------------------------------


def test_writing_that_fails_leaves_the_old_file(plain: Model, path: Path, tmp_path: Path) -> None:
    old = saved(plain, tmp_path / "a", 5).read_bytes()
    session, token = plain.session(), CancelToken()
    session.forward(IDS[:9])
    token.cancel()
    with pytest.raises(Cancelled):
        session.save(tmp_path / "a", cancel=token)
    with pytest.raises(Cancelled):
        plain.restore(tmp_path / "a", cancel=token)
    assert (tmp_path / "a").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(OutputError, match="cannot be written"):
        session.save(tmp_path / "nowhere" / "a")
    size = path.stat().st_size
    for same in (path, os.path.relpath(path)):
        with pytest.raises(ParameterError, match="the model's own file"):
            session.save(same)
    assert path.stat().st_size == size
    session.save(tmp_path / "a")
    assert plain.restore(tmp_path / "a").position == 9


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_the_model_s_own_file_after_a_change_of_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A path that was relative then is not looked for in the folder of now."""
    name = f"own.{kind}"
    (tmp_path / "sub").mkdir()
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        quantize(path, tmp_path / "sub" / name, "Q8_0", certificate="none")
    else:
        shutil.copy(path, tmp_path / "sub" / name)
    monkeypatch.chdir(tmp_path / "sub")
    with edgellama.load(name, context=CONTEXT, threads=1) as model:
        monkeypatch.chdir(tmp_path)
        own = model.info.path
        assert own == tmp_path / "sub" / name
        session = model.session()
        session.forward(IDS[:3])
        files = list(own.iterdir()) if own.is_dir() else [own]
        before = [file.read_bytes() for file in files]
        for file in files:
            with pytest.raises(ParameterError, match="the model's own file"):
                session.save(file)
        assert [file.read_bytes() for file in files] == before


FORK = """
import os, sys, threading, time
import edgellama
model = edgellama.load(sys.argv[1], threads=2)
session, token = model.session(), edgellama.CancelToken()
session.forward([1, 2, 3])
session.save(sys.argv[2])

def busy():
    with session._turns.turn():  # a fork inherits the lock, and nobody who would open it
        token_set.wait(60)

token_set = threading.Event()
thread = threading.Thread(target=busy)
thread.start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    calls = (
        lambda: session.save(sys.argv[2]),
        lambda: session.truncate(0),
        lambda: list(model.generate([1], session=session)),
        lambda: model.restore(sys.argv[2]),
    )
    right = 0
    for call in calls:
        try:
            call()
        except edgellama.ForkedProcess:
            right += 1
    os._exit(right)
_, status = os.waitpid(child, 0)
token_set.set()
thread.join(60)
assert os.waitstatus_to_exitcode(status) == 4, status
assert model.restore(sys.argv[2]).ids == (1, 2, 3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is POSIX's")
def test_a_forked_child_is_refused(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(path), str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_closed_ones_refuse(path: Path, tmp_path: Path) -> None:
    model = load(path)
    session = model.session()
    saved(model, tmp_path / "a", 3)
    session.close()
    with pytest.raises(ParameterError, match="closed"):
        session.save(tmp_path / "a")
    model.close()
    with pytest.raises(ParameterError, match="closed"):
        model.restore(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size > 0
