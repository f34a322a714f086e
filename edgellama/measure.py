"""How fast a model runs here, and what it costs: speed, loading, first token, peak memory.

Two runtimes are measured in turns, so that a machine that is busy or throttles treats both alike,
and what is cold is measured in processes of its own. Knows nothing about terminals.

    python -m edgellama.measure WORK

is such a process; WORK is a JSON object (see `fresh_process`), and so is what it prints.
"""

import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.control import CancelToken, Progress
from edgellama.errors import EdgeLlamaError, ParameterError, require_integer
from edgellama.opening import load
from edgellama.sampling import Sampling

if TYPE_CHECKING:
    from edgellama.model import Model
    from edgellama.session import Session

PREFILL, DECODE, CONTEXT = 256, 64, 512  # tokens
SMALL_CONTEXT = 16  # tokens before the decode that is timed
ROUNDS, COLD_ROUNDS = 7, 5
PAUSE = 0.03  # seconds: threads of the runtime before may still be spinning
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Spread:
    """Of some measurements: the middle one, the least, the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """One runtime's figures."""

    device: dict[str, Any]
    prefill: Spread  # tokens per second
    decode: Spread  # tokens per second
    load_seconds: Spread  # of `load`, in a fresh process
    first_token_seconds: Spread  # from the start of a process to the first token of a reply
    peak_bytes: Spread | None  # largest resident set of such a process; None if unknown


FIGURES = ("prefill", "decode", "load_seconds", "first_token_seconds", "peak_bytes")


@dataclass(frozen=True)
class Comparison:
    """What was measured, of one runtime or of two."""

    model: Path
    machine: dict[str, Any]
    threads: int
    prefill_tokens: int
    decode_tokens: int
    rounds: int
    cold_rounds: int
    runtimes: dict[str, Measured]
    ratios: dict[str, Spread]  # first runtime's over the second's, round by round


@dataclass(frozen=True)
class Work:
    """The ids that every round computes, cut to the context."""

    prefill: list[int]
    decode: list[int]

    @classmethod
    def of(cls, model: "Model", prefill: int = PREFILL, decode: int = DECODE) -> "Work":
        context, size = model.info.context, model.config.vocab_size
        prefill, decode = min(prefill, context), min(decode, context - 1)
        ids = [7919 * (i + 1) % size for i in range(max(prefill, decode))]
        return cls(ids[:prefill], ids[:decode])


