"""Signals in the first moments of the command, while it is still being imported."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

SLOW = """
import os, pathlib, time
pathlib.Path(os.environ["MARK"]).touch()
time.sleep(60)
"""
ROOT = Path(__file__).parents[1]
SCRIPT = "import sys; from edgellama.__main__ import main; sys.exit(main())"  # as pip writes it


def ended(tmp_path: Path, words: list[str], number: int) -> tuple[int, bytes, bytes]:
    """How a command ends that gets a signal while it imports typer."""
    (tmp_path / "typer.py").write_text(SLOW)
    mark = tmp_path / "mark"
    settings = {"PYTHONPATH": str(tmp_path), "MARK": str(mark)}
    with subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            deadline = time.monotonic() + 60
            while not mark.exists() and child.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            child.send_signal(number)
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
    return child.returncode, out, err


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX does")
@pytest.mark.parametrize("words", [["-m", "edgellama", "--help"], ["-c", SCRIPT, "--help"]])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_importing(tmp_path: Path, words: list[str], name: str) -> None:
    assert ended(tmp_path, words, getattr(signal, name)) == (130, b"", b"")


def test_the_script_begins_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"edgellama": "edgellama.__main__:main"}


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX does")
def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """As for what a shell starts in the background, or with nohup."""
    program = (
        "import signal\n"
        "for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        "import sys; sys.argv = ['edgellama', '--version']\n"
        "import edgellama.cli.main as cli; from edgellama.__main__ import main\n"
        "cli.run = lambda _: "
        "print(*map(signal.getsignal, (signal.SIGINT, signal.SIGHUP))) or 0\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, b"1 1")
