"""Every command of a chat, with a tiny model: what it does, what it tells, what it refuses."""

import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Model, Sampling
from edgellama.cli import clipboard
from edgellama.cli.chat import Chat
from edgellama.cli.commands import COMMANDS
from edgellama.cli.conversation import Conversation
from edgellama.cli.reply import Wording
from edgellama.cli.sampling import SAMPLING
from edgellama.cli.settings import NAMES, Settings, line_about, setting_named, spelled
from edgellama.cli.terminal import Terminal

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
CONTEXT = 256


def opened(path: Path, template: str | None) -> Model:
    config = tiny_config(context_length=CONTEXT)
    metadata = {"tokenizer.chat_template": template}
    return edgellama.load(write_tiny(path, config, metadata=metadata), runtime="reference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(tmp_path_factory.mktemp("models") / "chat.gguf", TEMPLATE) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(tmp_path_factory.mktemp("models") / "base.gguf", None) as loaded:
        yield loaded


Begin = Callable[..., Chat]


@pytest.fixture
def begin(model: Model, monkeypatch: pytest.MonkeyPatch) -> Begin:
    for name in ("VISUAL", "EDITOR", "SSH_CONNECTION", "SSH_TTY", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)

    def start(
        other: Model | None = None,
        *,
        seed: int | None = None,
        temperature: float = 0.0,
        max_tokens: int | None = 5,
        overflow: str = "error",
        system: str | None = None,
    ) -> Chat:
        sampling = {"temperature": temperature, "seed": seed}
        settings = Settings.of(Wording(max_tokens, None, sampling), overflow)
        return Chat(Conversation(Terminal(), other or model, settings, system))

    return start


@pytest.fixture
def chat(begin: Begin) -> Chat:
    return begin()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[Chat, str], str]:
    """What a chat says on stderr to one thing that was typed; it must not end by it."""

    def ask(chat: Chat, typed: str) -> str:
        capsys.readouterr()
        assert chat.take(typed)
        return capsys.readouterr().err

    return ask


Told = Callable[[Chat, str], str]


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.conversation.messages()]


# --- talking --------------------------------------------------------------------------------------


def test_a_message_and_its_footer(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.take("hello")
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == contents(chat)[1].rstrip("\n") != ""
    for words in ("[prompt ", " tokens", "reply 5 tokens", "first token", f"/{CONTEXT}"):
        assert words in err
    assert "cut at max_tokens" in err and "\x1b" not in err
    chat.take("again")
    assert " cached)" in capsys.readouterr().err
    chat.stats = False
    chat.take("more")
    assert capsys.readouterr().err == ""


def test_slashes(chat: Chat, told: Told) -> None:
    assert "There is no command '/sett'. Did you mean /set?" in told(chat, "/sett x")
    assert "// begins a message" in told(chat, "/zzz")
    assert "\\x1b" in told(chat, "/a\x1b[2J")
    assert contents(chat) == []
    told(chat, "//set x")
    assert contents(chat)[0] == "/set x"


def test_help(chat: Chat, told: Told) -> None:
    text = told(chat, "/help")
    for command in COMMANDS.values():
        assert f"/{command.name}" in text and command.help in text
        page = told(chat, f"/help {command.name}")
        assert page.startswith(f"/{command.name}") and len(page.splitlines()) > 1
        assert told(chat, f"/help /{command.name}") == page
        for name in command.also:
            assert told(chat, f"/help {name}") == page
    assert '"""' in text and "Ctrl-C" in text
    assert told(chat, "/?") == text
    assert "There is no command" in told(chat, "/help nothing")


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "/exit  "])
def test_exit(chat: Chat, word: str) -> None:
    assert not chat.take(word)


def test_clear(begin: Begin, told: Told) -> None:
    chat = begin(system="be brief")
    told(chat, "hello")
    told(chat, "/clear")
    assert contents(chat) == ["be brief"] and chat.conversation.session.position == 0


def test_undo(chat: Chat, told: Told) -> None:
    assert "nothing was said yet" in told(chat, "/undo")
    told(chat, "one")
    told(chat, "two")
    assert '"two"' in told(chat, "/undo")
    assert len(contents(chat)) == 2 and chat.draft == "two"
    told(chat, "three")
    assert chat.conversation.replies[-1].usage is not None
    assert chat.conversation.replies[-1].usage.reused_tokens > 0


