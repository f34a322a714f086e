"""Conversions that are refused, fail, are killed or cancelled: an old output survives them all."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conversions import WIDE, big_model, names_in, posix, quantize
from killing import digest, kill_many
from tiny import write_tiny

import edgellama
from edgellama.errors import Cancelled, EdgeLlamaError, OutputError, ParameterError
from edgellama.gguf import open_gguf
from edgellama.quantize.importance_files import Importance, write_importance


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("models")
    write_tiny(at / "small.gguf")
    write_tiny(at / "F32.gguf", WIDE)
    return at


# --- arguments ----------------------------------------------------------------------------------


def test_output_that_is_the_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "a.gguf")
    before = digest(source)
    (tmp_path / "folder").mkdir()
    os.link(source, tmp_path / "hard.gguf")
    (tmp_path / "soft.gguf").symlink_to(source)
    (tmp_path / "folder" / "there.gguf").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for name in (
        source,
        "a.gguf",
        "./a.gguf",
        "folder/../a.gguf",
        "hard.gguf",
        "soft.gguf",
        "folder/there.gguf/a.gguf",
    ):
        with pytest.raises(ParameterError, match="the output is the input"):
            quantize(source, name, "F16")
        with pytest.raises(ParameterError, match="the output is the input"):
            quantize(name, source, "F16")
    assert digest(source) == before


def test_output_that_is_a_part_of_the_input_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "a-00002-of-00002.gguf"
    part.write_bytes(b"")
    with pytest.raises(ParameterError, match="the output is the input"):
        quantize(tmp_path / "a-00001-of-00002.gguf", part, "F16")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "x.gguf").write_bytes(b"")
    with pytest.raises(ParameterError, match="the output is the input"):
        quantize(checkpoint, checkpoint / "x.gguf", "F16")


def test_output_that_is_the_importance_matrix_is_refused(models: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    name = "blk.0.attn_q.weight"
    sums, counts = {name: np.ones(64, np.float32)}, {name: np.ones(1, np.float32)}
    write_importance(matrix, Importance(sums, counts))
    before = digest(matrix)
    os.link(matrix, tmp_path / "other.gguf")
    for output in (matrix, str(matrix), tmp_path / "other.gguf"):
        with pytest.raises(ParameterError, match=r"the output is the input, '.*imatrix\.gguf'"):
            quantize(models / "small.gguf", output, "Q4_0", importance=matrix)
    assert digest(matrix) == before and len(names_in(tmp_path)) == 2
    quantize(models / "small.gguf", tmp_path / "out.gguf", "Q4_0", importance=matrix)


def test_output_folder_that_holds_an_input_is_refused(models: Path, tmp_path: Path) -> None:
    """It would be replaced with all that lies in it."""
    folder = tmp_path / "model.onnx"
    (folder / "deep").mkdir(parents=True)
    (folder / "edgellama.json").write_text("{}")
    inside = Path(shutil.copy(models / "small.gguf", folder / "deep" / "small.gguf"))
    (tmp_path / "link.gguf").symlink_to(inside)
    for source in (inside, tmp_path / "link.gguf"):
        with pytest.raises(ParameterError, match="the output is the input"):
            quantize(source, folder, "Q8_0")
    with pytest.raises(ParameterError, match="the output is the input"):
        quantize(models / "small.gguf", folder, "Q8_0", importance=inside)
    assert inside.is_file()


def test_arguments_are_checked(models: Path, tmp_path: Path) -> None:
    source, output = models / "small.gguf", tmp_path / "out.gguf"
    for wrong in (
        {"type": "Q9"},
        {"certificate": "half"},
        {"threads": 0},
        {"output": tmp_path / "out.bin"},
        {"strict": True, "type": "Q6_K"},
    ):
        with pytest.raises(ParameterError):
            quantize(**({"source": source, "output": output, "type": "F16"} | wrong))
    with pytest.raises(ParameterError, match="K types cannot be written for ONNX Runtime"):
        quantize(source, tmp_path / "out.onnx", "Q4_K")
    with pytest.raises(EdgeLlamaError, match="missing"):
        quantize(tmp_path / "missing.gguf", output, "F16")
    assert names_in(tmp_path) == []


# --- an old output survives ---------------------------------------------------------------------


def test_existing_output_is_replaced(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    quantize(models / "small.gguf", output, "F16")
    with open_gguf(output) as file:
        assert file.tensors["blk.0.attn_q.weight"].type.name == "F16"
    assert names_in(tmp_path) == ["out.gguf"]


def test_output_where_none_can_be(models: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for output in (tmp_path / "missing" / "out.gguf", tmp_path / "folder.gguf"):
        with pytest.raises(OutputError):
            quantize(models / "small.gguf", output, "F16")
    with pytest.raises(OutputError, match="null"):
        quantize(models / "small.gguf", tmp_path / "a\0b.gguf", "F16")
    assert names_in(tmp_path) == ["folder.gguf"]


@posix
@pytest.mark.parametrize("suffix", [".gguf", ".onnx"])
def test_output_that_is_a_loop_of_links(models: Path, tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    one.symlink_to(other)
    other.symlink_to(one)
    for output in (one, one / f"out{suffix}"):
        with pytest.raises(OutputError, match=rf"{suffix}: cannot be written: .*symbolic links"):
            quantize(models / "small.gguf", output, "Q8_0")
    assert one.is_symlink() and other.is_symlink()


CHILD = """
import os, resource, signal, sys
from edgellama.errors import EdgeLlamaError
from edgellama.measure import peak_bytes
from edgellama.quantize import quantize
source, output, kind, limit, number = sys.argv[1:]
if limit == "user":
    os.seteuid(int(number))
