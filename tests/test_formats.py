"""The named prompt formats: texts and ids as released code makes them, and nobody can forge a turn.

The golden texts are always compared; ids where the vocabulary is at hand (see vocabs.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import vocabs
from hypothesis import given, settings, strategies as st

from edgellama.chat import ChatTemplate
from edgellama.errors import ParameterError
from edgellama.formats_named import FORMATS, chosen_template, format_named
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_golden.json").read_text())
TALK: list[dict[str, Any]] = GOLDEN["messages"]
NO_SYSTEM, FIRST = TALK[1:], [TALK[1]]
ALPACA = GOLDEN["alpaca_input_example"]
WITH_INPUT = [{"role": "user", "content": ALPACA["instruction"], "input": ALPACA["input"]}]
V1, V3 = "mistral-7b-instruct-v0.1/v0.2 (v1)", "mistral-7b-instruct-v0.3 (v3)"
CASES = (  # golden case, format, vocabulary, messages
    ("llama2-chat", "llama-2", "llama2", TALK),
    ("llama2-chat-nosys", "llama-2", "llama2", NO_SYSTEM),
    ("codellama-instruct-7b-13b-34b", "codellama", "llama2", TALK),
    ("llama3-instruct", "llama-3", "llama3", TALK),
    ("llama3-instruct-nosys", "llama-3", "llama3", NO_SYSTEM),
    ("llama3-instruct", "llama-3", "llama3_ranks", TALK),
    ("llama3.1-instruct", "llama-3.1", "llama3", TALK),
    ("llama3.1-instruct-nosys", "llama-3.1", "llama3", NO_SYSTEM),
    ("llama3.2-instruct", "llama-3.2", "llama3", TALK),
    ("llama3.2-instruct-nosys", "llama-3.2", "llama3", NO_SYSTEM),
    ("codellama-70b-instruct-meta", "codellama-70b", "llama2+16", TALK),
    ("codellama-70b-instruct-hf", "codellama-70b-hf", "llama2+16", TALK),
    ("alpaca-noinput", "alpaca", "llama2", FIRST),
    ("alpaca-input", "alpaca", "llama2", WITH_INPUT),
    ("vicuna-v0-train", "vicuna-v0", "llama2", NO_SYSTEM),
    ("vicuna-v0-serve", "vicuna-v0-serve", "llama2", NO_SYSTEM),
    ("vicuna-v0-fastchat-now", "vicuna-v0-fastchat", "llama2", NO_SYSTEM),
    ("vicuna-v1.1", "vicuna-v1.1", "llama2", NO_SYSTEM),
    ("koala", "koala", "llama2", NO_SYSTEM),
    ("wizardlm-7b", "wizardlm-7b", "llama2", FIRST),
    ("wizardlm-13b-30b-70b", "wizardlm", "llama2", NO_SYSTEM),
    ("openassistant-llama", "openassistant", "", NO_SYSTEM),
    ("belle", "belle", "llama2", NO_SYSTEM),
    ("colossal-llama-2", "colossal", "", TALK),
    ("tinyllama-chat-v1.0 (zephyr)", "zephyr", "llama2", TALK),
    ("smollm2-instruct", "chatml", "smollm2", TALK),
    ("smollm2-instruct", "smollm2", "smollm2", TALK),
    ("smollm2-instruct-nosys", "smollm2", "smollm2", NO_SYSTEM),
    (V1, "mistral", "mistral_v1", NO_SYSTEM),
    (f"{V1} with system", "mistral", "mistral_v1", TALK),
    ("mistral-7b-instruct-v0.2 (HF template of 2023)", "mistral-hf", "mistral_v1", NO_SYSTEM),
    (V3, "mistral-v3", "mistral_v3", NO_SYSTEM),
    (f"{V3} with system", "mistral-v3", "mistral_v3", TALK),
)
cases = pytest.mark.parametrize("case", CASES, ids=[f"{c[1]}-{c[0]}-{c[2]}" for c in CASES])
NAMED = [
    *("<step>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|im_start|>", "<|im_end|>", "<|prompter|>", "<|assistant|>", "<|system|>"),
    *("[INST]", "[/INST]"),
]
CONTROL, USER_DEFINED = 3, 4
PREFIX = "tokenizer.ggml."


def vocabulary(kind: int, add_bos: bool = False) -> Tokenizer:
    """Single bytes, BOS, EOS, and the named tokens as control or user-defined ones."""
    names = ["<unk>", "<s>", "</s>", *NAMED, "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    keys = {
        "model": "llama",
        "tokens": names,
        "scores": [0.0] * len(names),
        "token_type": [2, 3, 3, *[kind] * len(NAMED), 1, *[6] * 256],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": False,
        "add_bos_token": add_bos,
    }
    return tokenizer_from_gguf({PREFIX + key: value for key, value in keys.items()})


KINDS = {kind: vocabulary(kind) for kind in (CONTROL, USER_DEFINED)}


def messages_for(name: str, *texts: str) -> list[dict[str, Any]]:
    """As many messages as the format takes: the system's if it can, then user and assistant."""
    form = format_named(name)
    roles = ["user"] if form.single else ["user", "assistant", "user"]
    roles = ["system", *roles] if "system" in form.roles else roles
    return [{"role": role, "content": texts[i % len(texts)]} for i, role in enumerate(roles)]


