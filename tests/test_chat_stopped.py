"""Ctrl-C during a reply: what there is of it stays, and a second one waits for the prompt."""

import io
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout

import pytest
from chatting import Begin, contents
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgellama.cli.chat import Chat
from edgellama.cli.commands import COMMANDS
from edgellama.cli.keyboard import Keyboard

pytest_plugins = ["chat_fixtures"]
CTRL_C, CTRL_D = "\x03", "\x04"
HINT = "Ctrl-C once more does, too"


class Impatient(io.StringIO):
    """One who presses Ctrl-C so many times at the first words."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def write(self, text: str) -> int:
        while self.times:
            self.times -= 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.fixture
def pipe() -> Iterator[PipeInput]:
    with create_pipe_input() as opened:
        yield opened


@pytest.fixture
def long(begin: Begin) -> Chat:
    """A chat whose replies end with the context, if nobody stops them."""
    return begin(max_tokens=None)


def converse(chat: Chat, pipe: PipeInput, keys: str, presses: int) -> str:
    """Type, and press Ctrl-C amid the first reply; returns what is shown of the replies."""
    pipe.send_text(keys)
    with redirect_stdout(Impatient(presses)) as out:
        chat.converse(Keyboard(chat.terminal, COMMANDS, input=pipe, output=DummyOutput()))
    return out.getvalue()


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_what_there_is_stays(
    presses: int, long: Chat, pipe: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = converse(long, pipe, f"hello\r{CTRL_D}", presses)
    said, reply = contents(long)
    assert said == "hello" and reply != "" and shown.rstrip("\n") == reply.rstrip("\n")
    last = long.conversation.exchanges[-1]
    assert last.reply.interrupted and last.reply.usage is not None and last.prompt
    assert last.reply.position < long.conversation.model.info.context
    err = capsys.readouterr().err
    assert "what there is of it stays" in err and (HINT in err) is (presses > 1)


def test_the_second_counts_at_the_prompt(
    long: Chat, pipe: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        converse(long, pipe, f"hello\r{CTRL_C}", 2)
    assert contents(long)[0] == "hello" and capsys.readouterr().err.count(HINT) == 1


def test_it_is_forgotten_with_the_next_message(
    long: Chat, pipe: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(long, pipe, f"hello\r/set max_tokens 2\rmore\r{CTRL_C}{CTRL_D}", 2)
    assert contents(long)[2] == "more" and capsys.readouterr().err.count(HINT) == 2


def test_a_reply_that_is_made_again_stays(
    long: Chat, pipe: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    long.conversation.settings = long.conversation.settings.changed("max_tokens", "2")
    converse(long, pipe, f"hello\r/set max_tokens default\r{CTRL_D}", 0)
    before = contents(long)
    converse(long, pipe, f"/regen\r{CTRL_D}", 2)
    assert contents(long)[0] == "hello" and len(contents(long)) == len(before) == 2
    assert long.conversation.exchanges[-1].reply.interrupted
    assert HINT in capsys.readouterr().err
