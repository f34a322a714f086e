"""Parity and speed on a CUDA machine, in one command; docs/gpu.md explains it.

    python tests/gpu/run.py [--out DIR] [--quick] [--device cuda|cpu] [--model FILE.gguf]

Writes results.json, table.md and golden/*.npz to DIR; the table goes to stdout too. Exit status 0
when everything ran and is within its bounds, else 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
sys.path[0:1] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]  # not this folder: `gpu.` names it

from gpu import parts, report  # noqa: E402
from gpu.parts import Given  # noqa: E402


def main() -> int:
    if sys.argv[1:2] == ["--part"]:
        parts.work(sys.argv[2], sys.argv[3])
        return 0
    if sys.argv[1:2] == ["--prepare"]:
        from gpu import shapes

        shapes.write_all(Path(sys.argv[2]))
        return 0
    given = _arguments()
    out, model = given.out.resolve(), _model(given.model)  # before the cache is moved
    out.mkdir(parents=True, exist_ok=True)
    results = report.header(given.device, given.quick)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        os.environ["EDGELLAMA_CACHE"] = str(Path(scratch) / "cache")
        writer = _writer(given, scratch)
        for part, ends in _schedule(given):
            told = Given(given.device, str(out), scratch, model, given.quick, ends)
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            results["parts"][part.name] = parts.start(part, told, HERE)
            report.write(out, results)
        if writer is not None:
            writer.kill()
            writer.wait()
    print(report.table(results))
    return 0 if report.good(results) else 1


def _schedule(given: argparse.Namespace) -> Iterator[tuple[parts.Part, float]]:
    """Each part and when it ends: its share of the time, and what those before left over."""
    chosen = [part for part in parts.PARTS if not given.parts or part.name in given.parts]
    default = 9.0 if given.device == "cuda" else 20.0
    minutes = default if given.minutes is None else given.minutes
    began, total, share = time.time(), sum(part.seconds for part in chosen), 0
    for part in chosen:
        share += part.seconds
        yield part, began + minutes * 60 * share / total


def _writer(given: argparse.Namespace, scratch: str) -> subprocess.Popen[bytes] | None:
    """Large models are written while the parts before `speed` run."""
    if given.device != "cuda" or given.quick or (given.parts and "speed" not in given.parts):
        return None
    return subprocess.Popen([sys.executable, str(HERE), "--prepare", scratch])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases, one small model")
    parser.add_argument("--model", type=Path, help="the default model's file; else as pulled")
    parser.add_argument("--minutes", type=float, help="for all: 9 on CUDA, 20 on the CPU")
    parser.add_argument("--folder", type=Path, help="where models are written: up to 20 GB")
    names = [part.name for part in parts.PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, help="only these")
    return parser.parse_args()


def _model(chosen: Path | None) -> str:
    """The default model's file, or "" where there is none."""
    from edgellama.errors import EdgeLlamaError
    from edgellama.paths import DEFAULT_MODEL, model_path

    if chosen is not None:
        return str(chosen.resolve())
    if "EDGELLAMA_TEST_MODEL" in os.environ:
        return os.environ["EDGELLAMA_TEST_MODEL"]
    try:
        return str(model_path(DEFAULT_MODEL))
    except EdgeLlamaError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
