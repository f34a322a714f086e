"""`quantize --calibrate` and `--report`: what surrounds a conversion, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from conversions import names_in
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.perplexity import measure, read_text
from edgellama.quantize import quantize
from edgellama.quantize.calibrate import calibrate, check_matrix, check_place, matrix_beside
from edgellama.quantize.importance import collect, read_importance
from edgellama.quantize.runnable import runnable
from edgellama.quantize.source import open_source

WORDS = "the cat and the dog sat on a mat in the rain; "


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF model, the folder of a checkpoint, and two texts of two chunks each."""
    at = tmp_path_factory.mktemp("calibrate")
    write_tiny(at / "tiny.gguf", tiny_config(context_length=512), seed=3)
    (at / "folder").mkdir()
    styles = zoo.styles().values()
    zoo.write_folder(at / "folder", next(s for s in styles if s["max_position_embeddings"] >= 512))
    (at / "calm.txt").write_text(WORDS * 45)
    (at / "other.txt").write_text("a dog in the rain and no cat on the mat. " * 45)
    (at / "short.txt").write_text("the cat")
    return at


def command(source: Path, output: Path, *more: object) -> list[str]:
    line = ["quantize", source, output, "--type", "q4_1", "--certificate", "none", *more]
    return [str(word) for word in line]


# --- calibrating --------------------------------------------------------------------------------


