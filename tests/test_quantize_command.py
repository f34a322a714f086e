"""`edgellama quantize`: what it says, where, and its exit status."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversions import big_model, names_in, posix
from tiny import write_tiny

from edgellama.cli.main import run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "small.gguf")


def test_command_converts(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    assert run(["quantize", str(small), str(output), "--type", "f16"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "F16: " in said.err and "bits per weight, in " in said.err
    assert output.exists()


def test_command_shows_the_plan(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["quantize", str(small), str(tmp_path / "out.gguf"), "--dry-run"]
    assert run([*line, "--type", "q4_k"]) == 0
    said = capsys.readouterr()
    rows = [" ".join(row.split()) for row in said.out.splitlines()]
    assert rows[0] == "tensors from to MB why"
    assert "attn_q x 2 F32 Q5_0 0.0 rows of 64 are no multiple of 256, as Q4_K needs" in rows
    assert rows[-1].startswith("Q4_K_M: ") and rows[-1].endswith(" bits per weight")
    assert "note: 16 of 21 tensors get a larger type" in said.err
    assert names_in(tmp_path) == []


def test_command_in_json(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    line = ["quantize", str(small), str(output), "--type", "F16", "--json"]
    assert run([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run([*line, "--quiet"]) == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert said.err == ""
    assert done["type"] == "F16" and done["types"] == {"F16": 16, "F32": 5}
    assert done["bytes"] == output.stat().st_size and done["seconds"] > 0
    assert "seconds" not in planned
    assert done["tensors"] == planned["tensors"] and len(done["tensors"]) == 21
    assert done["tensors"][0] == {
        "name": "token_embd.weight",
        "shape": [288, 64],
        "source_type": "F32",
        "type": "F16",
        "reason": "",
        "fallback": False,
        "bytes": 288 * 64 * 2,
    }


def test_command_refuses(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = str(small), str(tmp_path / "out.gguf")
    for line, status, word in (
        ([source, output, "--type", "Q9"], 2, "type = 'Q9'"),
        ([source, output, "--type", "Q4_K", "--strict"], 2, "'token_embd.weight'"),
        ([source, source, "--type", "F16"], 2, "the output is the input"),
        ([source, output[:-4] + "onnx", "--type", "Q4_K"], 2, "ONNX"),
        ([str(tmp_path / "no.gguf"), output, "--type", "F16"], 1, "no such file"),
        ([source, output], 2, "--type"),
    ):
        assert run(["quantize", *line]) == status
        said = capsys.readouterr()
        assert word in said.err and said.out == ""
    assert names_in(tmp_path) == []


@posix
def test_command_on_a_terminal(tmp_path: Path) -> None:
    """A bar in bytes with the time that is left; once it has gone, the outcome."""
    import pty

    source, output = big_model(tmp_path / "big.gguf", 2**17), tmp_path / "out.gguf"
    line = [sys.executable, "-m", "edgellama", "quantize", str(source), str(output)]
    line += ["--type", "F32", "--certificate", "none"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(line, stderr=theirs, env={**os.environ, "COLUMNS": "120"}) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the other end has been closed
            while piece := os.read(ours, 4096):
                said += piece
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert re.search(r"quantizing .*% \d+\.\d/\d+\.\d MB \d\d:\d\d", text)
    assert re.search(r"out\.gguf: F32, .* bits per weight, in .* s; peak memory", text)


@posix
def test_command_that_is_interrupted(tmp_path: Path) -> None:
    source = big_model(tmp_path / "big.gguf", 2**19)
    line = [sys.executable, "-m", "edgellama", "quantize", str(source), str(tmp_path / "out.gguf")]
    line += ["--type", "F32", "--certificate", "none"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".out.gguf.*.tmp")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert names_in(tmp_path) == ["big.gguf"]
