"""The commands of a chat, in one table: what can be typed after a slash, and what it does.

A command's docstring is its page in `/help`. Commands tell the person on stderr; what goes wrong,
they raise.
"""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.cli import clipboard, conversation_file, editor, report, why
from edgellama.cli.background import in_background
from edgellama.cli.reply import Reply
from edgellama.cli.settings import line_about, setting_named
from edgellama.cli.spelling import beginning, plural, tokens_in_rows
from edgellama.cli.terminal import colours
from edgellama.control import CancelToken
from edgellama.errors import ParameterError, did_you_mean, shown
from edgellama.regular_file import read_start

if TYPE_CHECKING:
    from edgellama.cli.chat import Chat
    from edgellama.cli.conversation import Exchange

KEYS = '''\
"""           around a message of many lines; Alt-Enter or Ctrl-J: a new line
//text        a message that begins with a slash
Ctrl-C        stop the reply, or drop what is typed; twice when empty: leave
Ctrl-D        leave'''
MOST_TOKENS_SHOWN = 400
BYTES_PER_TOKEN = 16  # a file with more than this for each token of the context cannot fit
SYSTEM_OFF = "-"

Action = Callable[["Chat", str], bool | None]  # False ends the chat


@dataclass(frozen=True)
class Command:
    name: str
    arguments: str
    help: str  # one line
    action: Action
    also: tuple[str, ...] = ()
    takes: str = ""  # what Tab completes: "command", "setting" or "path"

    @property
    def page(self) -> str:
        heading = f"/{self.name} {self.arguments}".rstrip()
        also = f" (also {', '.join(f'/{name}' for name in self.also)})" if self.also else ""
        return f"{heading}{also}\n{_flowing(self.action.__doc__ or self.help)}"


def _flowing(text: str) -> str:
    """A docstring with a line for each paragraph, for the terminal to break; what is indented
    stays as it is.
    """
    lines = re.split(r"\n{2,}", inspect.cleandoc(text))
    return "\n\n".join(each if each[:1] == " " else each.replace("\n", " ") for each in lines)


COMMANDS: dict[str, Command] = {}  # by name, in the order of /help


def command(
    name: str, arguments: str, help: str, also: tuple[str, ...] = (), takes: str = ""
) -> Callable[[Action], Action]:
    def enter(action: Action) -> Action:
        COMMANDS[name] = Command(name, arguments, help, action, also, takes)
        return action

    return enter


def obey(chat: "Chat", line: str) -> bool:
    """Do what a line beginning with a slash says; False ends the chat. Raises EdgeLlamaError."""
    name, _, rest = line.removeprefix("/").partition(" ")
    known, rest = named(name), rest.strip()
    if rest and not known.arguments:
        hint = f"/help {known.name} tells of it; // begins a message with /"
        raise ParameterError(f"/{name} does not take {shown(rest)}", hint=hint)
    return known.action(chat, rest) is not False


def named(name: str) -> Command:
    """The command of that name. Raises ParameterError."""
    names = {each: known for known in COMMANDS.values() for each in (known.name, *known.also)}
    if name in names:
        return names[name]
    hint = did_you_mean(name, names, "/") or "/help shows them; // begins a message with /"
    raise ParameterError(f"There is no command {shown('/' + name)}", hint=hint)


# --- the chat itself ------------------------------------------------------------------------------


@command("help", "[COMMAND]", "show the commands, or all about one", also=("?",), takes="command")
def _help(chat: "Chat", text: str) -> None:
    """Show all commands in a line each; with a COMMAND, everything about it."""
    if text:
        chat.terminal.tell(named(text.removeprefix("/")).page)
        return
    width = max(len(f"/{each.name} {each.arguments}") for each in COMMANDS.values())
    rows = (
        f"{f'/{each.name} {each.arguments}':<{width}}  {each.help}" for each in COMMANDS.values()
    )
    chat.terminal.tell("\n".join([*rows, "", KEYS]))


@command("exit", "", "leave (Ctrl-D too)", also=("quit", "bye"))
def _exit(chat: "Chat", text: str) -> bool:
    """Leave the chat. What was said is gone, unless /save kept it."""
    return False


@command("clear", "", "forget the conversation")
def _clear(chat: "Chat", text: str) -> None:
    """Forget what was said, and files that wait for a message. System message and settings stay."""
    chat.conversation.clear()
    chat.files.clear()
    chat.terminal.tell("The conversation is forgotten.")


@command("regen", "", "have the last reply again, differently")
def _regen(chat: "Chat", text: str) -> None:
    """Have another reply to your last message; the old one is replaced.

    With a seed that was set, the next attempt takes the next seed, so that a series of attempts can
    be repeated. At temperature 0 the reply is the same again.
    """
    _last(chat)
    if chat.conversation.settings.sampling.greedy:
        chat.terminal.tell("The temperature is 0: the reply will be the same. See /set temperature")
    chat.hear(chat.conversation.again)