def test_regen_takes_the_next_seeds(begin: Begin, model: Model, told: Told) -> None:
    chat = begin(seed=2**64 - 2, temperature=1.5)
    assert "nothing was said yet" in told(chat, "/regen")
    told(chat, "hello")
    first = contents(chat)[0]
    for seed in (2**64 - 1, 0, 1):
        told(chat, "/regen")
        talk = [{"role": "user", "content": first}]
        params = Sampling(temperature=1.5, seed=seed)
        text = "".join(chunk.text for chunk in model.chat(talk, params, max_tokens=5))
        assert contents(chat) == [first, text]
    assert len({reply.text for reply in chat.conversation.replies}) > 1


def test_regen_without_chance_says_so(chat: Chat, told: Told) -> None:
    told(chat, "hello")
    before = contents(chat)
    assert "the reply will be the same" in told(chat, "/regen")
    assert contents(chat) == before


def test_regen_that_fails_keeps_the_reply(chat: Chat, told: Told) -> None:
    told(chat, "hello")
    before = contents(chat)
    told(chat, "/set logit_bias 100000=1")
    assert "logit_bias id" in told(chat, "/regen")
    assert contents(chat) == before


def test_a_message_that_fails_is_not_kept(chat: Chat, told: Told) -> None:
    text = told(chat, "z" * 500)
    assert "do not fit the context" in text and "/edit opens it" in text
    assert contents(chat) == [] and chat.draft == "z" * 500
    assert "reply 5 tokens" in told(chat, "hello")


# --- settings -------------------------------------------------------------------------------------


def test_set_shows_and_changes(chat: Chat, told: Told) -> None:
    everything = told(chat, "/set")
    assert all(f"{name} = " in everything for name in NAMES)
    assert "temperature = 0   (default 0.8)" in everything
    assert told(chat, "/set top-k") == "top_k = 40\n"
    assert told(chat, "/set top_k 7") == "top_k = 7   (default 40)\n"
    assert chat.conversation.settings.sampling.top_k == 7
    assert told(chat, "/set top_k default") == "top_k = 40\n"
    told(chat, "/set max_tokens 2")
    assert "reply 2 tokens" in told(chat, "hello")


VALUES = {  # for each setting: what is typed, and what it means
    "top_k": ("3", 3),
    "penalty_window": ("9", 9),
    "dry_allowed_length": ("3", 3),
    "dry_window": ("9", 9),
    "dry_breakers": ('["a", "\\n"]', ("a", "\n")),
    "mirostat": ("2", 2),
    "mirostat_mu": ("4.5", 4.5),
    "logit_bias": ("5=-inf, 9=1.5", {5: -math.inf, 9: 1.5}),
    "order": ("top_k, min_p,temperature", ("top_k", "min_p", "temperature")),
    "seed": ("18446744073709551615", 2**64 - 1),
    "max_tokens": ("12", 12),
    "stop": ('["x", "y"]', ("x", "y")),
    "overflow": ("shift", "shift"),
    "dry_base": ("2", 2.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_can_be_set_read_back_and_taken_back(name: str) -> None:
    text, value = VALUES.get(name, ("0.25", 0.25))
    changed = Settings().changed(name, text)
    assert changed.value(name) == value
    assert changed.document() == {name: value}
    assert changed.changed(name, spelled(value)) == changed
    assert changed.changed(name, "default") == Settings()
    with pytest.raises(edgellama.ParameterError, match=name):
        Settings().changed(name, '["')
    assert f"{name} = " in line_about(changed, name)


def test_settings_are_those_of_sampling() -> None:
    assert set(SAMPLING) == {each.name for each in dataclasses.fields(Sampling)}
    assert {*NAMES} - {*SAMPLING} == {"max_tokens", "stop", "overflow"}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/set top_k x", "expected an integer 0.."),
        ("/set top_p 2", "a number above 0, up to 1"),
        ("/set temperature nan", "a number 0..100"),
        ("/set seed -1", "an integer 0.."),
        ("/set seed 1e3", "an integer 0.."),
        ("/set max_tokens 0", "an integer 1.."),
        ("/set max_tokens " + "9" * 5000, "an integer 1.."),
        ("/set top_k " + "9" * 5000, "an integer 0.."),
        ("/set overflow drop", "error, shift, drop-oldest"),
        ("/set order top_k,top_k", "each at most once of penalties, dry"),
        ("/set logit_bias 5", "expected ID=NUMBER"),
        ("/set stop []x", "a JSON list of texts"),
        ("/set stop [1]", "strings of 1..4096 characters"),
        ("/set stop " + "[" * 100_000, "a JSON list of texts"),
        ("/set mirostat 1", "0 (off) or 2"),
        ("/set temprature 1", "Did you mean temperature?"),
        ("/set \x1b 1", "there is no setting '\\x1b'"),
    ],
)
def test_set_refuses_and_names_what_is_allowed(
    typed: str, words: str, chat: Chat, told: Told
) -> None:
    before = chat.conversation.settings
    assert words in told(chat, typed)
    assert chat.conversation.settings is before


