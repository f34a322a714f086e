"""Prompt formats and infilling on the command line, and the formats' stops through a model."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_config, vocabulary, write_tiny

import edgellama
from edgellama import Model, ParameterError, Sampling, TemplateError
from edgellama.cli.main import run

SIZE = 320
NAMES = {  # pieces that these tests make the model say, and the tokens that formats write
    300: "\u2581<PRE>",
    301: "\u2581<SUF>",
    302: "\u2581<MID>",
    303: "\u2581<EOT>",
    304: "<step>",
    305: "<|prompter|>",
    306: "<|assistant|>",
    307: "<|system|>",
    308: "\u2581yes\u2581USER:\u2581no",
    309: "\u2581yes<0x0A>",
}
USER_DEFINED = range(304, 308)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = ("--runtime", "reference", "--temperature", "0", "-n", "6")
USER = [{"role": "user", "content": "hi"}]


def written(path: Path, template: str | None = None) -> Path:
    pieces, scores, types = vocabulary(SIZE)
    for at, name in NAMES.items():
        pieces[at], types[at] = name, 4 if at in USER_DEFINED else 3 if at < 304 else 1
    keys = {"tokens": pieces, "scores": scores, "token_type": types}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    metadata["tokenizer.chat_template"] = template
    config = tiny_config(vocab_size=SIZE, context_length=512)
    return write_tiny(path, config, metadata=metadata)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("chatty") / "chatty.gguf", TEMPLATE)


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[Model]:
    with edgellama.load(base, runtime="reference") as loaded:
        yield loaded


def said(path: Path, talk: list[dict[str, str]], template: str | None) -> str:
    with edgellama.load(path, runtime="reference") as loaded:
        chunks = loaded.chat(talk, Sampling(temperature=0), template=template, max_tokens=6)
        return "".join(chunk.text for chunk in chunks)


def forced(token: int) -> Sampling:
    return Sampling(temperature=0, logit_bias={token: 1000.0})


# --- the library --------------------------------------------------------------------------------


def test_a_formats_stop_texts_end_a_reply_and_are_not_shown(model: Model) -> None:
    for name, text in (("vicuna-v1.1", "yes"), ("koala", "yes"), ("zephyr", "yes USER: no")):
        chunks = list(model.chat(USER, forced(308), template=name, max_tokens=1))
        assert "".join(chunk.text for chunk in chunks) == text
        assert chunks[-1].finish_reason == ("length" if name == "zephyr" else "stop")
    own = model.chat(USER, forced(308), template="vicuna-v1.1", stop=["es"])
    assert "".join(chunk.text for chunk in own) == "y"
    with pytest.raises(ParameterError, match="stop is"):
        model.chat(USER, template="vicuna-v1.1", stop="x")


@pytest.mark.parametrize(("name", "token"), [("codellama-70b", 304), ("openassistant", 305)])
def test_a_formats_own_tokens_end_a_reply(model: Model, name: str, token: int) -> None:
    chunks = list(model.chat(USER, forced(token), template=name, max_tokens=3))
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "stop")]
    other = list(model.chat(USER, forced(token), template="zephyr", max_tokens=3))
    assert len(other) == 3 and other[-1].finish_reason == "length"


def test_a_templates_own_end_of_turn_ends_a_reply(model: Model) -> None:
    template = "{{ messages[0].content }}<step>"
    chunks = list(model.chat(USER, forced(304), template=template, max_tokens=3))
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "stop")]


def test_nothing_is_guessed(model: Model, chatty: Path) -> None:
    assert model.info.template is None
    assert model.info.template_source.startswith("none: the file has no chat template")
    with pytest.raises(TemplateError, match=r"base model.*template="):
        model.chat(USER)
    with edgellama.load(chatty, runtime="reference") as other:
        assert other.info.template == TEMPLATE
        assert other.info.template_source == "the file's own, which comes first"
        own = other.chat_ids(USER)
        assert own == other.chat_ids(USER, template=TEMPLATE)
        assert own != other.chat_ids(USER, template="koala")
    with pytest.raises(ParameterError, match="Did you mean koala"):
        model.chat(USER, template="kaola")


def test_a_next_turn_computes_only_new_tokens(model: Model) -> None:
    session, first = model.session(), model.chat_ids(USER, template="llama-2")
    talk = [*USER]
    for known in (0, len(first)):
        chunks = list(
            model.chat(talk, forced(280), template="llama-2", session=session, max_tokens=4)
        )
        usage = chunks[-1].usage
        assert usage is not None and known <= usage.reused_tokens <= known + 4
        text = "".join(chunk.text for chunk in chunks)
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "more"}]


# --- the commands -------------------------------------------------------------------------------


def test_run_with_a_format(base: Path, chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (base, chatty):
        assert run(["run", str(path), "hi", "--template", "vicuna-v1.1", *GREEDY, "--json"]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["text"] == said(path, USER, "vicuna-v1.1")
        assert document["template_source"] == "the format vicuna-v1.1, as --template asks"
        assert document["chat"] is True and "vicuna-v1.1" in err
    assert run(["run", str(chatty), "hi", *GREEDY, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["template_source"] == "the file's own, which comes first"
    assert run(["run", str(base), "hi", *GREEDY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["template_source"] is None


def test_run_with_a_template_in_a_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    arguments = ["run", str(base), "hi", *GREEDY, "--template"]
    assert run([*arguments, str(tmp_path / "own.jinja")]) == 0
    out, err = capsys.readouterr()
    assert out.removesuffix("\n") == said(base, USER, TEMPLATE).removesuffix("\n")
    assert "own.jinja, as --template asks" in err

    (tmp_path / "bad.jinja").write_text("{% if %}")
    assert run([*arguments, str(tmp_path / "bad.jinja")]) == 1
    assert "bad.jinja: chat template: line 1" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert run([*arguments, str(tmp_path / "binary")]) == 1
    assert "not UTF-8" in capsys.readouterr().err


def test_wrong_uses_are_found_before_a_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--template", "lama-2"], "Did you mean llama-2"),
        (["--template", "koala", "--raw"], "contradict"),
        (["--infill", "a", "b"], "no prompt"),
    ):
        assert run(["run", str(tmp_path / "none.gguf"), "hi", *arguments]) == 2
        assert words in capsys.readouterr().err
    for nothing in ("x" * 300, str(tmp_path), "a\0b"):
        assert run(["chat", str(tmp_path / "none.gguf"), "--template", nothing]) == 2
        assert "the formats are llama-2, codellama" in capsys.readouterr().err


def test_chat_with_a_format(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n"), encoding="utf-8"))
    monkeypatch.setenv("EDGELLAMA_TEMPLATE", "llama-2")
    assert run(["chat", str(base), *GREEDY, "--json", "--system", "be brief"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["template_source"] == "the format llama-2, as --template asks"
    assert "template  the format llama-2" in err and "base model" not in err
    talk = [{"role": "system", "content": "be brief"}, *USER]
    assert document["replies"][0]["text"] == said(base, talk, "llama-2")


def test_info_shows_the_template_and_its_source(
    base: Path, chatty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, template, source in ((base, None, "none: the file has"), (chatty, TEMPLATE, "the f")):
        assert run(["info", str(path), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["template"] == template and document["chat_template"] is bool(template)
        assert document["template_source"].startswith(source)
        assert run(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert document["template_source"] in out and ("{% for m in" in out) is bool(template)


def test_run_fills_in(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "before.py").write_bytes(b"def f(x):\r\n    return ")
    (tmp_path / "behind.py").write_bytes(b"\n\nprint(f(3))\n")
    files = ["--infill", str(tmp_path / "before.py"), str(tmp_path / "behind.py")]
    for more in ([], ["--suffix-first"]):
        assert run(["run", str(base), *files, *more, *GREEDY]) == 0
        out = capsys.readouterr().out
        with edgellama.load(base, runtime="reference") as model:
            expected = model.infill(
                "def f(x):\r\n    return ", "\n\nprint(f(3))\n", Sampling(temperature=0),
                max_tokens=6, suffix_first=bool(more),
            )  # fmt: skip
        assert out == expected
    assert run(["run", str(base), *files, *GREEDY, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["infill"] == files[1:] and document["usage"]["completion_tokens"] <= 6
    assert run(["run", str(base), "--infill", files[1], str(tmp_path), *GREEDY]) == 1
    assert "is no file" in capsys.readouterr().err


def test_run_refuses_to_fill_in_with_other_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny(tmp_path / "plain.gguf")
    (tmp_path / "a").write_text("a")
    files = ["--infill", str(tmp_path / "a"), str(tmp_path / "a")]
    assert run(["run", str(path), *files, *GREEDY]) == 1
    assert "plain.gguf: key 'tokenizer.ggml.tokens': the vocabulary has no infilling tokens" in (
        capsys.readouterr().err
    )
