"""Hugging Face's tokenizer.json: byte-level BPE, and SentencePiece's BPE with byte fallback.

Knows nothing about the other files of a checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.config import MOST_VOCAB
from edgellama.errors import shown
from edgellama.quantize.draft import Draft, refuse, tokens_by_id, unsupported
from edgellama.quantize.pretokenizers import Cutting, recognise
from edgellama.vocab import BYTE, BYTE_TOKEN, LONGEST_TOKEN, MOST_MERGES, NORMAL, UNKNOWN


def read_tokenizer_json(data: Mapping[str, Any], path: Path, notes: list[str]) -> Draft:
    """The vocabulary of a parsed tokenizer.json, without its added tokens.

    Raises TokenizerError, naming the place, for what is damaged; UnsupportedModelError for other
    models than BPE and for pre-tokenizers, normalizers and decoders that are not known exactly.
    """
    model = data.get("model")
    if not isinstance(model, dict):
        refuse(f"{shown(model)} is no model", path, "model")
    kind = model.get("type", "BPE")  # old files leave it out
    if kind != "BPE":
        unsupported(f"{shown(kind)} is not supported; supported: BPE", path, "model.type", kind)
    cutting = recognise(data, path)
    _check_options(model, cutting, path, notes)
    draft = tokens_by_id(vocabulary(model, path), path, "model.vocab")
    merges = _merges(model, draft, path)
    added = {text for _, text, _ in listed_tokens(data, path)}
    draft.add_space_prefix = cutting.add_space_prefix
    if cutting.model == "llama":
        _become_sentencepiece(draft, model, merges, added)
    else:
        draft.pre, draft.add_bos = cutting.pre, cutting.pre == "llama-bpe"
        draft.merges = [f"{left} {right}" for left, right in merges]
    if cutting.sometimes:
        notes.append(
            f"{path.name} puts a space before a text, but not where it begins with one or follows "
            "a special token; GGUF files cannot say so: it is put there too, as SentencePiece does"
        )
    return draft


def vocabulary(model: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Text -> id of `model.vocab`, checked."""
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids:
        refuse(f"{shown(ids)} is not an object of tokens and ids", path, "model.vocab")
    for text, token in ids.items():
        if type(token) is not int or token < 0:
            refuse(f"{shown(text)} has the id {shown(token)}", path, "model.vocab")
        if not 0 < len(text) <= LONGEST_TOKEN:
            problem = f"the token {token} has {len(text)} characters; expected 1..{LONGEST_TOKEN}"
            refuse(problem, path, "model.vocab")
    return ids


def listed_tokens(data: Mapping[str, Any], path: Path) -> list[tuple[int, str, bool]]:
    """(id, text, special) of `added_tokens`, checked."""
    listed = data.get("added_tokens")
    if listed is None:
        return []
    if not isinstance(listed, list):
        refuse(f"{shown(listed)} is not a list", path, "added_tokens")
    return [added_token(token, path, f"added_tokens[{i}]") for i, token in enumerate(listed)]


def added_token(
    token: Any, path: Path, place: str, token_id: int | None = None
) -> tuple[int, str, bool]:
    """(id, text, special) of an added token as Hugging Face's files describe it."""
    if not isinstance(token, dict):
        refuse(f"{shown(token)} is not an object", path, place)
    number = token.get("id") if token_id is None else token_id
    text, special = token.get("content"), token.get("special", False)
    if type(number) is not int or not 0 <= number < MOST_VOCAB:
        refuse(f"the id is {shown(number)}; expected 0..{MOST_VOCAB - 1}", path, place)
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_TOKEN:
        problem = f"the content is {shown(text)}; expected 1..{LONGEST_TOKEN} characters"
        refuse(problem, path, place)
    if not isinstance(special, bool):
        refuse(f"special is {shown(special)}; expected true or false", path, place)
    return number, text, special


