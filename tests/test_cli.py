"""The command line as a person or a script meets it: what comes out where, and the exit status."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.cli.terminal import safe

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = ("--runtime", "reference", "--temperature", "0")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "base.gguf")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that goes on for long: long enough to be interrupted."""
    path = tmp_path_factory.mktemp("models") / "chat.gguf"
    metadata = {"tokenizer.chat_template": TEMPLATE}
    return write_tiny(path, tiny_config(context_length=8192), metadata=metadata)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def expected(path: Path, prompt: str, tokens: int, *, chat: bool = False) -> str:
    """What the library says, which the command must pass on."""
    with edgellama.load(path, runtime="reference") as model:
        greedy = edgellama.Sampling(temperature=0)
        messages = [{"role": "user", "content": prompt}]
        chunks = (
            model.chat(messages, greedy, max_tokens=tokens)
            if chat
            else model.generate(prompt, greedy, max_tokens=tokens)
        )
        return "".join(chunk.text for chunk in chunks)


# --- run ----------------------------------------------------------------------------------------


def test_run_writes_the_text_alone(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(base_model), "the cat", "-n", "12", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out.removesuffix("\n") == expected(base_model, "the cat", 12).removesuffix("\n")
    assert out.endswith("\n")
    assert "no chat template" in err
    assert "reply 12 tokens" in err


def test_run_uses_the_files_template(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(chat_model), "the cat", "-n", "12", *GREEDY]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == expected(chat_model, "the cat", 12, chat=True).rstrip("\n")
    assert "chat template" in err and "--raw" in err

    assert run([*arguments, "--raw"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == expected(chat_model, "the cat", 12).rstrip("\n")
    assert "template" not in err


def test_run_reads_stdin(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = expected(base_model, "the cat", 5).rstrip("\n")
    for arguments in (["-"], []):
        give_stdin(monkeypatch, b"the cat\n")
        assert run(["run", str(base_model), *arguments, "-n", "5", *GREEDY]) == 0
        assert capsys.readouterr().out.rstrip("\n") == text


def test_run_json_is_one_document(
    base_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_MAX_TOKENS", "7")  # every option has a twin
    monkeypatch.setenv("EDGELLAMA_QUIET", "1")
    assert run(["run", str(base_model), "the cat", "--json", *GREEDY]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["text"] == expected(base_model, "the cat", 7)
    assert document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 7
    assert document["device"]["runtime"] == "reference"
    assert document["chat"] is False


def test_run_quiet_says_nothing_else(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(base_model), "the cat", "-n", "3", "--quiet", *GREEDY]) == 0
    assert capsys.readouterr().err == ""


def test_same_seed_same_text(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(base_model), "the", "-n", "8", "--runtime", "reference", "-t", "1.2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert run([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_real_model_answers(default_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["run", str(default_model), "Name the capital of France.", "-n", "32", "-t", "0"]) == 0
    )
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "t/s" in err


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "nowhere.gguf", "hi"], 1, "nowhere.gguf"),
        (["run", "smollm2-135m-instruct", "hi"], 1, "edgellama pull smollm2-135m-instruct"),
        (["run", "https://example.org/x.gguf", "hi"], 2, "not a local file"),
        (["run", "nowhere.gguf", ""], 2, "the prompt is empty"),
        (["run", "nowhere.gguf", "a\udcff"], 2, "not valid text"),
        (["run", "nowhere.gguf", "hi", "--temperature", "-1"], 2, "temperature"),
        (["run", "nowhere.gguf", "hi", "--temperature", "nan"], 2, "temperature"),
        (["info", "nowhere.gguf"], 1, "nowhere.gguf"),
        (["pull", "no-such-model"], 2, "no-such-model"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgellama: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chatt"], "Did you mean 'chat'?"),
        (["run"], "Missing argument"),
        (["run", "x.gguf", "--temprature", "1"], "--temperature"),
        (["run", "x.gguf", "hi", "--threads", "0"], "--threads"),
        (["run", "x.gguf", "hi", "-n", "many"], "--max-tokens"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A9 and A11."""
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and "Traceback" not in err


def test_stdin_that_is_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"\xff\xfe\x00")
    assert run(["run", "nowhere.gguf"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    assert run(["info", str(tmp_path / "bad.gguf")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("edgellama: bad.gguf: ") and err.count("\n") == 1
    assert run(["info", str(tmp_path / "bad.gguf"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_prompt_longer_than_the_context(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(base_model), "z" * 500, *GREEDY, "--quiet"]) == 1
    assert "do not fit the context of 128" in capsys.readouterr().err


def test_system_without_a_template(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(base_model), "hi", "--system", "be brief", *GREEDY]) == 2
    assert "--system" in capsys.readouterr().err


# --- chat ---------------------------------------------------------------------------------------


def test_chat_takes_all_of_a_pipe_as_one_message(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in it is a command, a fence or a continued line."""
    message = '/help\none\\\n\n//two\n"""three"""\n/exit'
    give_stdin(monkeypatch, f"{message}\n".encode())
    system = ["--system", "be brief"]
    assert run(["chat", str(chat_model), "-n", "4", "--json", *system, *GREEDY]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [message["content"] for message in document["messages"][:2]] == ["be brief", message]
    with edgellama.load(chat_model, runtime="reference") as model:
        greedy = edgellama.Sampling(temperature=0)
        chunks = model.chat(document["messages"][:-1], greedy, max_tokens=4)
        text = "".join(chunk.text for chunk in chunks)
    assert document["messages"][2] == {"role": "assistant", "content": text}
    assert [reply["text"] for reply in document["replies"]] == [text]
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("given", "arguments", "words"),
    [
        (b"", (), "the prompt is empty"),
        (b"hi", ("--overflow", "drop"), "error, shift, drop-oldest"),
        (b"\xff", (), "not UTF-8"),
    ],
)
def test_chat_refuses_before_a_model_is_read(
    given: bytes,
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give_stdin(monkeypatch, given)
    assert run(["chat", "none.gguf", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == ""


def test_chat_that_fails_in_a_pipe_says_so(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"z" * 500)
    assert run(["chat", str(base_model), *GREEDY]) == 1
    out, err = capsys.readouterr()
    assert "do not fit the context of 128" in err and out == ""
    give_stdin(monkeypatch, b"hello")
    assert run(["chat", str(base_model), "--system", "be brief", *GREEDY]) == 2
    assert "needs a chat template" in capsys.readouterr().err


def test_chat_prints_replies_on_stdout(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"hello\n")
    assert run(["chat", str(chat_model), "-n", "4", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == expected(chat_model, "hello", 4, chat=True).rstrip("\n")
    assert "chat.gguf" in err and "reference" in err and "reply 4 tokens" in err


def test_chat_with_a_base_model_continues_text(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"the cat\n")
    assert run(["chat", str(base_model), "-n", "4", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == expected(base_model, "the cat", 4).rstrip("\n")
    assert "base model" in err


# --- pull, info, help ---------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_cache")
def test_pull_from_disk(default_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "--from", str(default_model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    path = Path(document["path"])
    assert path.stat().st_size == document["bytes"] == default_model.stat().st_size
    assert run(["info", document["name"]]) == 0  # the name is known from now on
    assert str(path) in capsys.readouterr().out


def test_info(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(chat_model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == chat_model.stat().st_size
    assert document["architecture"] == "llama" and document["problem"] is None
    assert document["config"]["n_kv_heads"] == 2 and document["config"]["context_length"] == 8192
    assert document["bits_per_weight"] == 32 and document["chat_template"] is True
    with edgellama.load(chat_model, runtime="reference") as model:
        assert document["parameters"] == model.info.parameters
        assert document["tensors"] == model.info.types

    assert run(["info", str(chat_model)]) == 0
    assert "2 of 64, 4 heads of 16, 2 for keys, ffn 96" in capsys.readouterr().out


def test_info_shows_what_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path / "odd.gguf", metadata={"general.architecture": "odd\x1b[2Jmodel"})
    assert run(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "problem" in out and r"odd\x1b[2Jmodel" in out and "\x1b" not in out


def test_help_repeats_the_librarys_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    defaults = edgellama.Sampling()
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        option = words.split(f"--{name.replace('_', '-')} ", 1)[1]
        assert option.split("[default: (", 1)[1].startswith(f"{getattr(defaults, name):g})")


# --- streams ------------------------------------------------------------------------------------


def test_control_characters_are_not_shown() -> None:
    """A13 of the catalogue of bad inputs."""
    osc52 = "\x1b]52;c;aGk=\x07"
    assert safe(f"a{osc52}b\x9b2Jc\u202egnp.exe\r\n\tz\x7f") == "a]52;c;aGk=b2Jcgnp.exe\n\tz"
    assert safe("naïve 日本語 😀 e\u0301 \u200d") == "naïve 日本語 😀 e\u0301 \u200d"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgellama", *arguments]


def test_reader_that_goes_away_is_no_error(chat_model: Path) -> None:
    """A12."""
    with subprocess.Popen(
        command("run", str(chat_model), "hi", "--raw", "-n", "4000", "--quiet", *GREEDY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        errors = child.stderr.read()
        assert child.wait(60) == 0
    assert errors == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["info"], ["run"]])
def test_full_disk_under_stdout(chat_model: Path, arguments: list[str]) -> None:
    if arguments == ["info"]:
        arguments = ["info", str(chat_model)]
    elif arguments == ["run"]:
        arguments = ["run", str(chat_model), "hi", "-n", "4", "--quiet", *GREEDY]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr.startswith("edgellama: ") and done.stderr.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in done.stderr


def test_no_input(chat_model: Path) -> None:
    """A12."""
    done = subprocess.run(
        command("run", str(chat_model), "-n", "4", *GREEDY),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "the prompt is empty" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that can close descriptors")
def test_closed_streams(chat_model: Path) -> None:
    """A12."""
    words = " ".join(command("info", str(chat_model)))
    done = subprocess.run(["sh", "-c", f"{words} <&- >&-"], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
