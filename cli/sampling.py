"""The sampling options of `run` and `chat`: one for each field of `Sampling`.

Knows nothing about what the fields mean: `edgellama.Sampling` checks them.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import typer

from edgellama.cli import options
from edgellama.errors import ParameterError, shown

SAMPLING: dict[str, Any] = {  # field of Sampling -> its option, in the order of --help
    "temperature": options.Temperature,
    "top_k": options.TopK,
    "top_p": options.TopP,
    "min_p": options.MinP,
    "typical_p": options.TypicalP,
    "top_n_sigma": options.TopNSigma,
    "repetition_penalty": options.RepetitionPenalty,
    "presence_penalty": options.PresencePenalty,
    "frequency_penalty": options.FrequencyPenalty,
    "penalty_window": options.PenaltyWindow,
    "dry_multiplier": options.DryMultiplier,
    "dry_base": options.DryBase,
    "dry_allowed_length": options.DryAllowedLength,
    "dry_window": options.DryWindow,
    "dry_breakers": options.DryBreaker,
    "xtc_probability": options.XtcProbability,
    "xtc_threshold": options.XtcThreshold,
    "mirostat": options.Mirostat,
    "mirostat_tau": options.MirostatTau,
    "mirostat_eta": options.MirostatEta,
    "mirostat_mu": options.MirostatMu,
    "logit_bias": options.LogitBias,
    "order": options.Order,
    "seed": options.Seed,
}
NEEDS = {  # what means nothing unless the other one is given
    **dict.fromkeys(("mirostat_tau", "mirostat_eta", "mirostat_mu"), "mirostat"),
    **dict.fromkeys(("dry_base", "dry_allowed_length", "dry_window"), "dry_multiplier"),
    **{"dry_breakers": "dry_multiplier", "xtc_threshold": "xtc_probability"},
}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options before its `runtime`; it finds their values in ctx.params."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        command(*args, **{name: kwargs[name] for name in kwargs if name not in SAMPLING})

    own = list(inspect.signature(command).parameters.values())
    before = [parameter.name for parameter in own].index("runtime")
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    added = [
        inspect.Parameter(name, kind, default=None, annotation=option)
        for name, option in SAMPLING.items()
    ]
    parameters = [*own[:before], *added, *own[before:]]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapper


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Sampling` that the command's options give; what was not given is left out.

    Raises ParameterError for a --logit-bias that is no ID=NUMBER.
    """
    given = {name: values[name] for name in SAMPLING if values[name] not in (None, [], ())}
    if "logit_bias" in given:
        given["logit_bias"] = dict(bias(text, "--logit-bias") for text in given["logit_bias"])
    if "order" in given:
        steps = (step.strip() for step in given["order"].split(","))
        given["order"] = tuple(step for step in steps if step)
        if not given["order"]:
            problem = "--order names no step"
            raise ParameterError(problem, field="order", hint="Without it, all are taken")
    return given


def check_effect(ctx: typer.Context) -> None:
    """Raises ParameterError for what was typed and has no effect without another option.

    Not for a chat, in which the other one may still be set.
    """
    for name, needed in NEEDS.items():
        if options.typed(ctx, name) and ctx.params[needed] is None:
            raise ParameterError(f"{_option(name)} is for {_option(needed)}", field=name)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-").replace("breakers", "breaker")


def bias(text: str, what: str) -> tuple[int, float]:
    """A token and what is added to its logit. Raises ParameterError, which names `what`."""
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        problem = f"{what} {shown(text)}; expected ID=NUMBER, such as 5=-2.5 or 5=-inf"
        raise ParameterError(problem, field="logit_bias", value=text) from None
