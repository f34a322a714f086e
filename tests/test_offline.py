"""`run` and `chat` use no network: their tests again, and the real model, under an audit hook.

The hook is in every process, children included; sessions at a terminal have it always, see
`terminalhome`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from offline import Watched

HERE = Path(__file__).parent
HANG = 600.0  # seconds; it takes some ten
AGAIN = (
    "test_run.py",
    "test_cli.py",
    "test_chat.py",
    "test_chat_cli.py",
    "test_chat_commands.py",
    "test_chat_files.py",
    "test_chat_reading.py",
    "test_keyboard.py",
    "test_terminal.py",
)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def done(
    watched: Watched, *arguments: str, given: str = "", **more: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        input=given,
        env=os.environ | watched.environment() | more,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=HANG,
    )


def test_the_tests_of_run_and_chat(watched: Watched) -> None:
    files = [str(HERE / name) for name in AGAIN]
    result = done(watched, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *files)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert watched.attempts() == []
    assert sum("'-m', 'edgellama'" in line for line in watched.processes()) >= 10  # and children


def test_the_real_model(watched: Watched, default_model: Path) -> None:
    command = ("-m", "edgellama")
    options = ("--temperature", "0", "-n", "8")
    replies = [
        done(watched, *command, "run", str(default_model), "Who are you?", *options),
        done(watched, *command, "chat", str(default_model), *options, given="Who are you?"),
    ]
    for reply in replies:
        assert reply.returncode == 0, reply.stderr
    assert replies[0].stdout.strip() == replies[1].stdout.strip() != ""
    assert len(watched.processes()) >= 2 and watched.attempts() == []


def test_an_attempt_is_refused_and_noted(watched: Watched) -> None:
    """Or the tests above would say nothing: in a process, in its child, in `pull`."""
    attempt = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    child = (
        "import subprocess, sys\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {attempt!r}]).returncode)"
    )
    for number, code in enumerate((attempt, child), 1):
        result = done(watched, "-c", code)
        assert result.returncode == 1 and "the network was used" in result.stderr
        assert len(watched.attempts()) == number
    pulled = done(
        watched,
        *("-m", "edgellama", "pull", "nobody/nothing/none.gguf"),
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert pulled.returncode == 1 and len(watched.attempts()) > 2
