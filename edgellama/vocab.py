"""A tokenizer's data, read from GGUF metadata and checked once, so that nothing below has to.

Knows nothing about text: `spm.py` and `bpe.py` encode it. Key names: the GGUF specification.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any, Literal

from edgellama.config import MOST_VOCAB
from edgellama.control import CancelToken
from edgellama.errors import TokenizerError, UnsupportedModelError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
MODELS = ("llama", "gpt2")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# Control tokens that end a turn or a text, by the names that released models give them.
END_NAMES = ("</s>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")

# Where a file is silent: the pre-tokenizers whose texts llama.cpp starts with BOS; and the ids that
# SentencePiece and llama.cpp give these tokens, with their types.
BOS_FIRST = ("llama-bpe", "llama3", "llama-v3")
USUAL_IDS = {"bos": (1, CONTROL), "eos": (2, CONTROL), "unknown": (0, UNKNOWN)}

LONGEST_TOKEN = 65_536  # characters; 8 times the longest seen would be 1,024
MOST_SPECIAL = 2**20  # characters of all special tokens together; Llama 3 has 7,000
MOST_MERGES = 16 * 2**20
MERGES_AT_ONCE, MERGES_BETWEEN_LOOKS = 2048, 65_536


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Vocab:
    """The checked vocabulary: `tokens[id]`, `types[id]`, and what text may become."""

    model: Literal["llama", "gpt2"]
    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]  # normal tokens only: plain text can become no other
    specials: Mapping[str, int]  # control, unknown and user-defined tokens
    ranks: Mapping[str, int]  # what merges: piece, or "left right" -> lowest first
    pre: str  # gpt2: name of the pre-tokenizer
    bos: int | None
    eos: tuple[int, ...]
    unk: int | None
    add_bos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    path: str | Path | None = None  # for messages

    def of_type(self, *types: int) -> dict[str, int]:
        return {text: i for text, i in self.specials.items() if self.types[i] in types}


class _Keys:
    """Typed access to `tokenizer.ggml.*`, with errors naming key, index and value."""

    def __init__(
        self, metadata: Mapping[str, Any], path: str | Path | None, cancel: CancelToken | None
    ) -> None:
        self.metadata, self.path, self.cancel = metadata, path, cancel

    def look(self) -> None:
        """Between steps that take long in a large vocabulary. Raises Cancelled."""
        if self.cancel is not None:
            self.cancel.check("reading the vocabulary")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def error(
        self, key: str, problem: str, *, value: object = None, allowed: str = ""
    ) -> Exception:
        field = f"tokenizer.ggml.{key}"
        if allowed:
            problem = f"{problem}; expected {allowed}"
        return TokenizerError(
            problem,
            path=self.path,
            where=f"key '{field}'",
            field=field,
            value=value,
            allowed=allowed or None,
        )

    def at(self, key: str, index: int, value: object, allowed: str) -> Exception:
        """The error for one element of an array."""
        return self.error(key, f"[{index}] is {shown(value)}", value=value, allowed=allowed)

    def array(self, key: str, kind: type, low: int, high: int) -> Sequence[Any]:
        """An array of `low`..`high` elements, every one exactly a `kind` (a bool is no int)."""
        self.look()
        names = {str: "strings", int: "integers", float: "floats"}
        value = self.get(key)
        size = f"{low}..{high}" if low < high else f"{low}"
        allowed = f"array of {size} {names[kind]}"
        if value is None:
            raise self.error(key, "the key is missing", allowed=allowed)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise self.error(key, f"found {type(value).__name__}", value=value, allowed=allowed)
        if not low <= len(value) <= high:
            raise self.error(key, f"found {len(value)} elements", value=len(value), allowed=allowed)
        if set(map(type, value)) - {kind}:
            i = next(i for i, element in enumerate(value) if type(element) is not kind)
            raise self.at(key, i, value[i], allowed)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"found {shown(value)}", value=value, allowed="a bool")
        return value

    def token_id(self, key: str, size: int) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < size:
            raise self.error(
                key, f"found {shown(value)}", value=value, allowed=f"integer 0..{size - 1}"
            )
        return value


def vocab_from_gguf(
    metadata: Mapping[str, Any],
    path: str | Path | None = None,
    *,
    cancel: CancelToken | None = None,
) -> Vocab:
    """Read and check `tokenizer.ggml.*`.

    Raises UnsupportedModelError for a kind of tokenizer that edgellama lacks, TokenizerError,
    naming key, index and value, for data that is missing, mistyped, or contradicts itself;
    Cancelled.
    """
    keys = _Keys(metadata, path, cancel)
    model = _model(keys)
    tokens = _tokens(keys)
    types = _types(keys, len(tokens))
    ids = _ids(keys, tokens)
    specials = _take_specials(keys, ids, types)
    llama = model == "llama"
    ranks = _scores(keys, tokens, ids) if llama else _merges(keys, ids)
    pre = _pre(keys)
    bos, eos, unk = _special_ids(keys, types, llama)
    return Vocab(
        model=model,
        tokens=tokens,
        types=types,
        ids=ids,
        specials=specials,
        ranks=ranks,
        pre=pre,
        bos=bos,
        eos=_ends(keys, eos, specials, types),
        unk=unk,
        add_bos=keys.flag("add_bos_token", llama or pre in BOS_FIRST) and bos is not None,
        add_space_prefix=keys.flag("add_space_prefix", True),
        remove_extra_whitespaces=keys.flag("remove_extra_whitespaces", False),
        path=path,
    )


def _model(keys: _Keys) -> Literal["llama", "gpt2"]:
    model = keys.get("model")
    if model == "llama":
        return "llama"
    if model == "gpt2":
        return "gpt2"
    if model is None:
        raise keys.error("model", "the key is missing", allowed=" or ".join(MODELS))
    raise UnsupportedModelError(
        f"tokenizer {shown(model)} is not supported; supported: " + ", ".join(MODELS),
        path=keys.path,
        where="key 'tokenizer.ggml.model'",
        field="tokenizer.ggml.model",
        value=model,
        allowed=", ".join(MODELS),
    )


def _pre(keys: _Keys) -> str:
    pre = keys.get("pre")
    if pre is not None and not isinstance(pre, str):
        raise keys.error("pre", f"found {shown(pre)}", value=pre, allowed="a string")
    return "default" if pre is None else pre


def _tokens(keys: _Keys) -> Sequence[str]:
    tokens: Sequence[str] = keys.array("tokens", str, 1, MOST_VOCAB)
    if "" in tokens or max(map(len, tokens)) > LONGEST_TOKEN:
        i = next(i for i, token in enumerate(tokens) if not 0 < len(token) <= LONGEST_TOKEN)
        raise keys.at("tokens", i, tokens[i], f"1..{LONGEST_TOKEN} characters")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        i = next(i for i, token in enumerate(tokens) if _has_surrogate(token))
        raise keys.at("tokens", i, tokens[i], "valid UTF-8") from None
    return tokens


def _ids(keys: _Keys, tokens: Sequence[str]) -> dict[str, int]:
    keys.look()
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        i = _first_repeated(tokens)
        raise keys.at("tokens", i, tokens[i], "every token once")
    return ids


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _types(keys: _Keys, size: int) -> Sequence[int]:
    """`token_type`, all normal where the file has none."""
    if keys.get("token_type") is None:
        return [NORMAL] * size
    types: Sequence[int] = keys.array("token_type", int, size, size)
    if not set(types) <= set(range(NORMAL, BYTE + 1)):
        i = next(i for i, kind in enumerate(types) if not NORMAL <= kind <= BYTE)
        raise keys.at("token_type", i, types[i], f"{NORMAL}..{BYTE}")
    return types


def _take_specials(keys: _Keys, ids: dict[str, int], types: Sequence[int]) -> dict[str, int]:
    """Leave only normal tokens in `ids`; return the control, unknown and user-defined ones."""
    specials = {}
    others = [
        (text, i) for (text, i), kind in zip(ids.items(), types, strict=True) if kind != NORMAL
    ]
    for text, i in others:
        del ids[text]
        if types[i] == BYTE and not BYTE_TOKEN.fullmatch(text):
            raise keys.at("tokens", i, text, "<0x00>..<0xFF> for a byte token")
        if types[i] in (CONTROL, UNKNOWN, USER_DEFINED):
            specials[text] = i
    if sum(map(len, specials)) > MOST_SPECIAL:
        raise keys.error("tokens", f"special tokens of more than {MOST_SPECIAL} characters")
    return specials


def _scores(keys: _Keys, tokens: Sequence[str], ids: Mapping[str, int]) -> dict[str, int]:
    """Normal piece -> place of its score: SentencePiece merges the highest score first."""
    scores = keys.array("scores", float, len(tokens), len(tokens))
    if not all(map(math.isfinite, scores)):
        i = next(i for i, score in enumerate(scores) if not math.isfinite(score))
        raise keys.at("scores", i, scores[i], "a finite number")
    order = {score: i for i, score in enumerate(sorted(set(scores), reverse=True))}
    return {piece: order[scores[i]] for piece, i in ids.items()}


def _merges(keys: _Keys, ids: Mapping[str, int]) -> dict[str, int]:
    """Merge "left right" -> its line."""
    merges: Sequence[str] = keys.array("merges", str, 0, MOST_MERGES)
    ranks: dict[str, int] = {}
    for start in range(0, len(merges), MERGES_BETWEEN_LOOKS):
        keys.look()
        some = merges[start : start + MERGES_BETWEEN_LOOKS]
        ranks.update(zip(some, range(start, start + len(some)), strict=True))
    if len(ranks) != len(merges):
        i = _first_repeated(merges)
        raise keys.at("merges", i, merges[i], "every merge once")
    for start in range(0, len(merges), MERGES_AT_ONCE):
        keys.look()
        _check_merges(keys, merges[start : start + MERGES_AT_ONCE], start, ids)
    return ranks


def _check_merges(keys: _Keys, merges: Sequence[str], start: int, ids: Mapping[str, int]) -> None:
    """Whole-array steps over a few thousand lines, which stay in the processor's cache."""
    halves = " ".join(merges).split(" ")
    results = list(map(add, halves[::2], halves[1::2]))
    if [len(result) + 1 for result in results] != list(map(len, merges)):
        i = next(i for i, line in enumerate(merges) if line.count(" ") != 1)
        raise keys.at("merges", start + i, merges[i], "two tokens with one space between them")
    if not all(map(ids.__contains__, halves)):
        i = next(i for i, half in enumerate(halves) if half not in ids) // 2
        raise keys.at("merges", start + i, merges[i], "two normal tokens of the vocabulary")
    if not all(map(ids.__contains__, results)):
        i = next(i for i, result in enumerate(results) if result not in ids)
        raise keys.at("merges", start + i, merges[i], "two tokens that make a normal token")


