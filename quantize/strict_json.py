"""JSON from strangers, read strictly: one meaning or none.

Refuses what Python's reader lets pass: duplicate keys, NaN and infinities, numbers that overflow,
deep nesting, files that are no regular files or larger than such a file can be. Knows nothing
about what the keys mean.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Never

from edgellama.errors import EdgeLlamaError, ModelConfigError, ModelFormatError, shown
from edgellama.regular_file import read_start

LARGEST = 64 * 2**20  # bytes of a configuration or an index
MOST_PARTS = 2**20  # brackets, braces and commas; each costs far more memory than it takes
DEEPEST = 64  # levels of nesting
LONGEST_NUMBER = 400  # characters; a float64 never needs more

_STRING = r'"(?:[^"\\]++|\\.?)*+"?'  # one without an end, too, lest every quote in it begin another
_TOKEN = re.compile(_STRING + r'|[\[\]{}]|[^\s\[\]{}:,"]+', re.DOTALL)
_SHAPE = re.compile(_STRING + r"|[\[\]{}]", re.DOTALL)
_COLON = re.compile(r"\s*:")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|-?Infinity|NaN")


class _Refused(Exception):
    """A number or a key that the hooks of `json` refuse; they do not know where it stands."""

    def __init__(self, problem: str, literal: str | None) -> None:
        self.problem, self.literal = problem, literal


def read_json(path: Path, *, largest: int = LARGEST, parts: int = MOST_PARTS) -> dict[str, Any]:
    """The object that a JSON file holds; UTF-8, a byte-order mark is tolerated.

    Raises ModelConfigError naming line and column, also for a folder, a pipe or a device and for
    more than `largest` bytes; EdgeLlamaError with the system's reason if it cannot be read.
    """
    return parse_json(read_small(path, largest), path, kind=ModelConfigError, parts=parts)


def read_small(path: Path, largest: int) -> bytes:
    """The bytes of a regular file of at most `largest` bytes; errors as `read_json`."""
    raw = read_start(path, largest + 1, ModelConfigError)
    if len(raw) > largest:
        problem = f"more than {largest} bytes, too many for such a file"
        raise ModelConfigError(problem, path=path, allowed=str(largest))
    return raw


def parse_json(
    raw: bytes,
    path: Path,
    where: str | None = None,
    kind: type[EdgeLlamaError] = ModelFormatError,
    parts: int = MOST_PARTS,
) -> dict[str, Any]:
    """The object that `raw` spells; `where` names it within the file ("header").

    Raises `kind` naming line and column of what breaks the rules.
    """
    text = _text(raw, path, where, kind)

    def refuse(problem: str, at: int) -> Never:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        place = f"line {line}, column {column}"
        raise kind(problem, path=path, where=f"{where}, {place}" if where else place)

    _check_shape(text, parts, refuse)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except json.JSONDecodeError as error:
        refuse(f"not JSON: {error.msg}", error.pos)
    except _Refused as error:
        refuse(error.problem, _position(text, error.literal))
    if not isinstance(value, dict):
        refuse(f"{type(value).__name__} instead of an object in braces", 0)
    return value


def _text(raw: bytes, path: Path, where: str | None, kind: type[EdgeLlamaError]) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "UTF-16" if utf16 else f"byte {error.start} is 0x{raw[error.start]:02X}"
        hint = "Save it as UTF-8"
        raise kind(f"not UTF-8 text: {what}", path=path, where=where, hint=hint) from error
    if not text.strip():
        raise kind("it is empty", path=path, where=where)
    return text


def _check_shape(text: str, parts: int, refuse: Callable[[str, int], Never]) -> None:
    """Depth and size, before anything is built of it."""
    if sum(map(text.count, "[{,")) > parts:
        refuse(f"more than {parts} values", 0)
    depth = 0
    for match in _SHAPE.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        if depth > DEEPEST:
            refuse(f"nested deeper than {DEEPEST} levels", match.start())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    times = Counter(key for key, _ in pairs)
    double = next(key for key, count in times.items() if count > 1)
    raise _Refused(f"the key {shown(double)} appears twice in one object", None)


def _no_constant(literal: str) -> Never:
    raise _Refused(f"{literal} is not a number that JSON has", literal)


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise _Refused(f"the number {shown(literal)} is too large", literal)
    return value


def _integer(literal: str) -> int:
    if len(literal) > LONGEST_NUMBER:
        problem = f"a number of {len(literal)} characters; at most {LONGEST_NUMBER} are read"
        raise _Refused(problem, literal)
    return int(literal)


def _position(text: str, literal: str | None) -> int:
    """Where the refused literal stands; without one, where a key repeats. 0 if that is unknown."""
    return next(_repeated_keys(text) if literal is None else _numbers(text, literal), 0)


def _numbers(text: str, literal: str) -> Iterator[int]:
    """Positions of a number that is spelled so, whatever illegal characters follow it."""
    for match in _TOKEN.finditer(text):
        found = _NUMBER.match(match[0])
        if found and found[0] == literal:
            yield match.start()


def _repeated_keys(text: str) -> Iterator[int]:
    """Positions of keys that their object already has, in legal JSON up to there."""
    objects: list[set[str] | None] = []  # one entry a level; None: a list
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            objects.append(set() if token == "{" else None)
        elif token in "]}":
            objects.pop()
        elif token[0] == '"' and _COLON.match(text, match.end()):
            keys, key = objects[-1], json.loads(token)
            if keys is not None and key in keys:
                yield match.start()
            if keys is not None:
                keys.add(key)
