"""Parts of a run: each a process of its own, each row of one kept as soon as it is there.

So neither an error nor a crash nor a part that takes too long costs more than its own figures.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Task = tuple[Row, Callable[[], Row]]  # what names a row; what fills it
TAIL = 2000  # characters of a failed part's errors
GRACE = 20  # seconds that a part may take beyond its time, to finish a row


@dataclass(frozen=True)
class Given:
    """What every part is told."""

    device: str  # "cuda" or "cpu"
    out: str  # folder of results
    scratch: str  # folder of models, removed at the end
    model: str  # the default model's file; "" where it is not here
    quick: bool = False
    ends: float = 0.0  # time.time() when the part should be done


@dataclass(frozen=True)
class Part:
    """A module with `tasks(given)`, its share of the time, and its environment."""

    name: str
    module: str
    seconds: int
    environment: tuple[tuple[str, str], ...] = ()


NO_TF32 = (("NVIDIA_TF32_OVERRIDE", "0"), ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0"))
PARTS = (  # 540 s together; of another time the same shares
    Part("goldens", "gpu.goldens", 80, NO_TF32),
    Part("operators", "gpu.ops", 40),
    Part("parity", "gpu.parity", 140),
    Part("capture", "gpu.capture", 40),
    Part("speed", "gpu.speed", 240),
)


def start(part: Part, given: Given, script: Path, grace: float = GRACE) -> dict[str, Any]:
    """Run a part in a process of its own; its rows, and its error if it had one."""
    rows_file = Path(given.scratch) / f"{part.name}.json"
    command = [sys.executable, str(script), "--part", part.name, json.dumps(asdict(given))]
    began, limit = time.monotonic(), max(given.ends - time.time(), 0) + grace
    result: dict[str, Any] = {"error": None}
    try:
        done = subprocess.run(
            command,
            env=os.environ | dict(part.environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limit,
        )
        if done.returncode:
            tail = done.stderr.decode(errors="replace")[-TAIL:]
            result["error"] = f"ended with status {done.returncode}: {tail}"
    except subprocess.TimeoutExpired:
        result["error"] = f"stopped after {limit:.0f} s"
    result["seconds"] = round(time.monotonic() - began, 1)
    result["rows"] = json.loads(rows_file.read_text("utf-8")) if rows_file.exists() else []
    return result


def work(name: str, text: str) -> None:
    """What a part's process does: every task in turn, rows written as they come."""
    known = {field.name for field in fields(Given)}
    given = Given(**{k: v for k, v in json.loads(text).items() if k in known})
    (part,) = (part for part in PARTS if part.name == name)
    tasks: Callable[[Given], Iterator[Task]] = importlib.import_module(part.module).tasks
    rows: list[Row] = []
    try:
        for labels, task in tasks(given):
            rows.append(labels | filled(task, given))
            _keep(given, name, rows)
    except Exception as error:  # of the list itself: without CUDA there may be none
        rows.append(_failed(error))
        _keep(given, name, rows)


def _keep(given: Given, name: str, rows: list[Row]) -> None:
    target = Path(given.scratch) / f"{name}.json"
    temporary = target.with_suffix(".new")
    temporary.write_text(json.dumps(rows), "utf-8")
    temporary.replace(target)


def filled(task: Callable[[], Row], given: Given) -> Row:
    """What a task gives, or why it gave nothing."""
    if time.time() > given.ends:
        return {"skipped": "no time was left"}
    try:
        return task()
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Row:
    if isinstance(error, Skip):
        return {"skipped": str(error)}
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]} ({place})"}


class Skip(Exception):
    """A row that cannot be filled here, and why."""