def _special_ids(keys: _Keys, types: Sequence[int], llama: bool) -> list[int | None]:
    """Those of `USUAL_IDS`: the file's, else in SentencePiece's vocabularies the usual ones.

    llama.cpp takes those blindly. A token that the file says is another is none here: models that
    were trained without BOS have another piece in its place.
    """
    ids = [keys.token_id(f"{name}_token_id", len(types)) for name in USUAL_IDS]
    untyped, named = keys.get("token_type") is None, set(ids)
    for place, (i, kind) in enumerate(USUAL_IDS.values()):
        fits = llama and i < len(types) and i not in named and (untyped or types[i] == kind)
        if ids[place] is None and fits:
            ids[place] = i
    return ids


def _ends(
    keys: _Keys, eos: int | None, specials: Mapping[str, int], types: Sequence[int]
) -> tuple[int, ...]:
    """Ids that end a turn: the file's own keys first, then control tokens known by name."""
    ids = [eos, *(keys.token_id(f"{end}_token_id", len(types)) for end in ("eot", "eom"))]
    named = [specials.get(name) for name in END_NAMES]
    ids += [i for i in named if i is not None and types[i] == CONTROL]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _first_repeated(values: Iterable[str]) -> int:
    seen: set[str] = set()
    for i, value in enumerate(values):
        if value in seen:
            return i
        seen.add(value)
    raise AssertionError("no value is repeated")
