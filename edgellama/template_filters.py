"""What a chat template may do with values, and the budget that pays for it.

Knows nothing about template syntax (`sandbox.py`) or messages. Each filter first pays for what it
is about to make, so that no single call can take the machine's memory.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment
from jinja2.filters import do_float, do_indent, do_int, do_title
from jinja2.runtime import Undefined

STEP = 32  # the price of doing anything at all; a character costs 1
WORK = 16 * 2**20  # units for one rendering, and 32 for each character of the messages
MOST_SECONDS = 2.0  # of CPU time, for one rendering
MOST_BITS = 64  # of an integer
MOST_INDENT = 8  # spaces in JSON

_VIEWS: Any = (type({}.items()), type({}.keys()), type({}.values()))
ITEMIZED: Any = (str, list, tuple, dict, range, Undefined, *_VIEWS)  # what can be looped over


class NotAllowed(Exception):
    """The template does something that templates may not do; the argument says what."""


class Budget:
    """Work that one rendering may still do."""

    def __init__(self, given: int = 0) -> None:
        """`given` is the number of characters to render."""
        self.left = WORK + 32 * given
        self.deadline = time.thread_time() + MOST_SECONDS

    def spend(self, units: int) -> None:
        self.left -= units + STEP
        if self.left < 0 or time.thread_time() > self.deadline:
            raise NotAllowed("it does far more work than a chat needs")

    def charge(self, value: Any) -> Any:
        """Pay for a value that the template made, by its whole size, and return it."""
        self.spend(0)
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise NotAllowed(f"it computes an integer of more than {MOST_BITS} bits")
        elif isinstance(value, list | tuple | dict):
            self.charge_all(value)
        return value

    def charge_all(self, container: Any) -> None:
        """Pay for everything inside; shared parts count each time, as they do when printed."""
        waiting = [container]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, dict):
                self.spend(STEP * len(value))
                waiting += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                self.spend(STEP * len(value))
                waiting += value


def as_text(budget: Budget, value: Any) -> str:
    """What jinja2 would print for a value of the template's own types."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        budget.charge_all(value)
    elif not (value is None or isinstance(value, int | float | Undefined)):
        raise NotAllowed(f"it prints a {type(value).__name__}")
    text = str(value)
    budget.spend(len(text))
    return text


def as_items(budget: Budget, value: Any) -> list[Any]:
    """The items of anything a template may loop over."""
    if not isinstance(value, ITEMIZED):
        raise NotAllowed(f"it loops over a {type(value).__name__}")
    if not isinstance(value, Undefined):
        budget.spend(STEP * len(value))
    return list(value)


