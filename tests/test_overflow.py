"""Conversations too long for the context: what is left out, and that it is told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tiny import write_tiny

import edgellama
from edgellama import ContextOverflow, Model, ParameterError, TemplateError
from edgellama.overflow import POLICIES, REPLY_SHARE, fitted, turns

CONTEXT = 120
GLUE = 2  # tokens around each message, and in front of the reply


def encode(messages: Any) -> list[int]:
    """Message by message; ids tell which message they are of."""
    ids = [-1] * GLUE
    for message in messages:
        ids += [message["n"]] * (len(message["content"]) + GLUE)
    return ids


def conversation(*sizes: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"role": r, "content": "x" * n, "n": i} for i, (r, n) in enumerate(sizes)]


roles = st.sampled_from(["user", "assistant", "tool", "system"])
conversations = st.lists(st.tuples(roles, st.integers(0, 20)), min_size=1, max_size=12).map(
    lambda sizes: conversation(*sizes)
)


@settings(max_examples=1000)
@given(
    messages=conversations,
    overflow=st.sampled_from(POLICIES),
    max_tokens=st.none() | st.integers(0, 200),
    context=st.integers(1, 200),
)
def test_what_is_rendered_and_what_is_dropped_make_up_the_input(
    messages: list[dict[str, Any]], overflow: Any, max_tokens: int | None, context: int
) -> None:
    everything = encode(messages)
    try:
        result = fitted(messages, encode, overflow=overflow, context=context, max_tokens=max_tokens)
    except ContextOverflow as error:
        alone = encode(last_turn(messages, overflow))
        assert error.need > error.have == context
        assert len(everything) > context and (overflow == "error" or len(alone) > context)
        return
    dropped = [messages[i] for i in result.dropped_messages]
    kept = [m for m in messages if m not in dropped]
    assert result.ids == encode(kept) and len(result.ids) <= context
    assert sorted(result.ids + encode(dropped)[GLUE:]) == sorted(everything)
    assert len(result.ids) + result.dropped_tokens == len(everything)
    if overflow == "error":
        assert not dropped
    assert kept[-1] is messages[-1]
    check_order(messages, dropped, overflow)
    check_no_more_than_needed(messages, kept, dropped, overflow, room(context, max_tokens))


def room(context: int, max_tokens: int | None) -> int:
    share = context // REPLY_SHARE
    return context - (share if max_tokens is None else min(share, max_tokens))


def last_turn(messages: list[dict[str, Any]], overflow: str) -> list[dict[str, Any]]:
    first, starts = turns(messages)
    if not starts:
        return messages
    return [*(messages[:first] if overflow == "shift" else []), *messages[starts[-1] :]]


def check_order(
    messages: list[dict[str, Any]], dropped: list[dict[str, Any]], overflow: str
) -> None:
    """The oldest go first, in whole turns; the system message first of all, or never."""
    first, starts = turns(messages)
    begin = first if overflow == "shift" else 0
    assert dropped == messages[begin : begin + len(dropped)]
    if dropped:
        assert begin + len(dropped) in starts
    for message in messages[first:]:
        assert (message["role"] == "user") <= (message["n"] in starts)


def check_no_more_than_needed(
    messages: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    dropped: list[dict[str, Any]],
    overflow: str,
    limit: int,
) -> None:
    """With one turn fewer dropped it would not fit."""
    if not dropped:
        whole = len(encode(messages))
        assert whole <= limit or overflow == "error" or kept == last_turn(messages, overflow)
        return
    first, starts = turns(messages)
    begin = first if overflow == "shift" else 0
    stops = sorted({begin, *starts})
    before = stops[stops.index(begin + len(dropped)) - 1]
    assert len(encode([*messages[:begin], *messages[before:]])) > limit


def test_shift_keeps_the_system_message_and_drop_oldest_does_not() -> None:
    messages = conversation(("system", 10), ("user", 30), ("assistant", 30), ("user", 20))
    shifted = fitted(messages, encode, overflow="shift", context=100)
    assert shifted.dropped_messages == (1, 2) and shifted.dropped_tokens == 64
    oldest = fitted(messages, encode, overflow="drop-oldest", context=100)
    assert oldest.dropped_messages == (0, 1, 2)
    only = fitted(messages, encode, overflow="drop-oldest", context=100, max_tokens=1)
    assert only.dropped_messages == (0,)


def test_room_that_cannot_be_had_drops_all_but_the_last_turn() -> None:
    messages = conversation(("user", 3), ("assistant", 3), ("user", 80))
    result = fitted(messages, encode, overflow="shift", context=100)
    assert result.dropped_messages == (0, 1) and len(result.ids) == 84
    with pytest.raises(ContextOverflow, match="last message alone") as caught:
        fitted(messages, encode, overflow="shift", context=83)
    assert (caught.value.need, caught.value.have) == (84, 83)


def test_a_template_that_puts_in_what_was_left_out_gains_nothing() -> None:
    def stubborn(messages: Any) -> list[int]:
        has_system = messages[0]["role"] == "system"
        return encode(messages) if has_system else [*range(50), *encode(messages)]

    messages = conversation(("system", 5), ("user", 80))
    result = fitted(messages, stubborn, overflow="drop-oldest", context=100)
    assert result.dropped_messages == () and result.dropped_tokens == 0


def test_few_renderings_even_of_a_long_conversation() -> None:
    calls = 0

    def counting(messages: Any) -> list[int]:
        nonlocal calls
        calls += 1
        return encode(messages)

    messages = conversation(*[("user", 5), ("assistant", 5)] * 1000, ("user", 5))
    result = fitted(messages, counting, overflow="shift", context=200)
    assert calls <= 13 and len(result.ids) > 100


@pytest.mark.parametrize("overflow", ["truncate", "", None, 1, "SHIFT"])
def test_other_policies_are_refused(overflow: Any) -> None:
    with pytest.raises(ParameterError, match="allowed: error, shift, drop-oldest"):
        fitted(conversation(("user", 1)), encode, overflow=overflow, context=100)


@pytest.mark.parametrize("max_tokens", [-1, "5", 1.0, True])
def test_a_wrong_max_tokens_is_refused(max_tokens: Any) -> None:
    with pytest.raises(ParameterError, match="max_tokens"):
        fitted(
            conversation(("user", 1)), encode, overflow="shift", context=9, max_tokens=max_tokens
        )


# --- with a model -------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = write_tiny(tmp_path_factory.mktemp("overflow") / "tiny.gguf", metadata=metadata)
    with edgellama.load(path, threads=1, context=CONTEXT) as loaded:
        yield loaded


def talk(n: int) -> list[dict[str, str]]:
    """A system message, and n turns of some 20 tokens each."""
    messages = [{"role": "system", "content": "be"}]
    for i in range(n):
        messages.append({"role": "user", "content": f"say {i} and"})
        messages.append({"role": "assistant", "content": "the"})
    return [*messages, {"role": "user", "content": "now"}]


def test_the_last_chunk_tells_what_was_left_out(model: Model) -> None:
    messages = talk(5)
    with pytest.raises(ContextOverflow, match="do not fit the context of 120"):
        model.chat(messages)
    last = list(model.chat(messages, max_tokens=3, overflow="shift"))[-1]
    assert last.usage is not None
    dropped = last.usage.dropped_messages
    assert dropped == tuple(range(1, len(dropped) + 1)) and len(dropped) % 2 == 0 < len(dropped)
    kept = [m for i, m in enumerate(messages) if i not in dropped]
    ids = model.chat_ids(kept)
    assert last.usage.prompt_tokens == len(ids)
    assert last.usage.dropped_tokens == len(model.chat_ids(messages)) - len(ids)
    whole = list(model.chat(kept, max_tokens=3))[-1]
    assert whole.usage is not None and whole.usage.dropped_messages == ()
    asked = model.fitted(messages, max_tokens=3)
    assert (asked.ids, asked.dropped_messages) == (ids, dropped)


def test_a_long_chat_goes_on(model: Model) -> None:
    """Turn after turn with one session, however long it gets."""
    session, seen = model.session(), []
    for n in range(8):
        chunks = list(model.chat(talk(n), max_tokens=2, overflow="drop-oldest", session=session))
        assert chunks[-1].finish_reason in ("length", "stop") and chunks[-1].usage is not None
        seen.append(len(chunks[-1].usage.dropped_messages))
        assert session.position <= CONTEXT
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > 6


def test_a_format_of_turns_still_fits(model: Model) -> None:
    """Llama 2's format wants the user first, and then turns."""
    chunks = list(model.chat(talk(6), max_tokens=1, overflow="shift", template="llama-2"))
    assert chunks[-1].usage is not None and chunks[-1].usage.dropped_messages
    with pytest.raises(ContextOverflow):
        model.chat(talk(6), template="llama-2")


def test_a_full_context_ends_the_reply(model: Model) -> None:
    """A3 of the catalogue of bad inputs."""
    messages = [{"role": "user", "content": "the " * 20}]
    forever = edgellama.Sampling(logit_bias={2: -float("inf")})
    last = list(model.chat(messages, forever, overflow="shift"))[-1]
    assert last.finish_reason == "context" and last.usage is not None
    assert last.usage.prompt_tokens + last.usage.completion_tokens == CONTEXT


def test_without_a_template_nothing_is_fitted(tmp_path: Path) -> None:
    with (
        edgellama.load(write_tiny(tmp_path / "base.gguf"), threads=1) as base,
        pytest.raises(TemplateError, match="no chat template"),
    ):
        base.fitted(talk(1))
