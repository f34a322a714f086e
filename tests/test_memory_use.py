"""What loading and running cost in memory, measured in processes of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_tiny

HANG = 300.0
MIB = 1 << 20
FLIGHT = 16 * MIB  # of pieces between file and place, of temporary arrays, and of the heap's slack

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read Linux's way"
)

MEASURE = """
import sys
import edgellama

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def start():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    return status("VmRSS")
"""


def run(code: str, *arguments: Any) -> list[int]:
    """The numbers that a fresh process prints."""
    command = [sys.executable, "-c", MEASURE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


LOAD = """
edgellama.load(sys.argv[1]).close()  # modules and kernels
before = start()
model = edgellama.load(sys.argv[2], threads=2)
print(before, status("VmHWM"), model.info.memory["weights"], model.info.memory["scratch"])
"""


def test_loading_takes_the_weights_and_little_more(tmp_path: Path) -> None:
    """The peak is that of the repacked weights, the program's rooms, and what is in flight.

    Both kinds of repacking: what is only moved, and what is taken apart.
    """
    config = tiny_config(vocab_size=17_000, n_layers=2, dim=1024, ffn_dim=2816, tied_output=True)
    small = tiny_config(dim=256, ffn_dim=256, n_layers=1)
    types = {"token_embd": "F16", "blk.": "Q6_K"}
    large_path = write_tiny(tmp_path / "large.gguf", config, types)
    small_path = write_tiny(tmp_path / "small.gguf", small, types)
    before, peak, weights, scratch = run(LOAD, small_path, large_path)
    largest = 17_000 * 1024 * 2
    assert weights > largest > 2 * FLIGHT  # neither may be in memory a second time
    assert peak - before <= weights + scratch + FLIGHT
    assert peak - before >= weights // 2  # it was measured at all


CANCELLED = """
import threading
edgellama.load(sys.argv[1]).close()  # modules and kernels
threads = threading.active_count()
for part in (0.9, 0.0, 0.5, 0.9):
    token = edgellama.CancelToken()

    def cancel(done, total, what):
        if what == "loading weights" and done > part * total:
            token.cancel()

    try:
        edgellama.load(sys.argv[2], threads=2, cancel=token, progress=cancel)
    except edgellama.Cancelled:
        print(threading.active_count() - threads, status("VmRSS"))
"""


def test_a_cancelled_load_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither threads nor weights; what was read into stays in the heap, once."""
    config = tiny_config(vocab_size=17_000, n_layers=1, dim=1024, ffn_dim=256, tied_output=True)
    large = write_tiny(tmp_path / "large.gguf", config, "F16")
    small = write_tiny(tmp_path / "small.gguf", types="F16")
    left = run(CANCELLED, small, large)
    assert left[::2] == [0, 0, 0, 0]
    assert max(left[1::2]) - left[1] <= FLIGHT


RUN = """
model = edgellama.load(sys.argv[1])
kernels_were_cached = "numba" not in sys.modules
session = model.session()
session.forward(list(range(3, 400)))
for _ in range(20):
    session.forward([5])
used = model.info.memory["kv_cache"] * session.position // model.info.context
print(int(kernels_were_cached), status("VmHWM"), model.info.memory["weights"], used)
"""


def test_a_whole_run_takes_little_more_than_the_weights(default_model: Path) -> None:
    """Weights, keys and values used, and 200 MB for everything else: the interpreter too."""
    cached, peak, weights, used = run(RUN, default_model)
    if not cached:  # the compiler's memory does not count
        cached, peak, weights, used = run(RUN, default_model)
    assert cached
    assert peak <= weights + used + 200_000_000


CYCLES = """
import os, threading

def now():
    return status("VmRSS"), threading.active_count(), len(os.listdir("/proc/self/fd"))

def cycle(close):
    model = edgellama.load(sys.argv[1], threads=3)
    session = model.session()
    session.forward([1, 2, 3])
    if close:
        model.close()

for _ in range(30):
    cycle(True)
before = now()
for i in range(200):
    cycle(i % 3 < 2)  # every third is only dropped
print(*before, *now())
"""


def test_loading_and_closing_again_and_again(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    memory, threads, files, memory_after, threads_after, files_after = run(CYCLES, path)
    assert memory_after - memory < 4 * MIB  # less than 21 kB a model
    assert threads_after <= threads + 2  # the last dropped model's helpers may be on their way
    assert files_after == files