def test_names_of_settings() -> None:
    assert setting_named("TOP-P") == "top_p"


def test_system(chat: Chat, base: Model, begin: Begin, told: Told) -> None:
    assert "There is no system message" in told(chat, "/system")
    assert told(chat, "/system be brief") == "system: be brief\n"
    told(chat, "hello")
    assert contents(chat)[0] == "be brief"
    told(chat, "/system be long")
    assert contents(chat)[:2] == ["be long", "hello"]
    assert "There is no system message" in told(chat, "/system -")
    assert contents(chat)[0] == "hello"
    assert "needs a chat template" in told(begin(base), "/system be brief")


def test_system_that_the_template_refuses(begin: Begin, told: Told, tmp_path: Path) -> None:
    with opened(tmp_path / "strict.gguf", NO_SYSTEM) as strict:
        chat = begin(strict)
        assert "no system" in told(chat, "/system be brief")
        assert chat.conversation.system is None
        assert "reply 5 tokens" in told(chat, "hello")


def test_show(begin: Begin, told: Told) -> None:
    chat = begin(system="be brief")
    told(chat, "/set top_k 7")
    text = told(chat, "/show")
    for words in ("chat.gguf", "reference", "F32", "32.0 bits", "be brief", "top_k = 7", TEMPLATE):
        assert words in text
    assert f"{CONTEXT} tokens of the model's {CONTEXT}" in text and "comes first" in text


# --- the context ----------------------------------------------------------------------------------


def test_context(begin: Begin, told: Told) -> None:
    chat = begin(system="be brief")
    assert f"0 of {CONTEXT} tokens" in told(chat, "/context")
    told(chat, "hello")
    text = told(chat, "/context")
    used = chat.conversation.replies[-1].position
    assert f"{used} of {CONTEXT} tokens" in text
    for words in ("system", "user", "assistant", '"hello"', "Nothing is ever left out"):
        assert words in text


def test_a_full_context_is_foretold_and_told(begin: Begin, told: Told) -> None:
    chat = begin(overflow="shift", max_tokens=30)
    first = told(chat, "z" * 150)
    assert "The context is" in first and "will push out the 2 messages" in first
    assert "to be left out" in told(chat, "/context")
    second = told(chat, "hello")
    assert "left out 2 messages" in second
    assert 'the model did not see the 2 messages from "zzz' in second and " tokens." in second
    assert "did not see" not in told(chat, "more")  # said once
    usage = chat.conversation.replies[-1].usage
    assert usage is not None and usage.dropped_messages == (0, 1)


def test_a_nearly_full_context_without_a_policy(begin: Begin, told: Told) -> None:
    chat = begin(max_tokens=1)
    text = told(chat, "z" * 185)
    assert "% full" in text and "/set overflow shift" in text
    assert "% full" not in told(chat, "a")  # said once
    assert "will be refused: " in told(chat, "a")
    assert "will be refused: " in told(chat, "/context")


