"""The `edgellama` command: what can be typed, and how every command ends.

Each command's work lies in a module of its own, imported when the command runs, so that `--help`
stays quick. Exit status: 0 done, 1 bad file or failed work, 2 bad usage, 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

import edgellama
from edgellama.cli import options, upkeep
from edgellama.cli.background import still_working
from edgellama.cli.sampling import check_effect, with_sampling
from edgellama.cli.terminal import (
    ReaderGone,
    Terminal,
    Terminated,
    abandon_stdout,
    complain,
    prepare_streams,
)
from edgellama.errors import Cancelled, EdgeLlamaError, ParameterError
from edgellama.paths import DEFAULT_MODEL

app = typer.Typer(
    cls=options.Commands,
    help="Run quantized LLaMA-family models on your own machine, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A .gguf file, or the name of a model already pulled.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"edgellama {edgellama.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def pull(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A known model, or ORG/REPO/FILE.gguf.")] = (
        DEFAULT_MODEL
    ),
    source: options.From = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fetch a model into the cache, its checksum verified."""
    from edgellama.cli.pull import pull_model

    path = pull_model(ctx.obj, name, source)
    if ctx.obj.json:
        ctx.obj.document({"name": name, "path": str(path), "bytes": path.stat().st_size})
    else:
        ctx.obj.note(f"{name} is at {path}")


