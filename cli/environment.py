"""What is wrong with the EDGELLAMA_* variables that are set: misspelt, or refused by an option.

Knows nothing about what the options do.
"""

import os
from collections.abc import Iterator
from typing import Any

import typer

import edgellama
from edgellama.cli.options import twin_of
from edgellama.cli.sampling import SAMPLING, settings_of
from edgellama.errors import ParameterError, did_you_mean, shown

OTHERS = ("EDGELLAMA_CACHE", "EDGELLAMA_ISA", "EDGELLAMA_KERNELS")  # read by the library itself
OF_TESTS = "EDGELLAMA_TEST_"


def problems(commands: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong and what to do, of all variables that are set; `commands` by name."""
    twins: dict[str, list[tuple[Any, Any]]] = {}
    for command in commands.values():
        for option in command.params:
            if option.param_type_name == "option":
                twins.setdefault(twin_of(option.opts[0]), []).append((command, option))
    for name, value in sorted(os.environ.items()):
        if not name.startswith("EDGELLAMA_") or name in OTHERS or name.startswith(OF_TESTS):
            continue
        if name not in twins:
            meant = did_you_mean(name, (*twins, *OTHERS), cutoff=0.8)
            yield f"nothing is set by {shown(name)[1:-1]}", meant or "Unset it"
        elif refused := next(filter(None, (_refused(*each) for each in twins[name])), None):
            yield f"{name} is {shown(value)}: {refused}", "Correct it, or unset it"


def _refused(command: Any, option: Any) -> str | None:
    """Why the option of a command cannot take what the environment has for it."""
    ctx = typer.Context(command)
    try:
        value, _ = option.consume_value(ctx, {})
        value = option.process_value(ctx, value)
        if option.name in SAMPLING:
            given = dict.fromkeys(SAMPLING) | {option.name: value}
            edgellama.Sampling(**settings_of(given))
    except typer.BadParameter as error:
        return error.message.removesuffix(".")
    except ParameterError as error:
        return str(error)
    return None
