"""The commands about a machine rather than a text: estimate, doctor, warmup.

`main.py` adds them to the others; each one's work lies in a module of its own.
"""

from typing import Annotated

import typer

from edgellama.cli import options


def estimate(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="A model file or folder, or a model's name.")],
    kv_type: options.KvType = "f16",
    runtime: options.Runtime = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    context: options.EstimatedContext = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what a model will need in memory, without loading it."""
    from edgellama.cli.estimate import show_estimate
    from edgellama.cli.reply import Running

    show_estimate(ctx.obj, file, Running.of(ctx.params), kv_type)


def doctor(
    ctx: typer.Context,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what edgellama finds here, what is wrong with it, and what to do."""
    from edgellama.cli.doctor import show_findings

    show_findings(ctx.obj)


def warmup(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(help="Models whose kernels to compile; default: all.")
    ] = None,
    types: options.Types = None,
    into: options.Into = None,
    levels: options.Levels = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compile kernels ahead of time, into the cache or into a folder that an app ships."""
    from edgellama.cli.warmup import run_warmup

    run_warmup(ctx.obj, models or [], types=types, into=into, levels=levels)


COMMANDS = (estimate, doctor, warmup)