@app.command()
def info(
    ctx: typer.Context,
    file: Model,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what is inside a model file, without running it."""
    from edgellama.cli.info import show_info

    show_info(ctx.obj, file)


@app.command("run")
@with_sampling
def _run(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; from stdin if absent or `-`.")
    ] = None,
    file: options.PromptFile = None,
    separator: options.Separator = None,
    raw: options.Raw = False,
    system: options.System = None,
    template: options.Template = None,
    infill: options.Infill = None,
    suffix_first: options.SuffixFirst = False,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    context: options.Context = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer a prompt, or each of a file; stdout gets the text alone."""
    from edgellama.cli.reply import Running, Wording
    from edgellama.cli.run import Manner, prompts_of, run_prompt, run_prompts

    how, wording = Running.of(ctx.params), Wording.of(ctx.params)
    manner = Manner(how, wording, raw, system, template)
    own = {name for name in ("prompt", "file", "infill") if options.typed(ctx, name)}
    if own:  # what is asked on the command line comes before what the environment asks
        file = file if "file" in own else None
        infill = infill if "infill" in own else None
    _check_together(ctx, file, infill)
    wording.params()  # complains, before anything else is looked at
    check_effect(ctx)
    if infill is not None:
        from edgellama.cli.infill import run_infill

        run_infill(ctx.obj, model, infill, suffix_first=suffix_first, how=how, wording=wording)
    elif file is None:
        run_prompt(ctx.obj, model, prompt, manner)
    elif prompt is not None:
        raise ParameterError("the prompts come from --file; a prompt was given too")
    else:
        run_prompts(ctx.obj, model, prompts_of(ctx.obj, file, separator), manner)


def _check_together(
    ctx: typer.Context, file: Path | None, infill: tuple[Path, Path] | None
) -> None:
    """Refuse what was typed and would have no effect."""
    unfit = ("prompt", "file", "raw", "system", "template")
    if infill is not None and any(options.typed(ctx, name) for name in unfit):
        problem = "--infill takes two files, and no prompt, --file, --raw, --system, --template"
        raise ParameterError(problem)
    if options.typed(ctx, "separator") and (file is None or infill is not None):
        raise ParameterError("--separator is for --file", field="separator")
    if options.typed(ctx, "suffix_first") and infill is None:
        raise ParameterError("--suffix-first is for --infill", field="suffix_first")


@app.command()
@with_sampling
def chat(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A .gguf file or a model's name; default: a small one.")
    ] = None,
    system: options.System = None,
    template: options.Template = None,
    overflow: options.Overflow = "error",
    no_stats: options.NoStats = False,
    markdown: options.Markdown = False,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    context: options.Context = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Talk with a model; without MODEL, with the default one, fetched on first use."""
    from edgellama.cli.chat import start_chat
    from edgellama.cli.reply import Running, Wording

    start_chat(
        ctx.obj,
        model,
        system=system,
        template=template,
        how=Running.of(ctx.params),
        wording=Wording.of(ctx.params),
        overflow=overflow,
        stats=not no_stats,
        markdown=markdown,
    )


@app.command()
def bench(
    ctx: typer.Context,
    model: Model = DEFAULT_MODEL,
    against: options.Against = None,
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    context: options.Context = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure a model's speed and memory here, beside a peer if asked."""
    from edgellama.cli.bench import run_bench
    from edgellama.cli.reply import Running

    run_bench(ctx.obj, model, against=against, how=Running.of(ctx.params))


@app.command()
def perplexity(
    ctx: typer.Context,
    model: Model,
    text: options.Text,
    base: options.Base = None,
    base_runtime: options.BaseRuntime = None,
    chunks: options.Chunks = None,
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    context: options.ChunkTokens = 512,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from a base model."""
    from edgellama.cli.perplexity import show_perplexity
    from edgellama.cli.reply import Running

    how, other = Running.of(ctx.params), base_runtime or runtime
    show_perplexity(ctx.obj, model, text, base=base, how=how, base_runtime=other, chunks=chunks)


@app.command()
def quantize(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="A checkpoint folder, or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The .gguf file to write, or .onnx folder.")],
    type: options.Type,
    strict: options.Strict = False,
    dry_run: options.DryRun = False,
    importance: options.Importance = None,
    calibrate: options.Calibrate = None,
    importance_out: options.ImportanceOut = None,
    certificate: options.Certificate = "full",
    report: options.Report = False,
    text: options.ReportText = None,
    chunks: options.Chunks = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Convert a checkpoint or a GGUF file to another type, as .gguf or as an .onnx folder."""
    from edgellama.cli.quality import Extras
    from edgellama.cli.quantize import Choices, run_quantize

    choices = Choices(type, importance, certificate, strict, threads)
    extras = Extras(calibrate, importance_out, report, text, chunks)
    run_quantize(ctx.obj, source, output, choices, extras, dry_run=dry_run)


@app.command()
def verify(
    ctx: typer.Context,
    file: Model,
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Replay a file's certificate: its checksums, its tokenizer, and what it answers."""
    from edgellama.cli.verify import show_verdict

    show_verdict(ctx.obj, file, runtime=runtime, device=device, threads=threads)


@app.command()
def diff(
    ctx: typer.Context,
    file: Model,
    other: Annotated[
        str | None, typer.Argument(help="Another file of the same shape, for the second runtime.")
    ] = None,
    a: options.A = "cpu",
    b: options.B = "onnx",
    text: options.DiffText = None,
    tolerance: options.Tolerance = None,
    accuracy: options.Accuracy = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Name the first value of the decoder graph where two runtimes, or two files, part."""
    from edgellama.cli.diff import Choices, show_difference

    if options.typed(ctx, "accuracy") and not {a, b} & {"onnx", "onnx:cpu"}:
        problem = "--accuracy is for onnx on the CPU, which neither --a nor --b is"
        raise ParameterError(problem, field="accuracy")
    show_difference(ctx.obj, file, other, Choices(a, b, text, tolerance, accuracy, threads))


for _command in upkeep.COMMANDS:
    app.command()(_command)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    status = _status(arguments)
    try:
        sys.stdout.flush()  # what was written may still fail on its way out
    except OSError as error:
        abandon_stdout()
        if not isinstance(error, BrokenPipeError) and status == 0:
            complain(f"edgellama: stdout cannot be written: {error.strerror or error}")
            status = 1
    return status


def _status(arguments: list[str]) -> int:
    terminal = Terminal()
    try:
        app(arguments, prog_name="edgellama", obj=terminal)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except ReaderGone:
        return 0
    except (KeyboardInterrupt, Cancelled):
        return 130
    except Exception as error:
        if terminal.debug:
            traceback.print_exc()
        complain(f"edgellama: {_one_line(error)}")
        return 2 if isinstance(error, ParameterError) else 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, EdgeLlamaError):
        return text
    if isinstance(error, OSError):
        return text if error.filename is not None else error.strerror or text
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return f"internal error, {type(error).__name__}: {text} (--debug shows where)"


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM and SIGHUP end the program as Ctrl-C does: temporary files are removed."""
    raise Terminated


def main() -> NoReturn:
    prepare_streams()
    for name in ("SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, ValueError):  # not on every platform or thread
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _terminated)
    status = run(sys.argv[1:])
    if still_working():  # a thread inside compiled code must not see the interpreter go away
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