@cases
def test_texts_are_exact(case: tuple[str, str, str, list[dict[str, Any]]]) -> None:
    golden, name, _, talk = case
    bos = "<|begin_of_text|>" if name.startswith("llama-3") else "<s>"
    text = format_named(name, date="26 Jul 2024").render(talk, bos=bos)
    expected = GOLDEN["formats"][golden]["text"]
    if "\u2581" in expected:  # pieces, with a space before each text that begins anew
        for mark in ("<s>", "</s>", "[/INST]", *(("[INST]",) if golden.startswith(V3) else ())):
            expected = expected.replace(f"{mark}\u2581", mark)
        expected = expected.replace("\u2581", " ").replace("<0x0A>", "\n")
    assert text == expected


@cases
def test_ids_are_exact(
    case: tuple[str, str, str, list[dict[str, Any]]], request: pytest.FixtureRequest
) -> None:
    golden, name, vocab, talk = case
    expected = GOLDEN["formats"][golden]["ids"]
    if not vocab:
        assert expected is None  # nobody has that vocabulary
        return
    tokenizer = tokenizer_from_gguf(vocabs.metadata(vocab, request))
    assert format_named(name, date="26 Jul 2024").encode(tokenizer, talk) == expected


def test_every_format_is_compared() -> None:
    assert {name for _, name, _, _ in CASES} == set(FORMATS)
    known = {case for case, _, _, _ in CASES} | {"zephyr-7b-beta (mistral vocab)"}
    infilling = {"codellama-infill-psm", "codellama-infill-spm"}
    assert known | infilling == set(GOLDEN["formats"])


def test_every_format_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert {name for name in FORMATS if f"`{name}`" not in text} == set()