@command("undo", "", "take the last message and reply back")
def _undo(chat: "Chat", text: str) -> None:
    """Take the last message and its reply back, as if they had not been said.

    /edit opens the message that was taken back. Nothing is computed again: what the model had read
    before is still there.
    """
    _last(chat)
    undone = chat.conversation.undo()
    assert undone is not None
    chat.draft = undone.message
    chat.terminal.tell(f"Taken back: {beginning(undone.message)}. /edit opens it.")


@command("edit", "[TEXT]", "write the message in your editor")
def _edit(chat: "Chat", text: str) -> None:
    """Write the next message in the editor that $VISUAL or $EDITOR names, and send it.

    It opens with TEXT, or with the message that was last taken back or refused. An empty text is
    not sent.
    """
    message = editor.edited(text or chat.draft)
    if not message.strip():
        chat.terminal.tell("The text is empty; nothing was sent.")
        return
    chat.draft = message
    chat.terminal.tell([(message, "dim")])
    chat.send(message)


def _last(chat: "Chat") -> "Exchange":
    """The last exchange. Raises ParameterError without any."""
    if not chat.conversation.exchanges:
        raise ParameterError("nothing was said yet")
    return chat.conversation.exchanges[-1]


# --- settings -------------------------------------------------------------------------------------


@command("system", "[TEXT]", "show or change what the model is told to be")
def _system(chat: "Chat", text: str) -> None:
    """Tell the model what to be; without TEXT, show what it is told. /system - tells it nothing.

    The conversation goes on under the new words; the model reads it again from the beginning.
    """
    conversation = chat.conversation
    if text:
        conversation.instruct(None if text == SYSTEM_OFF else text)
    now = conversation.system
    chat.terminal.tell("There is no system message." if now is None else f"system: {now}")


@command("set", "[NAME [VALUE]]", "show or change a setting", takes="setting")
def _set(chat: "Chat", text: str) -> None:
    """Change how replies are made, from the next one on: any field of Sampling, and max_tokens,
    stop, overflow (error, shift, drop-oldest). Without VALUE, show the setting; without NAME, all.
    The value "default" takes back what was set, "none" empties it where that is possible.

        /set temperature 0     /set seed 7
        /set stop "\\n\\n"       /set logit_bias 5=-inf,9=1.5
    """
    name, _, value = text.partition(" ")
    if not name:
        chat.terminal.tell(report.settings_lines(chat.conversation))
        return
    name, value = setting_named(name), value.strip()
    if value:
        chat.conversation.settings = chat.conversation.settings.changed(name, value)
    chat.terminal.tell(line_about(chat.conversation.settings, name))


@command("show", "", "show the model, the template and what is set")
def _show(chat: "Chat", text: str) -> None:
    """Show the model and its file, the device and why it was chosen, the context, the system
    message, the settings that are not as usual, the chat template and where it is from.
    """
    chat.terminal.tell(report.show(chat.conversation))


# --- looking inside -------------------------------------------------------------------------------


@command("context", "", "show how full the context is, and what will be left out")
def _context(chat: "Chat", text: str) -> None:
    """Show the tokens in use, those of each message (the template's own come on top), what the
    last reply was made without because the context was full, and what the next message will push
    out, or whether it will be refused.
    """
    chat.terminal.tell(report.context(chat.conversation))


@command("tokens", "[TEXT]", "show the ids that the model saw, or those of a text")
def _tokens(chat: "Chat", text: str) -> None:
    """Show the ids and pieces of TEXT; without it, all that the model has read and written, with
    the template's control tokens. The middle of a long one is left out.
    """
    tokenizer = chat.conversation.model.tokenizer
    ids = tokenizer.encode(text) if text else list(chat.conversation.session.ids)
    if not ids:
        raise ParameterError("the model has not read anything yet")
    chat.terminal.tell(f"{plural(len(ids), 'token')}:")
    if len(ids) > MOST_TOKENS_SHOWN:
        half = MOST_TOKENS_SHOWN // 2
        chat.terminal.tell(tokens_in_rows(tokenizer, ids[:half]))
        chat.terminal.tell(f"... {len(ids) - 2 * half:,} more ...")
        ids = ids[-half:]
    chat.terminal.tell(tokens_in_rows(tokenizer, ids))


@command("stats", "", "show speed and memory of this chat")
def _stats(chat: "Chat", text: str) -> None:
    """Show all tokens read and written since the chat began, how fast, how long a first token
    took, and the memory in use.
    """
    chat.terminal.tell(report.stats(chat.conversation))


