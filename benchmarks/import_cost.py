"""What starting costs: imports, help, the first token of a process, the first use of all.

    python benchmarks/import_cost.py MODEL.gguf [--rounds N] [--json FILE]

Each figure is a median over rounds in which what is compared takes turns. `over` is the median of
the differences from the baseline that the figure's bound refers to.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgellama.machine import usable_cores
from edgellama.measure import fresh_process, machine

PROGRAMS = {  # figure -> (program, its baseline)
    "import edgellama": (["-c", "import edgellama"], ["-c", "pass"]),
    "edgellama --help": (["-m", "edgellama", "--help"], ["-c", "import typer"]),
}


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def paired(a: Callable[[], float], b: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians of both and of their differences; one round of each is not counted."""
    a(), b()
    pairs = []
    for round_ in range(rounds):
        first, second = (a, b) if round_ % 2 == 0 else (b, a)
        x, y = first(), second()
        pairs.append((x, y) if round_ % 2 == 0 else (y, x))
    return {
        "seconds": statistics.median(x for x, _ in pairs),
        "baseline": statistics.median(y for _, y in pairs),
        "over": statistics.median(x - y for x, y in pairs),
    }


def python(arguments: list[str]) -> Callable[[], float]:
    command = [sys.executable, *arguments]
    return lambda: seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))


def first_tokens(model: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Load time and first token, with the kernels compiled before and with an empty cache."""
    threads = usable_cores()

    def figures(empty: bool) -> dict[str, float | None]:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) if empty else None
            return fresh_process(model, "cpu", threads, cache=cache)

    figures(empty=False)
    warm, cold = [], []
    for _ in range(rounds):
        warm.append(figures(empty=False))
        cold.append(figures(empty=True))
    return {
        name: {figure: statistics.median(one[figure] or 0.0 for one in runs) for figure in runs[0]}
        for name, runs in (("kernels compiled before", warm), ("empty cache", cold))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what starting costs.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("import_cost.json"))
    given = parser.parse_args()
    results: dict[str, object] = {"machine": machine()}
    for name, (program, baseline) in PROGRAMS.items():
        results[name] = cost = paired(python(program), python(baseline), given.rounds)
        print(f"{name}: {1e3 * cost['seconds']:.1f} ms, {1e3 * cost['over']:.1f} ms over", end="")
        print(f" `python {' '.join(baseline)}`")
    for name, figures in first_tokens(given.model, given.cold_rounds).items():
        results[name] = figures
        print(f"{name}: load {1e3 * figures['load_seconds']:.0f} ms,", end=" ")
        print(f"first token {1e3 * figures['first_token_seconds']:.0f} ms after the start")
    given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
