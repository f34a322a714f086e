"""Finding stop strings in text that arrives in pieces.

Knows nothing about tokens or models. One Knuth-Morris-Pratt automaton per stop string (Knuth,
Morris & Pratt 1977): linear in the text, whatever the strings.
"""

from collections.abc import Sequence
from typing import Any

from edgellama.errors import ParameterError, shown

MOST_STOPS = 64
LONGEST_STOP = 4096  # characters


def checked_stops(stop: Any) -> tuple[str, ...]:
    """`stop` as a tuple; ParameterError unless it is 0..64 strings of 1..4096 characters."""
    allowed = f"a list of up to {MOST_STOPS} strings of 1..{LONGEST_STOP} characters"
    if isinstance(stop, str) or not isinstance(stop, Sequence) or len(stop) > MOST_STOPS:
        many = f"{len(stop)} strings" if isinstance(stop, list | tuple) else shown(stop)
        problem = f"stop is {many}; expected {allowed}"
        raise ParameterError(problem, field="stop", value=stop, allowed=allowed)
    for index, text in enumerate(stop):
        if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_STOP:
            problem = f"stop[{index}] is {shown(text)}; expected {allowed}"
            raise ParameterError(problem, field=f"stop[{index}]", value=text, allowed=allowed)
    return tuple(stop)


class StopMatcher:
    """Lets text through up to the stop string that is complete first.

    Of several that end at the same character, the longest counts. Where the pieces are cut makes
    no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(text) for text in stops]
        self._held = ""  # the beginning of a stop string, perhaps
        self.found: str | None = None  # the stop string that is complete

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certainly before any stop string, and whether one is complete."""
        if not self._automata:
            return text, False
        whole = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            complete = [each.text for each in self._automata if each.push(char)]
            if complete:
                self._held, self.found = "", max(complete, key=len)
                return whole[: end - len(self.found)], True
        sure = len(whole) - max(each.matched for each in self._automata)
        self._held = whole[sure:]
        return whole[:sure], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of one string the text so far ends with."""

    __slots__ = ("fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self.fallback = [0]  # [n]: the longest proper prefix of text[: n + 1] that also ends it
        for char in text[1:]:
            self.fallback.append(self._step(self.fallback[-1], char))

    def push(self, char: str) -> bool:
        """Whether the string is complete with `char`; nothing may be pushed after that."""
        self.matched = self._step(self.matched, char)
        return self.matched == len(self.text)

    def _step(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self.fallback[matched - 1]
        return matched + (self.text[matched] == char)
