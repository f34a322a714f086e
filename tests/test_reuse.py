"""What the next turn of a chat has to compute: the new tokens, and nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Model, Sampling, Usage
from edgellama.reuse import as_cached, shared_length

CONTROL, NAMED = 1000, 999  # a control token, and one that is user-defined


class Spelling:
    """A tokenizer whose ids are texts: a number for each string of one to three letters."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    def id(self, text: str) -> int:
        raw = text.encode()
        if raw not in self.texts:
            self.texts.append(raw)
        return self.texts.index(raw)

    def token_bytes(self, token: int) -> bytes:
        return b"<name>" if token >= NAMED else self.texts[token]

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode()

    @property
    def user_defined_texts(self) -> frozenset[str]:
        return frozenset(["<name>"])

    def is_special(self, token: int) -> bool:
        return token == CONTROL

    def cut(self, text: str, lengths: list[int]) -> list[int]:
        """The text in pieces of these lengths; "|" is a control token."""
        ids, at, turn = [], 0, 0
        while at < len(text):
            if text[at] == "|":
                ids.append(CONTROL)
                at += 1
                continue
            stop = at + lengths[turn % len(lengths)]
            stop = min([stop, *(i for i in (text.find("|", at),) if i >= 0)])
            ids.append(self.id(text[at:stop]))
            at, turn = stop, turn + 1
        return ids

    def text(self, ids: list[int]) -> str:
        return "".join("|" if i >= CONTROL else self.texts[i].decode() for i in ids)


cuts = st.lists(st.integers(1, 3), min_size=1, max_size=5)
texts = st.text("ab|", max_size=20)


@given(texts, texts, texts, cuts, cuts)
def test_the_same_text_in_the_cache_s_own_tokens(
    shared: str, mine: str, theirs: str, first: list[int], second: list[int]
) -> None:
    """Whatever comes out spells the ids, and begins as the cache does for as long as it can."""
    spelling = Spelling()
    cached = spelling.cut(shared + mine, first)
    ids = spelling.cut(shared + theirs, second)
    result = as_cached(cached, ids, spelling)
    assert spelling.text(result) == spelling.text(ids)
    assert result.count(CONTROL) == ids.count(CONTROL)
    n = shared_length(cached, result)
    assert n >= shared_length(cached, ids)
    begun = spelling.text(cached[:n])
    longer = [i for i in range(n + 1, len(cached) + 1) if ends_together(spelling, cached[:i], ids)]
    assert not longer, (begun, longer)


def ends_together(spelling: Spelling, cached: list[int], ids: list[int]) -> bool:
    """Whether some beginning of ids spells exactly this."""
    text = spelling.text(cached)
    return any(spelling.text(ids[:j]) == text for j in range(len(ids) + 1))


@pytest.mark.parametrize("name", [CONTROL, NAMED])
def test_tokens_with_a_name_are_no_text(name: int) -> None:
    """Text that looks like the end of a turn must not become one, nor the other way round."""
    spelling = Spelling()
    a, first, second = (spelling.id(text) for text in ("a", "<na", "me>"))
    look = [a, first, second, a]
    assert as_cached(look, [a, name, a], spelling) == [a, name, a]
    assert as_cached([a, name, a], look, spelling) == look
    assert as_cached([a, name, a], [a, name, a], spelling) == [a, name, a]


# --- with models --------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' }}{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    metadata = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_space_prefix": False}
    config = tiny_config(context_length=512)
    path = write_tiny(tmp_path_factory.mktemp("reuse") / "tiny.gguf", config, metadata=metadata)
    with edgellama.load(path, threads=1, deterministic=True) as loaded:
        yield loaded


def converse(model: Model, params: Sampling, asked: list[str]) -> list[tuple[Usage, str]]:
    """A chat of several turns in one session; what each reply cost, and its text."""
    messages: list[dict[str, Any]] = []
    session, replies = model.session(), []
    for text in asked:
        messages.append({"role": "user", "content": text})
        chunks = list(model.chat(messages, params, max_tokens=24, session=session))
        usage = chunks[-1].usage
        assert usage is not None and session.position == (
            usage.prompt_tokens + usage.completion_tokens - 1
        )
        messages.append({"role": "assistant", "content": "".join(c.text for c in chunks)})
        replies.append((usage, messages[-1]["content"]))
    return replies


