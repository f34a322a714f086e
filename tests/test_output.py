"""Outputs that replace a file: what lies beside it, its permissions, and names of any length."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import write_tiny

from edgellama.output import atomic_output, sweep

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
HANG = 20  # seconds; what takes longer waits for ever


def write(target: Path) -> None:
    with atomic_output(target) as file:
        file.write(b"new")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what lies beside it -------------------------------------------------------------------------

FOREIGN = (
    ".notes.tmp",
    ".notes.mine.tmp",
    ".notes.0123456789AB.tmp",
    ".notes.0123456789abc.tmp",
    ".notes.mine.0123456789ab.tmp",
    ".notes.0123456789ab.tmp.tmp",
    ".notes.0123456789ab.old",
    ".notes0123456789ab.tmp",
    "notes.0123456789ab.tmp",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    write(tmp_path / "notes")
    assert names_in(tmp_path) == sorted([name, "notes"])


def test_a_folder_is_swept_of_what_begins_so_and_of_nothing_else(tmp_path: Path) -> None:
    kept = [".a_.tmp", ".a_b.o.1f.tmp", ".a_b.o.0123456789ab.tmp.x", ".b.o.0123456789ab.tmp"]
    for name in (*kept, ".a_b.o.0123456789ab.tmp", ".a_0123456789ab.tmp", ".a_\n.0123456789ab.tmp"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path, ".a_")
    assert names_in(tmp_path) == sorted(kept)


def pipe_link(place: Path) -> None:
    os.mkfifo(place.with_name("pipe"))
    place.symlink_to("pipe")


@posix
@pytest.mark.parametrize("make", [os.mkfifo, pipe_link, Path.mkdir] if os.name == "posix" else [])
def test_what_is_no_file_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Opening a pipe that nobody writes to would wait for ever."""
    place = tmp_path / ".notes.0123456789ab.tmp"
    make(place)
    before = place.lstat()
    thread = threading.Thread(target=write, args=[tmp_path / "notes"], daemon=True)
    thread.start()
    thread.join(HANG)
    assert not thread.is_alive()
    assert place.lstat().st_ino == before.st_ino
    assert (tmp_path / "notes").read_bytes() == b"new"


# --- permissions ---------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o444, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(
    umask: None, tmp_path: Path, kept: int, private: bool
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(kept)
    with atomic_output(path, private=private) as file:
        file.write(b"new")
        assert [mode(each) for each in tmp_path.iterdir()] == [kept, kept]  # never more open
    assert path.read_bytes() == b"new" and mode(path) == kept


@posix
def test_a_new_file_follows_the_umask_or_is_private(umask: None, tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert mode(tmp_path / "out") == 0o640
    with atomic_output(tmp_path / "secret", private=True):
        assert [mode(path) for path in tmp_path.glob(".secret.*")] == [0o600]
    assert mode(tmp_path / "secret") == 0o600


@posix
def test_saved_conversations_are_the_owner_s_alone(umask: None, tmp_path: Path) -> None:
    import edgellama
    from edgellama.cli import conversation_file

    path, text = tmp_path / "talk.session", tmp_path / "talk.json"
    model_file = write_tiny(tmp_path / "tiny.gguf")
    with edgellama.load(model_file, "reference", context=16) as model, model.session() as session:
        session.forward([5, 6, 7])
        session.save(path)
        assert mode(path) == 0o600
        path.chmod(0o640)  # its owner shares it
        session.save(path)
        assert mode(path) == 0o640
    conversation_file.save(text, [], {})
    assert mode(text) == 0o600


# --- names ---------------------------------------------------------------------------------------

LONG = ("模" * 80 + ".gguf", "é" * 125, "a" + "\U0001f600" * 60, "a" * 250)


@pytest.mark.parametrize("name", LONG)
def test_names_as_long_as_they_may_be(tmp_path: Path, name: str) -> None:
    """A name has at most 255 bytes; the temporary one is cut between two characters."""
    with atomic_output(tmp_path / name) as file:
        file.write(b"new")
        (temporary,) = names_in(tmp_path)
        assert temporary.rsplit(".", 2)[0][1:] in name
        os.fsencode(temporary).decode("utf-8")  # else it would be no text
    write(tmp_path / name)
    assert names_in(tmp_path) == [name]


@posix
def test_long_names_are_swept(tmp_path: Path) -> None:
    (tmp_path / f".{'模' * 33}.0123456789ab.tmp").write_bytes(b"half")
    write(tmp_path / LONG[0])
    assert names_in(tmp_path) == [LONG[0]]
