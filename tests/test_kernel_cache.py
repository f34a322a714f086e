"""Compiled kernels on disk: reused without Numba, rebuilt when damaged, never in the way."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgellama.runtimes import kernel_cache

USE = """
import sys
import numpy as np
from edgellama.runtimes import abi, kernel_cache, levels
level = levels.choose()[0]
steps = []
names = ["select"]
address = kernel_cache.addresses(names, level, lambda *step: steps.append(step))["select"]
source, target = np.arange(64, dtype=np.float32).reshape(2, 32), np.zeros((1, 32), np.float32)
rows = np.array([1], np.int64)
instruction = np.zeros(abi.INSTRUCTION_WORDS, np.int64)
instruction[abi.ARGS : abi.ARGS + 3] = source.ctypes.data, target.ctypes.data, 128
state = np.zeros(abi.STATE_WORDS, np.int64)
state[abi.ROWS] = rows.ctypes.data
kernel_cache.function(address, 5)(instruction.ctypes.data, state.ctypes.data, 0, 1, 0)
assert np.array_equal(target[0], source[1])
print(int("numba" in sys.modules), steps)
"""
COMPILED = "1 [(0, 1, 'compiling kernels'), (1, 1, 'compiling kernels')]"
FOUND = "0 []"


def start(cache: Path, code: str = USE) -> "subprocess.Popen[str]":
    environment = os.environ | {"EDGELLAMA_CACHE": str(cache), "PYTHONWARNINGS": "error"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def use(cache: Path) -> str:
    """What a fresh process says after it has used a kernel."""
    return finish(start(cache))


def files(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").iterdir())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds one kernel."""
    cache = tmp_path_factory.mktemp("cache")
    assert use(cache) == COMPILED
    return cache


def copied(filled: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    for file in files(filled):
        (folder / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_second_process_does_without_numba(filled: Path) -> None:
    assert use(filled) == FOUND
    assert len(files(filled)) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_are_private(filled: Path) -> None:
    assert stat.S_IMODE((filled / "kernels").stat().st_mode) == 0o700
    for file in files(filled):
        assert stat.S_IMODE(file.stat().st_mode) & 0o022 == 0


def test_a_damaged_file_is_compiled_anew(filled: Path, tmp_path: Path) -> None:
    cache = copied(filled, tmp_path)
    (file,) = files(cache)
    good = file.read_bytes()
    file.write_bytes(flipped(good))
    assert use(cache) == COMPILED
    assert file.read_bytes() == good


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "longer", "foreign", "renamed"])
def test_damage_is_noticed(
    damage: str, filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = files(copied(filled, tmp_path))
    good = file.read_bytes()
    assert kernel_cache._read(file)
    bad = {
        "empty": b"",
        "short": good[:-1],
        "flipped": flipped(good),
        "longer": good + b"\0",
        "foreign": b"\x7fELF" + bytes(200),
        "renamed": other_kernel(),
    }[damage]
    file.write_bytes(bad)
    assert kernel_cache._read(file) is None
    assert file.name in caplog.text


def other_kernel() -> bytes:
    """A sound file, but another kernel's."""
    from edgellama.runtimes import levels

    level = levels.choose()[0]
    kernel_cache.addresses(["pack_rows"], level)
    file = kernel_cache._file("pack_rows", level)
    assert file is not None
    return file.read_bytes()


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("in the way")
    process = start(tmp_path)
    assert finish(process) == COMPILED
    assert (tmp_path / "kernels").read_text() == "in the way"


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a folder that the user cannot write to"
)
def test_a_read_only_folder_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir(mode=0o500)
    assert use(tmp_path) == COMPILED
    assert files(tmp_path) == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    assert {finish(process) for process in both} <= {COMPILED, FOUND}
    assert len(files(tmp_path)) == 1  # and no temporary file
    assert use(tmp_path) == FOUND


def test_the_key_covers_everything_the_code_follows_from() -> None:
    """Every module that a kernel is made of is part of the fingerprint."""
    code = """
import sys
from edgellama.quantize import encode_k
from edgellama.runtimes import compiler, kernel_team, kernels_attention, kernels_tiles
print(*(name for name in sys.modules if name.startswith("edgellama.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    runtimes = {f"edgellama.runtimes.{name}" for name in kernel_cache._SOURCES}
    assert runtimes == {name for name in loaded if name.startswith("edgellama.runtimes.")}
    encoders = {f"edgellama.quantize.{name}" for name in kernel_cache._ENCODERS}
    assert encoders == {name for name in loaded if name.startswith("edgellama.quantize.")}


def test_another_source_gets_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellama.runtimes import levels

    level = levels.choose()[0]
    before = kernel_cache._file("norm", level)
    assert before is not None and before.name.startswith(f"edgellama_norm-{level.name}-")
    monkeypatch.setattr(kernel_cache, "_fingerprint", lambda: "0123456789abcdef")
    after = kernel_cache._file("norm", level)
    assert after is not None and after.parent == before.parent and after != before


def test_kernels_of_old_releases_go_when_new_ones_are_written(tmp_path: Path) -> None:
    """The latest stay, whatever else lies there, and what a killed process left goes."""
    kernels = tmp_path / "kernels"
    kernels.mkdir(mode=0o700)
    made = []
    for age in range(kernel_cache.OTHERS + 3):
        for kernel, seconds in (("norm", 0), ("linear_Q4_1", 9_000)):  # its younger file counts
            file = kernels / f"edgellama_{kernel}-avx2-{age:016x}.o"
            file.write_bytes(b"code")
            os.utime(file, (time.time() - 3600 * age - seconds,) * 2)
            made.append(file)
    left = kernels / ".edgellama_norm-avx2-0123456789abcdef.o.0123456789ab.tmp"
    others = [kernels / name for name in ("notes.txt", "edgellama_norm.o", "a-0123456789abcdef.o")]
    for file in (left, *others):
        file.write_bytes(b"x")
    assert use(tmp_path) == COMPILED
    assert [file.exists() for file in made] == [True] * 2 * kernel_cache.OTHERS + [False] * 6
    assert all(file.exists() for file in others)
    if sys.platform != "win32":
        assert not left.exists()
    assert use(tmp_path) == FOUND


def test_an_address_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellama.runtimes import levels

    level = levels.choose()[0]
    first = kernel_cache.addresses(["norm", "select", "norm"], level)
    assert list(first) == ["norm", "select"] and all(first.values())
    monkeypatch.setattr(kernel_cache, "_load", None)  # would be called for anything new
    assert kernel_cache.addresses(["select", "norm"], level) == {
        "select": first["select"],
        "norm": first["norm"],
    }
