"""Perplexity of a model on a text, and its distance from another model, token by token.

The definition is llama.cpp's: the text's tokens are cut into chunks of 512; each chunk is read
afresh, its first token replaced by BOS where the model wants one; what is scored are the
predictions made in its second half, at positions 256 to 510. Perplexities are comparable only
between files of one vocabulary. Unlike llama.cpp, a base model runs in the same pass, so that its
probabilities are neither stored nor rounded to 16 bits.

Knows nothing about files of models, runtimes or terminals; the formulas are in `distance.py`.
"""

import codecs
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellama.control import CancelToken, Progress
from edgellama.distance import Figures, Scores
from edgellama.errors import (
    ContextOverflow,
    EdgeLlamaError,
    NonFiniteError,
    ParameterError,
    require_integer,
)
from edgellama.model import Model
from edgellama.regular_file import read_start
from edgellama.session import Session
from edgellama.tokenizer import Tokenizer

CONTEXT = 512  # tokens of a chunk
LEAST_CONTEXT = 8
MOST_CHUNKS = 1_000_000_000
MOST_BYTES = 1 << 28  # of a text; encoding takes about seven times as much memory
BYTES_A_TOKEN = 512  # at most, on average over a text
LETTERS_A_TOKEN = 8  # tried first; ordinary texts have three to five
MARGIN = 1024  # tokens by which a text that was cut off must be longer than what is taken of it
BUCKETS = 4  # that a chunk's scored positions are told apart in
READ = 128  # positions whose logits are computed at once: float32 (READ, vocab_size) a model
SCORED = 1 << 19  # logits scored at once, in float64, between two looks at the cancel token


@dataclass(frozen=True)
class Bucket:
    """The figures at some positions of all chunks."""

    first: int  # position within the chunk, of the first prediction
    last: int
    figures: Figures


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text, and how far it is from a base model."""

    context: int  # tokens of a chunk
    chunks: int
    figures: Figures
    buckets: list[Bucket]


def read_text(
    path: "str | os.PathLike[str]", chunks: int | None = None, context: int = CONTEXT
) -> str:
    """A text file as perplexity wants it: UTF-8, one final line break dropped, as llama.cpp does.

    With `chunks`, only as much of its beginning as holds so many chunks of `context` tokens.
    Raises EdgeLlamaError for other bytes or too many, and for a file that cannot be read, a
    folder, pipe or device among them.
    """
    path = Path(path)
    most = MOST_BYTES if chunks is None else BYTES_A_TOKEN * (_needed(chunks, context) + MARGIN)
    data = read_start(path, min(most, MOST_BYTES) + 1, EdgeLlamaError, wanted="a text file")
    whole = len(data) <= most
    if len(data) > MOST_BYTES:
        raise EdgeLlamaError(
            f"the text is longer than {MOST_BYTES} bytes",
            path=path,
            allowed=f"at most {MOST_BYTES} bytes",
            hint="Give a part of it, or take fewer chunks",
        )
    try:  # not as text: that would rewrite line breaks
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise EdgeLlamaError(
            f"is not UTF-8 text: byte {data[error.start]} at {error.start}", path=path
        ) from None
    return text.removesuffix("\n") if whole else text


def chunked(
    tokenizer: Tokenizer, text: str, context: int = CONTEXT, limit: int | None = None
) -> list[list[int]]:
    """The text's ids in chunks of `context`, BOS in each one's first place if the model wants it.

    A rest that fills no chunk is left out; `limit` takes the first chunks only. Raises
    EdgeLlamaError for a text of fewer than two chunks, whatever the limit, as llama.cpp does.
    """
    most = MOST_CHUNKS if limit is None else require_integer("chunks", limit, 1, MOST_CHUNKS)
    bos = tokenizer.bos if tokenizer.add_bos else None
    ids = _first_ids(tokenizer, text, _needed(most, context), bos is not None)
    if len(ids) < 2 * context:
        raise EdgeLlamaError(
            f"the text has {len(ids)} tokens; at least {2 * context} are needed, two chunks",
            field="text",
            value=len(ids),
            allowed=f"at least {2 * context} tokens",
            hint="Give a longer text",
        )
    count = min(len(ids) // context, most)
    chunks = [ids[i * context : (i + 1) * context] for i in range(count)]
    if bos is not None:
        chunks = [[bos, *chunk[1:]] for chunk in chunks]
    return chunks


def _needed(chunks: int, context: int) -> int:
    """Tokens: a text of fewer than two chunks is refused."""
    return max(2, chunks) * context


def _first_ids(tokenizer: Tokenizer, text: str, count: int, bos: bool) -> list[int]:
    """The first `count` ids of the text, or all there are, from no more of it than that takes.

    Where a text is cut off, only the ids next to the cut become others: these are not taken.
    """
    length = LETTERS_A_TOKEN * (count + MARGIN)
    while length < len(text):
        ids = tokenizer.encode(text[:length], bos=bos)
        if len(ids) >= count + MARGIN:
            return ids[:count]
        length *= 2
    return tokenizer.encode(text, bos=bos)


def measure(
    model: Model,
    text: str,
    *,
    base: Model | None = None,
    context: int = CONTEXT,
    chunks: int | None = None,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity of `model` on `text`; with `base`, also its distance from that model.

    context: tokens of a chunk; only 512 gives the usual definition. chunks: how many of the
    text's chunks to score, None for all. progress: (tokens done, tokens in all, what).

    Raises EdgeLlamaError for a text that is too short, ParameterError for a base of another
    vocabulary, ContextOverflow for a model loaded with less context, NonFiniteError, Cancelled.
    """
    require_integer("context", context, LEAST_CONTEXT, 1 << 30)
    models = [model] if base is None else [model, base]
    for one in models:
        if one.info.context < context:
            raise ContextOverflow(context, one.info.context, "Load the model with more context")
    if base is not None:
        _check_vocabulary(model, base)
    cut = chunked(model.tokenizer, text, context, chunks)
    if base is not None and chunked(base.tokenizer, text, context, chunks) != cut:
        raise _other_vocabulary(base, "it encodes the text differently")
    scored = []
    with ExitStack() as opened:
        sessions = [opened.enter_context(closing(one.session())) for one in models]
        for number, chunk in enumerate(cut):
            if progress:
                progress(number * context, len(cut) * context, "scoring")
            scored.append(_score_chunk(sessions, chunk, f"chunk {number + 1}", cancel))
    if progress:
        progress(len(cut) * context, len(cut) * context, "scoring")
    return _quality(Scores.joined(scored), context, len(cut))


