"""A loaded model in a process of its own, which computes what it is told to and says how long.

Several stay loaded side by side and take turns, each with its own instruction-set level, threads
and clean memory. Parent and child talk in lines of JSON. Knows nothing about tables.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edgellama.measure import CONTEXT, PAUSE, SMALL_CONTEXT, decode_seconds, prefill_seconds

RUNTIMES = {"edgellama": "cpu", "llama.cpp": "llama.cpp", "onnx": "onnx"}
AT_ONCE = 512  # tokens, when the cache is only to be filled


class Unavailable(Exception):
    """A subject that cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Spec:
    """What is measured: a file in a runtime, and how."""

    path: Path
    runtime: str  # one of RUNTIMES
    threads: int
    context: int = CONTEXT
    kv_type: str = "f16"
    level: str = ""  # forces an instruction-set level; "": the best there is


class Subject:
    """The parent's end. A context manager; entering it loads the model, or raises Unavailable."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device: dict[str, Any] = {}

    def __enter__(self) -> Self:
        spec = self.spec
        work = vars(spec) | {"path": str(spec.path)}
        level = {"EDGELLAMA_ISA": spec.level} if spec.level else {}
        with contextlib.ExitStack() as on_failure:
            self.complaints = on_failure.enter_context(tempfile.TemporaryFile("w+"))
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.complaints,
                env=os.environ | level,
                text=True,
            )
            on_failure.callback(self._stop)
            answer = self._answer()
            self.device = answer["device"]
            on_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self.complaints.close()

    def _stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, what: str, **how: int) -> Any:
        """Have the child do one of `ACTIONS`; its answer."""
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        with contextlib.suppress(BrokenPipeError):  # it died: the answer tells
            self.process.stdin.write(json.dumps([what, how]) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.complaints.seek(0)
            last = self.complaints.read().strip().splitlines()[-1:]
            raise Unavailable(last[0] if last else f"status {self.process.wait()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer["answer"]


# --- the child's end ----------------------------------------------------------------------------


class Work:
    """What a child can be asked for. Ids are the same for every subject."""

    def __init__(self, model: Any) -> None:
        self.session = model.session()
        size = model.config.vocab_size
        self.ids = [7919 * (i + 1) % size for i in range(model.info.context)]

    def reach(self, at: int) -> float:
        """Fill the cache up to `at` tokens."""
        start = time.perf_counter()
        while self.session.position < at:
            first = self.session.position
            self.session.forward(self.ids[first : min(first + AT_ONCE, at)])
        return time.perf_counter() - start

    def prefill(self, tokens: int) -> float:
        return prefill_seconds(self.session, self.ids[:tokens])

    def decode(self, at: int, tokens: int) -> float:
        self.reach(at)
        return decode_seconds(self.session, self.ids[:tokens], at)

    def batch(self, tokens: int, times: int) -> list[list[float]]:
        """Seconds of (one token, `tokens` in one call), so many times, at a small context."""
        self.reach(SMALL_CONTEXT)
        return [
            [self._forward(1), self._forward(tokens)]
            if turn % 2 == 0
            else [self._forward(tokens), self._forward(1)][::-1]
            for turn in range(times)
        ]

    def _forward(self, tokens: int) -> float:
        self.session.truncate(SMALL_CONTEXT)
        start = time.perf_counter()
        self.session.forward(self.ids[:tokens])
        return time.perf_counter() - start


ACTIONS: dict[str, Callable[..., Any]] = {
    "reach": Work.reach,
    "prefill": Work.prefill,
    "decode": Work.decode,
    "batch": Work.batch,
}


def serve(given: dict[str, Any]) -> None:
    """Load, then answer line by line until there is no more line."""
    import edgellama

    runtime = RUNTIMES[given["runtime"]]
    device = "cpu" if runtime == "onnx" else "auto"
    how = {key: given[key] for key in ("threads", "context", "kv_type")}
    try:
        with edgellama.load(given["path"], runtime, device=device, **how) as model:
            say({"answer": {"device": model.device}})
            work = Work(model)
            for line in sys.stdin:
                what, arguments = json.loads(line)
                say({"answer": ACTIONS[what](work, **arguments)})
    except edgellama.EdgeLlamaError as error:
        say({"unavailable": str(error)})


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # the parent says it
        serve(json.loads(sys.argv[1]))
