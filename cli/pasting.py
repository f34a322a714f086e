"""What was pasted into a message, told from what was typed: a paste is taken as it is.

Slashes, fences of three quotes and backslashes at line ends mean something only where they were
typed. Knows nothing about keys or models.
"""

FENCE = '"""'
CONTINUED = "\\\n"


class Pastes:
    """The texts that were pasted since a message was begun."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        self._texts.append(text)

    def forget(self) -> None:
        self._texts.clear()

    def typed(self, text: str) -> str:
        """What would have to be typed for the message `text`: behind fences, where it matters.

        What begins with a typed slash or fence stays, and so does a pasted line that is a command.
        """
        pasted = [paste for paste in self._texts if paste.strip() and paste in text]
        begun = any(text.lstrip().startswith(paste.lstrip()) for paste in pasted)
        if not begun and text.lstrip().startswith(("/", FENCE)):
            return text
        if not (begun and _looks_typed(text)) and not any(map(_continued, pasted)):
            return text
        return f"{FENCE}{_without_continuations(text, pasted).rstrip()}{FENCE}"


def _looks_typed(text: str) -> bool:
    """Whether the beginning would mean something if it had been typed, and not a command."""
    text = text.strip()
    return text.startswith("//") or ("\n" in text and text.startswith(("/", FENCE)))


def _continued(paste: str) -> bool:
    return CONTINUED in paste or paste.endswith("\\")


def _without_continuations(text: str, pasted: list[str]) -> str:
    """The text with its typed line ends alone made plain."""
    if not pasted:
        return text.replace(CONTINUED, "\n")
    first, *others = pasted
    return first.join(_without_continuations(part, others) for part in text.split(first))
