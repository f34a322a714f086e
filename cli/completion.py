"""What Tab completes in a chat: commands, names of settings, paths.

Knows nothing about what commands do; imported only once a person sits at a terminal.
"""

from collections.abc import Iterable, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from edgellama.cli.commands import Command
from edgellama.cli.settings import NAMES
from edgellama.overflow import POLICIES


class Words(Completer):
    """Completes a line that begins with a slash, and no other."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            yield from self._named(name)
            return
        takes = self._commands[name].takes if name in self._commands else ""
        if takes == "path":
            yield from self._paths.get_completions(Document(rest, len(rest)), event)
        elif takes == "command":
            yield from self._named(rest)
        elif takes == "setting":
            yield from _settings(rest)

    def _named(self, start: str) -> Iterable[Completion]:
        for command in self._commands.values():
            if command.name.startswith(start):
                text = f"{command.name} " if command.takes else command.name
                yield Completion(text, -len(start), display=command.name, display_meta=command.help)


def _settings(rest: str) -> Iterable[Completion]:
    name, space, value = rest.partition(" ")
    if not space:
        words, start = NAMES, name
    else:
        words, start = (POLICIES if name == "overflow" else ("default",)), value
    for word in words:
        if word.startswith(start):
            yield Completion(word, -len(start))
