"""The public API as a whole: an app that uses all of it, and what it does to its host."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import typed_user
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run

INFILL = {"fim_pre": 284, "fim_suf": 285, "fim_mid": 286, "eot": 287}  # any four tokens


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in INFILL.items()}
    config = tiny_config(context_length=512)
    return write_tiny(tmp_path_factory.mktemp("api") / "tiny.gguf", config, metadata=keys)


def test_an_app_that_uses_everything(path: Path, tmp_path: Path) -> None:
    typed_user.main(path, tmp_path)


def test_it_leaves_nothing_out() -> None:
    text = Path(typed_user.__file__).read_text(encoding="utf-8")
    unused = [name for name in edgellama.__all__ if f"edgellama.{name}" not in text]
    assert unused == ["__version__"]


HOST = """
import asyncio, decimal, faulthandler, gc, locale, logging, os, signal, sys, threading, warnings
from pathlib import Path
import numpy, typed_user  # the app's own imports

def host():
    handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
    loggers = [(n, l.handlers) for n, l in logging.root.manager.loggerDict.items()
               if getattr(l, "handlers", None) and n != "edgellama"]
    mask = os.umask(0o22)
    os.umask(mask)
    return {
        "environment": dict(os.environ), "signals": handlers, "cwd": os.getcwd(), "umask": mask,
        "root": (logging.root.level, list(logging.root.handlers)), "loggers": loggers,
        "warnings": list(warnings.filters), "hooks": (sys.excepthook, threading.excepthook),
        "locale": locale.setlocale(locale.LC_ALL), "numpy": numpy.geterr(), "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr, sys.stdin), "gc": (gc.isenabled(), gc.get_threshold()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()), "trace": sys.gettrace(),
        "faulthandler": faulthandler.is_enabled(), "decimal": decimal.getcontext().prec,
        "threads": threading.active_count(), "unraisable": sys.unraisablehook,
    }

before = host()
typed_user.main(Path(sys.argv[1]), Path(sys.argv[2]))
after = host()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
assert [type(h).__name__ for h in logging.getLogger("edgellama").handlers] == ["NullHandler"]
assert logging.getLogger("edgellama").level == logging.NOTSET
"""


def test_the_host_is_left_as_it_was(path: Path, tmp_path: Path) -> None:
    """No prints, warnings, handlers, settings or threads are left; the environment is the same."""
    source = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HOST, str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": source},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CHILD = """
import multiprocessing, sys
import edgellama

def answer(path):
    with edgellama.load(path, threads=1) as model:
        chunks = model.generate([1, 5, 6], edgellama.Sampling(seed=3), max_tokens=5)
        return [chunk.token for chunk in chunks]

if __name__ == "__main__":
    with edgellama.load(sys.argv[1], threads=2) as model:
        model.session().forward([1, 2])  # the parent has threads that work
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
            replies = pool.map(answer, [sys.argv[1]] * 3, chunksize=1)
    replies.append(answer(sys.argv[1]))
    print(len(set(map(tuple, replies))), len(replies[0]))
"""


@pytest.mark.parametrize("way", ["spawn", "forkserver"])
def test_other_processes_load_their_own(way: str, path: Path, tmp_path: Path) -> None:
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot start processes by {way}")
    program = tmp_path / "program.py"
    program.write_text(CHILD)
    command = [sys.executable, str(program), str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 5\n", "")


def test_what_belongs_to_a_process_cannot_be_sent_to_another(path: Path) -> None:
    with edgellama.load(path, threads=1) as model:
        for each in (model, model.session(), edgellama.CancelToken()):
            with pytest.raises(TypeError, match="to another process"):
                pickle.dumps(each)
        for each in (model, edgellama.CancelToken()):
            with pytest.raises(TypeError, match="cannot be copied"):
                copy.copy(each)
        assert pickle.loads(pickle.dumps(model.config)) == model.config
        assert pickle.loads(pickle.dumps(model.info)) == model.info


def test_warnings_are_told_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """In `model.info` and by the logger; the command line prints them."""
    odd = write_tiny(tmp_path / "odd.gguf", metadata={"general.file_type": 2})  # it is float32
    with edgellama.load(odd, runtime="reference") as model:
        (warning,) = model.info.warnings
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("edgellama", f"odd.gguf: {warning}")
    ]
    assert "".join(capsys.readouterr()) == ""
    assert run(["run", str(odd), "hi", "-n", "1", "--runtime", "reference"]) == 0
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert run(["run", str(odd), "hi", "-n", "1", "--runtime", "reference", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