def replaced(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    budget.spend(len(text))
    times = text.count(old) if count < 0 else min(count, text.count(old))
    budget.spend(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


def joined(budget: Budget, separator: str, items: Any) -> str:
    texts = [as_text(budget, item) for item in as_items(budget, items)]
    budget.spend(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _tojson(
    env: "Worker",
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: not escaped for HTML, not for ASCII."""
    if not (indent is None or (type(indent) is int and 0 <= indent <= MOST_INDENT)):
        raise NotAllowed(f"tojson with an indent other than 0..{MOST_INDENT}")
    for separator in separators or ():
        if not isinstance(separator, str) or len(separator) > MOST_INDENT:
            raise NotAllowed("tojson with a strange separator")
    env.budget.charge_all(value)
    return json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )


def _default(env: "Worker", value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, Undefined) or (boolean and not value) else value


def _indent(
    env: "Worker", value: Any, width: int = 4, first: bool = False, blank: bool = False
) -> str:
    if type(width) is not int or not 0 <= width <= 64:
        raise NotAllowed("indent by something else than 0..64 spaces")
    text = as_text(env.budget, value)
    env.budget.spend(len(text) + (width + STEP) * (len(text.splitlines()) + 1))
    return do_indent(text, width, bool(first), bool(blank))


def _title(env: "Worker", value: Any) -> str:
    text = as_text(env.budget, value)
    env.budget.spend(STEP * len(text))  # each character may be a word
    return do_title(text)


def _attribute(env: "Worker", item: Any, path: Any) -> Any:
    for part in str(path).split("."):
        item = env.getitem(item, int(part) if part.isdigit() else part)
    return item


def _items_or_none(env: "Worker", value: Any) -> list[Any]:
    """As jinja2's own filters do, which many a template relies on where there are no tools."""
    return [] if value is None else as_items(env.budget, value)


def _map(env: "Worker", value: Any, name: str = "", *args: Any, **options: Any) -> list[Any]:
    items = _items_or_none(env, value)
    if "attribute" not in options:
        if name not in FILTERS:
            raise NotAllowed("map with an unknown filter")
        return [env.budget.charge(FILTERS[name](env, item, *args, **options)) for item in items]
    found = [_attribute(env, item, options["attribute"]) for item in items]
    if "default" not in options:
        return found
    return [options["default"] if isinstance(item, Undefined) else item for item in found]


def _chosen(wanted: bool, by_attribute: bool) -> Callable[..., list[Any]]:
    """select, reject, selectattr, rejectattr."""

    def choose(env: "Worker", value: Any, *args: Any) -> list[Any]:
        path, rest = (args[0], args[1:]) if by_attribute else (None, args)
        kept = []
        for item in _items_or_none(env, value):
            env.budget.spend(0)
            tested = _attribute(env, item, path) if by_attribute else item
            passed = env.call_test(rest[0], tested, rest[1:]) if rest else bool(tested)
            if passed == wanted:
                kept.append(item)
        return kept

    return choose


def _text(function: Callable[..., Any]) -> Callable[..., Any]:
    def act(env: "Worker", value: Any, *args: Any, **options: Any) -> Any:
        return function(as_text(env.budget, value), *args, **options)

    return act


def _sorted(
    env: "Worker",
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    items = as_items(env.budget, value)
    env.budget.charge_all(items)
    paths = [] if attribute is None else str(attribute).split(",")
    env.budget.spend(STEP * len(items) * len(paths))

    def key(item: Any) -> list[Any]:
        parts = [_attribute(env, item, path) for path in paths] or [item]
        if case_sensitive:
            return parts
        return [part.lower() if isinstance(part, str) else part for part in parts]

    return sorted(items, key=key, reverse=bool(reverse))


def _first(env: "Worker", value: Any) -> Any:
    items: Sequence[Any] = as_items(env.budget, value)
    return items[0] if items else env.undefined("the first of no items")


def _last(env: "Worker", value: Any) -> Any:
    items: Sequence[Any] = as_items(env.budget, value)
    return items[-1] if items else env.undefined("the last of no items")


def _reverse(env: "Worker", value: Any) -> Any:
    if isinstance(value, str):
        return value[::-1]
    return as_items(env.budget, value)[::-1]


def _items(env: "Worker", value: Any) -> list[Any]:
    if isinstance(value, Undefined):
        return []
    if not isinstance(value, dict):
        raise NotAllowed("the items of something that is no mapping")
    return list(value.items())


class Worker(Environment):
    """An environment with a budget: what filters are given."""

    budget: Budget


FILTERS: dict[str, Callable[..., Any]] = {
    "trim": _text(str.strip),
    "upper": _text(str.upper),
    "lower": _text(str.lower),
    "title": _title,
    "capitalize": _text(str.capitalize),
    "string": _text(str),
    "safe": _text(str),
    "replace": lambda env, value, *args: replaced(env.budget, as_text(env.budget, value), *args),
    "join": lambda env, value, d="": joined(env.budget, d, value),
    "indent": _indent,
    "tojson": _tojson,
    "default": _default,
    "d": _default,
    "length": lambda env, value: len(value),
    "count": lambda env, value: len(value),
    "first": _first,
    "last": _last,
    "list": lambda env, value: as_items(env.budget, value),
    "reverse": _reverse,
    "sort": _sorted,
    "items": _items,
    "int": lambda env, value, *args: do_int(value, *args),
    "float": lambda env, value, *args: do_float(value, *args),
    "abs": lambda env, value: abs(value),
    "map": _map,
    "select": _chosen(True, False),
    "reject": _chosen(False, False),
    "selectattr": _chosen(True, True),
    "rejectattr": _chosen(False, True),
}