def test_drop_oldest_names_the_system_message(begin: Begin, told: Told) -> None:
    chat = begin(overflow="drop-oldest", system="s" * 60, max_tokens=30)
    assert "the system message first" in told(chat, "/context")
    told(chat, "z" * 90)
    assert 'the system message "sss' in told(chat, "/context")


def test_tokens(chat: Chat, model: Model, told: Told) -> None:
    assert "has not read anything" in told(chat, "/tokens")
    text = told(chat, "/tokens the cat\x1b")
    for token in model.tokenizer.encode("the cat\x1b"):
        assert f"{token} " in text
    assert "' the'" in text and "\\x1b" in text and "\x1b" not in text
    told(chat, "hello")
    ids = chat.conversation.session.ids
    text = told(chat, "/tokens")
    assert f"{len(ids)} tokens:" in text and "'<s>'" in text
    assert "... 1,601 more ..." in told(chat, "/tokens " + "ä" * 1000)


def test_stats(chat: Chat, told: Told) -> None:
    assert "0 replies" in told(chat, "/stats")
    told(chat, "hello")
    assert "1 reply\n" in told(chat, "/stats")
    told(chat, "/regen")
    text = told(chat, "/stats")
    uses = [reply.usage for reply in chat.conversation.replies]
    read = sum(use.prompt_tokens for use in uses if use)
    assert "2 replies" in text and f"{read} tokens" in text and "10 tokens" in text
    assert "weights" in text and "kv cache" in text and "on average" in text


# --- why ------------------------------------------------------------------------------------------


def test_why_tells_the_models_own_probabilities(chat: Chat, model: Model, told: Told) -> None:
    assert "nothing was said yet" in told(chat, "/why")
    told(chat, "hello")
    prompt = model.chat_ids([{"role": "user", "content": "hello"}])
    session = model.session()
    tokens = chat.conversation.exchanges[-1].reply.tokens
    shares = []
    logits = session.forward(prompt)
    for token in tokens:
        odds = np.exp(logits.astype(np.float64) - logits.max())
        shares.append(odds[token] / odds.sum())
        logits = session.forward([token])
    lines = told(chat, "/why all").splitlines()
    assert len(lines) == len(tokens) == 5
    for number, (line, share) in enumerate(zip(lines, shares, strict=True), 1):
        assert line.split()[0] == str(number)
        assert any(near in line for near in _percents(share))
    overview = told(chat, "/why")
    assert "Of 5 tokens, 5 were the model's first choice" in overview and "/why N" in overview
    one = told(chat, "/why 2")
    assert "Token 2 of 5" in one and one.count("%") == 10 and "\n > " in one
    assert "reply 5 tokens" in told(chat, "more")  # the conversation goes on as before
    assert contents(chat)[1] == model.tokenizer.decode(tokens)


def _percents(share: float) -> list[str]:
    return [
        f"{100 * share + change:.{digits}f} %" for change in (-0.1, 0, 0.1) for digits in (0, 1)
    ]


@pytest.mark.parametrize("wrong", ["0", "6", "some", "²", "9" * 5000])
def test_why_of_what(wrong: str, chat: Chat, told: Told) -> None:
    told(chat, "hello")
    assert "allowed are all, or a token's number 1..5" in told(chat, f"/why {wrong}")


def test_why_after_other_commands(chat: Chat, told: Told, tmp_path: Path) -> None:
    told(chat, "one")
    expected = told(chat, "/why all")
    told(chat, "two")
    told(chat, "/undo")
    assert told(chat, "/why all") == expected
    told(chat, f"/save {tmp_path / 'a.json'}")
    told(chat, f"/load {tmp_path / 'a.json'}")
    assert "was not made in this chat" in told(chat, "/why")


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(begin: Begin, told: Told, tmp_path: Path) -> None:
    chat, path = begin(system="be brief"), tmp_path / "a talk.json"
    told(chat, "hällo")
    told(chat, "/set top_k 3")
    assert "3 messages written" in told(chat, f"/save {path}")
    document = json.loads(path.read_text("utf-8"))
    assert document["messages"] == chat.conversation.messages()
    assert document["settings"] == {"temperature": 0, "max_tokens": 5, "top_k": 3}
    told(chat, f'/save "{path}"')  # one of ours is replaced
    assert list(tmp_path.iterdir()) == [path]

    other = begin()
    assert "1 exchange read" in told(other, f"/load {path}")
    assert other.conversation.messages() == chat.conversation.messages()
    chat.conversation.settings = other.conversation.settings
    told(chat, "more")
    told(other, "more")
    assert contents(chat) == contents(other)


