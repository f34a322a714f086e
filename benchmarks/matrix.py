"""The whole comparison in one command: shapes and types, runtimes, the machine's own limits.

    python benchmarks/matrix.py [--quick] [--shapes S ...] [--types T ...] [--model FILE.gguf ...]
        [--runtimes R ...] [--levels L ...] [--parts P ...] [--threads N] [--folder DIR] [--clean]
        [--json FILE] [--resume] [--plot FILE.png]
    python benchmarks/matrix.py --table FILE.json [--plot FILE.png]

Everything is paired in one run: subjects are loaded side by side, each in a process of its own,
and take turns with each other and with the limits. The JSON file is written anew after every cell,
so an interrupted run leaves what it has; --resume adds what is missing. docs/benchmarks.md
describes the figures and the JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import limits
import report
import synthetic
from cells import FAILURES, Cost, Effort, Given, speed, with_context, with_threads
from subject import RUNTIMES, Spec

from edgellama.errors import EdgeLlamaError
from edgellama.ggml import RUNNABLE
from edgellama.machine import usable_cores
from edgellama.measure import CONTEXT, machine
from edgellama.output import atomic_output
from edgellama.paths import DEFAULT_MODEL, cache_root, model_path
from edgellama.runtimes import levels

DEFAULT = (  # shape, type
    ("smollm2-135m", "Q4_0"),
    ("smollm2-135m", "Q8_0"),
    ("llama-3.2-1b", "Q4_0"),
    ("llama-3.2-1b", "Q4_K"),
    ("llama-3.2-1b", "Q8_0"),
    ("llama-2-7b", "Q4_0"),
)
QUICK = DEFAULT[:1]
LEVELS = ("avx512vnni", "avx2")  # forced by default, where they are not the best anyway
QUICK_BUFFER = 2**28  # bytes read to measure the bandwidth
PARTS = ("files", "by_threads", "by_context")
SMALL, MIDDLE = 500_000_000, 3_000_000_000  # parameters
POSITIONS, QUICK_POSITIONS = (0, 2048, 8192), (0, 512)
PACKAGES = ("edgellama", "numpy", "numba", "llvmlite", "llama-cpp-python", "onnxruntime")


@dataclass(frozen=True)
class Entry:
    """A file to measure, by what the tables call it."""

    model: str
    type: str  # "" for a file that is not ours
    path: Path
    write: Callable[[], object] = lambda: None  # unless it is there

    @property
    def label(self) -> str:
        return f"{self.model} {self.type}".strip()


def entries(given: argparse.Namespace) -> list[Entry]:
    pairs: list[tuple[str, str]] = list(QUICK if given.quick else DEFAULT)
    if given.shapes or given.types or given.model:
        types = given.types or ["Q4_0"]
        shapes = given.shapes or (["smollm2-135m"] if given.types else [])
        pairs = [(shape, kind) for shape in shapes for kind in types]
    files = [Entry(path.stem, "", path) for path in given.model]
    return [_synthetic(given.folder, *pair) for pair in pairs] + files


def _synthetic(folder: Path, shape: str, kind: str) -> Entry:
    """SmolLM2's shape gets its true vocabulary where the model has been pulled."""
    vocabulary = None
    if shape == "smollm2-135m":
        try:
            vocabulary = model_path(DEFAULT_MODEL)
        except EdgeLlamaError:
            vocabulary = None
    facts = (folder, shape, kind, vocabulary)
    path = synthetic.cached_path(*facts)
    return Entry(shape, kind, path, lambda: synthetic.cached(*facts))


def effort(cost: Cost, given: argparse.Namespace) -> Effort:
    """The larger the model, the less of it."""
    if cost.parameters < SMALL:
        chosen = Effort(prefill=512, decode=64, rounds=7, cold_rounds=5)
    elif cost.parameters < MIDDLE:
        chosen = Effort(prefill=256, decode=32, rounds=4, cold_rounds=3)
    else:
        chosen = Effort(prefill=128, decode=16, rounds=3, cold_rounds=2, batches=5)
    chosen = replace(chosen, prefill=min(chosen.prefill, cost.context_length))
    if given.quick:
        chosen = replace(chosen, rounds=2, cold_rounds=1, batches=3)
    return replace(chosen, rounds=given.rounds or chosen.rounds)


Work = Callable[[Spec, Cost], dict[str, Any]]
Job = tuple[str, Entry, Work]  # part, file, work


