"""What a wrong argument does: it is refused by name, and nothing has changed.

Beside test_arguments.py, where the rows of the catalogue of bad inputs are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny

import edgellama
from edgellama import EdgeLlamaError, Model, ParameterError, Sampling, Session
from edgellama.quantize import quantize

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("refused") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with edgellama.load(path, runtime="reference", context=64) as loaded:
        yield loaded


def generated(model: Model, session: Session, **options: Any) -> Any:
    return model.generate([9], session=session, **options)


def chatted(model: Model, session: Session, **options: Any) -> Any:
    return model.chat(MESSAGES, template=TEMPLATE, session=session, **options)


@pytest.mark.parametrize("call", [generated, chatted])
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"params": Sampling(logit_bias={288: 1})}, "logit_bias id"),
        ({"params": "x"}, "params"),
        ({"cancel": True}, "cancel"),
    ],
)
def test_a_refused_reply_leaves_the_cache(
    model: Model, call: Callable[..., Any], options: dict[str, Any], field: str
) -> None:
    with model.session() as session:
        session.forward([1, 5, 6, 7, 8])
        with pytest.raises(ParameterError) as caught:
            call(model, session, **options)
        assert caught.value.field == field and caught.value.allowed
        assert caught.value.value is not None
        assert session.ids == (1, 5, 6, 7, 8)


ODD_IDS = [
    np.array([[1, 2]]),
    np.array([[1], [2]]),
    np.zeros((0, 3), np.int64),
    np.array(3),
    np.array([1.0]),
    np.array([True]),
    None,
    5,
    b"ab",
    [np.array([1])],
    [10**30],
]


@pytest.mark.parametrize("ids", ODD_IDS)
def test_ids_are_one_row_of_integers(model: Model, ids: Any) -> None:
    with model.session() as session:
        for call in (session.forward, session.generate, model.generate):
            with pytest.raises(ParameterError) as caught:
                call(ids)
            assert caught.value.field == ("prompt" if "prompt" in str(caught.value) else "ids")
        assert session.position == 0


def test_integers_of_numpy_do_as_well(path: Path) -> None:
    eight: Any = np.int64(8)
    with edgellama.load(path, context=eight, threads=np.uint8(1)) as model:
        assert model.info.context == 8 and type(model.info.context) is int
        session = model.session()
        session.forward([1, 5, 6])
        session.truncate(np.int32(2))
        assert session.ids == (1, 5)
        last = list(model.generate([1], max_tokens=np.int16(1)))[-1]
        assert last.usage is not None and last.usage.completion_tokens == 1
        with pytest.raises(ParameterError, match=r"n = 9; allowed: an integer 0\.\.2"):
            session.truncate(np.int64(9))


# --- arguments of another kind -------------------------------------------------------------------


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"x"


HUGE = 10**5000
CALLS: dict[str, tuple[Callable[[Model, Session, Any], Any], list[Any]]] = {
    "cancel": (lambda m, s, x: s.forward([1], cancel=x), [True, 5, np.array([1, 2])]),
    "cancel: save": (lambda m, s, x: s.save("x", cancel=x), [True]),
    "cancel: restore": (lambda m, s, x: m.restore("x", cancel=x), [True]),
    "cancel: reply": (lambda m, s, x: s.generate([1], cancel=x), [True]),
    "cancel: fitted": (lambda m, s, x: m.fitted(MESSAGES, template=TEMPLATE, cancel=x), [True]),
    "cancel: encode": (lambda m, s, x: m.tokenizer.encode("a", cancel=x), [True]),
    "path": (lambda m, s, x: s.save(x), [None, 5, b"x", BytesPath()]),
    "path: restore": (lambda m, s, x: m.restore(x), [None, 5, b"x", BytesPath()]),
    "ids": (lambda m, s, x: m.tokenizer.decode(x), [None, 5, np.array(3)]),
    "text": (lambda m, s, x: m.tokenizer.token_id(x), [None, [], {}]),
    "template": (lambda m, s, x: m.chat(MESSAGES, template=x), [[], {}, HUGE, 5]),
}
LOADS: dict[str, list[Any]] = {
    "path": [None, 5, b"x", BytesPath()],
    "kv_type": [[], None, HUGE, "f17"],
    "dtype": [np.array([1, 2]), [], HUGE],
    "accuracy": [np.array([1, 2]), [], HUGE, True, 5, "4"],
    "threads": [np.array([1, 2]), [], HUGE],
    "context": [np.array([1, 2]), [], HUGE],
    "progress": [True, "x"],
    "cancel": [True, "x"],
    "deterministic": [1, "x", None],
}
CONVERSIONS: dict[str, list[Any]] = {
    "source": [None, 5, b"x", BytesPath()],
    "output": [None, 5, b"x", BytesPath()],
    "importance": [True, 5, b"x", [], {"output.weight": "x"}, {"output.weight": None}],
    "progress": [True, "x"],
    "cancel": [True, "x"],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_name_what_is_wrong(model: Model, name: str) -> None:
    call, values = CALLS[name]
    with model.session() as session:
        for value in values:
            with pytest.raises(ParameterError) as caught:
                call(model, session, value)
            assert caught.value.field == name.split(":")[0]
            assert caught.value.value is value and caught.value.allowed


@pytest.mark.parametrize("name", LOADS)
def test_load_names_what_is_wrong(path: Path, name: str) -> None:
    for value in LOADS[name]:
        for runtime in ("auto", "reference") if name == "dtype" else ("auto",):
            with pytest.raises(ParameterError) as caught:
                edgellama.load(**{"path": path, "runtime": runtime} | {name: value})
            assert caught.value.field == name
            assert caught.value.value is value and caught.value.allowed


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"runtime": "cpu", "dtype": "float64"}, "dtype"),
        ({"runtime": "cpu", "accuracy": 0}, "accuracy"),
        ({"runtime": "reference", "deterministic": True}, "deterministic"),
    ],
)
def test_options_of_another_runtime(path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match="runtime only") as caught:
        edgellama.load(path, **options)
    assert (caught.value.field, caught.value.value) == (field, options[field])
    assert caught.value.allowed


def test_a_wrong_id_is_in_the_error(model: Model) -> None:
    with pytest.raises(ParameterError) as caught:
        model.session().forward([1, 288])
    assert (caught.value.field, caught.value.value) == ("ids", 288)
    assert caught.value.allowed == "integers 0..287"


@pytest.mark.parametrize("name", CONVERSIONS)
def test_quantize_names_what_is_wrong(path: Path, tmp_path: Path, name: str) -> None:
    usual = {"source": path, "output": tmp_path / "x.gguf", "type": "Q8_0", "certificate": "none"}
    for value in CONVERSIONS[name]:
        with pytest.raises(ParameterError) as caught:
            quantize(**usual | {name: value})
        assert caught.value.field == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["source", "importance"])
@pytest.mark.parametrize("value", ["\0", "\ud800", "a" * 5000, "nowhere"])
def test_names_that_no_file_has(path: Path, tmp_path: Path, name: str, value: str) -> None:
    usual = {"source": path, "output": tmp_path / "x.gguf", "type": "Q8_0", "certificate": "none"}
    with pytest.raises(EdgeLlamaError):
        quantize(**usual | {name: value})
    assert list(tmp_path.iterdir()) == []
