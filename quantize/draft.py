"""A vocabulary on its way from a checkpoint's tokenizer file to GGUF metadata.

Knows nothing about files; `vocabularies.py` fills and finishes it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from edgellama.config import MOST_VOCAB
from edgellama.errors import TokenizerError, UnsupportedModelError, shown
from edgellama.vocab import NORMAL, UNUSED

ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # llama.cpp's; only normal pieces are ever merged


@dataclass
class Draft:
    """Tokens by id with their types, and what one file says about them.

    `scores` belong to the model "llama", `merges` and `pre` to "gpt2". `special` holds the ids
    that the file itself gives to "bos", "eos", "unk" and "pad".
    """

    model: Literal["llama", "gpt2"]
    path: Path
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = True
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False

    def extend(self, size: int) -> None:
        """Fill up to `size` tokens with unused ones."""
        for i in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{i}]")
            self.types.append(UNUSED)
            self.scores.append(PADDING_SCORE)

    def place(self, token: int, text: str, kind: int) -> None:
        """Give id `token` a text and a type; a gap before it is filled up."""
        self.extend(token + 1)
        self.tokens[token], self.types[token], self.scores[token] = text, kind, ADDED_SCORE

    def cut(self, size: int) -> None:
        del self.tokens[size:], self.types[size:], self.scores[size:]

    def ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.tokens)}


def tokens_by_id(ids: dict[str, int], path: Path, place: str) -> Draft:
    """A draft of tokens whose ids a file lists by their text; ids it leaves out are unused."""
    highest = max(ids.values(), default=-1)
    if highest >= min(MOST_VOCAB, 2 * len(ids) + 65_536):
        text = next(text for text, i in ids.items() if i == highest)
        refuse(f"{shown(text)} has the id {highest}, beyond {len(ids)} tokens", path, place)
    draft = Draft("gpt2", path, [], [])
    draft.extend(highest + 1)
    seen: dict[int, str] = {}
    for text, i in ids.items():
        if i in seen:
            refuse(f"{shown(seen[i])} and {shown(text)} share the id {i}", path, place)
        seen[i] = text
        draft.tokens[i], draft.types[i], draft.scores[i] = text, NORMAL, 0.0
    return draft


def refuse(problem: str, path: Path, where: str | None = None, hint: str | None = None) -> NoReturn:
    """What is damaged or contradicts itself."""
    raise TokenizerError(problem, path=path, where=where, hint=hint)


def unsupported(problem: str, path: Path, where: str, value: object, hint: str = "") -> NoReturn:
    """What is legal, and nothing here or in GGUF files can express."""
    raise UnsupportedModelError(
        problem, path=path, where=where, field=where, value=value, hint=hint or None
    )
