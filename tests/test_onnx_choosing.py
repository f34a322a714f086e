"""Replies of sessions that find the likeliest tokens themselves: those of all logits, to the id.

The sessions are CUDA's, on the CPU provider, with 8 candidates of half-precision logits.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, tiny_weights, vocabulary, write_tiny

import edgellama
from edgellama.control import CancelToken
from edgellama.generate import Chunk, generate
from edgellama.gguf import open_gguf
from edgellama.graph import decoder
from edgellama.runtimes.base import Options
from edgellama.sampling import Sampling
from edgellama.tokenizer import tokenizer_from_gguf
from edgellama.weights import model_config

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

CONTEXT = 64
PROMPT = [int(i) for i in np.random.default_rng(4).integers(3, 288, 9)]
SETTINGS: dict[str, dict[str, Any]] = {  # those that need all logits last
    "greedy": {"temperature": 0},
    "few": {"top_k": 5, "seed": 1},
    "one": {"top_k": 1, "seed": 1},
    "hot": {"top_k": 7, "seed": 2, "temperature": 2.5, "top_p": 1.0, "min_p": 0.0},
    "xtc": {"top_k": 7, "seed": 3, "xtc_probability": 0.5, "xtc_threshold": 0.02},
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.8, "seed": 4},
    "sometimes": {"top_k": 0, "top_p": 1.0, "min_p": 0.15, "seed": 5, "temperature": 2.0},
    "default": {"seed": 6},
    "penalties": {"top_k": 5, "seed": 7, "repetition_penalty": 1.3},
    "bias": {"temperature": 0, "logit_bias": {9: 3.0}},
    "mirostat": {"mirostat": 2, "seed": 8},
}
ALL = list(SETTINGS)[list(SETTINGS).index("default") :]
Opened = Callable[..., edgellama.Model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("models")


def opened(path: Path, **manner: Any) -> edgellama.Model:
    """A model as `load` makes it for CUDA, but on the CPU."""
    from edgellama.runtimes.onnx_cache import transcoded
    from edgellama.runtimes.onnx_containers import EIGHT_BIT
    from edgellama.runtimes.onnx_lowering import Manner
    from edgellama.runtimes.ort import Ort

    options = Options(context=CONTEXT, threads=1)
    with open_gguf(path) as file:
        graph = decoder(model_config(file))
        tokenizer = tokenizer_from_gguf(file.metadata, path=path)
        source, _ = transcoded(file, graph, options, EIGHT_BIT)
        source.close()
        how = {"dtype": "float16", "accuracy": 0, "candidates": 8} | manner
        runtime = Ort(source, graph, options, Manner(**how))
        return edgellama.Model(file, graph, tokenizer, runtime, options, [])


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[edgellama.Model]:
    with opened(write_tiny(folder / "tiny.gguf", tiny_config(), "Q8_0", seed=9)) as model:
        yield model


class Plain:
    """The same session without what it could find itself."""

    def __init__(self, session: edgellama.Session) -> None:
        self.session = session

    @property
    def position(self) -> int:
        return self.session.position

    def forward(self, ids: Sequence[int], *, cancel: CancelToken | None = None) -> np.ndarray:
        return self.session.forward(ids, cancel=cancel)


def of_all_logits(model: edgellama.Model, ids: list[int], how: Sampling, n: int) -> list[Chunk]:
    plain = Plain(model.session())
    options: dict[str, Any] = {"context": CONTEXT, "max_tokens": n}
    return list(generate(plain, model.tokenizer, ids, how, **options))


def counted(session: edgellama.Session, calls: Counter[str]) -> edgellama.Session:
    """The session, whose runtime's calls are counted from now on."""
    runtime_session: Any = session._runtime_session
    for name in ("forward", "step", "logits"):
        original = getattr(runtime_session, name)

        def call(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            calls[name] += 1
            return original(*args, **kw)

        setattr(runtime_session, name, call)
    return session


def same(found: list[Chunk], wanted: list[Chunk]) -> None:
    assert [c.token for c in found] == [c.token for c in wanted]
    assert [c.text for c in found] == [c.text for c in wanted]
    assert found[-1].finish_reason == wanted[-1].finish_reason
    logprobs = [c.logprob for c in wanted]
    assert [c.logprob for c in found] == pytest.approx(logprobs, abs=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_replies_are_those_of_all_logits(model: edgellama.Model, name: str) -> None:
    how, n = Sampling(**SETTINGS[name]), 30
    wanted = of_all_logits(model, PROMPT, how, n)
    calls: Counter[str] = Counter()
    session = counted(model.session(), calls)
    same(list(model.generate(PROMPT, how, max_tokens=n, session=session)), wanted)
    steps = len(wanted) - 1
    assert steps > 10  # it is a reply
    if name in ALL:
        assert calls["forward"] == 1 + steps and calls["step"] == 0
        return
    assert calls["forward"] == 1 and calls["step"] == steps
    if name == "sometimes":
        assert 0 < calls["logits"] < steps
    else:
        assert calls["logits"] == 0


@pytest.mark.parametrize("name", ["greedy", "few", "penalties"])
def test_to_the_end_of_the_context(model: edgellama.Model, name: str) -> None:
    how = Sampling(**SETTINGS[name] | {"logit_bias": {2: -np.inf}} | {"temperature": 0})
    free = Sampling(**SETTINGS[name])
    for prompt in (PROMPT, PROMPT * 7, (PROMPT * 8)[: CONTEXT - 2]):
        for settings in (free, how):
            wanted = of_all_logits(model, prompt, settings, 999)
            same(list(model.generate(prompt, settings)), wanted)
            assert wanted[-1].finish_reason == "context" or settings is free


def test_replies_in_turns(model: edgellama.Model) -> None:
    """Two sessions a token each; both as if alone."""
    how = [Sampling(**SETTINGS[name]) for name in ("greedy", "few")]
    prompts = [PROMPT, PROMPT[::-1]]
    alone = [of_all_logits(model, p, h, 12) for p, h in zip(prompts, how, strict=True)]
    replies = [model.generate(p, h, max_tokens=12) for p, h in zip(prompts, how, strict=True)]
    both = list(zip_longest(*replies))
    for found, wanted in zip(zip(*both, strict=True), alone, strict=True):
        same([chunk for chunk in found if chunk], wanted)


def test_turns_of_one_session(model: edgellama.Model) -> None:
    """A reply, a rewind into it, another one: the cache holds what it should."""
    session = model.session()
    greedy, few = (Sampling(**SETTINGS[name]) for name in ("greedy", "few"))
    first = [c.token for c in model.generate(PROMPT, greedy, max_tokens=10, session=session)]
    assert session.position == len(PROMPT) + 9
    prompt = [*PROMPT, *filter(None, first[:5]), 17, 30]
    for how in (few, greedy):
        wanted = of_all_logits(model, prompt, how, 10)
        same(list(model.generate(prompt, how, max_tokens=10, session=session)), wanted)
    session.truncate(4)
    wanted = of_all_logits(model, PROMPT, greedy, 10)
    same(list(model.generate(PROMPT, greedy, max_tokens=10, session=session)), wanted)


def test_stop_strings(model: edgellama.Model) -> None:
    greedy = Sampling(temperature=0)
    text = "".join(c.text for c in model.generate(PROMPT, greedy, max_tokens=20))
    stop = next(c for c in text[3:] if text.index(c) > 2)
    chunks = list(model.generate(PROMPT, greedy, max_tokens=20, stop=[stop]))
    assert chunks[-1].finish_reason == "stop"
    assert "".join(c.text for c in chunks) == text[: text.index(stop)]


def test_cancelled_and_gone_on(model: edgellama.Model) -> None:
    greedy, session, token = Sampling(temperature=0), model.session(), CancelToken()
    wanted = of_all_logits(model, PROMPT, greedy, 20)
    chunks = []
    for chunk in model.generate(PROMPT, greedy, max_tokens=20, session=session, cancel=token):
        chunks.append(chunk)
        if len(chunks) == 6:
            token.cancel()
    assert [c.token for c in chunks] == [*(c.token for c in wanted[:6]), None]
    assert chunks[-1].finish_reason == "cancelled"
    assert list(session.ids) == [*PROMPT, *(c.token for c in chunks)][: session.position]
    prompt = [*PROMPT, *(c.token for c in wanted[:6] if c.token is not None)]
    rest = list(model.generate(prompt, greedy, max_tokens=14, session=session))
    assert [c.token for c in rest] == [c.token for c in wanted[6:]]


def test_a_session_that_was_used_otherwise(model: edgellama.Model) -> None:
    session = model.session()
    reply = model.generate(PROMPT, Sampling(temperature=0), session=session)
    list(chain([next(reply)], [next(reply)]))
    session.truncate(3)
    with pytest.raises(edgellama.ParameterError, match="used otherwise"):
        next(reply)


def test_infinite_logits_are_an_error(folder: Path) -> None:
    """What overflows in half precision must not become a token."""
    config = tiny_config()
    weights = {"output_norm.weight": np.full(64, 6e4, np.float32)}
    path = write_tiny(folder / "huge.gguf", config, "F16", seed=9, weights=weights)
    with opened(path) as model:
        logits = model.session().forward(PROMPT)
        assert not np.isfinite(logits).all()
        session = model.session()
        for how in ({"temperature": 0}, {"top_k": 5}):
            with pytest.raises(edgellama.NonFiniteError):
                list(model.generate(PROMPT, Sampling(**how), session=session))
            runtime_session: Any = session._runtime_session
            few = runtime_session.step(5)
            assert not np.isfinite(few.log_p) or np.isfinite(runtime_session.logits()).all()


def test_equal_tokens(folder: Path) -> None:
    """Rows of the head that are the same: the lowest id of the likeliest is taken."""
    config = tiny_config()
    head = tiny_weights(config, 9)["output.weight"]
    head = np.tile(head[:24], (12, 1))  # every token twelve times: more than candidates
    path = write_tiny(folder / "equal.gguf", config, "F16", seed=9, weights={"output.weight": head})
    with opened(path) as model:
        for name in ("greedy", "few", "hot", "min_p"):
            how = Sampling(**SETTINGS[name])
            wanted = of_all_logits(model, PROMPT, how, 12)
            same(list(model.generate(PROMPT, how, max_tokens=12)), wanted)


def test_ids_without_text_are_never_chosen(folder: Path) -> None:
    """A head may be padded: its last rows are no tokens, however likely."""
    config, size = tiny_config(), 280
    pieces, scores, types = vocabulary(size)
    keys = {"tokens": pieces, "scores": scores, "token_type": types}
    metadata = {f"tokenizer.ggml.{name}": values for name, values in keys.items()}
    head = tiny_weights(config, 9)["output.weight"]
    head[size:] *= 20
    path = write_tiny(
        *(folder / "padded.gguf", config, "F16", 9, metadata), weights={"output.weight": head}
    )
    with opened(path) as model:
        assert model.tokenizer.vocab_size == size < model.config.vocab_size
        for name in ("greedy", "few"):
            how = Sampling(**SETTINGS[name])
            wanted = of_all_logits(model, PROMPT, how, 12)
            same(list(model.generate(PROMPT, how, max_tokens=12)), wanted)
            assert all(c.token is None or c.token < size for c in wanted)


def test_default_model(default_model: Path) -> None:
    with opened(default_model, dtype="float32", accuracy=4, candidates=64) as model:
        ids = model.tokenizer.encode("The capital of France is")
        for how in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "temperature": 1.8, "min_p": 0}):
            wanted = of_all_logits(model, ids, Sampling(**how), 12)
            calls: Counter[str] = Counter()
            session = counted(model.session(), calls)
            same(list(model.generate(ids, Sampling(**how), max_tokens=12, session=session)), wanted)
            assert calls["step"] == len(wanted) - 1 and calls["logits"] <= 1
