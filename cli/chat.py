"""`edgellama chat`: a conversation in the terminal. Ctrl-C stops a reply, not the program.

At a terminal, messages and commands are read one by one; from a pipe, all of stdin is one message.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgellama.cli import report
from edgellama.cli.commands import COMMANDS, obey
from edgellama.cli.conversation import Conversation, Unseen
from edgellama.cli.keyboard import Keyboard
from edgellama.cli.pull import pull_model
from edgellama.cli.reply import Reply, Running, Wording, load_model
from edgellama.cli.run import checked_prompt, stdin_text
from edgellama.cli.settings import Settings
from edgellama.cli.templates import asked_template
from edgellama.cli.terminal import Terminal, Terminated
from edgellama.errors import EdgeLlamaError
from edgellama.paths import DEFAULT_MODEL, model_file

if TYPE_CHECKING:
    from edgellama.model import Model

NOTHING_SAID = "Where stdin is no terminal, all of it is the one message"


def start_chat(
    terminal: Terminal,
    name: str | None,
    *,
    system: str | None,
    template: str | None,
    how: Running,
    wording: Wording,
    overflow: str,
    stats: bool,
    markdown: bool,
) -> None:
    asked, settings = asked_template(template), Settings.of(wording, overflow)
    live = sys.stdin is not None and sys.stdin.isatty()
    message = None if live else checked_prompt(stdin_text(terminal), NOTHING_SAID)
    keyboard = Keyboard(terminal, COMMANDS) if live else None
    with keyboard.hushed() if keyboard else contextlib.nullcontext():
        model = _loaded(terminal, name, how)
    with model:
        conversation = Conversation(terminal, model, settings, system, asked, markdown)
        chat = Chat(conversation, stats)
        terminal.note(report.first_screen(model, asked))
        if keyboard is not None:
            chat.converse(keyboard)
        elif message is not None:
            chat.say(message)
        if terminal.json:
            terminal.document(chat.conversation.document())
    if message is not None and chat.conversation.replies[-1].interrupted:
        raise KeyboardInterrupt


def _loaded(terminal: Terminal, name: str | None, how: Running) -> "Model":
    """The model of that name; the default one is fetched if it is not here."""
    if name is None:
        name = DEFAULT_MODEL
        if not model_file(name).is_file():
            terminal.note(f"Fetching {name}, this once.")
            pull_model(terminal, name)
    return load_model(terminal, name, how)


class Chat:
    """A conversation and the person at the keyboard."""

    def __init__(self, conversation: Conversation, stats: bool = True) -> None:
        self.conversation, self.terminal = conversation, conversation.terminal
        self.stats = stats  # whether a footer follows each reply
        self.files: list[str] = []  # texts that go in front of the next message
        self.draft = ""  # a message that was not kept, for /edit
        self._unseen: tuple[int, ...] | int = ()  # messages that did not fit last time, or tokens
        self._future = ""  # what was said of the next message
        self._keyboard: Keyboard | None = None

    def converse(self, keyboard: Keyboard) -> None:
        """Until the person leaves. KeyboardInterrupt: by Ctrl-C."""
        self._keyboard = keyboard
        going = True
        while going:
            text = keyboard.message(empty=self.conversation.can_go_on)
            going = text is not None and self.take(text)

    def take(self, text: str) -> bool:
        """Do what was typed, whatever it is; False ends the chat. What goes wrong is told."""
        line = text.strip()
        try:
            if line.startswith("/") and not line.startswith("//"):
                return obey(self, line)
            self.send(line[1:] if line.startswith("//") else text)
        except EdgeLlamaError as error:
            self.terminal.tell([(str(error), "fair")])
        except Terminated:
            raise
        except KeyboardInterrupt:  # a command that takes long, or a reply that was slow to end
            self.terminal.tell("Stopped.")
        return True

    def send(self, message: str) -> None:
        """Have an answer to the files that wait and the message; what goes wrong is told."""
        try:
            self.say("\n\n".join([*self.files, message]))
        except EdgeLlamaError as error:
            told = f"{error}. The message was not kept; /edit opens it."
            self.terminal.tell([(told, "fair")])

    def say(self, message: str) -> None:
        """Have an answer to a message; what goes wrong is raised."""
        self.draft = message
        self.files.clear()
        self.hear(lambda: self.conversation.answer(message))

    def hear(self, answer: Callable[[], Reply]) -> None:
        """Show a reply, and what there is to know about it."""
        alone = self._keyboard.answering() if self._keyboard else contextlib.nullcontext()
        with alone:
            self._hear(answer)

    def _hear(self, answer: Callable[[], Reply]) -> None:
        reply = answer()
        exchanges = self.conversation.exchanges
        kept = bool(exchanges) and exchanges[-1].reply is reply
        if not self.terminal.json:
            self._remark(reply, kept)
        if kept:
            self.draft = ""

    def _remark(self, reply: Reply, kept: bool) -> None:
        if self.stats and reply.tokens:
            footer = reply.footer(self.conversation.model.info.context)
            self.terminal.note(f"[{footer}]", "dim")
        if reply.interrupted:
            if kept:
                words = "what there is of it stays in the conversation; /undo takes it back."
            elif self.draft:
                words = "it had not begun, and the message was not kept; /edit opens it."
            else:
                words = "the one before stays."
            self.terminal.note(f"The reply was stopped: {words}", "dim")
        self._warn(reply)

    def _warn(self, reply: Reply) -> None:
        """Of messages that had no room, and before that happens; of each once."""
        conversation, usage = self.conversation, reply.usage
        unseen = (usage.dropped_messages or usage.dropped_tokens) if usage is not None else ()
        if usage is not None and unseen and unseen != self._unseen:
            lost = Unseen(usage.dropped_messages, usage.dropped_tokens)
            self.terminal.note(report.left_out(conversation, lost), "fair")
        future = report.foresight(conversation)
        if future and future != self._future:
            share = conversation.position() / conversation.model.info.context
            self.terminal.note(f"The context is {share:.0%} full. {future}", "fair")
        self._unseen, self._future = unseen, future
