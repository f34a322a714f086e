"""Folders that are replaced whole: only what edgellama made itself is ever removed or renamed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellama.runtimes.onnx_atomic import MARK, UNFINISHED, atomic_folder

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of folders")


def write(target: Path, text: str = "new") -> None:
    with atomic_folder(target) as folder:
        (folder / MARK).write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


NAMES = (
    ".m.onnx.old",
    ".m.onnx.mine.tmp",
    ".m.onnx.mine.old",
    ".m.onnx.0123456789AB.tmp",
    ".m.onnx.0123456789abc.old",
)
OURS = (".m.onnx.0123456789ab.tmp", ".m.onnx.0123456789ab.old")
FOREIGN = [*((name, MARK) for name in NAMES), *((name, "thesis.txt") for name in (*NAMES, *OURS))]


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize(("name", "mark"), FOREIGN)
def test_folders_of_others_are_left_alone(
    tmp_path: Path, name: str, mark: str, there: bool
) -> None:
    """Ours have a name of our pattern and hold a mark of ours."""
    if there:
        write(tmp_path / "m.onnx", "old")
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / mark).write_text("mine")
    write(tmp_path / "m.onnx")
    assert names_in(tmp_path) == sorted([name, "m.onnx"])
    assert (foreign / mark).read_text() == "mine"
    assert (tmp_path / "m.onnx" / MARK).read_text() == "new"


def link(place: Path) -> None:
    elsewhere = place.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / MARK).touch()
    place.symlink_to(elsewhere)


@posix
@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, link] if os.name == "posix" else [])
@pytest.mark.parametrize("name", OURS)
def test_what_is_no_folder_is_left_alone(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    place = tmp_path / name
    make(place)
    before = place.lstat()
    write(tmp_path / "m.onnx")
    assert place.lstat().st_ino == before.st_ino
    assert not (tmp_path / "m.onnx").is_symlink()


@posix
@pytest.mark.parametrize("mark", [MARK, UNFINISHED])
def test_what_edgellama_made_and_left_goes(tmp_path: Path, mark: str) -> None:
    write(tmp_path / "m.onnx", "old")
    for name in OURS:
        left = tmp_path / name
        left.mkdir()
        (left / mark).touch()
    write(tmp_path / "m.onnx")
    assert names_in(tmp_path) == ["m.onnx"]


@posix
def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from edgellama.runtimes.onnx_atomic import atomic_folder\n"
        "with atomic_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'data').write_bytes(b'half')\n"
        "    os._exit(9)\n"
    )
    command = [sys.executable, "-B", "-c", program, str(tmp_path / "m.onnx")]
    assert subprocess.run(command, timeout=60).returncode == 9
    assert len(names_in(tmp_path)) == 1
    write(tmp_path / "m.onnx")
    assert names_in(tmp_path) == ["m.onnx"]
    assert names_in(tmp_path / "m.onnx") == [MARK]


def test_a_name_as_long_as_it_may_be(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / ("模" * 80 + ".onnx"), text)
    assert names_in(tmp_path) == ["模" * 80 + ".onnx"]
