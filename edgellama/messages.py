"""Messages as callers give them: checked, counted and copied into plain values.

Knows nothing about templates or tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from edgellama.errors import ParameterError, shown

ROLES = ("system", "user", "assistant", "tool")
MOST_TEXT = 8 * 2**20  # characters in all messages
MOST_VALUES = 100_000  # in all messages
MOST_NESTED = 16


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages, made of plain dicts, lists, texts and numbers; or ParameterError."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", shown(messages), "a list of 1 or more messages")
    count = _Count()
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _wrong(where, shown(message), "a mapping with role and content")
        copy = count.copied(dict(message), where, 0)
        if copy.get("role") not in ROLES:
            raise _wrong(f"{where}['role']", shown(copy.get("role")), "one of " + ", ".join(ROLES))
        if not isinstance(copy.get("content"), str):
            raise _wrong(f"{where}['content']", shown(copy.get("content")), "text")
        checked.append(copy)
    return checked


def _wrong(where: str, found: str, allowed: str) -> ParameterError:
    problem = f"{where} is {found}; expected {allowed}"
    return ParameterError(problem, field=where, value=found, allowed=allowed)


def roles_of(messages: list[dict[str, Any]]) -> str:
    """The roles in a row, for messages about them."""
    roles = [message["role"] for message in messages]
    return ", ".join(roles if len(roles) <= 8 else [*roles[:8], "..."])


class _Count:
    """Copies plain JSON values, counting what they hold."""

    def __init__(self) -> None:
        self.characters = self.values = 0

    def copied(self, value: Any, where: str, depth: int) -> Any:
        self.values += 1
        if depth > MOST_NESTED or self.values > MOST_VALUES:
            allowed = f"at most {MOST_VALUES} values, {MOST_NESTED} levels deep"
            raise _wrong(where, "too large", allowed)
        if isinstance(value, str):
            return self.text(value, where)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self.copied(item, where, depth + 1) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {
                self.text(key, where): self.copied(item, f"{where}[{key[:40]!a}]", depth + 1)
                for key, item in value.items()
            }
        raise _wrong(where, type(value).__name__, "plain JSON: text, numbers, lists, dicts, None")

    def text(self, value: str, where: str) -> str:
        self.characters += len(value)
        if self.characters > MOST_TEXT:
            raise _wrong(where, "too long", f"at most {MOST_TEXT} characters in all messages")
        return str(value)