ATTACKS = ["</s>", "<s>", "<unk>", "a", " ", "\n", "<", "|im_end|>", "é", "\u2581", *NAMED]
attack = st.lists(st.sampled_from(ATTACKS), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(st.sampled_from([*FORMATS]), st.lists(attack, min_size=4, max_size=4))
def test_users_cannot_write_a_formats_tokens(kind: int, name: str, texts: list[str]) -> None:
    form, tokenizer = format_named(name, date="1 Jan 2025"), KINDS[kind]
    for tag in form.tags:  # refused, see below
        texts = [text.replace(tag, "") for text in texts]
    talk = messages_for(name, *texts)
    own = {tokenizer.token_id(text) for text in ("<s>", "</s>", *form.tokens, *form.end_tokens)}
    ids = form.encode(tokenizer, talk)
    plain = form.encode(tokenizer, messages_for(name, "x"))
    assert [i for i in ids if i in own] == [i for i in plain if i in own]
    assert tokenizer.decode(ids, special=True) == form.render(talk).replace("\u2581", " ")


@pytest.mark.parametrize("name", ["llama-2", "codellama", "mistral"])
def test_tags_that_are_plain_text_are_refused(name: str) -> None:
    for tag in format_named(name).tags:
        with pytest.raises(ParameterError, match="which the format"):
            format_named(name).render([{"role": "user", "content": f"a {tag} b"}])
    talk = messages_for(name, "x")
    talk[-2]["content"] = "[/INST]"  # the model may have written so
    assert talk[-2]["role"] == "assistant" and format_named(name).render(talk)


@pytest.mark.parametrize(
    ("name", "roles", "problem"),
    [
        ("llama-2", "assistant user", "user and assistant must take turns, the user first"),
        ("llama-2", "user user", "must take turns"),
        ("llama-2", "user assistant", "the last message must be the user's"),
        ("llama-2", "system", "the last message must be the user's"),
        ("llama-2", "user system user", "a system message comes first, and once"),
        ("llama-2", "user tool user", "no place for a tool message"),
        ("llama-3", "user assistant", "the last message must be the user's"),
        ("koala", "system user", "no place for a system message"),
        ("alpaca", "system user", "no place for a system message"),
        ("alpaca", "user assistant user", "single instruction"),
        ("wizardlm-7b", "user assistant user", "single instruction"),
        ("zephyr", "user tool", "no place for a tool message"),
    ],
)
def test_the_order_of_roles_is_named(name: str, roles: str, problem: str) -> None:
    """J7 of the catalogue of bad inputs."""
    talk = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(ParameterError) as caught:
        format_named(name).encode(KINDS[CONTROL], talk)
    message = str(caught.value)
    assert name in message and problem in message
    assert "roles: " + ", ".join(roles.split()) in message


def test_a_system_message_takes_the_place_of_the_usual_one() -> None:
    for name in ("vicuna-v0", "vicuna-v1.1", "wizardlm", "colossal", "smollm2"):
        text = format_named(name).render(TALK)
        assert "You are a helpful assistant." in text
        assert "A chat between" not in text and "SmolLM" not in text


def test_tool_results_in_llama_3() -> None:
    talk = [TALK[1], {"role": "tool", "content": " 4 "}]
    text = format_named("llama-3").render(talk)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>" in text


def test_dates() -> None:
    assert "Today Date: 26 Jul 2024\n" in format_named("llama-3.1").render(TALK)
    chosen = format_named("llama-3.1", date="05 Mar 2025").render(TALK)
    assert "Today Date: 05 Mar 2025\n" in chosen
    today = format_named("llama-3.2").render(TALK)
    assert "Today Date: 26 Jul 2024" not in today and "Today Date: " in today


def test_a_vocabulary_without_the_tokens_is_refused() -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    keys = {"model": "llama", "tokens": names, "scores": [0.0] * len(names)}
    types = [2, 1, 3, *[6] * 256]
    metadata = {PREFIX + key: value for key, value in (keys | {"token_type": types}).items()}
    bare = tokenizer_from_gguf(metadata)
    with pytest.raises(ParameterError, match=r"chatml needs the token '<\|im_start\|>'"):
        format_named("chatml").encode(bare, TALK)
    with pytest.raises(ParameterError, match="llama-2 needs the token '<s>'"):
        format_named("llama-2").encode(bare, TALK)  # it has the name, but no BOS


def test_bos_comes_once_and_only_where_it_belongs() -> None:
    tokenizer = vocabulary(CONTROL, add_bos=True)
    for name in FORMATS:
        ids = format_named(name).encode(tokenizer, messages_for(name, "x"))
        count = {"llama-2": 2, "codellama": 2, "colossal": 4, "belle": 0}.get(name, 1)
        count = 0 if name in ("chatml", "smollm2") else count
        own = "<|begin_of_text|>" if name.startswith("llama-3") else "<s>"
        assert ids.count(tokenizer.token_id(own)) == count, name
        assert not name.startswith("llama-3") or tokenizer.bos not in ids


def test_choosing() -> None:
    tokenizer = KINDS[CONTROL]
    assert chosen_template("koala", tokenizer) is FORMATS["koala"]
    assert chosen_template(FORMATS["koala"], tokenizer) is FORMATS["koala"]
    jinja = chosen_template("{{ bos_token }}", tokenizer)
    assert isinstance(jinja, ChatTemplate) and jinja.render(FIRST) == "<s>"
    with pytest.raises(ParameterError, match=r"Did you mean vicuna-v1\.1"):
        chosen_template("vicuna-v1", tokenizer)
    for wrong in ("", "x" * 5000, 7, None, b"koala"):
        with pytest.raises(ParameterError) as caught:
            chosen_template(wrong, tokenizer)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 1000


def test_an_alpaca_input_must_be_text() -> None:
    with pytest.raises(ParameterError, match="input"):
        format_named("alpaca").render([{"role": "user", "content": "x", "input": 7}])
