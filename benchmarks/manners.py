"""How a loaded model treats its host: cancelling, closing, other threads, and idling.

    python benchmarks/manners.py MODEL.gguf [--first-use]

Cancel and close: milliseconds from the call to the end of the work, the worst of several tries at
random moments. Heartbeat: the longest time that another Python thread, which wants to run every
millisecond, was kept from it. --first-use adds the compilation of kernels, in an empty cache.
"""

import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

TRIES = 10


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
    with heartbeat("load"):
        model = edgellama.load(path)
    session = model.session()
    prompt = [5] * min(2000, model.info.context - 100)
    with heartbeat(f"prefill of {len(prompt)} tokens"):
        session.forward(prompt)
    with heartbeat("decode of 64 tokens"):
        for _ in range(64):
            session.forward([5])
    worst_cancel("load", lambda token: edgellama.load(path, cancel=token).close(), 0.05)
    started = time.perf_counter()
    model.session().forward(prompt)
    longest = time.perf_counter() - started
    worst_cancel("prefill", lambda token: model.session().forward(prompt, cancel=token), longest)

    other = threading.Thread(target=forward_until_closed, args=(model.session(), prompt))
    other.start()
    time.sleep(longest / 4)
    started = time.perf_counter()
    model.close()
    print(f"close during prefill: {(time.perf_counter() - started) * 1000:.1f} ms")
    other.join()

    with edgellama.load(path) as model:
        model.session().forward([5])
        used = time.process_time()
        time.sleep(2)
        print(f"processor time while idle: {(time.process_time() - used) / 2:.2%}")


def forward_until_closed(session: object, prompt: list[int]) -> None:
    import edgellama

    with suppress(edgellama.ParameterError):
        session.forward(prompt)  # type: ignore[attr-defined]


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--first-use"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    if "--first-use" in sys.argv:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["EDGELLAMA_CACHE"] = empty
            import edgellama

            with heartbeat("first use: compiling kernels, load"):
                edgellama.load(arguments[0]).close()
            measure(arguments[0])
    else:
        measure(arguments[0])


if __name__ == "__main__":
    main()
