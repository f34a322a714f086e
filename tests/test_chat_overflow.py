"""Chats and texts longer than the context: what is left out, and what /context tells of it."""

from typing import Any

import pytest
from chatting import CONTEXT, Begin, begun, contents, told
from hypothesis import given, strategies as st

from edgellama import ContextOverflow, Model
from edgellama.cli.chat import Chat
from edgellama.cli.continuation import STEPS, fitted_text
from edgellama.generate import Usage

pytest_plugins = ["chat_fixtures"]
STEP = CONTEXT // STEPS


def usage(chat: Chat) -> Usage:
    found = chat.conversation.replies[-1].usage
    assert found is not None
    return found


def test_context_tells_what_is_out_of_sight_from_what_is_next(begin: Begin) -> None:
    chat = begin(overflow="shift", max_tokens=30)
    told(chat, "z" * 150)
    assert marks(chat) == ["to be left out next"] * 2
    told(chat, "y" * 60)
    usage = chat.conversation.replies[-1].usage
    assert usage is not None and usage.dropped_messages == (0, 1)
    text = told(chat, "/context")
    assert f'made without the 2 messages from "{"z" * 32}..." on, {usage.dropped_tokens} t' in text
    assert "push out" not in text and "leaves out more of the oldest turns" in text
    assert marks(chat) == ["left out", "left out", "", ""]
    told(chat, "/system be brief")  # the places move on
    assert marks(chat) == ["", "left out", "left out", "", ""]
    told(chat, "/system -")
    told(chat, "x" * 90)
    assert chat.conversation.unseen().messages == (0, 1, 2, 3)
    told(chat, "/set overflow error")
    assert "will be refused" in told(chat, "/context")
    assert marks(chat) == [*["left out of the last reply"] * 4, "", ""]
    told(chat, "/undo")
    told(chat, "/set overflow shift")
    assert marks(chat)[:3] == ["left out", "left out", ""]
    told(chat, "/clear")
    assert "made without" not in told(chat, "/context") and marks(chat) == []


def marks(chat: Chat) -> list[str]:
    """What /context says of each message, behind its words."""
    lines = told(chat, "/context").splitlines()
    about = [line for line in lines if line.startswith(("  system ", "  user ", "  assistant "))]
    return [line.rpartition("   ")[2] if "left out" in line else "" for line in about]


# --- a base model ---------------------------------------------------------------------------------


def writing(base: Model, **settings: Any) -> Chat:
    """One that writes a single word again and again, which is a token of its own."""
    chat = begun(base, **settings)
    token = base.tokenizer.encode(" the")[-1]
    assert base.tokenizer.encode(" the" * 9)[1:] == [token] * 9  # behind a space of its own
    told(chat, f"/set logit_bias {token}=1000")
    return chat


@pytest.mark.parametrize("overflow", ["shift", "drop-oldest"])
def test_the_beginning_is_left_out(base: Model, overflow: str) -> None:
    chat = writing(base, overflow=overflow, max_tokens=30)
    told(chat, "z" * 150)
    assert f"overflow {overflow} leaves out the beginning" in told(chat, "/context")
    told(chat, "/set max_tokens 10")
    before = "".join(contents(chat))
    second = told(chat, "y" * 70)
    assert f"left out {STEP} tokens" in second
    assert f"the model did not see the first {STEP} tokens of the text" in second
    whole = base.tokenizer.encode(before + "y" * 70, bos=True)
    assert (usage(chat).dropped_tokens, usage(chat).dropped_messages) == (STEP, ())
    seen = [whole[0], *whole[1 + STEP :]]
    assert base.tokenizer.decode(chat.conversation.exchanges[-1].prompt) == (
        base.tokenizer.decode(seen)
    )
    third = told(chat, "x")
    assert "did not see" not in third and usage(chat).dropped_tokens == STEP
    assert usage(chat).reused_tokens >= len(seen)  # the same beginning: little is read again
    text = told(chat, "/context")
    assert f"The last reply was made without the first {STEP} tokens of the text." in text
    assert f"{usage(chat).prompt_tokens + usage(chat).completion_tokens} of {CONTEXT}" in text
    assert "Of 10 tokens" in told(chat, "/why")


def test_it_is_foretold_and_a_text_goes_on_for_ever(base: Model) -> None:
    chat = writing(base, overflow="shift", max_tokens=None)
    first = told(chat, "the cat")
    reason = chat.conversation.replies[-1].finish_reason
    assert reason == "context" and "will push out the first 96 tokens of the text" in first
    for _ in range(2):
        told(chat, "")
        assert chat.conversation.replies[-1].tokens and usage(chat).dropped_tokens > 0
        assert usage(chat).prompt_tokens <= CONTEXT * 3 // 4
    assert len(base.tokenizer.encode("".join(contents(chat)))) > CONTEXT


def test_error_leaves_nothing_out(base: Model) -> None:
    chat = begun(base)
    told(chat, "z" * 200)
    assert "A full context ends the text (overflow is error)" in told(chat, "/context")
    before = contents(chat)
    refused = told(chat, "y" * 100)
    assert "do not fit the context" in refused and "/set overflow shift goes on" in refused
    assert contents(chat) == before
    told(chat, "/set overflow shift")
    assert "reply 5 tokens" in told(chat, "y" * 100)


def test_what_was_written_last_is_never_cut(base: Model) -> None:
    chat = begun(base, overflow="shift")
    told(chat, "z" * 20)
    assert "too long by itself" in told(chat, "y" * 300)
    told(chat, "y" * 254)
    assert usage(chat).prompt_tokens >= 255 and len(contents(chat)) == 4


pieces = st.text(st.sampled_from("ab \u00e9\u65e5\U0001f98a\n"), max_size=120)


@given(before=pieces, last=pieces, overflow=st.sampled_from(["shift", "drop-oldest", "error"]))
def test_any_text(base: Model, before: str, last: str, overflow: str) -> None:
    """What stays is the end of the whole, cut between characters, and as long as it may be."""
    tokenizer, context, room = base.tokenizer, 64, 48
    whole = tokenizer.encode(before + last, bos=True)
    alone = len(whole) - len(tokenizer.encode(before, bos=True)) + 1
    try:
        fitting = fitted_text(
            tokenizer, before, last, overflow=overflow, context=context, max_tokens=None
        )
    except ContextOverflow as error:
        assert error.need > error.have == context
        assert overflow == "error" or alone > context - 4  # a token may reach into both
        return
    cut, ids = fitting.dropped_tokens, fitting.ids
    assert ids == [*whole[:1], *whole[1 + cut :]] and len(ids) <= context
    if overflow == "error":
        assert cut == 0
    elif len(ids) > room:
        assert alone > room - 4
    if cut:
        assert len(whole) > room and len(ids) > room - context // STEPS - 4
        assert "\ufffd" not in tokenizer.decode(ids[1:])