def test_save_leaves_other_files_alone(chat: Chat, told: Told, tmp_path: Path) -> None:
    for name, data in (("notes.txt", b"mine"), ("a.json", b'{"messages": []}'), ("bin", b"\xff")):
        (tmp_path / name).write_bytes(data)
        assert "there is another file of that name" in told(chat, f"/save {tmp_path / name}")
        assert (tmp_path / name).read_bytes() == data
    assert "another file" in told(chat, f"/save {tmp_path}")
    assert "cannot be written" in told(chat, f"/save {tmp_path / 'none' / 'a.json'}")
    assert "which file?" in told(chat, "/save")
    assert "which file?" in told(chat, "/save a\0b")


HEAD = '{"format": "edgellama conversation", "version": 1, "messages": '
HOSTILE = {
    "": "not JSON",
    "[]": "not written by /save",
    '{"messages": []}': "not written by /save",
    '{"format": "edgellama conversation", "version": 2, "messages": []}': "version is 2",
    '{"format": "edgellama conversation", "version": true}': "version is True",
    HEAD + "5}": "messages is 5",
    HEAD + "[5]}": "messages[0]",
    HEAD + '[{"role": "user", "content": "a"}]}': "take turns",
    HEAD + '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}': "turns",
    HEAD + '[{"role": "tool", "content": "a"}]}': "turns",
    HEAD + '[{"role": "root", "content": "a"}]}': "expected one of",
    HEAD + '[{"role": "user", "content": 1}]}': "expected text",
    HEAD + '[{"role": "system", "content": "\\ud800"}]}': "not valid Unicode",
    HEAD + "[" * 100_000: "not JSON",
    HEAD + "1" * 100_000 + "}": "not JSON",
    HEAD + '[{"role": "user", "content": "' + "a" * (9 << 20) + '"}]}': "too long",
}


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:90][-30:] for text in HOSTILE])
def test_load_refuses(text: str, chat: Chat, told: Told, tmp_path: Path) -> None:
    told(chat, "hello")
    before = contents(chat)
    (tmp_path / "a.json").write_text(text)
    assert HOSTILE[text] in told(chat, f"/load {tmp_path / 'a.json'}")
    assert contents(chat) == before


def test_load_of_what_is_no_file(chat: Chat, told: Told, tmp_path: Path) -> None:
    assert "No such file" in told(chat, f"/load {tmp_path / 'none'}")
    assert "folder" in told(chat, f"/load {tmp_path}")
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in told(chat, f"/load {tmp_path / 'pipe'}")


def test_loaded_text_cannot_command_the_terminal(chat: Chat, told: Told, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "\x9b2J\r"}]
    (tmp_path / "a.json").write_text(HEAD + json.dumps(talk) + "}")
    text = told(chat, f"/load {tmp_path / 'a.json'}") + told(chat, "/context")
    assert not {"\x1b", "\x9b", "\r"} & {*text}