def compare(
    path: Path,
    runtimes: Sequence[str] = ("cpu",),
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int = CONTEXT,
    rounds: int = ROUNDS,
    cold_rounds: int = COLD_ROUNDS,
    cancel: CancelToken | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure one runtime, or two in turns: A B, B A, A B...

    Both get the same file, threads and context; `device` is the first one's. Every round computes
    PREFILL tokens at once, then DECODE tokens one by one after SMALL_CONTEXT, and a first round of
    each is not counted; then `cold_rounds` fresh processes of each load the model and reply.
    Raises what `load` raises.
    """
    if not 1 <= len(runtimes) <= 2 or len(set(runtimes)) != len(runtimes):
        raise ParameterError("one runtime, or two that differ, can be measured", field="runtimes")
    require_integer("rounds", rounds, 1, 1000)
    require_integer("cold_rounds", cold_rounds, 1, 1000)
    cancel = cancel or CancelToken()
    steps = _Steps(len(runtimes) * (rounds + 1 + cold_rounds), cancel, progress)
    places = dict(zip(runtimes, (device, "auto"), strict=False))
    alike = functools.partial(load, path, threads=threads, context=context, cancel=cancel)
    with contextlib.ExitStack() as loaded:
        models = [loaded.enter_context(alike(name, device=at)) for name, at in places.items()]
        used, work = models[0].device["threads"], Work.of(models[0])
        warm = _warm(models, work, rounds, steps)
        devices = [model.device for model in models]
    starts = [_cold(path, name, at, used, context, cancel) for name, at in places.items()]
    cold = in_turns(starts, cold_rounds, steps.next)
    samples = [w | c for w, c in zip(warm, cold, strict=True)]
    return Comparison(
        path,
        machine(),
        used,
        len(work.prefill),
        len(work.decode),
        rounds,
        cold_rounds,
        {n: _measured(d, s) for n, d, s in zip(runtimes, devices, samples, strict=True)},
        _ratios(*samples) if len(samples) == 2 else {},
    )


Samples = dict[str, list[float]]  # by figure, one value a round
Step = Callable[[], dict[str, float | None]]  # one round of one runtime


class _Steps:
    """Counts the work done, for the progress callback, and stops it once cancelled."""

    def __init__(self, total: int, cancel: CancelToken, progress: Progress | None) -> None:
        self.total, self.done, self.cancel, self.progress = total, 0, cancel, progress

    def next(self) -> None:
        self.cancel.check("the measurement")
        if self.progress:
            self.progress(self.done, self.total, "measuring")
        self.done += 1


def in_turns(
    subjects: Sequence[Step], rounds: int, each: Callable[[], None] = lambda: None
) -> list[Samples]:
    """Run each subject once a round, the order turned around every time; `each` before every one.

    A figure that is None is left out.
    """
    results: list[Samples] = [{} for _ in subjects]
    for round_ in range(rounds):
        order = range(len(subjects))
        for i in order if round_ % 2 == 0 else reversed(order):
            each()
            for figure, value in subjects[i]().items():
                if value is not None:
                    results[i].setdefault(figure, []).append(value)
    return results


def _warm(models: Sequence["Model"], work: Work, rounds: int, steps: _Steps) -> list[Samples]:
    subjects = [_round(model.session(), work, steps.cancel) for model in models]
    in_turns(subjects, 1, steps.next)
    return in_turns(subjects, rounds, steps.next)


def _round(session: "Session", work: Work, cancel: CancelToken) -> Step:
    def run() -> dict[str, float | None]:
        time.sleep(PAUSE)
        prefill = prefill_seconds(session, work.prefill)
        cancel.check("the measurement")
        at = min(SMALL_CONTEXT, len(work.prefill) - len(work.decode))
        decode = decode_seconds(session, work.decode, at)
        return {"prefill": len(work.prefill) / prefill, "decode": len(work.decode) / decode}

    return run


def prefill_seconds(session: "Session", ids: Sequence[int]) -> float:
    """Of computing `ids` at once into an empty cache."""
    session.truncate(0)
    start = time.perf_counter()
    session.forward(ids)
    return time.perf_counter() - start


def decode_seconds(session: "Session", ids: Sequence[int], at: int) -> float:
    """Of computing `ids` one by one after the first `at` tokens in the cache."""
    session.truncate(at)
    start = time.perf_counter()
    for token in ids:
        session.forward([token])
    return time.perf_counter() - start


def _measured(device: dict[str, Any], samples: Samples) -> Measured:
    spread = {figure: Spread.of(values) for figure, values in samples.items()}
    return Measured(
        device,
        prefill=spread["prefill"],
        decode=spread["decode"],
        load_seconds=spread["load_seconds"],
        first_token_seconds=spread["first_token_seconds"],
        peak_bytes=spread.get("peak_bytes"),
    )


def _ratios(a: Samples, b: Samples) -> dict[str, Spread]:
    return {
        figure: Spread.of([x / y for x, y in zip(a[figure], b[figure], strict=True)])
        for figure in FIGURES
        if figure in a and figure in b
    }


# --- fresh processes ----------------------------------------------------------------------------


def _cold(
    path: Path, runtime: str, device: str, threads: int, context: int, cancel: CancelToken
) -> Step:
    def run() -> dict[str, float | None]:
        time.sleep(PAUSE)
        figures = fresh_process(path, runtime, threads, context, device=device, cancel=cancel)
        return {figure: figures[figure] for figure in FIGURES[2:]}

    return run


def fresh_process(
    path: Path,
    runtime: str,
    threads: int,
    context: int = CONTEXT,
    *,
    device: str = "auto",
    prefill: int = PREFILL,
    decode: int = DECODE,
    cancel: CancelToken | None = None,
    cache: Path | None = None,
) -> dict[str, float | None]:
    """Load a model and begin a reply in a new process, then compute what a round does.

    `cache` replaces the folder of caches. Returns load_seconds, first_token_seconds and
    peak_bytes (None where the system does not say).
    """
    work = {
        "path": str(path),
        "runtime": runtime,
        "device": device,
        "threads": threads,
        "context": context,
        "prefill": prefill,
        "decode": decode,
    }
    program = [sys.executable, "-P", "-m", "edgellama.measure"]
    return timed_program(program, work, runtime, cancel=cancel, cache=cache)


def timed_program(
    program: Sequence[str],
    work: Mapping[str, object],
    what: str,
    *,
    cancel: CancelToken | None = None,
    cache: Path | None = None,
) -> dict[str, float | None]:
    """Run a program that is given `work` and its own `start` as JSON, and prints figures as JSON.

    `start` is time.monotonic(). Raises EdgeLlamaError with the last line of its complaint.
    """
    argument = json.dumps({**work, "start": time.monotonic()})
    process = subprocess.Popen(
        [*program, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | ({"EDGELLAMA_CACHE": str(cache)} if cache else {}),
        text=True,
    )
    with process:
        out, complaint = _communicate(process, cancel)
    if process.returncode != 0:
        last = complaint.strip().splitlines()[-1:] or [f"status {process.returncode}"]
        raise EdgeLlamaError(f"the process that measures {what} failed: {last[0]}")
    figures: dict[str, float | None] = json.loads(out)
    return figures


def _communicate(process: "subprocess.Popen[str]", cancel: CancelToken | None) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=0.05)
        except subprocess.TimeoutExpired:
            if cancel and cancel.cancelled:
                process.kill()
                cancel.check("the measurement")
        except BaseException:
            process.kill()
            raise


def _child(given: Mapping[str, Any]) -> dict[str, float | None]:
    before = time.perf_counter()
    with load(
        given["path"],
        runtime=given["runtime"],
        device=given["device"],
        threads=given["threads"],
        context=given["context"],
    ) as model:
        loaded = time.perf_counter() - before
        next(model.generate(PROMPT, Sampling(temperature=0), max_tokens=1))
        first_token = time.monotonic() - given["start"]
        work = Work.of(model, given["prefill"], given["decode"])
        session = model.session()
        prefill_seconds(session, work.prefill)
        decode_seconds(session, work.decode, 0)
        return {
            "load_seconds": loaded,
            "first_token_seconds": first_token,
            "peak_bytes": peak_bytes(),
        }


# --- the machine --------------------------------------------------------------------------------


def peak_bytes() -> int | None:
    """This process's largest resident set so far, in bytes; None where the system does not say.

    Not `ru_maxrss` on Linux: a child inherits there what its parent had.
    """
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def machine() -> dict[str, Any]:
    """What a measurement depends on: processor, cores, system, Python."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _lines(path: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from path.read_text().splitlines()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(json.loads(sys.argv[1]))) + "\n")
