"""Added tokens, special ids and chat templates: what the JSON files beside a vocabulary say.

Knows nothing about how text is cut and merged. Sources: the files that Hugging Face's libraries
write; the GGUF specification for the keys.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edgellama.chat import MOST_TEMPLATE
from edgellama.errors import EdgeLlamaError, TokenizerError, shown
from edgellama.quantize.draft import Draft, refuse
from edgellama.quantize.strict_json import parse_json, read_small
from edgellama.quantize.tokenizer_json import added_token, listed_tokens
from edgellama.vocab import (
    BYTE,
    CONTROL,
    END_NAMES,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

LARGEST, MOST_PARTS = 128 * 2**20, 8 * 2**20  # bytes and values of a tokenizer.json
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}
# Code Llama's tokens for filling in, under the keys that llama.cpp reads.
INFILL = {"prefix": "▁<PRE>", "suffix": "▁<SUF>", "middle": "▁<MID>", "eot": "▁<EOT>"}
PADDING_NAMES = re.compile(r"\[PAD\d*\]|<pad>|<\|pad\|>")
# What llama.cpp takes for a control token whatever the files say.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<pad>|<mask>|<unused.*>", re.DOTALL)


class Folder:
    """The JSON files of a checkpoint's folder, each read once and only when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, name: str) -> Path | None:
        """The path of a file of the folder, None without the file."""
        path = self.path / name
        try:
            return path if path.exists() else None
        except OSError as error:
            raise EdgeLlamaError(f"cannot be read: {error.strerror}", path=path) from error

    def read(self, name: str) -> dict[str, Any]:
        """The object in a file, empty without the file."""
        path = self.find(name)
        if path is None:
            return {}
        return parse_json(read_small(path, LARGEST), path, kind=TokenizerError, parts=MOST_PARTS)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        return self.read("tokenizer.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return self.read("tokenizer_config.json")

    @cached_property
    def special_tokens_map(self) -> dict[str, Any]:
        return self.read("special_tokens_map.json")

    @cached_property
    def added_tokens(self) -> dict[str, Any]:
        return self.read("added_tokens.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.read("config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self.read("generation_config.json")

    @cached_property
    def params(self) -> dict[str, Any]:
        return self.read("params.json")

    def flag(self, key: str) -> bool | None:
        """A switch of tokenizer_config.json; None where it is absent or null."""
        value = self.tokenizer_config.get(key)
        if value is not None and not isinstance(value, bool):
            problem = f"found {shown(value)}; expected true or false"
            refuse(problem, self.path / "tokenizer_config.json", key)
        return value

    def named(self, name: str) -> tuple[str, Path] | None:
        """The text of a special token ("bos", "eos", ...) and the file that names it."""
        for file in ("tokenizer_config", "special_tokens_map"):
            value = getattr(self, file).get(f"{name}_token")
            text = value.get("content") if isinstance(value, dict) else value
            path = self.path / f"{file}.json"
            if text is not None and not isinstance(text, str):
                refuse(f"found {shown(value)}; expected a token's text", path, f"{name}_token")
            if text:
                return text, path
        return None


def added_tokens(folder: Folder) -> Iterator[tuple[int, str, bool, Path, str]]:
    """(id, text, special, file, place) of every added token; a later one overrides."""
    path = folder.path / "tokenizer.json"
    for i, (token, text, special) in enumerate(listed_tokens(folder.tokenizer, path)):
        yield token, text, special, path, f"added_tokens[{i}]"
    path = folder.path / "added_tokens.json"
    for text, token in folder.added_tokens.items():
        place = shown(text)
        token, text, _ = added_token({"id": token, "content": text}, path, place)
        yield token, text, False, path, place
    path = folder.path / "tokenizer_config.json"
    listed = folder.tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        refuse(f"found {shown(listed)}; expected an object", path, "added_tokens_decoder")
    for key, value in listed.items():
        place = f"added_tokens_decoder[{shown(key)}]"
        if not re.fullmatch("[0-9]{1,9}", key):
            refuse("the key is no id", path, place)
        token, text, special = added_token(value, path, place, int(key))
        yield token, text, special, path, place


def _note_trimming(folder: Folder, notes: list[str]) -> None:
    """Say which added tokens swallow the spaces beside them: readers of GGUF files do not."""
    listed = folder.tokenizer_config.get("added_tokens_decoder") or {}
    every = [*(folder.tokenizer.get("added_tokens") or ()), *listed.values()]
    flags = ("lstrip", "rstrip", "single_word")
    texts = {shown(token["content"]) for token in every if any(token.get(f) for f in flags)}
    if texts:
        few = ", ".join(sorted(texts)[:3])
        notes.append(
            f"{few}{' ...' * (len(texts) > 3)} take spaces beside them away, or need them there; "
            "GGUF files cannot say so"
        )


def place_added_tokens(draft: Draft, folder: Folder, rows: int, notes: list[str]) -> dict[int, str]:
    """Put the added tokens among the others; return those that have no row in the embedding."""
    beyond: dict[int, str] = {}
    named = special_texts(folder)
    first_new, placed = len(draft.tokens), set()
    for token, text, special, path, place in added_tokens(folder):
        if token >= rows:
            beyond[token] = text
            continue
        control = special or text in named or _LOOKS_SPECIAL.fullmatch(text) is not None
        if token < first_new and token not in placed:
            _check_replaced(draft, token, text, path, place, notes)
        elif token in placed and draft.tokens[token] != _stored(text, draft.types[token]):
            problem = f"the id {token} is {shown(text)} here and {shown(draft.tokens[token])}"
            refuse(f"{problem} elsewhere", path, place)
        same = token < len(draft.tokens) and draft.tokens[token] == text
        if same and draft.types[token] in (UNKNOWN, BYTE, CONTROL):
            placed.add(token)
            continue
        kind = CONTROL if control else USER_DEFINED
        draft.place(token, _stored(text, kind), kind)
        placed.add(token)
    _note_trimming(folder, notes)
    return beyond


def _stored(text: str, kind: int) -> str:
    """User-defined tokens are compared with text before its spaces are replaced."""
    return text.replace("\u2581", " ") if kind == USER_DEFINED else text


def _check_replaced(
    draft: Draft, token: int, text: str, path: Path, place: str, notes: list[str]
) -> None:
    """An added token may rename a special or unused one, never take the id of a word."""
    old = draft.tokens[token]
    if old == text:
        return
    if draft.types[token] in (NORMAL, BYTE):
        problem = f"the id {token} of {shown(text)} is that of {shown(old)}"
        refuse(problem, path, place)
    if draft.types[token] != UNUSED:
        notes.append(f"{path.name} renames token {token} from {shown(old)} to {shown(text)}")
    draft.types[token] = UNUSED


def special_texts(folder: Folder) -> set[str]:
    """Texts that the folder's files give a role: they are never part of plain text."""
    found = set()
    for name in (*ID_KEYS, "sep", "cls", "mask"):
        named = folder.named(name)
        found |= {named[0]} if named else set()
    for listed in (folder.tokenizer_config, folder.special_tokens_map):
        more = listed.get("additional_special_tokens")
        for value in more if isinstance(more, list) else ():
            text = value.get("content") if isinstance(value, dict) else value
            found |= {text} if isinstance(text, str) else set()
    return found


def mark_special(draft: Draft, folder: Folder) -> None:
    """Tokens that have a role are control tokens, also where the vocabulary holds them as words."""
    texts = special_texts(folder)
    for i, (text, kind) in enumerate(zip(draft.tokens, draft.types, strict=True)):
        if kind in (NORMAL, USER_DEFINED) and text in texts:
            draft.types[i] = CONTROL


class Ids:
    """Finds the ids of special tokens, by name or by number."""

    def __init__(
        self, draft: Draft, folder: Folder, beyond: Mapping[int, str], notes: list[str]
    ) -> None:
        self.draft, self.folder, self.beyond, self.notes = draft, folder, beyond, notes
        self.by_text = draft.ids()
        self._found = {name: token for name in ID_KEYS if (token := self._one(name)) is not None}

    def text(self, name: str) -> str | None:
        """The text of "bos", "eos", "unk" or "pad"."""
        token = self._found.get(name)
        return None if token is None else self.draft.tokens[token]

    def _one(self, name: str) -> int | None:
        token = self._named(name)
        if token is None:
            token = self.draft.special.get(name)
        return next(self._numbered(name), None) if token is None else token

    def keys(self) -> dict[str, Any]:
        """The GGUF keys `tokenizer.ggml.*_token_id`, without the prefix."""
        found: dict[str, Any] = {ID_KEYS[name]: token for name, token in self._found.items()}
        found |= self._ends()
        for name, text in INFILL.items():
            if text in self.by_text:
                found.setdefault(f"{name}_token_id", self.by_text[text])
        return found

    def _named(self, name: str) -> int | None:
        named = self.folder.named(name)
        if named is None:
            return None
        text, path = named
        token = self.by_text.get(text)
        if token is None and text not in self.beyond.values():
            self.notes.append(f"{path.name} names {shown(text)} as {name}_token, which has no id")
        return token

    def _numbered(self, name: str) -> Iterator[int]:
        """Ids from config.json and generation_config.json, which may list several."""
        for file in ("config", "generation_config"):
            path, key = self.folder.path / f"{file}.json", f"{name}_token_id"
            value = getattr(self.folder, file).get(key)
            for token in value if isinstance(value, list) else [value]:
                size = len(self.draft.tokens)
                none = token is None or (name == "pad" and type(token) is int and token == -1)
                if none or (name == "pad" and type(token) is int and token in self.beyond):
                    continue
                if type(token) is not int or not 0 <= token < size:
                    refuse(f"found {shown(token)}; expected 0..{size - 1}", path, key)
                yield token

    def _ends(self) -> dict[str, int]:
        """Further ids that end a turn: readers know many by name, two more have keys."""
        draft, slots, ends = self.draft, ["eot_token_id", "eom_token_id"], {}
        for token in dict.fromkeys(self._numbered("eos")):
            text = draft.tokens[token]
            if token == self._found.get("eos") or (
                text in END_NAMES[1:] and draft.types[token] == CONTROL
            ):
                continue
            if token in (self._found.get("bos"), self._found.get("unk")):
                self.notes.append(f"{shown(text)} is said to end texts, which is not believed")
            elif slots:
                ends[slots.pop(0)] = token
            else:
                self.notes.append(f"{shown(text)} ends texts too, which GGUF files cannot say")
        return ends


def chat_templates(folder: Folder, notes: list[str]) -> dict[str, str | list[str]]:
    """`tokenizer.chat_template` and, for named ones, `tokenizer.chat_template.NAME`.

    chat_template.jinja goes before tokenizer_config.json, as in Hugging Face's library.
    """
    path = folder.path / "tokenizer_config.json"
    found = _listed_templates(folder.tokenizer_config.get("chat_template"), path)
    path = folder.path / "chat_template.json"
    found |= _listed_templates(folder.read(path.name).get("chat_template"), path)
    jinja, more = folder.find("chat_template.jinja"), folder.find("additional_chat_templates")
    files = {"default": jinja} if jinja else {}
    files |= {file.stem: file for file in sorted(more.glob("*.jinja"))} if more else {}
    for name, file in files.items():
        text = _template_file(file)
        if found.get(name, text) != text:
            notes.append(f"{file.name} is taken, not the chat template of tokenizer_config.json")
        found[name] = text
    return _template_keys(found)


def _template_keys(found: dict[str, str]) -> dict[str, str | list[str]]:
    keys: dict[str, str | list[str]] = {}
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in found.items()}
    default = named.pop("default", None)
    for name, text in named.items():
        keys[f"tokenizer.chat_template.{name}"] = text
    if named:
        keys["tokenizer.chat_templates"] = sorted(named)
    if default is not None:
        keys["tokenizer.chat_template"] = default
    return keys


def _listed_templates(value: Any, path: Path) -> dict[str, str]:
    """One template, or a list of them with names."""
    if value is None:
        return {}
    listed = value if isinstance(value, list) else [{"name": "default", "template": value}]
    found = {}
    for i, item in enumerate(listed):
        name = item.get("name") if isinstance(item, dict) else None
        text = item.get("template") if isinstance(item, dict) else None
        place = f"chat_template[{i}]" if isinstance(value, list) else "chat_template"
        if not isinstance(name, str) or not isinstance(text, str) or len(name) > 64:
            refuse(f"found {shown(item)}; expected a name and a template", path, place)
        found[name] = _checked_template(text, path, place)
    return found


def _template_file(path: Path) -> str:
    try:
        text = read_small(path, 4 * MOST_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start} is not UTF-8", path)
    return _checked_template(text, path, "the template")


def _checked_template(text: str, path: Path, place: str) -> str:
    if len(text) > MOST_TEMPLATE:
        refuse(f"{len(text)} characters; at most {MOST_TEMPLATE} are allowed", path, place)
    if any("\ud800" <= character <= "\udfff" for character in text):
        refuse("it holds a lone surrogate", path, place)
    return text
