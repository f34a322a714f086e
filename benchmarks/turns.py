"""What the next turn of a chat costs: it should depend on its new tokens only.

    python benchmarks/turns.py MODEL.gguf [--tokens 128,512,2048] [--new 16]

For conversations of these lengths: seconds to read them, seconds to the first token of a turn of
--new tokens behind them (the median of several), the same in a session restored from a file, and
seconds and megabytes of saving and restoring it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import edgellama

TRIES = 5
GREEDY = edgellama.Sampling(temperature=0)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def first_token(session: edgellama.Session, known: int, ids: list[int]) -> float:
    """Seconds to the first token behind `ids`, of which `known` are in the cache: the median."""
    times = []
    for _ in range(TRIES):
        session.truncate(known)
        taken, chunk = seconds(lambda: next(session.generate(ids, GREEDY)))
        assert chunk.token is not None
        times.append(taken)
    return statistics.median(times)


def row(model: edgellama.Model, folder: str, known: int, new: int) -> str:
    size = model.tokenizer.vocab_size
    ids = [(7 * i) % (size - 3) + 3 for i in range(known + new)]
    session, file = model.session(), os.path.join(folder, "session")
    reading, _ = seconds(lambda: session.forward(ids[:known]))
    saving, _ = seconds(lambda: session.save(file))
    restoring, restored = seconds(lambda: model.restore(file))
    turns = [first_token(each, known, ids) for each in (session, restored)]
    size_mb = os.path.getsize(file) / 1e6
    figures = (reading, *turns, saving, restoring, size_mb)
    return f"{known:>9}" + "".join(f"{figure:>11.3f}" for figure in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", default="128,512,2048")
    parser.add_argument("--new", type=int, default=16)
    given = parser.parse_args()
    lengths = [int(text) for text in given.tokens.split(",")]
    with (
        edgellama.load(given.model, context=max(lengths) + given.new + 1) as model,
        tempfile.TemporaryDirectory() as folder,
    ):
        model.session().forward([3] * 40)  # compiled, and the pages touched
        print(f"a turn of {given.new} new tokens; seconds, and megabytes of the file")
        heads = ("reading", "next turn", "restored", "save", "restore", "file")
        print("   tokens" + "".join(f"{head:>11}" for head in heads))
        for known in lengths:
            print(row(model, folder, known, given.new))


if __name__ == "__main__":
    main()
