"""Conversations on the disk: the same bits after restoring, and nothing believed unchecked."""

import hashlib
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, vocabulary, write_tiny

import edgellama
from edgellama import (
    Cancelled,
    CancelToken,
    ContextOverflow,
    EdgeLlamaError,
    Model,
    ModelFormatError,
    OutputError,
    ParameterError,
    Sampling,
    UnsupportedModelError,
)
from edgellama.saved import DIGEST, HEADER

CONTEXT = 200
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 288, CONTEXT)]
CONFIG = tiny_config(head_dim=24, dim=96, context_length=256)  # 24: padded for all kv_types
WAYS = {
    "f16": {"deterministic": True},
    "f32": {"kv_type": "f32"},
    "q8_0": {"kv_type": "q8_0"},
    "float64": {"runtime": "reference", "dtype": "float64"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("saved") / "tiny.gguf", CONFIG, "Q4_1")


def load(path: Path, **options: Any) -> Model:
    return edgellama.load(path, **{"context": CONTEXT, "threads": 1} | options)


@pytest.fixture(scope="module", params=WAYS)
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, **WAYS[request.param]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with load(path) as loaded:
        yield loaded


def saved(model: Model, to: Path, tokens: int) -> Path:
    with model.session() as session:
        if tokens:
            session.forward(IDS[:tokens])
        session.save(to)
    return to


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


# --- what does not fit --------------------------------------------------------------------------


def refused(model: Model, path: Path, kind: type[Exception], match: str, field: str | None) -> None:
    with pytest.raises(kind, match=match) as caught:
        model.restore(path)
    assert getattr(caught.value, "field", None) == field


def test_another_model_s_session_is_refused(plain: Model, tmp_path: Path) -> None:
    session = saved(plain, tmp_path / "a", 5)
    others: list[dict[str, Any]] = [
        {"types": "Q4_1", "seed": 1},
        {"types": "Q4_0"},
        {"types": "Q4_1", "config": tiny_config(head_dim=24, dim=96, context_length=250)},
        {"types": "Q4_1", "metadata": {"tokenizer.ggml.tokens": [*vocabulary(287)[0], "last"]}},
    ]
    for other in others:
        with load(write_tiny(tmp_path / "o.gguf", **{"config": CONFIG} | other)) as model:
            refused(model, session, ParameterError, "saved from another model: '[0-9a-f]", "model")


def test_a_name_or_a_template_makes_no_other_model(plain: Model, tmp_path: Path) -> None:
    session = saved(plain, tmp_path / "a", 5)
    metadata = {"general.name": "renamed", "tokenizer.chat_template": "{{ messages }}"}
    renamed = write_tiny(tmp_path / "o.gguf", CONFIG, "Q4_1", metadata=metadata)
    with load(renamed) as model:
        assert model.restore(session).position == 5


@pytest.mark.parametrize(
    ("way", "field", "match"),
    [
        ({"kv_type": "q8_0"}, "kv_type", "'cpu f16', here it is 'cpu q8_0, .*kv_type"),
        ({"runtime": "reference"}, "runtime", "'cpu f16', here it is 'reference float32'"),
    ],
)
def test_another_cache_is_refused_by_name(
    plain: Model, path: Path, tmp_path: Path, way: dict[str, Any], field: str, match: str
) -> None:
    session = saved(plain, tmp_path / "a", 5)
    with load(path, **way) as model:
        refused(model, session, ParameterError, match, field)


def test_a_session_longer_than_the_context_is_refused(
    plain: Model, path: Path, tmp_path: Path
) -> None:
    session = saved(plain, tmp_path / "a", 90)
    with load(path, context=80) as small:
        with pytest.raises(ContextOverflow, match="larger context") as caught:
            small.restore(session)
        assert (caught.value.need, caught.value.have) == (90, 80)
    with load(path, context=90) as exact:
        assert exact.restore(session).position == 90


def test_a_deterministic_model_takes_its_own_bits_only(
    plain: Model, path: Path, tmp_path: Path
) -> None:
    foreign = forged(saved(plain, tmp_path / "a", 5), origin=b"another level")
    assert plain.restore(foreign).position == 5
    with load(path, deterministic=True) as model:
        match = "other code.*'another level'.*deterministic=False"
        refused(model, foreign, ParameterError, match, "deterministic")


def test_a_runtime_that_cannot_says_so(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra llamacpp")
    with load(path, runtime="llama.cpp") as model:
        with pytest.raises(ParameterError, match=r"sessions of the llama\.cpp runtime"):
            model.session().save(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ParameterError, match=r"sessions of the llama\.cpp runtime"):
            model.restore(tmp_path / "a")


# --- damaged and hostile files ------------------------------------------------------------------

PLACES = {"magic": 0, "version": 8, "count": 12, "model": 16, "kind": 48, "origin": 80}


def forged(path: Path, ids: dict[int, int] | None = None, **fields: Any) -> Path:
    """The file with other fields and ids, and checksums that are right for them."""
    data = bytearray(path.read_bytes())
    for name, value in fields.items():
        raw = struct.pack("<I", value) if isinstance(value, int) else value.ljust(32)[:32]
        data[PLACES[name] : PLACES[name] + len(raw)] = raw
    data[HEADER.size : HEADER.size + DIGEST] = hashlib.sha256(data[: HEADER.size]).digest()
    for place, token in (ids or {}).items():
        struct.pack_into("<I", data, HEADER.size + DIGEST + 4 * place, token)
    data[-DIGEST:] = hashlib.sha256(data[:-DIGEST]).digest()
    out = path.with_name("forged")
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("fields", "kind", "match"),
    [
        ({"version": 2}, UnsupportedModelError, "version 2 are not known; expected 1"),
        ({"count": 2**32 - 1}, ContextOverflow, "4294967295 tokens"),
        ({"count": CONTEXT}, ModelFormatError, r"size is \d+; expected \d+ bytes for .* 200"),
        ({"count": 4}, ModelFormatError, "size is"),
        ({"count": 0}, ModelFormatError, "size is"),
        ({"ids": {3: 288}}, ModelFormatError, r"ids\[3\] is 288; expected 0\.\.287"),
        ({"ids": {0: 2**32 - 1}}, ModelFormatError, r"ids\[0\] is 4294967295"),
        ({"kind": b"cpu f32"}, ParameterError, "kv_type"),
        ({"kind": b"\x1b[31m\xff"}, ParameterError, "another runtime"),
        ({"kind": b""}, ParameterError, "another runtime"),
        ({"model": b"x"}, ParameterError, "another model"),
    ],
)
def test_forged_files_are_refused_by_name(
    plain: Model, tmp_path: Path, fields: dict[str, Any], kind: type[Exception], match: str
) -> None:
    file = forged(saved(plain, tmp_path / "a", 70), **fields)
    with pytest.raises(kind, match=match) as caught:
        plain.restore(file)
    assert str(caught.value).isprintable()


def test_a_cut_file_is_refused_at_every_length(plain: Model, tmp_path: Path) -> None:
    data = saved(plain, tmp_path / "a", 3).read_bytes()
    lengths = [*range(HEADER.size + 3 * DIGEST), *range(HEADER.size, len(data), 997), len(data) - 1]
    for length in lengths:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ModelFormatError, match="size is"):
            plain.restore(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    with pytest.raises(ModelFormatError, match="size is"):
        plain.restore(tmp_path / "cut")


def test_a_changed_byte_is_noticed_anywhere(plain: Model, tmp_path: Path) -> None:
    data = saved(plain, tmp_path / "a", 70).read_bytes()
    rng = random.Random(0)
    places = [*range(HEADER.size + DIGEST), *rng.sample(range(HEADER.size, len(data)), 200)]
    for place in [*places, *range(len(data) - DIGEST, len(data))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises((ModelFormatError, UnsupportedModelError)):
            plain.restore(tmp_path / "b")
    assert plain.restore(tmp_path / "a").position == 70


def test_numbers_that_are_none_are_told_when_sampling(plain: Model, tmp_path: Path) -> None:
    """A file may hold any numbers; NaN keys give an error, and no harm is done."""
    file = saved(plain, tmp_path / "a", 64)
    data = bytearray(file.read_bytes())
    start = HEADER.size + DIGEST + 4 * 64
    data[start:-DIGEST] = b"\xff" * (len(data) - start - DIGEST)
    file.write_bytes(data)
    session = plain.restore(forged(file))
    with pytest.raises(edgellama.NonFiniteError):
        list(plain.generate([*session.ids, 5], max_tokens=3, session=session))
    assert np.all(np.isfinite(plain.session().forward(IDS[:5])))


def test_what_is_no_session_file(plain: Model, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="not a session file"):
        plain.restore(path)
    for name, match in (("missing", "No such file"), ("\0", "not a file name")):
        with pytest.raises(EdgeLlamaError, match=match):
            plain.restore(tmp_path / name)
    with pytest.raises(ModelFormatError, match="this is a folder, not a session file"):
        plain.restore(tmp_path)
    for wrong in (None, 3, b"a"):
        with pytest.raises(ParameterError, match="path is"):
            plain.restore(wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_a_pipe_is_refused_without_waiting(plain: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFormatError, match="regular"):
        plain.restore(tmp_path / "pipe")
    with pytest.raises(OutputError):
        plain.session().save(tmp_path / "pipe")


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