def test_command_calibrates(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, kept = tmp_path / "out.gguf", tmp_path / "out.importance.gguf"
    assert matrix_beside(output) == kept
    assert run(command(here / "tiny.gguf", output, "--calibrate", here / "calm.txt")) == 0
    assert f"the importance matrix is kept in {kept}" in capsys.readouterr().err
    assert names_in(tmp_path) == [output.name, kept.name]
    found = read_importance(kept)
    wanted = collect(here / "tiny.gguf", read_text(here / "calm.txt"), dataset="calm.txt")
    assert found.datasets == ["calm.txt"] and found.chunks == wanted.chunks >= 2
    assert all((found.sums[name] == sums).all() for name, sums in wanted.sums.items())
    for name, importance in (("same", kept), ("plain", None)):
        other = tmp_path / f"{name}.gguf"
        quantize(here / "tiny.gguf", other, "q4_1", importance, certificate="none")
        assert (other.read_bytes() == output.read_bytes()) == (name == "same")


def test_a_checkpoint_is_calibrated_through_a_temporary_file(here: Path, tmp_path: Path) -> None:
    output, matrix = tmp_path / "out.gguf", tmp_path / "kept.gguf"
    line = command(here / "folder", output, "--calibrate", here / "calm.txt")
    assert run([*line, "--importance-out", str(matrix), "--chunks", "2", "--quiet"]) == 0
    assert names_in(tmp_path) == ["kept.gguf", "out.gguf"]
    floats = tmp_path / "floats.gguf"
    quantize(here / "folder", floats, "F16", certificate="none")
    wanted = collect(floats, read_text(here / "calm.txt"), chunks=2)
    found = read_importance(matrix)
    assert all((found.sums[name] == sums).all() for name, sums in wanted.sums.items())


def test_what_was_collected_is_used_again(here: Path, tmp_path: Path) -> None:
    matrix, done = tmp_path / "kept.gguf", []
    how = {"context": 64, "threads": 1}
    calibrate(here / "tiny.gguf", here / "calm.txt", matrix, chunks=2, **how)

    def progress(at: int, total: int, what: str) -> None:
        if what == "collecting importance":
            done.append((at // 64, total // 64))

    calibrate(here / "tiny.gguf", here / "calm.txt", matrix, chunks=5, progress=progress, **how)
    assert done[0] == (2, 5) and done[-1] == (5, 5)


def test_cancelled_while_calibrating(here: Path, tmp_path: Path) -> None:
    token, matrix = edgellama.CancelToken(), tmp_path / "kept.gguf"

    def progress(at: int, _total: int, what: str) -> None:
        if what == "collecting importance" and at:
            token.cancel()

    with pytest.raises(edgellama.Cancelled):
        calibrate(here / "tiny.gguf", here / "calm.txt", matrix, cancel=token, progress=progress)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("stop", ["cancelled", "failed"])
def test_the_temporary_file_goes_whatever_happens(here: Path, tmp_path: Path, stop: str) -> None:
    token = edgellama.CancelToken()
    kind = edgellama.Cancelled if stop == "cancelled" else ZeroDivisionError
    seen = []

    def progress(done: int, _total: int, what: str) -> None:
        seen.append(names_in(tmp_path))
        if stop == "cancelled" and done:
            token.cancel()

    with open_source(here / "folder") as source, pytest.raises(kind):
        how: dict[str, Any] = {"threads": 1, "cancel": token, "progress": progress}
        with runnable(source, tmp_path / "out.gguf", **how) as path:
            assert path.parent == tmp_path and path.exists()
            raise ZeroDivisionError
    assert any(seen) and names_in(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_a_killed_process_left_is_removed(here: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from edgellama.quantize.runnable import runnable\n"
        "from edgellama.quantize.source import open_source\n"
        "with open_source(sys.argv[1]) as source:\n"
        "    with runnable(source, Path(sys.argv[2]), threads=1):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", program, str(here / "folder"), str(output)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 1
    quantize(here / "folder", output, "Q8_0", certificate="none")
    assert names_in(tmp_path) == ["out.gguf"]


def test_a_temporary_file_in_use_is_left_alone(here: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with open_source(here / "folder") as source, runnable(source, output, threads=1) as path:
        quantize(here / "folder", output, "Q8_0", certificate="none")
        with edgellama.load(path, context=32) as model:
            assert np.isfinite(model.session().forward([1, 5, 9])).all()


def test_a_matrix_never_replaces_anything_else(here: Path, tmp_path: Path) -> None:
    text, output = here / "calm.txt", tmp_path / "out.gguf"
    precious = tmp_path / "precious.gguf"
    precious.write_bytes((here / "tiny.gguf").read_bytes())
    before = precious.read_bytes()
    for line in (
        command(here / "tiny.gguf", output, "--calibrate", text, "--importance-out", precious),
        command(here / "tiny.gguf", output, "--calibrate", text, "--importance-out", output),
        command(here / "tiny.gguf", output, "--calibrate", text, "--importance-out", text),
        command(precious, output, "--calibrate", text, "--importance-out", precious),
    ):
        assert run([*line, "--quiet"]) == 2
    assert precious.read_bytes() == before and names_in(tmp_path) == ["precious.gguf"]
    os.link(here / "calm.txt", tmp_path / "link.gguf")
    with pytest.raises(edgellama.ParameterError, match="cannot take the place"):
        check_matrix(tmp_path / "link.gguf", [text])


# --- reporting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tiny.gguf", "folder"])
def test_report(
    here: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, text = tmp_path / "out.gguf", here / "other.txt"
    assert run(command(here / source, output, "--report", "--text", text, "--quiet")) == 0
    lines = capsys.readouterr().out.splitlines()
    told = dict(re.split(r" {2,}", line) for line in lines)
    assert list(told)[:3] == ["type", "MB", "bits/weight"] and told["type"] == "Q4_1"
    assert re.fullmatch(r"\d+\.\d{4} ± \d+\.\d{4}", told["KL mean"])
    assert max(map(len, lines)) < 80
    assert names_in(tmp_path) == ["out.gguf"]

    base = tmp_path / "base.gguf"
    quantize(here / source, base, "F32" if source == "tiny.gguf" else "F16", certificate="none")
    line = command(here / source, output, "--report", "--text", text, "--quiet", "--json")
    assert run(line) == 0
    found = json.loads(capsys.readouterr().out)
    with edgellama.load(output, context=512) as model, edgellama.load(base, context=512) as other:
        wanted = measure(model, read_text(text), base=other).figures
    figures = found["quality"]["figures"]
    assert found["importance"] is None and figures["tokens"] == wanted.tokens
    for name in ("perplexity", "base_perplexity", "kl_mean", "kl_p99", "same_top", "delta_p_rms"):
        estimate = getattr(wanted, name)
        assert figures[name] == pytest.approx({"value": estimate.value, "error": estimate.error})
    assert told["KL mean"].startswith(f"{wanted.kl_mean.value:.4f} ± ")


def test_calibrating_and_reporting_share_the_file(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, calm = tmp_path / "out.gguf", here / "calm.txt"
    line = command(here / "folder", output, "--calibrate", calm, "--report", "--text", calm)
    assert run([*line, "--chunks", "2", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["importance"] == str(tmp_path / "out.importance.gguf")
    assert found["quality"]["chunks"] == 2
    assert "flatters" in said.err and any("flatters" in note for note in found["notes"])
    assert names_in(tmp_path) == ["out.gguf", "out.importance.gguf"]


def test_a_dry_run_measures_nothing(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Importance changes the plan of some types: it is shown."""
    line = command(here / "tiny.gguf", tmp_path / "out.gguf", "--calibrate", here / "calm.txt")
    more = ["--report", "--text", str(here / "other.txt"), "--dry-run", "--json"]
    assert run([*line, *more]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] is None
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--report"], 2, "--report needs --text"),
        (["--text", "calm.txt"], 2, "--text is for --report"),
        (["--chunks", "3"], 2, "--chunks is for"),
        (["--importance-out", "x.gguf"], 2, "--importance-out is for --calibrate"),
        (["--calibrate", "calm.txt", "--importance", "i.gguf"], 2, "choose one"),
        (["--calibrate", "short.txt"], 1, "at least 1024 are needed"),
        (["--report", "--text", "short.txt"], 1, "at least 1024 are needed"),
        (["--calibrate", "missing.txt"], 1, "cannot be read"),
        (["--report", "--text", "missing.txt"], 1, "cannot be read"),
    ],
)
def test_refused_before_anything_is_done(
    here: Path,
    tmp_path: Path,
    more: list[str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(here / word) if word.endswith(".txt") else word for word in more]
    assert run(command(here / "tiny.gguf", tmp_path / "out.gguf", *words)) == status
    assert said in capsys.readouterr().err
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("what", ["missing/out.gguf", "missing/out.onnx", "a.txt/out.gguf"])
@pytest.mark.parametrize("option", ["OUTPUT", "--importance-out"])
def test_places_are_looked_at_before_the_long_work(
    here: Path, tmp_path: Path, what: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("no folder")
    words = [str(tmp_path / what), "--calibrate", str(here / "calm.txt"), "--chunks", "2"]
    if option != "OUTPUT":
        words[:1] = [str(tmp_path / "out.gguf"), option, words[0]]
    elif what.startswith("missing"):  # else it would be beside the output, and fail first
        words += ["--importance-out", str(tmp_path / "m.gguf")]
    started = [str(here / "folder"), *words, "--type", "q4_1", "--certificate", "none"]
    assert run(["quantize", *started]) == 1
    err = capsys.readouterr().err
    assert "cannot be written: " in err and "folder" in err.splitlines()[-1]
    assert "Nothing was changed" in err and "collecting" not in err
    assert names_in(tmp_path) == ["a.txt"]  # no matrix was begun


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("needs a folder that the user cannot write to")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(edgellama.OutputError, match="cannot be written to"):
            check_place(tmp_path / "m.gguf")
    finally:
        tmp_path.chmod(0o700)