@pytest.mark.parametrize("seed", range(6))
def test_a_turn_computes_new_tokens_only(model: Model, seed: int) -> None:
    """Random letters are rarely in the tokens that the tokenizer would cut them into."""
    letters = {i: 0.0 for i in range(269, 288)}
    banned = {i: -float("inf") for i in range(288) if i not in letters}
    asked = ["the and", "a and the", "ing", "the"]
    replies = converse(model, Sampling(seed=seed, temperature=2, logit_bias=banned), asked)
    for (before, _), (usage, _), text in zip(replies, replies[1:], asked[1:], strict=False):
        in_cache = before.prompt_tokens + before.completion_tokens - 1
        end_of_turn = len(model.tokenizer.encode(text)) + 2  # and </s>, <s>
        assert usage.reused_tokens == in_cache
        assert usage.prompt_tokens - in_cache <= 1 + end_of_turn


def test_the_reply_is_that_of_the_same_ids_read_at_once(model: Model) -> None:
    session, greedy = model.session(), Sampling(temperature=0)
    messages = [{"role": "user", "content": "the and"}]
    first = list(model.chat(messages, Sampling(seed=3), max_tokens=9, session=session))
    messages += [
        {"role": "assistant", "content": "".join(c.text for c in first)},
        {"role": "user", "content": "a the"},
    ]
    second = [c.token for c in model.chat(messages, greedy, max_tokens=9, session=session)]
    assert second[-1] is not None
    prompt = session.ids[: len(session.ids) - len(second) + 1]
    fresh = [c.token for c in model.generate(prompt, greedy, max_tokens=9)]
    assert fresh == second
    assert model.tokenizer.decode(prompt) == model.tokenizer.decode(model.chat_ids(messages))


def test_generate_takes_ids_as_they_are(model: Model) -> None:
    """No other tokens for the same text, unlike in a chat."""
    tokenizer, session = model.tokenizer, model.session()
    whole = tokenizer.encode("the")
    letters = [i for c in "the" for i in tokenizer.encode(c)]
    assert whole != letters and tokenizer.decode(whole) == tokenizer.decode(letters)
    session.forward([1, *letters])
    list(model.generate([1, *whole, 5], max_tokens=0, session=session))
    assert session.ids == (1, *whole, 5)


def test_log_probabilities_are_of_the_raw_logits(model: Model) -> None:
    params = Sampling(seed=5, temperature=0.3, top_k=3, repetition_penalty=1.5)
    chunks = list(model.generate([1, 5, 9], params, max_tokens=6))
    tokens = [c.token for c in chunks if c.token is not None]
    logits = model.session().forward([1, 5, 9, *tokens[:-1]], all_logits=True)[2:].astype(float)
    logits -= logits.max(axis=-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for chunk, row in zip(chunks, expected, strict=True):
        assert chunk.token is not None and chunk.logprob == pytest.approx(
            row[chunk.token], abs=1e-5
        )


def test_the_benchmark_of_turns_prints_its_table(tmp_path: Path) -> None:
    config = tiny_config(context_length=512)
    path = write_tiny(tmp_path / "tiny.gguf", config)
    script = Path(__file__).parent.parent / "benchmarks" / "turns.py"
    command = [sys.executable, str(script), str(path), "--tokens", "20,200", "--new", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["20", "200"] and all(len(row) == 7 for row in rows)


def test_turns_of_the_default_model(default_model: Path) -> None:
    asked = ["Name a colour.", "Another one?", "And its opposite?"]
    with edgellama.load(default_model, context=512) as model:
        replies = converse(model, Sampling(seed=2), asked)
    for (before, _), (usage, _), text in zip(replies, replies[1:], asked[1:], strict=False):
        assert usage.reused_tokens >= before.prompt_tokens + before.completion_tokens - 1
        assert usage.prompt_tokens - usage.reused_tokens < 12 + len(text)
