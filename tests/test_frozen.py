"""The app that examples/build_app.py freezes: one folder that answers with nothing else around."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import edgellama
from edgellama.runtimes.levels import choose

HANG = 120.0
ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Name the capital of France."
BUILD = """
import sys
from pathlib import Path
from build_app import build
build(sys.argv[1], Path(sys.argv[2]), [sys.argv[3]])
"""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("PyInstaller") is None, reason="PyInstaller is not installed"
    ),
    pytest.mark.skipif(
        sys.platform == "linux" and not sysconfig.get_config_var("Py_ENABLE_SHARED"),
        reason="PyInstaller needs a Python with a shared library",
    ),
    pytest.mark.skipif(importlib.util.find_spec("tkinter") is None, reason="no tkinter"),
]


@pytest.fixture(scope="module")
def app(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's folder, with the kernels for this processor alone."""
    folder = tmp_path_factory.mktemp("frozen")
    site = folder / "site"  # as it is installed: PyInstaller does not see editable installations
    for name in ("edgellama", "quantize", "runtimes", "cli"):
        target = site / "edgellama" / name if name != "edgellama" else site / name
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
    paths = os.pathsep.join([str(site), str(ROOT / "examples")])
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(default_model), str(folder), choose()[0].name],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=10 * HANG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = folder / "edgellama-chat"
    size = sum(file.stat().st_size for file in found.rglob("*") if file.is_file())
    print(f"\nbuilt in {time.monotonic() - started:.0f} s; {size / 1e6:.0f} MB")
    return found


def alone() -> list[str]:
    """A command that runs another one without any network, where this user may do that."""
    prefix = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=HANG)
    return prefix if tried.returncode == 0 else []


def asked(app: Path, *prefix: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The app's answer, in an environment that holds nothing else."""
    command = [*prefix, str(app / app.name), "--ask", QUESTION]
    if os.name == "nt":
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    print(f"\nanswered in {time.monotonic() - started:.2f} s {'without a network' * bool(prefix)}")
    return done


def test_answers_without_network_home_and_compiler(app: Path, default_model: Path) -> None:
    """Only what is in the folder: no Numba, no cache, no network, no variables."""
    names = {path.name.split("-")[0].lower() for path in app.rglob("*")}
    assert "kernels" in names and not names & {"numba", "edgellama.libs"}
    archive = (app.parent / "work" / "edgellama-chat" / "PYZ-00.toc").read_text("utf-8")
    assert "'edgellama.model'" in archive and "'numba" not in archive
    with edgellama.load(default_model) as model:
        messages = [{"role": "user", "content": QUESTION}]
        chunks = list(model.chat(messages, edgellama.Sampling(temperature=0)))
    done = asked(app, *alone())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(chunk.text for chunk in chunks) + "\n"


def test_nothing_is_written(app: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in app.rglob("*")}
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    done = asked(app, HOME=str(home), LOCALAPPDATA=str(home))
    assert done.returncode == 0 and "Paris" in done.stdout
    assert not list(home.iterdir())
    assert {file: file.stat().st_mtime_ns for file in app.rglob("*")} == before


def test_it_is_the_shipped_kernels_that_run(app: Path) -> None:
    """Without them there is no answer, and what is missing is said in words."""
    (kernels,) = app.rglob("kernels")
    away = kernels.rename(app.parent / "away")
    try:
        done = asked(app, EDGELLAMA_CACHE=str(app.parent / "empty"))
    finally:
        away.rename(kernels)
    assert done.returncode == 1 and done.stdout == ""
    assert "kernel" in done.stderr and "numba" in done.stderr and "Traceback" not in done.stderr
