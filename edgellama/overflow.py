"""What becomes of a conversation that is too long for the context: which messages stay.

Whole turns are left out, never a part of one. A turn is a user's message and all that follows up
to the next one, so that what is left still begins with the user. Knows nothing about tokens but
how many there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgellama.errors import ContextOverflow, require_choice
from edgellama.generate import MOST_TOKENS
from edgellama.sampling import checked_integer

Overflow = Literal["error", "shift", "drop-oldest"]
POLICIES = ("error", "shift", "drop-oldest")
HINT = "Shorten it, let overflow='shift' drop earlier messages, or load a larger context"
REPLY_SHARE = 4  # 1 / of the context is kept free for the reply

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation's ids, and what was left out of it so that they fit."""

    ids: list[int]
    dropped_messages: tuple[int, ...] = ()  # their places in the conversation, counted from 0
    dropped_tokens: int = 0  # ids of the whole conversation less `ids`


def fitted(
    messages: Messages,
    encode: Callable[[Messages], list[int]],
    *,
    overflow: str,
    context: int,
    max_tokens: int | None = None,
) -> Fitted:
    """The conversation as far as it fits the context, with room for the reply.

    "error" drops nothing. "drop-oldest" drops the oldest turns, beginning with the system
    message; "shift" keeps the system message in front. Both drop as few as leave room for a reply
    of `max_tokens`, or of a quarter of the context if that is less or max_tokens is None; and
    never the last turn. A last turn that fits, but not with that room, stays alone.

    Raises ContextOverflow if even the last turn does not fit (with "error": if anything does not),
    ParameterError for another policy, and what `encode` raises.
    """
    require_choice("overflow", overflow, POLICIES)
    reply = context // REPLY_SHARE
    if max_tokens is not None:
        reply = min(reply, checked_integer("max_tokens", max_tokens, 0, MOST_TOKENS))
    ids, room = encode(messages), context - reply
    if overflow == "error" and len(ids) > context:
        raise ContextOverflow(len(ids), context, HINT)
    if overflow == "error" or len(ids) <= room:
        return Fitted(ids)
    kept = _kept(messages, encode, room, keep_system=overflow == "shift")
    if kept is None or len(kept.ids) >= len(ids):  # nothing could be gained
        kept = Fitted(ids)
    if len(kept.ids) > context:
        hint = "The last message alone is too long: shorten it, or load a larger context"
        raise ContextOverflow(len(kept.ids), context, hint)
    return Fitted(kept.ids, kept.dropped_messages, len(ids) - len(kept.ids))


def _kept(
    messages: Messages,
    encode: Callable[[Messages], list[int]],
    room: int,
    *,
    keep_system: bool,
) -> Fitted | None:
    """With as few turns dropped as fit the room, else with all but the last; None without any."""
    first, starts = turns(messages)
    if not keep_system and first:
        first, starts = 0, [0, *starts]

    def without(n: int) -> Fitted:  # the oldest n turns
        stop = starts[n]
        ids = encode([*messages[:first], *messages[stop:]])
        return Fitted(ids, tuple(range(first, stop)))

    if len(starts) < 2:
        return None
    low, high = 1, len(starts) - 1  # the least n that fits is in low..high, if any does
    best = without(high)
    if len(best.ids) > room:
        return best
    while low < high:
        middle = (low + high) // 2
        candidate = without(middle)
        if len(candidate.ids) <= room:
            best, high = candidate, middle
        else:
            low = middle + 1
    return best


def turns(messages: Messages) -> tuple[int, list[int]]:
    """How many system messages are in front, and where each turn behind them starts."""
    first = 0
    while first < len(messages) and messages[first].get("role") == "system":
        first += 1
    starts = [
        at
        for at in range(first, len(messages))
        if at == first or messages[at].get("role") == "user"
    ]
    return first, starts
