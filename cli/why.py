"""`/why`: how sure the model was of each token of a reply, and what it would have said instead.

The probabilities are the model's own, before temperature and the other samplers. They are computed
anew, by reading the reply as if it were a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellama.cli.spelling import percent, piece, plural
from edgellama.cli.terminal import Piece
from edgellama.control import CancelToken
from edgellama.reuse import shared_length

if TYPE_CHECKING:
    from edgellama.session import Session
    from edgellama.tokenizer import Tokenizer

BLOCK = 32  # tokens whose logits are in memory together
SURE, UNSURE = 0.5, 0.15  # shares that the colours tell apart
SHOWN, OTHERS = 8, 3  # tokens, and alternatives of one, without being asked for more


@dataclass(frozen=True)
class Choice:
    """One token of a reply among those that could have come."""

    token: int
    share: float  # its probability
    likeliest: tuple[tuple[int, float], ...]  # tokens and probabilities, likeliest first


def choices(
    session: "Session",
    prompt: Sequence[int],
    reply: Sequence[int],
    *,
    count: int,
    cancel: CancelToken,
    progress: Callable[[int, int, str], None],
) -> list[Choice]:
    """Each token of `reply` with the `count` likeliest ones. The session then holds both texts.

    Raises Cancelled, NonFiniteError.
    """
    ids, start = [*prompt, *reply], len(prompt) - 1
    session.truncate(min(shared_length(session.ids, ids), start))
    if session.position < start:
        session.forward(ids[session.position : start], cancel=cancel)
    found: list[Choice] = []
    while len(found) < len(reply):
        progress(len(found), len(reply), "weighing the reply")
        at = start + len(found)
        block = ids[at : min(at + BLOCK, len(ids) - 1)]
        logits = session.forward(block, all_logits=True, cancel=cancel)
        size = session.model.tokenizer.vocab_size
        found += (_choice(row[:size], ids[at + 1 + i], count) for i, row in enumerate(logits))
    return found


def _choice(logits: Any, token: int, count: int) -> Choice:
    import numpy as np

    from edgellama.sampler import normalizer

    largest, spread = normalizer(logits)
    shares = np.exp(logits.astype(np.float64) - largest - spread)
    best = np.argsort(-shares, kind="stable")[:count]
    return Choice(token, float(shares[token]), tuple((int(i), float(shares[i])) for i in best))


# --- for a reader ---------------------------------------------------------------------------------


def overview(tokenizer: "Tokenizer", found: Sequence[Choice], coloured: bool) -> list[Piece]:
    """The reply in colours, and the tokens that the model was least sure of."""
    first = sum(choice.likeliest[0][0] == choice.token for choice in found)
    pieces: list[Piece] = _in_colours(tokenizer, found) if coloured else []
    told = f"Of {plural(len(found), 'token')}, {first} were the model's first choice."
    doubtful = sorted(enumerate(found), key=lambda pair: pair[1].share)[:SHOWN]
    pieces.append((f"{told} It was least sure of:\n", ""))
    pieces += _table(tokenizer, sorted(doubtful, key=lambda pair: pair[0]))
    pieces.append(("\n/why all shows every token, /why N the alternatives of token N", "dim"))
    return pieces


def _in_colours(tokenizer: "Tokenizer", found: Sequence[Choice]) -> list[Piece]:
    stream = tokenizer.stream(special=True)
    return [
        *((stream.push(choice.token), _style(choice)) for choice in found),
        ("\n\n", ""),
        ("green", "good"),
        (f" at least {SURE:.0%} sure, ", "dim"),
        ("yellow", "fair"),
        (" less, ", "dim"),
        ("red", "poor"),
        (f" below {UNSURE:.0%}\n\n", "dim"),
    ]


def table(tokenizer: "Tokenizer", found: Sequence[Choice]) -> list[Piece]:
    return _table(tokenizer, list(enumerate(found)))


def _table(tokenizer: "Tokenizer", rows: Sequence[tuple[int, Choice]]) -> list[Piece]:
    spelled = [piece(tokenizer, choice.token) for _, choice in rows]
    width = min(24, max(map(len, spelled), default=0))
    pieces: list[Piece] = []
    for (index, choice), word in zip(rows, spelled, strict=True):
        others = [pair for pair in choice.likeliest if pair[0] != choice.token][:OTHERS]
        rest = ", ".join(f"{piece(tokenizer, i)} {percent(share)}" for i, share in others)
        pieces += [
            ("\n" if pieces else "", ""),
            (f"{index + 1:>5}  ", "dim"),
            (f"{word:<{width}}", ""),
            (f" {percent(choice.share):>7}", _style(choice)),
            (f"   or {rest}", "dim"),
        ]
    return pieces


def detail(tokenizer: "Tokenizer", found: Sequence[Choice], number: int) -> list[Piece]:
    """All that is known of one token: a bar for each of the likeliest, itself marked."""
    choice = found[number - 1]
    before = tokenizer.decode([c.token for c in found[max(0, number - 13) : number - 1]])
    pieces: list[Piece] = [(f"Token {number} of {len(found)}, after {before!r}:", "")]
    candidates = dict(choice.likeliest) | {choice.token: choice.share}
    words = {token: piece(tokenizer, token) for token in candidates}
    width = min(24, max(map(len, words.values())))
    for token, share in candidates.items():
        said = token == choice.token
        bar = "#" * round(30 * share)
        text = f"\n {'>' if said else ' '} {words[token]:<{width}} {percent(share):>7}  {bar}"
        pieces.append((text, _style(choice) if said else ""))
    return pieces


def _style(choice: Choice) -> str:
    if choice.share >= SURE:
        return "good"
    return "fair" if choice.share >= UNSURE else "poor"
