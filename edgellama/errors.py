"""The one family of exceptions that edgellama raises for anything a user or a file can cause.

Knows nothing about files, models or terminals: the command line turns these into one line and an
exit status, an embedding app catches them. `assert` is for our own bugs, never for input.
"""

import os
from array import array
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Self

LONGEST_SHOWN = 200  # characters of a file's value that a message repeats
LONGEST_MISSPELT = 40  # characters of a word that a choice is proposed for


def shown(value: object) -> str:
    """A value from a file, made safe to print: escaped, and cut at 200 characters.

    Control and bidirectional characters would otherwise reach the reader's terminal. What is
    longer is cut before it is escaped: a file may declare millions of elements.
    """
    if isinstance(value, (str, bytes, list, array)) and len(value) > LONGEST_SHOWN:
        value, cut = value[:LONGEST_SHOWN], True
    else:
        cut = False
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:
        value = f"an integer of {value.bit_length()} bits"  # Python refuses to spell it out
    text = ascii(value) if isinstance(value, str) else str(value)
    if not text.isascii() or not text.isprintable():
        text = ascii(text)
    return text[:LONGEST_SHOWN] + "..." if cut or len(text) > LONGEST_SHOWN else text


class EdgeLlamaError(Exception):
    """Base of all expected failures.

    A file error also says where: `path`, `where` (a tensor, a key), `field`, the `value` found,
    what is `allowed`, and a `hint` at what to do. Its text form is
    `<file name>: <where>: <problem>. <hint>`.
    """

    _BLANK: ClassVar[tuple[Any, ...]] = ("",)  # what `__init__` takes, to be overwritten

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        where: str | None = None,
        field: str | None = None,
        value: object = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem, self.path, self.where = problem, path, where
        self.field, self.value, self.allowed, self.hint = field, value, allowed, hint
        place = [Path(path).name or str(path)] if path is not None else []  # "." has no name
        place += [where] if where else []
        text = ": ".join([*place, problem])
        super().__init__(f"{text}. {hint}" if hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Made again from its text and attributes, whatever its own `__init__` takes.

        A `value` that cannot leave the process goes as text: a worker's error must arrive.
        """
        state = vars(self) | {"value": _portable(self.value)}
        return _again, (type(self), self.args), state

    def __copy__(self) -> Self:
        copied: Self = _again(type(self), self.args)
        vars(copied).update(vars(self))
        return copied


def _again(kind: type[Any], args: tuple[object, ...]) -> Any:
    """An error whose attributes pickle and copy will bring."""
    error = kind(*kind._BLANK)
    error.args = args
    return error


def _portable(value: object) -> object:
    import pickle

    try:
        pickle.dumps(value)
    except Exception:  # whatever a stranger's object may raise
        return shown(value)
    return value


class ModelFormatError(EdgeLlamaError):
    """The file is damaged or breaks its format's rules."""


class UnsupportedModelError(EdgeLlamaError):
    """The file is legal, but holds something edgellama does not run."""


class UnsafeModelError(EdgeLlamaError):
    """The file asks to run code or to leave its folder."""


class ModelConfigError(EdgeLlamaError):
    """The model's hyper-parameters are impossible or contradict each other or the tensors."""


class TokenizerError(EdgeLlamaError):
    """The tokenizer's data is damaged, or it cannot encode or decode what it was given."""


class TemplateError(EdgeLlamaError):
    """The chat template is damaged, unsafe, over its budget, or refuses the messages."""


class ParameterError(EdgeLlamaError, ValueError):
    """An argument is out of its range; the message names it and what is allowed."""


class ContextOverflow(EdgeLlamaError):
    """The tokens do not fit the context: `need` of them, and the context holds `have`."""

    _BLANK = (0, 0)

    def __init__(self, need: int, have: int, hint: str | None = None) -> None:
        self.need, self.have = need, have
        super().__init__(
            f"{need} tokens do not fit the context of {have}",
            hint=hint or "Shorten the prompt or load the model with a larger context",
        )


class DeviceUnavailable(EdgeLlamaError):
    """The device or runtime asked for cannot be had here; the message says what is missing."""


class OutOfMemory(EdgeLlamaError, MemoryError):
    """What was asked for does not fit the memory available; the message gives both numbers."""


class OutputError(EdgeLlamaError, OSError):
    """Writing failed; an existing output is left as it was."""

    def __str__(self) -> str:  # OSError would format its own argument tuple
        return str(self.args[0])


class Cancelled(EdgeLlamaError):
    """A CancelToken was set while the call ran."""

    def __init__(self, what: str = "the call") -> None:
        super().__init__(f"{what} was cancelled")


class ForkedProcess(EdgeLlamaError):
    """The model was loaded before this process forked; load it in the child."""


class NonFiniteError(EdgeLlamaError):
    """A NaN or an infinity where only finite numbers make sense: in weights or in logits."""


def as_integer(value: object) -> int | None:
    """The integer that a value is, one of NumPy's too; None for anything else, and for bools."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)  # type: ignore[arg-type]  # what it is, is asked here
    except TypeError:
        return None


def require_integer(name: str, value: object, low: int, high: int) -> int:
    """`value` if it is an integer in low..high, else ParameterError naming the parameter."""
    whole = as_integer(value)
    if whole is None or not low <= whole <= high:
        allowed = f"an integer {low}..{high}"
        raise ParameterError(
            f"{name} = {shown(value)}; allowed: {allowed}", field=name, value=value, allowed=allowed
        )
    return whole


def require_path(name: str, value: object) -> str:
    """The text of a path, given as such or as an os.PathLike; else ParameterError."""
    allowed = "a str or an os.PathLike of one"
    try:
        text = os.fspath(value)  # type: ignore[call-overload]  # what it is, is asked here
    except TypeError:
        text = None
    if not isinstance(text, str):
        kind = type(value).__name__ if text is None else f"an os.PathLike of {type(text).__name__}"
        problem = f"{name} is {kind}; allowed: {allowed}"
        raise ParameterError(problem, field=name, value=value, allowed=allowed)
    return text


def require_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """`value` if it is one of the choices, else ParameterError naming the parameter."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(choices)
        raise ParameterError(
            f"{name} = {shown(value)}; allowed: {allowed}",
            field=name,
            value=value,
            allowed=allowed,
            hint=did_you_mean(value, choices, cutoff=0.75),  # gpu is not meant to be cpu
        )
    return value


def did_you_mean(
    value: object, choices: Iterable[str], sign: str = "", *, cutoff: float = 0.6
) -> str | None:
    """A hint at the choice that was misspelt, in whatever case; None where no choice is near.

    sign: what stands before a choice when it is typed. cutoff: how alike both must be, 0..1.
    """
    if not isinstance(value, str) or len(value) > LONGEST_MISSPELT:
        return None
    from difflib import get_close_matches

    names = {choice.upper(): choice for choice in choices}
    close = get_close_matches(value.upper(), names, n=1, cutoff=cutoff)
    return f"Did you mean {sign}{names[close[0]]}?" if close else None
