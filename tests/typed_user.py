"""A program that uses all of the public API, as an app would: mypy checks it strictly beside what
ships, and test_api.py runs it. Knows nothing but the public names."""

import asyncio
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import edgellama
from edgellama.graph import Graph
from edgellama.quantize import quantize
from edgellama.tokenizer import Tokenizer

ERRORS: tuple[type[edgellama.EdgeLlamaError], ...] = (
    edgellama.ModelFormatError,
    edgellama.UnsupportedModelError,
    edgellama.UnsafeModelError,
    edgellama.ModelConfigError,
    edgellama.TokenizerError,
    edgellama.TemplateError,
    edgellama.ParameterError,
    edgellama.ContextOverflow,
    edgellama.DeviceUnavailable,
    edgellama.OutOfMemory,
    edgellama.OutputError,
    edgellama.Cancelled,
    edgellama.ForkedProcess,
    edgellama.NonFiniteError,
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


def told(done: int, total: int, what: str) -> None:
    assert done >= 0 and isinstance(total, int) and what


def opened(path: "str | os.PathLike[str]") -> edgellama.Model:
    return edgellama.load(
        path,
        runtime="cpu",
        device="auto",
        threads=2,
        context=256,
        kv_type="f16",
        dtype=None,
        accuracy=None,
        deterministic=True,
        cancel=edgellama.CancelToken(),
        progress=told,
    )


def facts(model: edgellama.Model) -> None:
    config = assert_type(model.config, edgellama.ModelConfig)
    sizes = config.vocab_size, config.n_layers, config.dim, config.ffn_dim
    heads = config.n_heads, config.n_kv_heads, config.head_dim, config.context_length
    assert all(n > 0 for n in (*sizes, *heads)) and config.norm_eps > 0
    assert_type(config.tied_output, bool)
    assert config.rope.dim > 0 and assert_type(model.graph, Graph).nodes
    info = assert_type(model.info, edgellama.ModelInfo)
    assert info.path.exists() and sum(info.types.values()) > 0 and info.bits_per_weight > 0
    assert info.parameters > 0 and info.context == 256 and info.template is None
    assert info.template_source and info.memory["weights"] > 0
    assert_type(info.warnings, list[str])
    wanted = {"runtime", "device", "providers", "threads", "isa", "reason"}
    assert wanted <= set(model.device) and model.device["runtime"] == "cpu"


def tokens(tokenizer: Tokenizer) -> None:
    ids = assert_type(tokenizer.encode("the cat", special=False, bos=True), list[int])
    assert assert_type(tokenizer.decode(ids), str) == "the cat"
    stream = tokenizer.stream()
    assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == "the cat"
    assert_type(tokenizer.bos, int | None)
    assert_type(tokenizer.eos, tuple[int, ...])
    assert ids[0] == tokenizer.bos and tokenizer.vocab_size > max(ids)


def sampling() -> edgellama.Sampling:
    return edgellama.Sampling(
        temperature=0.8,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        typical_p=1.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        penalty_window=64,
        logit_bias={2: -float("inf")},
        seed=3,
    )


def sessions(model: edgellama.Model, folder: Path) -> None:
    with model.session() as session:
        last = assert_type(session.forward([1, 5, 6]), NDArray[np.float32])
        assert last.shape == (model.config.vocab_size,) and last.dtype == np.float32
        session.truncate(0)
        every = session.forward([1, 5, 6], all_logits=True, cancel=edgellama.CancelToken())
        assert np.array_equal(every[-1], last) and every.shape[0] == session.position == 3
        session.save(folder / "session")
        assert assert_type(model.restore(folder / "session"), edgellama.Session).ids == (1, 5, 6)
        list(model.generate([1, 5, 6, 7], max_tokens=2, session=session))
        assert_type(session.model, edgellama.Model)
    session.close()


def text_of(chunks: Iterator[edgellama.Chunk]) -> str:
    pieces = []
    for chunk in chunks:
        pieces.append(assert_type(chunk.text, str))
        assert (chunk.token is None) == (chunk.logprob is None)
        if chunk.finish_reason is not None:
            usage = chunk.usage
            assert usage is not None
            assert_type(usage, edgellama.Usage)
            assert usage.prompt_tokens > 0 and usage.reused_tokens >= 0
            assert usage.completion_tokens >= 0 and usage.dropped_tokens == 0
            assert usage.prefill_seconds >= 0 and usage.decode_seconds >= 0
    assert chunk.finish_reason in ("stop", "length", "cancelled", "context")
    return "".join(pieces)


def replies(model: edgellama.Model) -> None:
    params, token = sampling(), edgellama.CancelToken()
    first = text_of(
        model.generate(
            "Once upon a time",
            params,
            max_tokens=6,
            stop=["\n\n"],
            session=None,
            cancel=token,
            special=False,
        )
    )
    ids = model.tokenizer.encode("Once upon a time", bos=True)
    assert text_of(model.generate(ids, params, max_tokens=6)) == first
    session = model.session()
    text_of(
        model.chat(
            MESSAGES,
            params,
            template=TEMPLATE,
            overflow="shift",
            max_tokens=4,
            stop=(),
            session=session,
            cancel=token,
        )
    )
    text_of(model.chat(MESSAGES, template="vicuna-v1.1", max_tokens=2))
    filled = model.infill("def f(", "return", params, max_tokens=3)
    assert_type(filled, str)
    token.cancel()
    (last,) = model.generate("a", cancel=token)
    assert token.cancelled and last.finish_reason == "cancelled"


def arrays(model: edgellama.Model) -> None:
    ids: NDArray[np.int64] = np.array([1, 5, 6])
    with model.session() as session:
        session.forward(ids)
        session.forward(ids.astype(np.uint16))
        assert session.ids == (1, 5, 6, 1, 5, 6)
        text_of(session.generate(ids, max_tokens=1))
    assert text_of(model.generate(ids, sampling(), max_tokens=1)) is not None
    assert model.tokenizer.decode(ids) == model.tokenizer.decode([1, 5, 6])


def left(model: edgellama.Model) -> None:
    """Replies that nobody reads to their end."""
    token = edgellama.CancelToken()
    for _ in range(2):  # once more with a token that is set
        first = model.generate("a", max_tokens=9, cancel=token)
        second = model.chat(MESSAGES, template=TEMPLATE, max_tokens=9, cancel=token)
        with model.session() as session:
            third = session.generate([1, 5], max_tokens=9, cancel=token)
            for reply in (first, second, third):
                assert_type(reply, Generator[edgellama.Chunk, None, None])
                next(reply)
                reply.close()
                assert list(reply) == []
        token.cancel()


async def later(model: edgellama.Model) -> None:
    async for chunk in model.agenerate("the", sampling(), max_tokens=3, stop=["never"]):
        assert_type(chunk, edgellama.Chunk)
    async with model.achat(MESSAGES, template=TEMPLATE, overflow="error", max_tokens=3) as chunks:
        texts = [chunk.text async for chunk in chunks]
    assert texts


def converted(source: Path, folder: Path) -> None:
    report = quantize(
        source,
        folder / "small.gguf",
        "Q8_0",
        importance=None,
        certificate="full",
        strict=False,
        threads=None,
        cancel=None,
        progress=told,
    )
    assert report.bytes < source.stat().st_size


def refused(model: edgellama.Model) -> None:
    try:
        model.session().forward([1] * 257)
    except edgellama.ContextOverflow as error:
        assert (assert_type(error.need, int), error.have) == (257, 256)
    try:
        edgellama.load("nowhere.gguf")
    except edgellama.EdgeLlamaError as error:
        parts = error.path, error.where, error.field, error.value, error.allowed, error.hint
        assert any(part is not None for part in parts)
    assert issubclass(edgellama.OutOfMemory, MemoryError)
    assert issubclass(edgellama.OutputError, OSError)


def main(path: Path, folder: Path) -> None:
    """Everything, once; `path` is a float32 model with infilling tokens and 256 of context."""
    with opened(path) as model:
        facts(model)
        tokens(assert_type(model.tokenizer, Tokenizer))
        sessions(model, folder)
        replies(model)
        arrays(model)
        left(model)
        asyncio.run(later(model))
        refused(model)
    model.close()
    converted(path, folder)
