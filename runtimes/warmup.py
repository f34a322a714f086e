"""Compiling kernels ahead of time: which ones a model or a type needs, and for which processors.

Into the cache, or into a folder that an app ships (`EDGELLAMA_KERNELS`). Knows nothing about what
kernels do.
"""

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellama.config import ModelConfig, Rope
from edgellama.control import CancelToken, Progress
from edgellama.errors import ParameterError, shown
from edgellama.ggml import BY_NAME, FLOATS, RUNNABLE
from edgellama.gguf import open_gguf
from edgellama.graph import decoder
from edgellama.output import atomic_output, told_as_output
from edgellama.paths import cache_root, model_path
from edgellama.quantize.plan import FALLBACKS, FILE_TYPES, type_name
from edgellama.runtimes import kernel_cache, levels, shipped_kernels
from edgellama.runtimes.abi import KV_TYPES
from edgellama.runtimes.cpu import batches_of
from edgellama.runtimes.levels import LEVELS, Level
from edgellama.runtimes.program import kernel_names
from edgellama.weights import expected_shapes, model_config

HEAD = ("Q6_K", "Q8_0")  # what the output of a quantized model gets, and where its rows do not fit
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # a mix gives some tensors a larger one
_ARM = ("neon", "generic")
_SMALL = ModelConfig(32, 1, 32, 32, 1, 1, 32, 32, Rope(32))


@dataclass(frozen=True)
class Warmth:
    """What was made ready."""

    folder: Path
    levels: tuple[str, ...]
    types: tuple[str, ...]  # of weights
    kernels: int  # of all levels together
    compiled: int  # those of them that were not in the cache
    bytes: int
    seconds: float


def warm_up(
    models: Sequence["str | os.PathLike[str]"] = (),
    *,
    types: Sequence[str] = (),
    into: Path | None = None,
    levels_wanted: Sequence[str] = (),
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Warmth:
    """Compile the kernels that models, or models of these types (as `quantize` names them), need;
    neither: all.

    levels_wanted: names of instruction sets; none: the one that models run at here, or with `into`
    all of this kind of processor. Raises ParameterError, OutputError, Cancelled, and what reading
    a model's header raises.
    """
    started = time.monotonic()
    kinds = weight_types(models, types)
    chosen = _levels(levels_wanted, everywhere=into is not None)
    if into is not None:
        with told_as_output(into):
            into.mkdir(parents=True, exist_ok=True)
    wanted = {level: kernels_for(kinds, level) for level in chosen}
    count = sum(map(len, wanted.values()))
    compiled = size = done = 0
    for level, names in wanted.items():
        at = done

        def told(step: int, _: int, what: str, at: int = at, level: Level = level) -> None:
            if progress:
                progress(at + step, count, f"{what} for {level.name}")

        found = kernel_cache.kept(names, level)
        made = kernel_cache.objects_of(names, level, told, cancel)
        compiled += len(names) - len(found)
        size += sum(map(len, made.values()))
        if into is not None:
            kernel_cache.ship(made, level, into)
        done += len(names)
    if into is not None:
        _finish(into)
    names_ = tuple(level.name for level in chosen)
    folder = into or cache_root() / "kernels"
    return Warmth(folder, names_, kinds, count, compiled, size, time.monotonic() - started)


def weight_types(
    models: Sequence["str | os.PathLike[str]"], types: Sequence[str]
) -> tuple[str, ...]:
    """The types of weights that occur in models, and in files of types that `quantize` can make."""
    if not models and (not types or [t.lower() for t in types] == ["all"]):
        return RUNNABLE
    found = {kind for name in types for kind in types_of_file(name)}
    for model in models:
        with open_gguf(model_path(os.fspath(model))) as file:
            shapes = expected_shapes(model_config(file))
            found |= {file.tensors[n].type.name for n, shape in shapes.items() if len(shape) > 1}
    unknown = sorted(found - set(RUNNABLE))
    if unknown:
        raise ParameterError(
            f"edgellama does not run the type {shown(unknown[0])}",
            field="types",
            allowed=", ".join(RUNNABLE),
        )
    return tuple(kind for kind in RUNNABLE if kind in found)


def types_of_file(name: str) -> set[str]:
    """Types that the tensors of such a file may have: a mix's larger ones, fallbacks, the head."""
    usual = FILE_TYPES[type_name(name)][1]
    if usual in FLOATS:
        return {usual}
    found = {usual, *HEAD}
    if usual in K_TYPES:
        found.update(K_TYPES[K_TYPES.index(usual) :])
    return found | {FALLBACKS[kind] for kind in found if kind in FALLBACKS}


def kernels_for(types: Iterable[str], level: Level) -> list[str]:
    """Names of the kernels that models with weights of these types need, in any mixture."""
    graph, names = decoder(_SMALL), []
    for kind in types:
        assert kind in BY_NAME, kind
        every = dict.fromkeys(graph.weights, kind)
        for batch in batches_of(level):
            names += kernel_names(graph, every, KV_TYPES, batch)
    return list(dict.fromkeys(names))


def _levels(wanted: Sequence[str], *, everywhere: bool) -> list[Level]:
    arm = platform.machine().lower() in ("aarch64", "arm64")
    possible = [name for name in LEVELS if arm == (name in _ARM) or name == "generic"]
    if [name.lower() for name in wanted] == ["all"] or (everywhere and not wanted):
        return [LEVELS[name] for name in possible]
    for name in wanted:
        if name.lower() not in possible:
            allowed = ", ".join(possible)
            problem = f"levels = {shown(name)}; allowed: {allowed}"
            raise ParameterError(problem, field="levels", value=name, allowed=allowed)
    return [LEVELS[name.lower()] for name in wanted] or [levels.choose()[0]]


def _finish(folder: Path) -> None:
    """Say which sources the kernels are from, and remove those of another release."""
    with atomic_output(folder / shipped_kernels.SOURCES) as output:
        output.write(kernel_cache.sources_digest().encode() + b"\n")
    for file in folder.glob("edgellama_*.o"):
        if not kernel_cache.is_current(file.name):
            file.unlink(missing_ok=True)
