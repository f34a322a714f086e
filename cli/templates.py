"""`--template NAME|FILE`: which prompt format `run` and `chat` use, and where it is from."""

import os
from dataclasses import dataclass
from pathlib import Path

import edgellama
from edgellama.chat import MOST_TEMPLATE, ChatTemplate
from edgellama.errors import EdgeLlamaError, ParameterError, did_you_mean, shown
from edgellama.formats import ChatFormat
from edgellama.formats_named import FORMATS, format_named
from edgellama.regular_file import unreadable


@dataclass(frozen=True)
class Asked:
    """What --template says, checked before a model is loaded."""

    given: str
    form: ChatFormat | None  # a format by name
    jinja: str | None  # else the text of a file

    @property
    def source(self) -> str:
        what = "the format" if self.form is not None else "the file"
        return f"{what} {self.given}, as --template asks"

    def of(self, model: "edgellama.Model") -> ChatTemplate | ChatFormat:
        if self.jinja is None:
            assert self.form is not None
            return self.form
        tokenizer = model.tokenizer
        return ChatTemplate(
            self.jinja, bos=tokenizer.bos_text, eos=tokenizer.eos_text, path=self.given
        )


def asked_template(given: str | None) -> Asked | None:
    """The option's value. Raises ParameterError if it is neither a format's name nor a file,
    EdgeLlamaError for a file that cannot be read as text.
    """
    if given is None:
        return None
    if given in FORMATS:
        return Asked(given, format_named(given), None)
    if not os.path.isfile(given):  # false, too, for what can be no path
        raise _unknown(given)
    path = Path(given)
    try:
        with path.open("rb") as file:
            text = file.read(4 * MOST_TEMPLATE + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeLlamaError(f"--template {path.name} is not UTF-8: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return Asked(given, None, text)


def _unknown(given: str) -> ParameterError:
    what = "is a folder" if os.path.isdir(given) else "there is no such file"
    problem = f"--template {shown(given)}: {what}, and no format has that name; the formats are "
    hint = did_you_mean(given, FORMATS)
    return ParameterError(problem + ", ".join(FORMATS), field="template", value=given, hint=hint)


def source_of(asked: Asked | None, model: "edgellama.Model") -> str:
    """Where the prompt format is from, and why, in words."""
    return asked.source if asked is not None else model.info.template_source


def template_of(asked: Asked | None, model: "edgellama.Model") -> ChatTemplate | ChatFormat | None:
    """The argument `template` of `model.chat`."""
    return asked.of(model) if asked is not None else None