def _check_options(
    model: Mapping[str, Any], cutting: Cutting, path: Path, notes: list[str]
) -> None:
    fallback = cutting.model == "llama"
    for key, allowed in (
        ("dropout", (None, 0.0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (True,) if fallback else (None, False)),
        ("ignore_merges", (None, False) if cutting.pre != "llama-bpe" else (None, False, True)),
    ):
        value = model.get(key)
        if not any(value is choice or value == choice for choice in allowed):
            problem = f"{shown(value)} is not supported with this pre-tokenizer"
            unsupported(problem, path, f"model.{key}", value)
    if cutting.pre == "llama-bpe" and not model.get("ignore_merges"):
        notes.append(
            f"{path.name} does not say ignore_merges; words that are tokens are taken whole, "
            "as LLaMA 3's own tokenizer does"
        )


def _merges(model: Mapping[str, Any], draft: Draft, path: Path) -> list[tuple[str, str]]:
    """The merges as pairs; every half and every result is a token, no pair occurs twice."""
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > MOST_MERGES:
        size = len(merges) if isinstance(merges, list) else shown(merges)
        refuse(f"{size} is not a list of 0..{MOST_MERGES} merges", path, "model.merges")
    ids = draft.ids()
    found: dict[tuple[str, str], int] = {}
    for i, merge in enumerate(merges):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if not isinstance(pair, (tuple, list)) or [type(half) for half in pair] != [str, str]:
            refuse(f"{shown(merge)} is not a pair of tokens", path, f"model.merges[{i}]")
        left, right = pair
        for token in (left, right, left + right):
            if token not in ids:
                problem = f"{shown(merge)} needs the token {shown(token)}, which is not there"
                refuse(problem, path, f"model.merges[{i}]")
        if " " in left + right:
            refuse(f"{shown(merge)} has a space inside a token", path, f"model.merges[{i}]")
        if (left, right) in found:
            problem = f"{shown(merge)} stands at [{found[left, right]}] already"
            refuse(problem, path, f"model.merges[{i}]")
        found[left, right] = i
    return list(found)


@dataclass
class _Span:
    """The merges that make one piece: from line `first` to line `last`."""

    first: int
    last: int


def _become_sentencepiece(
    draft: Draft, model: Mapping[str, Any], merges: list[tuple[str, str]], added: set[str]
) -> None:
    """Types and scores as a SentencePiece model would have them."""
    draft.model = "llama"
    for i, text in enumerate(draft.tokens):
        if BYTE_TOKEN.fullmatch(text):
            draft.types[i] = BYTE
    unknown = model.get("unk_token")
    ids = draft.ids()
    if unknown is not None:
        if not isinstance(unknown, str) or unknown not in ids:
            refuse(f"{shown(unknown)} is no token", draft.path, "model.unk_token")
        draft.types[ids[unknown]], draft.special["unk"] = UNKNOWN, ids[unknown]
    spans = _spans(merges)
    _check_every_halving(draft, set(merges), added)
    for text, score in _scores(spans):
        draft.scores[ids[text]] = score


def _spans(merges: list[tuple[str, str]]) -> dict[str, _Span]:
    spans: dict[str, _Span] = {}
    for line, (left, right) in enumerate(merges):
        span = spans.setdefault(left + right, _Span(line, line))
        span.last = line
    return spans


def _scores(spans: Mapping[str, _Span]) -> Iterator[tuple[str, float]]:
    """Piece -> score, falling with its place among the merges.

    SentencePiece compares pieces where merges compare pairs. Pieces whose merges mix had equal
    scores in the SentencePiece model, whose halvings are sorted by other things then.
    """
    score, end = 0.0, -1
    for text, span in spans.items():  # in the order of the first lines
        if span.first > end:
            score -= 1
        end = max(end, span.last)
        yield text, score


def _check_every_halving(draft: Draft, merges: set[tuple[str, str]], added: set[str]) -> None:
    """Scores let any two neighbours join that make a piece: so must the merges."""
    typed = zip(draft.tokens, draft.types, strict=True)
    ids = [text for text, kind in typed if kind == NORMAL and text not in added]
    begins, ends = _longest_beginnings(ids), _longest_ends(ids)
    for text in ids:
        rights = {len(right): right for right in _chain(ends, text)}
        for left in _chain(begins, text):
            right = rights.get(len(text) - len(left))
            if right is not None and (left, right) not in merges:
                _missing(left, right, draft)


def _longest_beginnings(texts: Iterable[str]) -> dict[str, str]:
    """Text -> the longest other one that it begins with, of those that have one; each is read
    once or twice, however long."""
    found: dict[str, str] = {}
    open_texts: list[str] = []  # each begins the next
    for text in sorted(set(texts)):
        while open_texts and not text.startswith(open_texts[-1]):
            open_texts.pop()
        if open_texts:
            found[text] = open_texts[-1]
        open_texts.append(text)
    return found


def _longest_ends(texts: Iterable[str]) -> dict[str, str]:
    """Text -> the longest other one that it ends with."""
    forth = {text[::-1]: text for text in texts}
    return {forth[text]: forth[end] for text, end in _longest_beginnings(forth).items()}


def _chain(parts: Mapping[str, str], text: str) -> Iterator[str]:
    """The longest part of a text, the longest part of that, and so on."""
    while part := parts.get(text):
        yield part
        text = part


def _missing(left: str, right: str, draft: Draft) -> None:
    unsupported(
        f"no merge joins {shown(left)} and {shown(right)}, though {shown(left + right)} is a token:"
        " these merges are not those of a SentencePiece vocabulary",
        draft.path,
        "model.merges",
        f"{left} {right}",
        "Put the model's tokenizer.model beside it",
    )
