"""What `/set` changes in a chat: how words are chosen, when a reply ends, what a full context does.

Texts in, settings out; `edgellama.Sampling` checks its own fields. Knows nothing about models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from edgellama.cli.reply import Wording
from edgellama.cli.sampling import SAMPLING, bias
from edgellama.control import CancelToken
from edgellama.errors import ParameterError, did_you_mean, require_choice, shown
from edgellama.generate import MOST_TOKENS
from edgellama.overflow import POLICIES, Overflow
from edgellama.sampling import ORDER, Sampling, checked_integer
from edgellama.stop import checked_stops

NAMES = (*SAMPLING, "max_tokens", "stop", "overflow")
DEFAULTS: dict[str, Any] = {
    **{each.name: getattr(Sampling(), each.name) for each in fields(Sampling)},
    "max_tokens": None,
    "stop": (),
    "overflow": "error",
}


@dataclass(frozen=True)
class Settings:
    """How the next reply is to be made."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    overflow: Overflow = "error"

    @classmethod
    def of(cls, wording: Wording, overflow: str) -> Self:
        """From the command line. Raises ParameterError."""
        stop = checked_stops(wording.stop or ())
        return cls(wording.params(), wording.max_tokens, stop, _policy(overflow))

    def limits(self, cancel: CancelToken) -> dict[str, Any]:
        """The arguments of `generate` and `chat` that end a reply."""
        return {"max_tokens": self.max_tokens, "stop": self.stop, "cancel": cancel}

    def value(self, name: str) -> Any:
        return getattr(self.sampling if name in SAMPLING else self, name)

    def changed(self, name: str, text: str) -> Self:
        """With another value of one setting; "default" takes back what was set.

        Raises ParameterError, which names what is allowed.
        """
        value = DEFAULTS[name] if text == "default" else _READERS.get(name, _number)(name, text)
        if name in SAMPLING:
            return replace(self, sampling=replace(self.sampling, **{name: value}))
        return replace(self, **{name: value})

    def document(self) -> dict[str, Any]:
        """All settings that differ from their defaults."""
        return {name: self.value(name) for name in NAMES if self.value(name) != DEFAULTS[name]}


def setting_named(text: str) -> str:
    """The setting meant by `text`. Raises ParameterError."""
    name = text.replace("-", "_").lower()
    if name in NAMES:
        return name
    hint = did_you_mean(name, NAMES) or f"There are {', '.join(NAMES)}"
    raise ParameterError(f"there is no setting {shown(text)}", field="setting", hint=hint)


def line_about(settings: Settings, name: str) -> str:
    value, usual = spelled(settings.value(name)), spelled(DEFAULTS[name])
    return f"{name} = {value}" + (f"   (default {usual})" if value != usual else "")


def spelled(value: Any) -> str:
    """A setting's value, as `/set` would read it."""
    if value in (None, {}, ()):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{token}={number:g}" for token, number in value.items())
    if isinstance(value, tuple):
        steps = value and {*value} <= {*ORDER}
        return ", ".join(value) if steps else json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- reading values -------------------------------------------------------------------------------


def _number(name: str, text: str) -> Any:
    """A number where `text` is one; else the text itself, for Sampling to say what is allowed."""
    if text == "none" and DEFAULTS[name] is None:
        return None
    whole = isinstance(DEFAULTS[name], int) or name == "seed"
    try:
        return int(text) if whole else float(text)
    except ValueError:
        return text


def _count(name: str, text: str) -> int | None:
    if text == "none":
        return None
    value: Any = int(text) if text.isdecimal() and len(text) < 20 else text
    return checked_integer(name, value, 1, MOST_TOKENS)


def _policy(text: str) -> Overflow:
    return require_choice("overflow", text, POLICIES)  # type: ignore[return-value]


def _texts(name: str, text: str) -> tuple[str, ...]:
    """A JSON list of texts, a JSON text, or the text as it stands."""
    if text == "none":
        return ()
    value: Any = text
    if text[0] in '["':
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"{name} is {shown(text)}; expected a text, or a JSON list of texts"
            raise ParameterError(problem, field=name, value=text) from error
    return tuple(value) if isinstance(value, list) else (value,)


def _stops(name: str, text: str) -> tuple[str, ...]:
    return checked_stops(_texts(name, text))


def _bias(name: str, text: str) -> dict[int, float]:
    """ID=NUMBER pairs, with commas or spaces between; "none" for no bias."""
    pairs = [] if text == "none" else text.replace(",", " ").split()
    return dict(bias(pair, name) for pair in pairs)


def _steps(name: str, text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


_READERS: dict[str, Callable[[str, str], Any]] = {
    "max_tokens": _count,
    "overflow": lambda name, text: _policy(text),
    "stop": _stops,
    "dry_breakers": _texts,
    "logit_bias": _bias,
    "order": _steps,
}
