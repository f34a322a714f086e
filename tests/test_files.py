"""Where files lie, and that an output appears whole or not at all."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from edgellama.errors import EdgeLlamaError, OutputError, ParameterError
from edgellama.output import atomic_output
from edgellama.paths import DEFAULT_MODEL, cache_dir, cache_root, model_file, model_path

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGELLAMA_CACHE", str(folder))
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@posix
def test_cache_folders_are_the_owners_alone(cache: Path) -> None:
    for kind in ("models", "kernels"):
        folder = cache_dir(kind)
        assert folder == cache / kind
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (cache / "kernels").chmod(0o777)  # an older, open one is closed
    assert stat.S_IMODE(cache_dir("kernels").stat().st_mode) == 0o700


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_cache_folder_of_another_user_is_refused(cache: Path) -> None:
    os.chown(cache_dir("kernels"), 12345, -1)
    with pytest.raises(OutputError, match="belongs to another user"):
        cache_dir("kernels")


def test_cache_that_is_a_file(cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot be used.*EDGELLAMA_CACHE"):
        cache_dir("models")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG folders are a Linux custom")
def test_cache_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGELLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "edgellama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "edgellama"
    assert not (tmp_path / "home").exists()  # asking creates nothing


def test_model_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "org/repo/file.gguf"):
        file = model_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"GGUF")
        assert model_path(name) == file
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert model_path("tiny") == Path("tiny")  # what lies here comes first
    assert model_path(tmp_path) == tmp_path


def test_model_that_is_not_there_names_the_command() -> None:
    with pytest.raises(EdgeLlamaError, match=f"edgellama pull {DEFAULT_MODEL}"):
        model_path(DEFAULT_MODEL)
    with pytest.raises(EdgeLlamaError, match=r"edgellama pull org/repo/file\.gguf"):
        model_path("org/repo/file.gguf")
    with pytest.raises(EdgeLlamaError, match="no such file"):
        model_path("../models/escape")


@pytest.mark.parametrize("text", ["", "a\0b", "https://example.org/x.gguf"])
def test_text_that_is_no_path(text: str) -> None:
    with pytest.raises(ParameterError):
        model_path(text)


def test_path_that_the_system_refuses() -> None:
    with pytest.raises(EdgeLlamaError, match=r"cannot open|no such file"):
        model_path("x" * 5000)


@posix
def test_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EdgeLlamaError, match="neither a regular file nor a folder"):
        model_path(tmp_path / "pipe")


def test_output_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with atomic_output(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["out.bin"]


@posix
def test_output_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    dead = tmp_path / ".out[1].bin.0123456789ab.tmp"
    dead.write_bytes(b"half")
    with atomic_output(tmp_path / "out[1].bin"):
        assert not dead.exists()
    assert names_in(tmp_path) == ["out[1].bin"]


def test_output_leaves_a_living_writer_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with atomic_output(path) as slow:
        slow.write(b"slow")
        with atomic_output(path) as quick:
            quick.write(b"quick")
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow"
    assert names_in(tmp_path) == ["out.bin"]


@posix
def test_output_without_locks_goes_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system that has no locks."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    old, fresh = tmp_path / ".out.aaaaaaaaaaaa.tmp", tmp_path / ".out.bbbbbbbbbbbb.tmp"
    old.write_bytes(b"")
    fresh.write_bytes(b"")
    os.utime(old, (1e9, 1e9))
    with atomic_output(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == [fresh.name, "out"]


@posix
def test_output_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    with atomic_output(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_output_that_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_output(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["out.bin"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a child with limits of its own")
def test_full_disk_is_an_output_error(tmp_path: Path) -> None:
    """A file size limit makes writes fail as a full disk does, in a child."""
    import resource
    import signal
    import subprocess

    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    program = (
        "import sys\n"
        "from edgellama.output import atomic_output\n"
        "from edgellama.errors import OutputError\n"
        "try:\n"
        "    with atomic_output(sys.argv[1]) as file:\n"
        "        file.write(bytes(1 << 20))\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    reason = os.strerror(errno.EFBIG)
    assert done.stdout == f"out.bin: cannot be written: {reason}. Nothing was changed\n"
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["out.bin"]


def test_output_where_none_can_be(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "out"):
        with pytest.raises(OutputError), atomic_output(path):
            pytest.fail("nothing may be written")
    assert names_in(tmp_path) == []


@posix
def test_output_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_output(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_device_is_left_alone() -> None:
    with pytest.raises(OutputError), atomic_output(os.devnull):
        pytest.fail("nothing may be written")
