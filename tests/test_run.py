"""`edgellama run` with a file of prompts, in pipes, and what it tells a script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.cli.prefill import PIECE

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
OPTIONS = ("--runtime", "reference", "--seed", "7", "-n", "6", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat.gguf"
    return write_tiny(path, tiny_config(), metadata={"tokenizer.chat_template": TEMPLATE})


def one(model: Path, prompt: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The reply to a single prompt."""
    assert run(["run", str(model), prompt, *OPTIONS, "--json", *more]) == 0
    text: str = json.loads(capsys.readouterr().out)["text"]
    return text


@pytest.mark.parametrize("more", [(), ("--raw",), ("--system", "be brief")])
def test_each_prompt_as_if_alone(
    more: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["the cat", "an ant", "the cat"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"the cat\r\n\nan ant\n   \nthe cat")
    assert run(["run", str(model), "--file", str(file), *OPTIONS, "--json", *more]) == 0
    document = json.loads(capsys.readouterr().out)
    alone = [one(model, prompt, capsys, *more) for prompt in prompts]
    assert [reply["prompt"] for reply in document["replies"]] == prompts
    assert [reply["text"] for reply in document["replies"]] == alone
    assert alone[0] == alone[2] != alone[1]
    assert {reply["finish_reason"] for reply in document["replies"]} == {"length"}
    assert document["model"] == str(model) and document["chat"] is ("--raw" not in more)


def test_text_alone_on_stdout(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nan ant\n")
    assert run(["run", str(model), "--file", str(file), *OPTIONS[:-1]]) == 0
    out, err = capsys.readouterr()
    texts = [one(model, prompt, capsys) for prompt in ("the cat", "an ant")]
    ended = [text if text.endswith("\n") else f"{text}\n" for text in texts]
    assert out == "\n".join(ended)
    assert "prompt 1 of 2: " in err and "prompt 2 of 2: " in err


def test_prompts_of_many_lines_in_a_pipe(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "edgellama", "run", str(model), "--file", "-", *OPTIONS]
    given = "the\n\ncat\n---\n---\nan ant\n--- \n"
    done = subprocess.run(
        [*command, "--separator", "---"],
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    texts = [one(model, prompt, capsys) for prompt in ("the\n\ncat", "an ant\n--- ")]
    ended = [text if text.endswith("\n") else f"{text}\n" for text in texts]
    assert done.stdout == "---\n".join(ended)


@pytest.mark.parametrize("raw", [True, False])
def test_a_long_prompt_is_read_as_if_at_once(
    raw: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piece by piece, so that there is progress to show; text and counts are the same."""
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = write_tiny(tmp_path / "a.gguf", tiny_config(context_length=1024), metadata=metadata)
    prompt = "the cat and " * 70
    arguments = ["run", str(path), prompt, *OPTIONS, "--json", *(["--raw"] if raw else [])]
    assert run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    with edgellama.load(path, runtime="reference") as model:
        params = edgellama.Sampling(seed=7)
        talk = [{"role": "user", "content": prompt}]
        if raw:
            chunks = [*model.generate(prompt, params, max_tokens=6)]
        else:
            chunks = [*model.chat(talk, params, max_tokens=6)]
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens > 2 * PIECE
    assert document["text"] == "".join(chunk.text for chunk in chunks)
    for name in ("prompt_tokens", "completion_tokens", "reused_tokens", "seed"):
        assert document["usage"][name] == getattr(usage, name)
    assert document["usage"]["prefill_seconds"] > 0
    assert run([*arguments[:2], prompt * 3, *arguments[3:]]) == 1
    assert "fit the context of 1024" in capsys.readouterr().err


def test_where_it_went_wrong(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n" + "z" * 500 + "\nan ant\n")
    assert run(["run", str(model), "--file", str(file), *OPTIONS[:-1]]) == 1
    out, err = capsys.readouterr()
    assert one(model, "the cat", capsys) in out
    assert "prompt 2 of 3 failed" in err
    assert err.splitlines()[-1].startswith("edgellama: ") and "128" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "more", "status", "words"),
    [
        (b"\n \n", (), 1, "holds no prompt"),
        (b"\xff\xfe", (), 1, "not UTF-8"),
        (b"hi", ("hello",), 2, "a prompt was given too"),
        (b"hi", ("--infill", "a", "b"), 2, "--infill takes two files"),
        (b"hi", ("--temperature", "-1"), 2, "temperature"),
        (None, (), 1, "prompts.txt"),
    ],
)
def test_what_is_refused(
    content: bytes | None,
    more: tuple[str, ...],
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the model is looked for: there is none here."""
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert run(["run", "nowhere.gguf", *more, "--file", str(file)]) == status
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
