"""The sampling options of `run` and `chat`: all of them, with their twins, and what they do."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.cli.sampling import SAMPLING, settings_of
from edgellama.sampling import ORDER

NONE = dict.fromkeys(SAMPLING)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "base.gguf")


def test_every_setting_has_its_option_and_twin() -> None:
    assert set(SAMPLING) == {each.name for each in fields(edgellama.Sampling)}
    for name, option in SAMPLING.items():
        declared = option.__metadata__[0]
        flag = name.removesuffix("s") if name == "dry_breakers" else name
        names = (declared.default, *declared.param_decls)  # how typer keeps the first
        assert "--" + flag.replace("_", "-") in names
        twin = None if name == "dry_breakers" else f"EDGELLAMA_{name.upper()}"
        assert declared.envvar == twin  # a breaker can be a line break, which no twin can hold


@pytest.mark.parametrize("command", ["run", "chat"])
def test_help_repeats_the_librarys_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for each in fields(edgellama.Sampling):
        if isinstance(each.default, (int, float)):
            option = words.split(f"--{each.name.replace('_', '-')} ", 1)[1]
            assert option.split("[default: (", 1)[1].startswith(f"{each.default:g})")


def test_what_is_not_given_is_left_to_the_library() -> None:
    assert settings_of(NONE) == settings_of(NONE | {"dry_breakers": (), "logit_bias": []}) == {}
    given = NONE | {"order": " top_k, temperature ,", "logit_bias": ["5=-inf", "7=2.5"], "top_k": 0}
    assert settings_of(given) == {
        "order": ("top_k", "temperature"),
        "logit_bias": {5: -float("inf"), 7: 2.5},
        "top_k": 0,
    }


def answer(
    capsys: pytest.CaptureFixture[str], model: Path, *more: str, status: int = 0
) -> dict[str, Any]:
    arguments = ["run", str(model), "the cat", "-n", "12", "--runtime", "reference", "--json"]
    assert run([*arguments, *more]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 3.0, "top_k": 3},
    {"temperature": 3.0, "typical_p": 0.2, "top_n_sigma": 1.5},
    {"temperature": 3.0, "xtc_probability": 0.7, "xtc_threshold": 0.02},
    {"temperature": 0.0, "dry_multiplier": 5.0, "dry_base": 1.2, "dry_allowed_length": 1},
    {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 1.0, "penalty_window": 9},
    {"temperature": 2.0, "mirostat": 2, "mirostat_tau": 2.0, "mirostat_mu": 3.0},
]


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: list(given)[1])
def test_options_and_twins_reach_the_library(
    given: dict[str, Any],
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with edgellama.load(model, runtime="reference") as loaded:
        params = edgellama.Sampling(**given, seed=3)
        chunks = list(loaded.generate("the cat", params, max_tokens=12))
    wanted = "".join(chunk.text for chunk in chunks)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    found = answer(capsys, model, "--seed=3", *options)
    assert found["text"] == wanted
    assert chunks[-1].usage is not None
    assert found["usage"]["mirostat_mu"] == chunks[-1].usage.mirostat_mu
    for name, value in given.items():
        monkeypatch.setenv(f"EDGELLAMA_{name.upper()}", str(value))
    assert answer(capsys, model, "--seed=3")["text"] == wanted


def test_order_and_bias_reach_the_library(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgellama.load(model, runtime="reference") as loaded:
        token = next(i for i in range(20, 99) if loaded.tokenizer.decode([i]).strip())
        wanted = loaded.tokenizer.decode([token] * 12, continuing=True)
    assert answer(capsys, model, f"--logit-bias={token}=1000")["text"] == wanted
    monkeypatch.setenv("EDGELLAMA_LOGIT_BIAS", f"5=-inf {token}=1000")
    assert answer(capsys, model)["text"] == wanted
    monkeypatch.delenv("EDGELLAMA_LOGIT_BIAS")

    hot = ("--seed=4", "--temperature=50", "--top-p=0.3", "--top-k=0", "--min-p=0")
    texts = {
        order: answer(capsys, model, *hot, f"--order={order}")["text"]
        for order in (",".join(ORDER), "top_p,temperature", "temperature,top_p")
    }
    same, late = texts[",".join(ORDER)], texts["temperature,top_p"]
    assert same == texts["top_p,temperature"] != late


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--logit-bias=x", "--logit-bias 'x'; expected ID=NUMBER"),
        ("--logit-bias=1=nan", "logit_bias[1] is nan"),
        ("--order=tempreature", "order is 'tempreature'; expected each at most once of penalties"),
        ("--mirostat=1", "mirostat is 1; expected 0 (off) or 2"),
        ("--typical-p=0", "typical_p is 0.0; expected a number above 0, up to 1"),
        ("--dry-breaker=", "dry_breakers is ''"),
        ("--xtc-threshold=nan", "xtc_threshold is nan"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_read(
    option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "nowhere.gguf", "hi", option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