@command("why", "[all|N]", "show how sure the model was of its last reply")
def _why(chat: "Chat", text: str) -> None:
    """Show how likely each token of the last reply was, and what else could have come there.

    The probabilities are the model's own, before temperature, top_k and the like. Without an
    argument, those it was least sure of; "all" shows every token, N the alternatives of token N.
    """
    last = _last(chat)
    if not last.prompt or not last.reply.tokens:
        raise ParameterError("the last reply was not made in this chat")
    total, tokenizer = len(last.reply.tokens), chat.conversation.model.tokenizer
    if text not in ("", "all") and not (text.isdecimal() and 1 <= int(text[:9]) <= total):
        raise ParameterError(f"/why {shown(text)}: allowed are all, or a token's number 1..{total}")
    found = _weighed(chat, last, 10 if text.isdecimal() else 1 + why.OTHERS)
    if text.isdecimal():
        chat.terminal.tell(why.detail(tokenizer, found, int(text)))
    elif text == "all":
        chat.terminal.tell(why.table(tokenizer, found))
    else:
        chat.terminal.tell(why.overview(tokenizer, found, colours()))


def _weighed(chat: "Chat", last: "Exchange", count: int) -> list[why.Choice]:
    cancel = CancelToken()
    with chat.terminal.progress() as display:
        return in_background(
            lambda: why.choices(
                chat.conversation.session,
                last.prompt,
                last.reply.tokens,
                count=count,
                cancel=cancel,
                progress=display.update,
            ),
            cancel,
            idle=display.remind,
        )


# --- files and the clipboard ----------------------------------------------------------------------


@command("read", "FILE", "put a file's text before the next message", takes="path")
def _read(chat: "Chat", text: str) -> None:
    """Put the text of a file in front of your next message; several files follow one another.

    The file must be UTF-8 text that fits the context. /clear drops files that wait.
    """
    path, model = _path(text), chat.conversation.model
    content = _text_of(path, BYTES_PER_TOKEN * model.info.context)
    count, limit = len(model.tokenizer.encode(content)), model.info.context
    if count >= limit:
        problem = f"its {count:,} tokens do not fit the context of {limit:,}"
        raise ParameterError(problem, path=path)
    chat.files.append(content)
    waiting = f"{path.name}: {plural(count, 'token')}, in front of your next message"
    chat.terminal.tell(waiting)
    used = chat.conversation.position()
    if used + count > limit:
        chat.terminal.tell(f"With the {used:,} tokens so far they do not fit; see /context")


@command("save", "FILE", "write the conversation to a file", takes="path")
def _save(chat: "Chat", text: str) -> None:
    """Write the system message and all that was said to a JSON file, which /load reads.

    A conversation that was saved under this name is replaced; any other file is left alone.
    """
    path, conversation = _path(text), chat.conversation
    settings = conversation.settings.document()
    about = {"model": conversation.model.info.path.name, "settings": settings}
    conversation_file.save(path, conversation.messages(), about)
    chat.terminal.tell(f"{plural(len(conversation.messages()), 'message')} written to {path}")


@command("load", "FILE", "go on with a saved conversation", takes="path")
def _load(chat: "Chat", text: str) -> None:
    """Go on with a conversation that /save wrote, in place of the present one.

    Its system message comes with it; settings stay as they are. The model reads it with your next
    message.
    """
    from edgellama.cli.conversation import Exchange

    path, conversation = _path(text), chat.conversation
    system, exchanges = conversation_file.load(path)
    if system is not None or not conversation.completing:
        conversation.instruct(system)
    conversation.clear()
    conversation.exchanges += [Exchange(said, Reply(answer)) for said, answer in exchanges]
    told = plural(len(exchanges), "exchange")
    chat.terminal.tell(f"{told} read from {path}, {conversation.position():,} tokens")
    for said, answer in exchanges[-1:]:
        chat.terminal.tell([(f"... {beginning(said)} {beginning(answer)}", "dim")])


@command("copy", "", "copy the last reply to the clipboard")
def _copy(chat: "Chat", text: str) -> None:
    """Copy the last reply, as the model wrote it, to the clipboard: with pbcopy, wl-copy, xclip or
    clip; else, and over SSH, by asking the terminal (OSC 52).
    """
    chat.terminal.tell(clipboard.copy(_last(chat).reply.text))


def _path(text: str) -> Path:
    """A file's name as typed; quotes around it are left out. Raises ParameterError."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", text)
    name = quoted[2] if quoted else text
    if not name or "\0" in name:
        raise ParameterError("which file? Its name follows the command")
    return Path(os.path.expanduser(name))


def _text_of(path: Path, most: int) -> str:
    data = read_start(path, most + 1, ParameterError, wanted="a text file")
    if len(data) > most:
        raise ParameterError(
            f"it has more than {most:,} bytes, too many for the context", path=path
        )
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        raise ParameterError(f"is not UTF-8 text: {error}", path=path) from error
    if "\0" in text or not text:
        raise ParameterError("is no text file" if text else "is empty", path=path)
    return text
