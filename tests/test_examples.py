"""The programs of examples/, with the default model; those with a window: test_chat_window.py."""

import asyncio
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edgellama
from edgellama import Model, Sampling

HANG = 120.0
EXAMPLES = Path(__file__).parent.parent / "examples"
GREEDY = Sampling(temperature=0)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the programs by name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with edgellama.load(default_model, context=2048) as loaded:
        yield loaded


def printed_by(program: str, *arguments: str, **environment: str) -> str:
    """What it writes to stdout; nothing may stand on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def serial(model: Model, *conversation: str, most: int | None = None) -> str:
    """The greedy reply to user, assistant, user…; of at most so many tokens."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(conversation)]
    return "".join(chunk.text for chunk in model.chat(messages, GREEDY, max_tokens=most))


# --- a conversation in a thread -----------------------------------------------------------------


@pytest.fixture
def talk(example: Callable[[str], ModuleType], default_model: Path) -> Iterator[Any]:
    someone = example("talk").Talk(str(default_model), GREEDY)
    yield someone
    someone.close()
    assert not someone._thread.is_alive()


def events_until(talk: Any, *last: str) -> list[tuple[str, Any]]:
    """All events up to the first of these names."""
    seen = [talk.events.get(timeout=HANG)]
    while seen[-1][0] not in last:
        seen.append(talk.events.get(timeout=HANG))
    return seen


def text_of(events: list[tuple[str, Any]]) -> str:
    return "".join(value for what, value in events if what == "text")


def test_two_turns(talk: Any, model: Model) -> None:
    loading = events_until(talk, "ready")
    assert {what for what, _ in loading[:-1]} == {"loading"}
    talk.ask("Name the capital of France.")
    first = events_until(talk, "done")
    assert text_of(first) == serial(model, "Name the capital of France.")
    talk.ask("Which river flows through it?")
    second = events_until(talk, "done")
    turns = ("Name the capital of France.", text_of(first), "Which river flows through it?")
    assert text_of(second) == serial(model, *turns)
    assert second[-1][1].usage.reused_tokens > 20
    assert [message["content"] for message in talk.messages] == [*turns, text_of(second)]


def test_a_stopped_reply_counts_as_far_as_it_came(talk: Any, model: Model) -> None:
    talk.ask("Write a very long story about the sea.")
    events = events_until(talk, "text")
    while len(events) < 30:
        events += events_until(talk, "text")
    talk.cancel()
    events += events_until(talk, "done")
    assert events[-1][1].finish_reason == "cancelled"
    told, usage = text_of(events), events[-1][1].usage
    question, most = "Write a very long story about the sea.", usage.completion_tokens
    assert serial(model, question, most=most) == told
    assert talk.messages[-1] == {"role": "assistant", "content": told}

    talk.clear()
    events_until(talk, "cleared")
    assert talk.messages == []


def test_a_question_that_is_too_long(talk: Any) -> None:
    talk.ask("sea " * 20_000, "shift")
    problem = events_until(talk, "failed")[-1][1]
    assert "context" in problem and talk.messages == []
    talk.ask("Name the capital of France.")
    assert text_of(events_until(talk, "done")) == "The capital of France is Paris."


def test_what_was_left_out_is_told(
    example: Callable[[str], ModuleType], default_model: Path
) -> None:
    talk = example("talk").Talk(str(default_model), GREEDY, context=256)
    long = "The sea is wide and deep. " * 22
    for question, lost in ((long, ()), ("Name the capital of France.", (0, 1))):
        talk.ask(question, "shift")
        last = events_until(talk, "done", "failed")[-1][1]
        assert last.usage.dropped_messages == lost
    talk.close()


@pytest.mark.parametrize("during", ["loading", "prefill", "decode"])
def test_closing_ends_the_work(
    during: str, example: Callable[[str], ModuleType], default_model: Path
) -> None:
    talk = example("talk").Talk(str(default_model))
    if during != "loading":
        talk.ask("The sea is wide. " * 800 if during == "prefill" else "Write a long story.")
        events_until(talk, "ready" if during == "prefill" else "text")
        time.sleep(0.1)
    talk.close()
    assert not talk._thread.is_alive()
    told = [talk.events.get() for _ in range(talk.events.qsize())]
    assert "done" not in [what for what, _ in told[:-1]]
    assert during == "loading" or told[-1][1].finish_reason == "cancelled"
    assert during != "prefill" or text_of(told) == ""


def test_a_missing_model_is_told_in_words(example: Callable[[str], ModuleType]) -> None:
    talk = example("talk").Talk("nowhere.gguf")
    assert "nowhere.gguf" in events_until(talk, "broken")[-1][1]
    talk.close()


# --- asyncio --------------------------------------------------------------------------------------


def test_answers_at_once_equal_those_one_by_one(
    example: Callable[[str], ModuleType], model: Model
) -> None:
    questions = [
        "Name the capital of France.",
        "Name the capital of Japan.",
        "Name the capital of Peru.",
        "Which animal says meow?",
    ]
    answers = asyncio.run(example("async_chat").answer_all(model, questions))
    assert answers == [serial(model, question) for question in questions]


def test_cancelling_one_leaves_the_others_alone(
    example: Callable[[str], ModuleType], model: Model
) -> None:
    chat, pieces, enough = example("async_chat"), [], asyncio.Event()

    def show(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 20:
            enough.set()

    async def work() -> tuple[str, bool, str | None]:
        long = asyncio.create_task(chat.answer(model, "Write a very long story.", show))
        other = asyncio.create_task(chat.answer(model, "Name the capital of France."))
        await enough.wait()
        long.cancel()
        late = await chat.answer_in_time(model, "Write a long story.", 0.05, lambda text: None)
        return await other, (await asyncio.wait({long}))[0].pop().cancelled(), late

    answer, cancelled, late = asyncio.run(work())
    assert answer == "The capital of France is Paris." and cancelled and late is None
    assert len(pieces) < 60  # it did not go on
    assert serial(model, "Write a very long story.", most=60).startswith("".join(pieces))


def test_the_asyncio_program(default_model: Path) -> None:
    lines = printed_by("async_chat.py", str(default_model)).splitlines()
    assert "0 | The capital of France is Paris." in lines
    assert {line[:4] for line in lines} == {"0 | ", "1 | ", "2 | ", "3 | "}


# --- a notebook -----------------------------------------------------------------------------------


def test_the_notebook(default_model: Path, tmp_path: Path) -> None:
    text = printed_by("notebook.py", str(default_model), TMPDIR=str(tmp_path))
    assert "The capital of France is Paris." in text
    tables = re.findall(r"^ *'.*'  +(-\d+\.\d+)  +(\d+\.\d+)%$", text, re.MULTILINE)
    assert len(tables) >= 10
    types = dict(re.findall(r"^(Q8_0|Q4_0).*KL mean (\S+),", text, re.MULTILINE))
    assert 0 < float(types["Q8_0"]) < float(types["Q4_0"]) < 1
    prompt, reused = map(int, re.findall(r"(\d+) tokens of prompt, (\d+) of them", text)[0])
    assert 0 < reused < prompt


def test_every_cell_has_a_title() -> None:
    cells = [
        line
        for line in (EXAMPLES / "notebook.py").read_text("utf-8").splitlines()
        if line.startswith("# %%")
    ]
    assert len(cells) > 6 and all(len(cell) > 6 for cell in cells)
