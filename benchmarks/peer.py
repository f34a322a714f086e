"""llama-cpp-python by itself: load, first token and peak memory of a process without edgellama.

    python benchmarks/peer.py WORK

The twin of `python -m edgellama.measure`, so that llama.cpp's start costs what it costs a program
made with it: its own Python classes, its own tokenizer. WORK and the figures are JSON objects, as
there. Imports edgellama only when all is measured but memory.
"""

import json
import sys
import time
from typing import Any

PROMPT = "The capital of France is"


def figures(given: dict[str, Any]) -> dict[str, float | None]:
    before = time.perf_counter()
    from llama_cpp import Llama

    model = Llama(
        given["path"],
        n_ctx=given["context"],
        n_threads=given["threads"],
        n_threads_batch=given["threads"],
        n_gpu_layers=0,
        verbose=False,
    )
    loaded = time.perf_counter() - before
    next(model.generate(model.tokenize(PROMPT.encode()), temp=0.0))
    first_token = time.monotonic() - given["start"]
    model.reset()
    size = model.n_vocab()
    ids = [7919 * (i + 1) % size for i in range(given["context"])]
    model.eval(ids[: given["prefill"]])
    model.reset()
    for token in ids[: given["decode"]]:
        model.eval([token])
    return {
        "load_seconds": loaded,
        "first_token_seconds": first_token,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int | None:
    from edgellama import measure

    return measure.peak_bytes()


if __name__ == "__main__":
    print(json.dumps(figures(json.loads(sys.argv[1]))))
