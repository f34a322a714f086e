"""The GPU kit (`tests/gpu`): on the CPU what can be, and with the marker `gpu` what needs CUDA."""

import json
import mmap
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import capture, nodes, ops, parts, provider, report, slim_wheel

RUN = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture(scope="module")
def onnxruntime_here() -> None:
    if (why := provider.missing("cpu")) is not None:
        pytest.skip(f"ONNX Runtime cannot be used here: {why}")


def given(folder: Path, device: str, model: str = "") -> parts.Given:
    return parts.Given(device, str(folder), str(folder), model, ends=time.time() + 300)


def wrong(module: Any, told: parts.Given) -> list[dict[str, Any]]:
    """Rows of a part that are out of bounds or failed; there must be rows."""
    rows = [labels | parts.filled(task, told) for labels, task in module.tasks(told)]
    assert rows
    return [row for row in rows if not row.get("ok", True)]


# --- the kit's own machinery ---------------------------------------------------------------------


def test_a_row_that_fails_says_why_and_the_others_are_filled(tmp_path: Path) -> None:
    told = given(tmp_path, "cpu")

    def fails() -> parts.Row:
        raise ValueError("no such thing")

    def cannot() -> parts.Row:
        raise parts.Skip("not here")

    row = parts.filled(fails, told)
    assert row["ok"] is False and row["error"].startswith("ValueError: no such thing (test_gpu.py:")
    assert parts.filled(cannot, told) == {"skipped": "not here"}
    assert parts.filled(lambda: {"nmse": 0.0}, told) == {"nmse": 0.0}
    late = replace(told, ends=time.time() - 1)
    assert parts.filled(fails, late) == {"skipped": "no time was left"}


def test_a_part_that_dies_costs_only_itself(tmp_path: Path) -> None:
    """An unknown part ends its process at once; one that takes too long is stopped."""
    told = given(tmp_path, "cpu")
    died = parts.start(parts.Part("nothing", "gpu.nothing", 1), told, RUN)
    assert "ended with status 1" in died["error"] and died["rows"] == []
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(1000)\n")
    stopped = parts.start(parts.Part("capture", "", 1), replace(told, ends=0.0), sleeper, grace=0.1)
    assert "stopped after" in stopped["error"]


def test_the_command_reports_what_it_could_not_do(tmp_path: Path) -> None:
    """With no time left every figure is missing and named; without torch a part fails."""
    command = [sys.executable, RUN, "--device", "cpu", "--quick", "--minutes", "0"]
    command += ["--parts", "speed", "capture", "--out", tmp_path, "--model", "nowhere.gguf"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert list(results["parts"]) == ["capture", "speed"]
    captured = results["parts"]["capture"]
    missing = {row["skipped"] for row in captured["rows"]}  # without `onnx` nothing is tried
    assert captured["error"] or missing == {"no time was left"} or "'onnx'" in str(missing)
    speed = results["parts"]["speed"]
    assert speed["error"] or any("skipped" in row for row in speed["rows"])
    assert done.returncode == (1 if speed["error"] or captured["error"] else 0)
    assert "## capture" in done.stdout and done.stdout.strip() == (
        (tmp_path / "table.md").read_text("utf-8").strip()
    )


def test_the_table_shows_the_worst_of_rows_alike_and_all_that_went_wrong() -> None:
    rows: list[dict[str, Any]] = [
        {"op": "MatMulNBits", "bits": 4, "m": m, "nmse": error, "ok": error < 0.5}
        for m, error in ((1, 0.1), (2, 0.3), (16, 0.2), (17, 0.9))
    ]
    results = report.header("cpu", True)
    results["parts"]["operators"] = {"error": None, "seconds": 1.0, "rows": rows}
    assert not report.good(results)
    lines = [line for line in report.table(results).splitlines() if line.startswith("| MatMul")]
    assert lines == [
        "| MatMulNBits | 4 | 3 | 0.3 | ok |",
        "| MatMulNBits | 4 | 1 | 0.9 | **out of bounds** |",
    ]
    results["parts"]["operators"]["rows"] = rows[:3]
    assert report.good(results)
    results["parts"]["operators"]["error"] = "stopped"
    assert not report.good(results)


def test_the_first_value_that_is_off_is_named() -> None:
    far = [("token_embd", 0.0), ("blk.0.attn", 1e-8), ("blk.0.ffn_residual", 0.2), ("output", 0.1)]
    row = nodes.row(far, 1e-3, 1)
    assert row["first_node"] == "blk.0.ffn_residual: 2.0e-01" and row["by_layer"] == [0.2]
    assert row["ok"] is False and row["nmse"] == 0.2
    assert nodes.row(far[:2], 1e-3, 0)["ok"] is True


def test_a_slim_wheel_keeps_one_architecture() -> None:
    """Machine code of another is zeroed; sizes, headers and all around it stay."""

    def entry(architecture: int, kind: int = slim_wheel.ELF) -> bytes:
        head = struct.pack("<HHIQ", kind, 0x101, 64, 40).ljust(slim_wheel.ARCHITECTURE_AT, b"h")
        return (head + struct.pack("<I", architecture)).ljust(64, b"h") + b"c" * 40

    entries = [entry(80), entry(90), entry(120), entry(90, kind=1)]
    size = sum(map(len, entries))
    header = slim_wheel.MAGIC + struct.pack("<HHQ", 1, 16, size)
    before = b"x" * 5 + slim_wheel.MAGIC + b"y" * 30 + header + b"".join(entries) + b"z" * 7
    with mmap.mmap(-1, len(before)) as library:
        library[:] = before
        assert slim_wheel.keep_architecture(library, 90) == (2, 80)
        after = library[:]
    kept = [entries[0][:64] + bytes(40), entries[1], entries[2][:64] + bytes(40), entries[3]]
    assert after == before[: before.index(header) + 16] + b"".join(kept) + b"z" * 7
    with mmap.mmap(-1, len(before)) as library:
        library[:] = before.replace(struct.pack("<Q", 40), struct.pack("<Q", 4000))
        with pytest.raises(ValueError, match="does not fit its fat binary"):
            slim_wheel.keep_architecture(library, 90)


# --- operators -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("onnxruntime_here")
def test_operators_on_the_cpu() -> None:
    failed = [case for case in ops.cases("cpu", quick=True) if not ops.run("cpu", case)["ok"]]
    assert not failed


@pytest.mark.usefixtures("onnxruntime_here")
def test_an_operator_that_turns_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with attention one position off, the operator is out of bounds."""
    case = ops.Attention(4, 2, 32, past=40, new=1, dtype="float32")
    assert ops.run("cpu", case)["ok"]
    original = ops.attention64

    def shifted(case: ops.Attention, feeds: dict[str, np.ndarray]) -> Any:
        turned = {name: np.roll(feeds[name], 1, axis=0) for name in ("cos", "sin")}
        return original(case, feeds | turned)

    monkeypatch.setattr(ops, "attention64", shifted)
    assert not ops.run("cpu", case)["ok"]


@pytest.mark.usefixtures("onnxruntime_here")
def test_decoding_is_the_same_however_it_is_driven(tmp_path: Path) -> None:
    assert not wrong(capture, replace(given(tmp_path, "cpu"), quick=True))


# --- on CUDA -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("module", ["ops", "parity", "capture"])
def test_on_cuda(module: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import importlib

    model = str(request.getfixturevalue("default_model")) if module != "ops" else ""
    told = given(tmp_path, "cuda", model)
    assert not wrong(importlib.import_module(f"gpu.{module}"), told)