def test_read(chat: Chat, told: Told, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b c.txt").write_text("three")
    assert "a.txt: " in told(chat, f"/read {tmp_path / 'a.txt'}")
    told(chat, f"/read {tmp_path / 'b c.txt'}")
    told(chat, "hello")
    assert contents(chat)[0] == "one\ntwo\n\nthree\n\nhello"
    told(chat, "more")
    assert contents(chat)[2] == "more"
    told(chat, f"/read {tmp_path / 'a.txt'}")
    told(chat, "/clear")
    told(chat, "hello")
    assert contents(chat)[0] == "hello"


def test_read_refuses(chat: Chat, told: Told, tmp_path: Path) -> None:
    for name, data, words in (
        ("binary", b"\xff\xfe", "not UTF-8"),
        ("null", b"a\0b", "no text file"),
        ("empty", b"\n", "is empty"),
        ("long", b"z" * CONTEXT, "do not fit the context of 256"),
        ("longer", b"z" * 100_000, "has more than 4,096 bytes"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in told(chat, f"/read {tmp_path / name}")
    assert "folder" in told(chat, f"/read {tmp_path}")
    assert "which file?" in told(chat, "/read")
    if Path("/dev/zero").exists():
        assert "not a regular file" in told(chat, "/read /dev/zero")
    told(chat, "hello")
    assert contents(chat)[0] == "hello"


def test_read_says_when_there_is_no_room_left(chat: Chat, told: Told, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("z" * 150)
    told(chat, "y" * 100)
    assert "they do not fit" in told(chat, f"/read {tmp_path / 'a.txt'}")


# --- programs -------------------------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    """A program for the shell; returns its name."""
    if os.name != "posix":
        pytest.skip("needs a shell")
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_edit(chat: Chat, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv(
        "VISUAL", script(tmp_path / "ed", f'cp "$2" {seen}; printf "%s\\n" one two > "$2"') + " -w"
    )
    assert "one\ntwo" in told(chat, "/edit some words")
    assert seen.read_text() == "some words" and contents(chat)[0] == "one\ntwo"
    told(chat, "/undo")
    told(chat, "/edit")
    assert seen.read_text() == "one\ntwo"


@pytest.mark.parametrize(
    ("editor", "words"),
    [
        (None, "Set VISUAL or EDITOR"),
        ("  ", "Set VISUAL or EDITOR"),
        ("no-such-program", "'no-such-program' was not found"),
        ("'a", "cannot be understood"),
        ('printf "" > "$1"', "nothing was sent"),
        ("exit 3", "ended with status 3"),
        ('printf "\\377" > "$1"', "not UTF-8"),
        ('head -c 5000000 /dev/zero > "$1"', "more than"),
        ('rm "$1"', "could not be edited"),
    ],
)
def test_edit_that_fails(
    editor: str | None,
    words: str,
    chat: Chat,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if editor is not None and " " in editor.strip():
        editor = script(tmp_path / "ed", editor)
    if editor is not None:
        monkeypatch.setenv("EDITOR", editor)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert words in told(chat, "/edit hello")
    assert contents(chat) == [] and not [*tmp_path.glob("edgellama-*")]


def test_copy_with_a_program(
    chat: Chat, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "wl-copy", f"/bin/cat > {tmp_path / 'clipboard'}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert "nothing was said yet" in told(chat, "/copy")
    told(chat, "hello")
    assert "wl-copy" in told(chat, "/copy")
    assert (tmp_path / "clipboard").read_text("utf-8") == contents(chat)[1]
    script(tmp_path / "wl-copy", "exit 1")
    assert "there is no clipboard" in told(chat, "/copy")


def test_copy_by_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "here")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "OSC 52" in clipboard.copy("hällo")
    assert capsys.readouterr().err == "\x1b]52;c;aMOkbGxv\x07"
    with pytest.raises(edgellama.EdgeLlamaError, match="too long"):
        clipboard.copy("x" * 60_000)
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(edgellama.EdgeLlamaError, match="no clipboard"):
        clipboard.copy("x")


# --- a base model ---------------------------------------------------------------------------------


def test_a_base_model_goes_on_with_the_text(
    begin: Begin, base: Model, told: Told, tmp_path: Path
) -> None:
    chat = begin(base)
    told(chat, "the cat")
    told(chat, " and the dog")
    text = "".join(contents(chat)[:3])
    greedy = Sampling(temperature=0)
    assert contents(chat)[3] == "".join(c.text for c in base.generate(text, greedy, max_tokens=5))
    usage = chat.conversation.replies[-1].usage
    assert usage is not None and usage.reused_tokens > 0
    assert "A full context ends the text" in told(chat, "/context")
    assert "Of 5 tokens" in told(chat, "/why")
    told(chat, f"/save {tmp_path / 'a.json'}")
    before = contents(chat)
    told(chat, "/clear")
    told(chat, f"/load {tmp_path / 'a.json'}")
    assert contents(chat) == before
    assert "do not fit the context" in told(chat, "z" * 300)