def _score_chunk(
    sessions: list[Session], chunk: list[int], where: str, cancel: CancelToken | None
) -> Scores:
    """Of the predictions in the second half; the last token is only ever predicted."""
    first, scored = len(chunk) // 2, []
    at_once = max(1, SCORED // sessions[0].model.config.vocab_size)
    for session in sessions:
        session.truncate(0)
        session.forward(chunk[:first], cancel=cancel)
    for start in range(first, len(chunk) - 1, READ):
        stop = min(start + READ, len(chunk) - 1)
        logits = [s.forward(chunk[start:stop], all_logits=True, cancel=cancel) for s in sessions]
        for session, rows in zip(sessions, logits, strict=True):
            _check_finite(session, rows, f"{where}, position {start}")
        targets = np.asarray(chunk[start + 1 : stop + 1], np.int64)
        for i in range(0, len(targets), at_once):
            if cancel:
                cancel.check("scoring")
            piece = [rows[i : i + at_once] for rows in logits]
            scored.append(Scores.of(piece[0], targets[i : i + at_once], *piece[1:]))
    return Scores.joined(scored)


def _check_finite(session: Session, logits: NDArray[np.float32], where: str) -> None:
    if not np.isfinite(logits).all():
        path = session.model.info.path
        raise NonFiniteError("the logits are not finite from here on", path=path, where=where)


def _check_vocabulary(model: Model, base: Model) -> None:
    """Both must mean the same by every row of their logits."""
    ours, theirs = model.tokenizer, base.tokenizer
    sizes = (model.config.vocab_size, ours.vocab_size)
    if sizes != (base.config.vocab_size, theirs.vocab_size):
        raise _other_vocabulary(base, f"it has {theirs.vocab_size} tokens, not {ours.vocab_size}")
    for token in range(ours.vocab_size):
        if ours.token_text(token) != theirs.token_text(token):
            raise _other_vocabulary(base, f"token {token} is another")


def _other_vocabulary(base: Model, why: str) -> ParameterError:
    return ParameterError(
        f"the base model has another vocabulary: {why}",
        path=base.info.path,
        field="base",
        hint="Compare files made from one model",
    )


def _quality(scores: Scores, context: int, chunks: int) -> Quality:
    first, each = context // 2, context - 1 - context // 2
    positions = np.tile(np.arange(first, context - 1), chunks)
    edges = [first + each * i // BUCKETS for i in range(BUCKETS + 1)]
    buckets = []
    for low, high in pairwise(edges):
        if low < high:
            chosen = (positions >= low) & (positions < high)
            buckets.append(Bucket(low, high - 1, scores.where(chosen).figures()))
    return Quality(context, chunks, scores.figures(), buckets)