elif limit:
    number = int(number)
    if limit == "RLIMIT_AS":
        number += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(getattr(resource, limit), (number, number))
try:
    quantize(source, output, kind, certificate="none", threads=2)
    print(peak_bytes())
except EdgeLlamaError as error:
    print(f"{type(error).__name__}: {error}")
"""


def limited(source: Path, output: Path, kind: str, limit: str = "", number: int = 0) -> str:
    """What a conversion in a process with that limit prints: an error, or its peak memory."""
    command = [sys.executable, "-c", CHILD, str(source), str(output), kind, limit, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip()


@posix
def test_full_disk(models: Path, tmp_path: Path) -> None:
    """A limit on a file's size makes writing fail, as a full disk does, wherever it strikes."""
    output = tmp_path / "out.gguf"
    size = quantize(models / "small.gguf", output, "F16").bytes
    output.write_bytes(b"old")
    for room in (0, 100, size // 2, size - 1):
        said = limited(models / "small.gguf", output, "F16", "RLIMIT_FSIZE", room)
        assert said.startswith("OutputError: out.gguf: cannot be written: "), said
        assert output.read_bytes() == b"old" and names_in(tmp_path) == ["out.gguf"]
    said = limited(models / "small.gguf", output, "F16", "RLIMIT_FSIZE", size)
    assert said.isdigit(), said
    assert output.stat().st_size == size


@posix
def test_folder_that_cannot_be_written(models: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        source, output = folder / "a.gguf", folder / "out.gguf"
        source.write_bytes((models / "small.gguf").read_bytes())
        output.write_bytes(b"old")
        folder.chmod(0o555)
        other = 65534 if os.geteuid() == 0 else os.geteuid()  # nothing is closed to root
        said = limited(source, output, "F16", "user", other)
        folder.chmod(0o755)
        assert said.startswith("OutputError: out.gguf: cannot be written: Permission denied")
        assert output.read_bytes() == b"old" and names_in(folder) == ["a.gguf", "out.gguf"]


@posix
def test_killed_at_any_moment(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.gguf", WIDE)
    folder = tmp_path / "outputs"
    folder.mkdir()
    found = kill_many(source, folder, "F16", times=10)
    assert found["damaged"] == found["litter"] == 0
    assert found["old"] + found["new"] == found["killed"] + found["ended"]
    assert found["killed"] == 10 and found["left"] <= 1


@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_cancelled(models: Path, tmp_path: Path, moment: float) -> None:
    output, token = tmp_path / "out.gguf", edgellama.CancelToken()
    output.write_bytes(b"old")
    if not moment:
        token.cancel()

    def progress(done: int, total: int, what: str) -> None:
        if done >= moment * total:
            token.cancel()

    with pytest.raises(Cancelled):
        quantize(models / "F32.gguf", output, "Q8_0", cancel=token, progress=progress)
    assert output.read_bytes() == b"old" and names_in(tmp_path) == ["out.gguf"]
    assert not [t for t in threading.enumerate() if t.name.startswith("edgellama-quantize")]


def test_cancelled_inside_a_large_tensor(tmp_path: Path) -> None:
    source = big_model(tmp_path / "big.gguf", 2**17)
    token, moment = edgellama.CancelToken(), []

    def cancel(done: int, total: int, what: str) -> None:
        assert done < total
        moment.append(time.monotonic())
        token.cancel()

    with pytest.raises(Cancelled):
        quantize(source, tmp_path / "out.gguf", "Q3_K_M", cancel=token, progress=cancel)
    assert time.monotonic() - moment[0] < 1.0
    assert names_in(tmp_path) == ["big.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """A tensor of 256 MB; as float32 it alone would take 512 MB."""
    source, output = big_model(tmp_path / "big.gguf", 2**17), tmp_path / "out.gguf"
    said = limited(source, output, "Q8_0", "RLIMIT_AS", 300 * 2**20)
    assert said.isdigit(), said
    assert int(said) < 300e6
    with open_gguf(output) as file:
        assert file.tensors["token_embd.weight"].n_bytes == 2**22 * 34


def test_progress_counts_the_bytes(models: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    output = tmp_path / "out.gguf"
    quantize(models / "F32.gguf", output, "F16", progress=lambda *now: told.append(now))
    done = [now[0] for now in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1]
    assert 0 <= output.stat().st_size - told[-1][1] < 2**16  # header and padding
