"""`edgellama chat`: a conversation in the terminal. Ctrl-C stops a reply, not the program."""

from typing import Any

import edgellama
from edgellama.cli.keyboard import Keyboard
from edgellama.cli.pull import pull_model
from edgellama.cli.reply import Reply, Running, Wording, load_model, show_reply
from edgellama.cli.templates import Asked, asked_template, source_of, template_of
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.errors import EdgeLlamaError, shown
from edgellama.paths import DEFAULT_MODEL, model_file

HELP = '''\
/help         show this
/clear        forget the conversation
/exit         leave (Ctrl-D too)
Ctrl-C        stop the reply; twice at the prompt: leave
"""           begin and end a message of several lines
\\             at the end of a line: the message goes on
//text        a message that begins with a slash'''


def start_chat(
    terminal: Terminal,
    name: str | None,
    *,
    system: str | None,
    template: str | None,
    how: Running,
    wording: Wording,
) -> None:
    asked = asked_template(template)
    if name is None:
        name = DEFAULT_MODEL
        if not model_file(name).is_file():
            terminal.note(f"Fetching {name}, this once.")
            pull_model(terminal, name)
    params = wording.params()
    with load_model(terminal, name, how) as model:
        conversation = Conversation(terminal, model, params, system, wording, asked)
        terminal.note(introduction(model, asked))
        keyboard = Keyboard(terminal)
        while (message := keyboard.message()) is not None and obey_or_answer(
            conversation, message, keyboard.live
        ):
            pass
        if terminal.json:
            terminal.document(conversation.document())


def introduction(model: "edgellama.Model", asked: Asked | None) -> str:
    """Which model, run how, in a few lines."""
    info, device = model.info, model.device
    size = f"{info.parameters / 1e6:,.0f} million parameters, {info.bits_per_weight:.1f} bits each"
    reason = f" ({device['reason']})" if device.get("reason") else ""
    lines = [
        f"{info.path.name}: {size}, {info.file_bytes / 1e6:,.0f} MB",
        f"on {device.get('device')} with the {device.get('runtime')} runtime{reason}",
        f"context {info.context} tokens of the model's {info.model_context}",
    ]
    if info.template is None and asked is None:
        lines.append("This is a base model, without a chat template: it continues what you write.")
    else:
        lines.append(f"chat template: {source_of(asked, model)}")
    return "\n".join([*lines, "/help shows the commands."])


def obey_or_answer(conversation: "Conversation", message: str, live: bool) -> bool:
    """Handle one message; False ends the chat."""
    terminal = conversation.terminal
    if message in ("/exit", "/quit", "/bye"):
        return False
    if message == "/clear":
        conversation.clear()
        terminal.note("The conversation is forgotten.")
    elif message in ("/help", "/?"):
        terminal.note(HELP)
    elif message.startswith("/") and not message.startswith("//"):
        terminal.note(f"There is no command {shown(message.split()[0])}; /help shows them.")
    else:
        try:
            conversation.answer(message[1:] if message.startswith("//") else message)
        except EdgeLlamaError as error:
            if not live:
                raise
            terminal.note(f"{error}\nThe message was not kept; /clear starts anew.")
    return True


class Conversation:
    """The messages so far, and one session that remembers what they were computed to."""

    def __init__(
        self,
        terminal: Terminal,
        model: "edgellama.Model",
        params: "edgellama.Sampling",
        system: str | None,
        wording: Wording,
        asked: Asked | None = None,
    ) -> None:
        self._asked, self._template = asked, template_of(asked, model)
        self.terminal, self._model, self._params, self._wording = terminal, model, params, wording
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self._messages: list[dict[str, str]] = list(self._first)
        self._session = model.session()
        self._replies: list[dict[str, Any]] = []

    def clear(self) -> None:
        self._messages = list(self._first)
        self._session.truncate(0)

    def answer(self, message: str) -> None:
        """Show the model's reply; what there is of one that was stopped stays in the memory."""
        self._messages.append({"role": "user", "content": message})
        try:
            reply = self._reply(message)
        except BaseException:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": reply.text})
        self._replies.append(reply.document())
        if not self.terminal.json:
            self.terminal.note(f"[{reply.footer()}]")

    def _reply(self, message: str) -> Reply:
        cancel = CancelToken()
        limits = self._wording.limits(cancel)
        if self._model.info.template is None and self._template is None:
            return show_reply(
                self.terminal, lambda: self._model.generate(message, self._params, **limits), cancel
            )
        return show_reply(
            self.terminal,
            lambda: self._model.chat(
                self._messages,
                self._params,
                template=self._template,
                session=self._session,
                **limits,
            ),
            cancel,
        )

    def document(self) -> dict[str, Any]:
        return {
            "model": str(self._model.info.path),
            "device": self._model.device,
            "template_source": source_of(self._asked, self._model),
            "messages": self._messages,
            "replies": self._replies,
        }
