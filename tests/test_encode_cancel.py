"""A cancel token is looked at while text becomes ids, too: long prompts take seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_tiny
from tinyvocabs import both, gpt2, llama

import edgellama
from edgellama import Cancelled, CancelToken, Model
from edgellama.gguf import open_gguf
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

TEXTS = {"words": "abc " * 1_500_000, "one word": "abc" * 300_000}  # half a second or more
SOON = 20.0  # seconds; the aim is 0.1
INFILL = {"fim_pre": 284, "fim_suf": 285, "fim_mid": 286, "eot": 287}  # any four tokens
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def stopped(work: Callable[[CancelToken], Any]) -> Any:
    """The result of work that is cancelled soon after its beginning."""
    token = CancelToken()
    timer = threading.Timer(0.02, token.cancel)
    timer.start()
    started = time.monotonic()
    try:
        return work(token)
    finally:
        assert time.monotonic() - started < SOON
        timer.join()


@both
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_while_encoding(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(Cancelled, match="encode"):
        stopped(lambda token: tokenizer.encode(text, cancel=token))
    parts = [("a", True), (text, False)]
    with pytest.raises(Cancelled):
        stopped(lambda token: tokenizer.encode_parts(parts, cancel=token))


@both
def test_a_token_that_is_not_set_changes_nothing(tokenizer: Tokenizer) -> None:
    for text in ("abc abc<tool>end", "abc" * 50_000, ""):
        assert tokenizer.encode(text, cancel=CancelToken()) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in INFILL.items()}
    path = tmp_path_factory.mktemp("encode") / "tiny.gguf"
    write_tiny(path, tiny_config(vocab_size=288), metadata=keys)
    with edgellama.load(path, runtime="reference") as loaded:
        yield loaded


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_replies_end_with_a_last_chunk(model: Model, text: str) -> None:
    messages, session = [{"role": "user", "content": text}], model.session()
    replies: list[Callable[[CancelToken], Iterator[edgellama.Chunk]]] = [
        lambda token: model.generate(text, cancel=token, session=session),
        lambda token: model.chat(messages, template=TEMPLATE, cancel=token, session=session),
        lambda token: model.chat(messages, template="vicuna-v1.1", cancel=token),
        lambda token: model.chat(messages, template=TEMPLATE, overflow="shift", cancel=token),
        lambda token: model.infill_chunks("x", text, cancel=token),
    ]
    for reply in replies:
        (chunk,) = stopped(lambda token, reply=reply: list(reply(token)))
        assert (chunk.text, chunk.token, chunk.finish_reason) == ("", None, "cancelled")
        assert chunk.usage is not None and chunk.usage.completion_tokens == 0
    assert session.position == 0
    with pytest.raises(Cancelled):
        stopped(lambda token: model.infill(text, "x", cancel=token))


@pytest.mark.parametrize("keys", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_while_a_file_is_opened(keys: dict[str, Any], tmp_path: Path) -> None:
    """Header and vocabulary: half a second for 128,000 tokens with 280,000 merges."""
    path, token = write_tiny(tmp_path / "tiny.gguf"), CancelToken()
    with open_gguf(path, cancel=token) as file:
        assert file.tensors
    assert tokenizer_from_gguf(keys, cancel=token).vocab_size > 256
    token.cancel()
    with pytest.raises(Cancelled, match="header"):
        open_gguf(path, cancel=token)
    with pytest.raises(Cancelled, match="vocabulary"):
        tokenizer_from_gguf(keys, cancel=token)
    with pytest.raises(Cancelled):
        edgellama.load(path, cancel=token)
