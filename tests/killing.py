"""Conversions killed at random moments, and what they leave behind.

One process imports the converter and forks for each conversion, so that a kill hits the work and
not the start of Python. Used by the tests of conversions and benchmarks/kills.py.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import os, sys
from edgellama.quantize import quantize
source, output, kind = sys.argv[1:]
print("ready", flush=True)
while sys.stdin.readline():
    child = os.fork()
    if child == 0:
        try:
            quantize(source, output, kind, certificate="none")
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Server:
    """Starts one conversion after another, each in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert self._line() == "ready"

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, kill_after: float | None = None) -> tuple[int, float]:
        """Status (negative: the signal that ended it) and seconds of one conversion."""
        self._say("go")
        child, start = int(self._line()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # awaited only below: the number is still its own
        self._say("wait")
        status = int(self._line())
        return os.waitstatus_to_exitcode(status), time.monotonic() - start


@contextmanager
def server(source: Path, output: Path, kind: str) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, str(source), str(output), kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process)
        process.communicate()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kill_many(source: Path, folder: Path, kind: str, times: int, seed: int = 0) -> Counter[str]:
    """Replace an old output until `times` conversions were killed: what was found afterwards.

    Counts "killed" conversions and those that had "ended" before, "old" and "new" outputs of both,
    "damaged" ones (neither), the most files "left" by dead writers at once, and "litter" after a
    last run.
    """
    output = folder / "out.gguf"
    found: Counter[str] = Counter()
    rng = random.Random(seed)
    with server(source, output, kind) as conversions:
        status, _ = conversions.run()
        assert status == 0
        new, seconds = digest(output), min(conversions.run()[1] for _ in range(3))
        old = hashlib.sha256(b"old").hexdigest()
        while found["killed"] < times and found["ended"] < 3 * times + 10:
            output.write_bytes(b"old")
            status, _ = conversions.run(kill_after=rng.uniform(0, 1.1 * seconds))
            found["killed" if status == -signal.SIGKILL else "ended"] += 1
            found[{old: "old", new: "new"}.get(digest(output), "damaged")] += 1
            found["left"] = max(found["left"], len(list(folder.glob(".*"))))
        assert conversions.run()[0] == 0 and digest(output) == new
    found["litter"] = len([path for path in folder.iterdir() if path != output])
    return found
