"""How a loaded model treats its host: cancelling, closing, other threads, neighbours, and idling.

    python benchmarks/manners.py MODEL.gguf [--tiny TINY.gguf] [--first-use]

Cancel and close: milliseconds from the call to the end of the work, the worst of several tries at
random moments; the text to be encoded is 250 kB of one letter, the slowest there is. Heartbeat: the
longest time that another Python thread, which wants to run every millisecond, was kept from it.
Busy neighbour: tokens a second while another process wants one of the cores all the time, pinned to
it. Cycles: what 1000 loads and closes of a tiny model leave behind (give its file with --tiny).
--first-use adds the compilation of kernels, in an empty cache.
"""

import argparse
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import edgellama

TRIES = 10
CYCLES = 1000
BUSY = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
print("ready", flush=True)
while True:
    pass
"""


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print the longest gap between two beats of another thread."""
    gaps, done = [0.0], threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"longest gap of a heartbeat during {what}: {max(gaps) * 1000:.0f} ms")


def worst_cancel(what: str, work: Callable[..., object], longest: float) -> None:
    """Cancel `work(cancel)` at random moments within `longest` seconds."""
    import edgellama

    worst = 0.0
    for _ in range(TRIES):
        token, moment = edgellama.CancelToken(), [0.0]

        def cancel(token: edgellama.CancelToken = token, moment: list[float] = moment) -> None:
            moment[0] = time.perf_counter()
            token.cancel()

        timer = threading.Timer(random.uniform(0, longest), cancel)
        timer.start()
        try:
            work(token)
        except edgellama.Cancelled:
            worst = max(worst, time.perf_counter() - moment[0])
        timer.join()
    print(f"cancel during {what}: {worst * 1000:.1f} ms at worst of {TRIES}")


def measure(path: str) -> None:
    import edgellama

    edgellama.load(path).close()  # kernels and file are warm from here on
    worst_cancel("load", lambda token: edgellama.load(path, cancel=token).close(), 0.05)
    with heartbeat("load"):
        model = edgellama.load(path)
    session = model.session()
    prompt = [5] * min(2000, model.info.context - 100)
    with heartbeat(f"prefill of {len(prompt)} tokens"):
        longest = seconds(lambda: session.forward(prompt))
    with heartbeat("decode of 64 tokens"):
        for _ in range(64):
            session.forward([5])
    worst_cancel("prefill", lambda token: model.session().forward(prompt, cancel=token), longest)
    measure_encoding(model)
    measure_close(model, prompt, longest)
    with edgellama.load(path) as model:
        model.session().forward([5])
        used = time.process_time()
        time.sleep(2)
        print(f"processor time while idle: {(time.process_time() - used) / 2:.2%}")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_encoding(model: "edgellama.Model") -> None:
    word, encode = "a" * 250_000, model.tokenizer.encode
    with heartbeat("encoding of a long word"):
        longest = seconds(lambda: encode(word))
    worst_cancel("encoding", lambda token: encode(word, cancel=token), longest)


def measure_close(model: "edgellama.Model", prompt: list[int], longest: float) -> None:
    other = threading.Thread(target=forward_until_closed, args=(model.session(), prompt))
    other.start()
    time.sleep(longest / 4)
    print(f"close during prefill: {seconds(model.close) * 1000:.1f} ms")
    other.join()


def forward_until_closed(session: object, prompt: list[int]) -> None:
    import edgellama

    with suppress(edgellama.ParameterError):
        session.forward(prompt)  # type: ignore[attr-defined]


def worst_signal(path: str) -> None:
    """Ctrl-C of an app that has no handler of its own, in the middle of a prefill."""
    import edgellama

    worst = 0.0
    with edgellama.load(path) as model:
        prompt = [5] * min(1000, model.info.context - 100)
        started = time.perf_counter()
        model.session().forward(prompt)
        longest = time.perf_counter() - started
        for _ in range(TRIES):
            moment = [0.0]

            def interrupt(moment: list[float] = moment) -> None:
                moment[0] = time.perf_counter()
                signal.raise_signal(signal.SIGINT)

            timer = threading.Timer(random.uniform(0, longest * 0.8), interrupt)
            session = model.session()
            try:
                timer.start()
                session.forward(prompt)
                timer.join()
            except KeyboardInterrupt:
                worst = max(worst, time.perf_counter() - moment[0])
            session.close()
    print(f"Ctrl-C during prefill: {worst * 1000:.1f} ms at worst of {TRIES}")


# --- neighbours ----------------------------------------------------------------------------------


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that never rests, on the last core this one may use."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def neighbour(path: str) -> None:
    """Alternating runs with and without the other process: medians, on 1 and on 2 threads."""
    import edgellama

    speeds: dict[tuple[int, bool, str], list[float]] = {}
    for threads in (1, 2):
        with edgellama.load(path, threads=threads, context=1024) as model:
            measure_speed(model)
            for busy in (False, True) * 5:
                with busy_core() if busy else nullcontext():
                    prefill, decode = measure_speed(model)
                speeds.setdefault((threads, busy, "prefill"), []).append(prefill)
                speeds.setdefault((threads, busy, "decode"), []).append(decode)
    for work, threads in itertools.product(("prefill", "decode"), (1, 2)):
        alone, shared = (statistics.median(speeds[threads, b, work]) for b in (False, True))
        print(
            f"{work} on {threads} threads: {alone:.0f} tokens/s alone, "
            f"{shared:.0f} beside a busy neighbour ({shared / alone:.0%})"
        )


def measure_speed(model: object) -> tuple[float, float]:
    """Tokens a second of prefill (256) and decode (48)."""
    session = model.session()  # type: ignore[attr-defined]
    started = time.perf_counter()
    session.forward([5] * 256)
    between = time.perf_counter()
    for _ in range(48):
        session.forward([5])
    ended = time.perf_counter()
    session.close()
    return 256 / (between - started), 48 / (ended - between)


def cycles(path: str) -> None:
    """Resident memory, threads and open files before and after."""
    import edgellama

    def cycle() -> None:
        with edgellama.load(path) as model:
            model.session().forward([1, 2, 3])

    def now() -> tuple[int, int, int]:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, threading.active_count(), len(os.listdir("/proc/self/fd"))

    for _ in range(20):
        cycle()
    before, started = now(), time.perf_counter()
    for _ in range(CYCLES):
        cycle()
    took, after = time.perf_counter() - started, now()
    memory, threads, files = (b - a for a, b in zip(before, after, strict=True))
    print(
        f"{CYCLES} loads and closes: {memory / 1e6:+.1f} MB, {threads:+d} threads, "
        f"{files:+d} files; {took / CYCLES * 1000:.1f} ms each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tiny")
    parser.add_argument("--first-use", action="store_true")
    arguments = parser.parse_args()
    if arguments.first_use:
        first_use(arguments.model)
    measure(arguments.model)
    worst_signal(arguments.model)
    neighbour(arguments.model)
    if arguments.tiny and os.path.exists("/proc/self/statm"):
        cycles(arguments.tiny)


def first_use(path: str) -> None:
    """Before anything else is loaded: the cache's folder is chosen once."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ["EDGELLAMA_CACHE"] = empty
        import edgellama

        worst_cancel("compiling", lambda token: edgellama.load(path, cancel=token).close(), 1.0)
        with heartbeat("first use: compiling kernels, load"):
            edgellama.load(path).close()


if __name__ == "__main__":
    main()