def jobs(given: argparse.Namespace, shared: Given) -> Iterator[Job]:
    """What to measure, part by part. Scaling takes one small and one middle-sized Q4_0 file."""
    files = entries(given)
    plain = [e for e in files if e.type == "Q4_0"] or files
    scaled = {e.model: e for e in plain if e.model != "llama-2-7b"} or {e.model: e for e in plain}
    if "files" in given.parts:
        yield from (("files", e, _speed(given, shared, files[:i], e)) for i, e in enumerate(files))
    if "by_threads" in given.parts and given.threads > 1:
        counts = (1, given.threads)
        yield from (
            (
                "by_threads",
                e,
                lambda spec, cost: with_threads(
                    spec, _less(effort(cost, given)), counts, given.runtimes
                ),
            )
            for e in scaled.values()
        )
    if "by_context" in given.parts:
        positions = QUICK_POSITIONS if given.quick else POSITIONS
        last = list(scaled.values())[-1]
        yield (
            "by_context",
            last,
            lambda spec, cost: with_context(
                spec,
                cost,
                replace(_less(effort(cost, given)), decode=16),
                positions,
                given.runtimes,
            ),
        )


def _speed(given: argparse.Namespace, shared: Given, before: list[Entry], entry: Entry) -> Work:
    """Compiling takes as long for any file of a type: the first one shows it."""
    first = shared.first_use and entry.type not in [e.type for e in before if e.type]
    own = replace(shared, first_use=first)
    return lambda spec, cost: speed(spec, cost, effort(cost, given), own)


def _less(full: Effort) -> Effort:
    return replace(full, rounds=min(full.rounds, 3))


# --- the run ------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure everything asked for; the document is on the disk whenever a cell is done."""
    document = _resumed(given.json) if given.resume else {}
    tell("the machine's limits")
    best = levels.choose()[0].name
    forced = [x for x in given.levels if x in levels.available() and x != best]
    bounds = limits.Limits(given.threads, (best, *forced), QUICK_BUFFER if given.quick else None)
    shared = Given(given.runtimes, forced, bounds, first_use=not given.quick)
    if not document:
        document.update(
            {
                "format": 1,
                "machine": machine() | {"last_cache_bytes": limits.last_cache_bytes()},
                "versions": versions(),
                "threads": given.threads,
                "level": best,
                "quick": given.quick,
                "limits": {k: dataclasses.asdict(v) for k, v in limits.measure(bounds).items()},
            }
            | {part: {} for part in PARTS}
        )
    for part, entry, work in jobs(given, shared):
        done = document[part].get(entry.label)
        if done is None or "error" in done:
            tell(f"{part}: {entry.label}")
            document[part][entry.label] = cell(entry, work, given)
            save(given.json, document)
    if given.clean:
        for entry in entries(given):
            if entry.type:
                entry.path.unlink(missing_ok=True)
    return document


def cell(entry: Entry, work: Work, given: argparse.Namespace) -> dict[str, Any]:
    """One cell; what fails says so in its place."""
    started = time.perf_counter()
    names = {"model": entry.model, "type": entry.type}
    try:
        entry.write()
        cost = Cost.of(entry.path)
        spec = Spec(entry.path, "edgellama", given.threads, min(CONTEXT, cost.context_length))
        found = work(spec, cost)
    except FAILURES as error:
        tell(f"{entry.label}: {error}")
        return names | {"error": f"{type(error).__name__}: {error}"}
    return names | found | {"seconds": time.perf_counter() - started}


def versions() -> dict[str, str]:
    """Of the packages that matter, those installed."""
    found = {"python": machine()["python"]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(path: Path, document: dict[str, Any]) -> None:
    with atomic_output(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def _resumed(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the whole matrix.")
    add = parser.add_argument
    add("--quick", action="store_true", help="one small file, few rounds: does everything work?")
    add("--shapes", nargs="+", choices=synthetic.SHAPES, default=[], help="synthetic models")
    add("--types", nargs="+", choices=RUNNABLE, type=str.upper, default=[], help="of the shapes")
    add("--model", nargs="+", type=Path, default=[], help="real files to measure")
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    add("--levels", nargs="*", choices=levels.LEVELS, default=LEVELS, help="forced, besides")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--threads", type=int, default=usable_cores())
    add("--rounds", type=int, help="of each file; default by its size")
    add("--folder", type=Path, default=cache_root() / "synthetic", help="of synthetic files")
    add("--clean", action="store_true", help="remove the synthetic files at the end")
    add("--json", type=Path, default=Path("matrix.json"))
    add("--resume", action="store_true", help="keep the cells that the JSON file has")
    add("--table", type=Path, metavar="JSON", help="measure nothing: print this run's tables")
    add("--plot", type=Path, help="draw the figures into a .png or .svg file")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    given, status = arguments(words), 0
    if given.table:
        document = json.loads(given.table.read_text("utf-8"))
    else:
        try:
            document = run(given)
        except KeyboardInterrupt:
            document, status = _resumed(given.json), 130
            tell(f"interrupted; what was measured is in {given.json}")
    if document:
        print(report.markdown(document))
    if document and given.plot:
        import plot

        plot.draw(document, given.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
