"""llama.cpp's own quantization, through llama-cpp-python's low-level call.

    python benchmarks/peer_quantize.py SOURCE.gguf OUTPUT.gguf FILE_TYPE_NUMBER [THREADS]

Prints seconds of the call, seconds until the output is on the disk, and the largest resident set,
as one JSON object. Importance matrices go in as llama-quantize reads them: mean squares by name.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def available() -> bool:
    try:
        import llama_cpp
    except ImportError:
        return False
    return hasattr(llama_cpp, "llama_model_quantize")


def peer_quantize(
    source: Path,
    output: Path,
    file_type: int,
    *,
    threads: int = 2,
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Quantize a GGUF file of floats with llama.cpp; RuntimeError if that fails."""
    import llama_cpp

    llama_cpp.llama_log_set(_nothing, None)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, threads, True
    kept = {k: np.ascontiguousarray(v, np.float32) for k, v in (importance or {}).items()}
    entries = _entries(kept)  # points into `kept`
    if kept:
        parameters.imatrix = entries
    status = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source.name}: status {status}")


def _entries(importance: Mapping[str, np.ndarray]) -> Any:
    """A C array that ends in an empty entry."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, weights) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(weights)
        entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _nothing(*_: object) -> None:
    pass


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    source, output, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    start = time.perf_counter()
    peer_quantize(source, output, number, threads=int((sys.argv[4:] or ["2"])[0]))
    called = time.perf_counter() - start
    with output.open("rb") as file:
        os.fsync(file.fileno())
    durable = time.perf_counter() - start
    from edgellama.measure import peak_bytes  # only now: its imports are not llama.cpp's memory

    print(json.dumps({"seconds": called, "durable": durable, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
