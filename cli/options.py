"""The options that several commands share: one name, one meaning, one EDGELLAMA_* twin each.

Knows nothing about what the commands do with them.
"""

from typing import Annotated, Any

import typer

from edgellama.cli.terminal import Terminal


def _twin(name: str, *shorts: str, help: str, **more: Any) -> Any:
    """An option that the environment can set too: --max-tokens, EDGELLAMA_MAX_TOKENS."""
    envvar = "EDGELLAMA_" + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, *shorts, help=help, envvar=envvar, show_envvar=False, **more)


Runtime = Annotated[str, _twin("--runtime", help="auto, cpu, onnx, reference or llama.cpp.")]
Device = Annotated[str, _twin("--device", help="For onnx: auto, cuda or cpu.")]
Threads = Annotated[
    int | None,
    _twin("--threads", min=1, help="Default: the physical cores."),
]
Context = Annotated[
    int | None,
    _twin("--context", min=1, help="Tokens kept. Default: what fits."),
]
MaxTokens = Annotated[
    int | None,
    _twin("--max-tokens", "-n", min=1, help="Stop after this many."),
]
Temperature = Annotated[
    float,
    _twin("--temperature", "-t", min=0, help="0: always the likeliest."),
]
TopK = Annotated[int, _twin("--top-k", min=0, help="0: off.")]
TopP = Annotated[float, _twin("--top-p", min=0, max=1, help="1: off.")]
MinP = Annotated[float, _twin("--min-p", min=0, max=1, help="0: off.")]
RepetitionPenalty = Annotated[float, _twin("--repetition-penalty", min=0, help="1: off.")]
Seed = Annotated[int | None, _twin("--seed", help="The same seed, the same text.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End before this text; may be repeated."),
]
System = Annotated[str | None, _twin("--system", help="What the model is told to be.")]


def _remember(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    setattr(ctx.ensure_object(Terminal), str(param.name), value)
    return value


def _flag(name: str, help: str) -> Any:
    return _twin(f"--{name}", help=help, callback=_remember)


# Every command takes these three; their values arrive in `ctx.obj`, a Terminal.
Json = Annotated[bool, _flag("json", "Print one JSON document on stdout.")]
Quiet = Annotated[bool, _flag("quiet", "Say nothing but the result.")]
Debug = Annotated[bool, _flag("debug", "Show the traceback of an error.")]
