"""What all commands have in common: options with their twins, and --json, --quiet, --debug."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import write_tiny

from edgellama.cli.main import app, run
from edgellama.quantize import quantize

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RUN_A_MODEL = ("run", "chat", "bench", "perplexity", "verify", "estimate")
LISTS = {"--stop", "--dry-breaker", "--infill"}  # their twins are read by edgellama itself
NO_TWIN = {("perplexity", "--context")}  # a habit of chatting must not change a measure
DOCUMENTED = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
FILES = {"fim_pre": 284, "fim_suf": 285, "fim_mid": 286, "eot": 287}  # any four tokens


def options_of(command: str) -> dict[str, Any]:
    """By their first names, without --help."""
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option"]
    return {o.opts[0]: o for o in options if "--help" not in o.opts}


def test_commands_are_the_documented_ones() -> None:
    assert all(f"\n## {name}\n" in DOCUMENTED for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_twin(command: str) -> None:
    for name, option in options_of(command).items():
        twin = "EDGELLAMA_" + name.removeprefix("--").replace("-", "_").upper()
        if name not in LISTS and (command, name) not in NO_TWIN:
            assert option.envvar == twin, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_these(command: str) -> None:
    wanted = {"--json", "--quiet", "--debug"}
    if command in RUN_A_MODEL:
        wanted |= {"--runtime", "--device", "--threads"}
        wanted |= {"--context"} if command != "verify" else set()  # the certificate says it
    assert wanted <= set(options_of(command))


# --- twins ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in FILES.items()}
    return write_tiny(tmp_path_factory.mktemp("options") / "tiny.gguf", metadata=keys)


@pytest.fixture
def asked(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run` with arguments, and twins by name: its document."""

    def ask(*arguments: str, **twins: str) -> dict[str, Any]:
        with monkeypatch.context() as patched:
            for name, value in twins.items():
                patched.setenv(f"EDGELLAMA_{name}", value)
            common = ["--runtime", "reference", "-t", "0", "-n", "6", "--json", "--quiet"]
            assert run(["run", str(model), *arguments, *common]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        for reply in document.get("replies", [document]):
            del reply["usage"]
        return document

    return ask


def test_prompts_from_a_file(asked: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the\ncat\n---\nan ant\n")
    wanted = asked("--file", str(file), "--separator", "---")
    assert [reply["prompt"] for reply in wanted["replies"]] == ["the\ncat", "an ant"]
    assert asked(FILE=str(file), SEPARATOR="---") == wanted
    plain = asked("the cat")
    assert asked("the cat", FILE=str(file)) == plain  # what is typed comes first


def test_filling_in(asked: Any, tmp_path: Path) -> None:
    files = [tmp_path / "be fore", tmp_path / "after"]
    for file, text in zip(files, ("the ", " cat"), strict=True):
        file.write_text(text)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the\n")
    twin = os.pathsep.join(map(str, files))
    wanted = asked("--infill", *map(str, files))
    assert wanted["infill"] == [str(file) for file in files]
    assert asked(INFILL=twin) == wanted
    others = {"FILE": str(prompts), "SYSTEM": "be brief", "RAW": "1"}
    assert asked("--infill", *map(str, files), **others) == wanted
    assert "infill" not in asked("the cat", INFILL=twin)
    assert len(asked("--file", str(prompts), INFILL=twin)["replies"]) == 1


def test_a_twin_that_is_no_pair(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_INFILL", "one")
    assert run(["run", "nowhere.gguf"]) == 2
    assert "EDGELLAMA_INFILL must be two files" in capsys.readouterr().err


def test_texts_are_taken_whole(asked: Any) -> None:
    whole = asked("the cat")["text"]
    middle = next(at for at in range(1, len(whole)) if whole.index(whole[at:]) == at)
    stopped = asked("the cat", "--stop", whole[middle : middle + 3])
    assert stopped["text"] == whole[:middle] and stopped["finish_reason"] == "stop"
    assert asked("the cat", STOP=whole[middle : middle + 3]) == stopped
    assert asked("the cat", STOP="a b\n")["text"] == whole
    assert asked("the cat", "--stop", "never to be found", STOP=whole[middle])["text"] == whole
    the = {"LOGIT_BIAS": "259=99", "DRY_MULTIPLIER": "99", "DRY_ALLOWED_LENGTH": "1"}
    wanted = asked("the cat", "--dry-breaker", "the", **the)
    assert wanted["text"] == " the" * 6  # what is a breaker may be repeated
    assert asked("the cat", DRY_BREAKER="the", **the) == wanted != asked("the cat", **the)


# --- documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "MODEL", "the cat", "-n", "2", "--runtime", "reference"),
        ("run", "MODEL", "--file", "TEXT", "-n", "2", "--runtime", "reference"),
        ("run", "MODEL", "--infill", "TEXT", "TEXT", "-n", "2", "--runtime", "reference"),
        ("info", "MODEL"),
        ("estimate", "MODEL", "--context", "64"),
        ("doctor",),
        ("warmup", "MODEL"),
        ("quantize", "MODEL", "OUTPUT", "--type", "Q8_0"),
        ("verify", "CERTIFIED", "--runtime", "reference"),
        ("diff", "MODEL", "--a", "reference", "--b", "cpu"),
        ("perplexity", "MODEL", "--text", "TEXT", "--context", "8", "--runtime", "reference"),
    ],
    ids=" ".join,
)
def test_documents_have_the_documented_keys(
    arguments: tuple[str, ...],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"MODEL": model, "TEXT": tmp_path / "text", "OUTPUT": tmp_path / "out.gguf"}
    files["TEXT"].write_text("the cat and the ant are in the inn, the cat on the ant\n")
    if "CERTIFIED" in arguments:
        files["CERTIFIED"] = quantize(model, tmp_path / "certified.gguf", "Q8_0").output
    assert run([*(str(files.get(word, word)) for word in arguments), "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    section = DOCUMENTED.split(f"\n## {arguments[0]}\n")[1].split("\n## ")[0]
    keys = re.findall("`([a-z_]+)`", "JSON: " + section.split("\nJSON: ")[1].split("\n\n")[0])
    assert set(document) <= set(keys)
    assert len(keys) >= len(document) > 3


# --- wrong choices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--runtime", "llamacpp"), "runtime = 'llamacpp'; allowed: auto, cpu, onnx"),
        (("run", "--runtime", "llamacpp"), "Did you mean llama.cpp?"),
        (("run", "--device", "gpu"), "device = 'gpu'; allowed: auto, cpu, cuda\n"),
        (("chat", "--runtime", "x" * 1000), "runtime = 'xxx"),
        (("estimate", "--kv-type", "q80"), "Did you mean q8_0?"),
        (("diff", "--a", "gpu"), "a = 'gpu'; allowed: cpu, onnx, reference"),
        (("perplexity", "--text", "nowhere.txt", "--base-runtime", "Cpu"), "Did you mean cpu?"),
        (("quantize", "out.gguf", "--type", "Q4_KM"), "Did you mean Q4_K_M?"),
    ],
)
def test_a_misspelt_name_is_told_before_a_model_is_looked_for(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A11: what can be chosen, and which of them was meant."""
    assert run([arguments[0], "nowhere.gguf", *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1 and len(err) < 1000


def test_a_wrong_twin_is_told_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_RUNTIME", "onx")
    assert run(["run", "nowhere.gguf", "hi"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean onnx?" in err and "EDGELLAMA_RUNTIME = 'onx'" in err
    assert run(["run", "nowhere.gguf", "hi", "--runtime", "onx"]) == 2
    assert "EDGELLAMA_RUNTIME" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("run", "THREADS", "0"),
        ("run", "MAX_TOKENS", "many"),
        ("estimate", "CONTEXT", "x"),
        ("doctor", "JSON", "perhaps"),
    ],
)
def test_a_wrong_twin_is_blamed_itself(
    command: str,
    name: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"EDGELLAMA_{name}", value)
    words = [] if command == "doctor" else ["nowhere.gguf"]
    assert run([command, *words]) == 2
    err = capsys.readouterr().err
    option = "--" + name.lower().replace("_", "-")
    assert f"EDGELLAMA_{name}" in err and option not in err
    if command != "doctor":
        assert run([command, *words, option, "no number"]) == 2
        err = capsys.readouterr().err
        assert option in err and f"EDGELLAMA_{name}" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "hi", "--separator", "---"), "--separator is for --file"),
        (("run", "--infill", "a", "b", "--separator", "---"), "--separator is for --file"),
        (("run", "hi", "--suffix-first"), "--suffix-first is for --infill"),
        (("run", "--file", "a", "--suffix-first"), "--suffix-first is for --infill"),
        (("run", "hi", "--mirostat-tau", "4"), "--mirostat-tau is for --mirostat"),
        (("run", "hi", "--mirostat-mu", "4"), "--mirostat-mu is for --mirostat"),
        (("run", "hi", "--dry-base", "2"), "--dry-base is for --dry-multiplier"),
        (("run", "hi", "--dry-breaker", "."), "--dry-breaker is for --dry-multiplier"),
        (("run", "hi", "--xtc-threshold", "0.2"), "--xtc-threshold is for --xtc-probability"),
        (("run", "hi", "--order", ""), "--order names no step"),
        (("chat", "--order", " , "), "--order names no step"),
        (("diff", "--b", "reference", "--accuracy", "4"), "--accuracy is for onnx on the CPU"),
        (("diff", "--b", "onnx:cuda", "--accuracy", "4"), "--accuracy is for onnx on the CPU"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([arguments[0], "nowhere.gguf", *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_what_has_an_effect_or_is_no_more_than_a_habit_is_not(asked: Any) -> None:
    plain = asked("the cat")
    habits = {"MIROSTAT_TAU": "4", "DRY_BASE": "2", "SEPARATOR": "---", "SUFFIX_FIRST": "1"}
    assert asked("the cat", **habits) == plain
    assert asked("the cat", "--mirostat-tau", "4", MIROSTAT="2")["text"] == plain["text"]
    assert asked("the cat", "--dry-multiplier", "0", "--dry-base", "2") == plain
