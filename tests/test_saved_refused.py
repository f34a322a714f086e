"""Session files that do not fit, are damaged or lie: nothing is believed unchecked."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from savedfiles import CONFIG, CONTEXT, IDS, forged, load, saved
from tiny import tiny_config, vocabulary, write_tiny

import edgellama
from edgellama import (
    ContextOverflow,
    EdgeLlamaError,
    Model,
    ModelFormatError,
    OutputError,
    ParameterError,
    UnsupportedModelError,
)
from edgellama.saved import DIGEST, HEADER


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("saved") / "tiny.gguf", CONFIG, "Q4_1")


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[Model]:
    with load(path) as loaded:
        yield loaded


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
