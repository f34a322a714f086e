"""What becomes of a text that is too long for the context, where a model continues it.

A text has no turns and no system message: what is left out is its beginning, and "shift" and
"drop-oldest" are the same. Knows nothing about sessions and replies.
"""

from typing import TYPE_CHECKING

from edgellama.errors import ContextOverflow
from edgellama.overflow import REPLY_SHARE, Fitted
from edgellama.reuse import shared_length

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

STEPS = 8  # 1 / of the context goes at a time: what is left stays in the cache for some replies
HINT = "/clear begins another text, /set overflow shift goes on without the beginning of this one"


def fitted_text(
    tokenizer: "Tokenizer",
    text: str,
    last: str,
    *,
    overflow: str,
    context: int,
    max_tokens: int | None,
) -> Fitted:
    """The ids of `text + last` as far as they fit the context, with room for the reply.

    "error" leaves nothing out. The others leave out the beginning, but for BOS, in whole steps;
    and nothing of what was written `last`. The room is that of a chat: a quarter of the context, or
    `max_tokens` if that is less. Raises ContextOverflow.
    """
    bos = tokenizer.add_bos
    ids = tokenizer.encode(text + last, bos=bos)
    room = context - min(context // REPLY_SHARE, max_tokens or context)
    if overflow == "error" and len(ids) > context:
        raise ContextOverflow(len(ids), context, HINT)
    if overflow == "error" or len(ids) <= room:
        return Fitted(ids)
    first, step = int(bos), max(1, context // STEPS)
    most = shared_length(tokenizer.encode(text, bos=bos), ids)  # from here on it is the last
    cut = min(first - (room - len(ids)) // step * step, most, len(ids) - 1)
    while cut < most and _amid_character(tokenizer.token_bytes(ids[cut])):
        cut += 1
    kept = [*ids[:first], *ids[cut:]] if cut > first else ids
    if len(kept) > context:
        hint = "What was written last is too long by itself: shorten it, or take a larger --context"
        raise ContextOverflow(len(kept), context, hint)
    return Fitted(kept, dropped_tokens=len(ids) - len(kept))


def _amid_character(data: bytes) -> bool:
    """Whether the bytes begin with one that continues a character of UTF-8."""
    return bool(data) and data[0] & 0xC0 == 0x80
