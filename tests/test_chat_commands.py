"""The commands of a chat, with a tiny model: what they do, what they tell, what they refuse."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from chatting import CONTEXT, TEMPLATE, Begin, begun, contents, opened, told

import edgellama
from edgellama import Model, Sampling
from edgellama.cli.chat import Chat
from edgellama.cli.commands import COMMANDS
from edgellama.cli.sampling import SAMPLING
from edgellama.cli.settings import NAMES, Settings, line_about, spelled

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)

pytest_plugins = ["chat_fixtures"]


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


def test_slashes(chat: Chat) -> None:
    assert "There is no command '/sett'. Did you mean /set?" in told(chat, "/sett x")
    for typed in ("/zzz", "/undo 2", "/exit now"):
        assert "// begins a message" in told(chat, typed)
    assert "\\x1b" in told(chat, "/a\x1b[2J") and contents(chat) == []
    told(chat, "//set x")
    assert contents(chat)[0] == "/set x"


def test_help(chat: Chat) -> None:
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


@pytest.mark.parametrize("word", ["/exit", "/quit", " /bye "])
def test_exit(chat: Chat, word: str) -> None:
    assert not chat.take(word)


def test_clear(begin: Begin) -> None:
    chat = begin(system="be brief")
    told(chat, "hello")
    told(chat, "/clear")
    assert contents(chat) == ["be brief"] and chat.conversation.session.position == 0


def test_undo(chat: Chat) -> None:
    assert "nothing was said yet" in told(chat, "/undo")
    told(chat, "one")
    told(chat, "two")
    assert '"two"' in told(chat, "/undo")
    assert len(contents(chat)) == 2 and chat.draft == "two"
    told(chat, "three")
    assert chat.conversation.replies[-1].usage is not None
    assert chat.conversation.replies[-1].usage.reused_tokens > 0


def test_regen_takes_the_next_seeds(begin: Begin, model: Model) -> None:
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


def test_regen_without_chance_says_so(chat: Chat) -> None:
    told(chat, "hello")
    before = contents(chat)
    assert "the reply will be the same" in told(chat, "/regen")
    assert contents(chat) == before


def test_regen_that_fails_keeps_the_reply(chat: Chat) -> None:
    told(chat, "hello")
    before = contents(chat)
    told(chat, "/set logit_bias 100000=1")
    assert "logit_bias id" in told(chat, "/regen")
    assert contents(chat) == before


def test_a_message_that_fails_is_not_kept(chat: Chat) -> None:
    text = told(chat, "z" * 500)
    assert "do not fit the context" in text and "/edit opens it" in text
    assert contents(chat) == [] and chat.draft == "z" * 500
    assert "reply 5 tokens" in told(chat, "hello")


# --- settings -------------------------------------------------------------------------------------


def test_set_shows_and_changes(chat: Chat) -> None:
    everything = told(chat, "/set")
    assert all(f"{name} = " in everything for name in NAMES)
    assert "temperature = 0   (default 0.8)" in everything
    assert told(chat, "/set TOP-k") == "top_k = 40\n"
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
def test_set_refuses_and_names_what_is_allowed(typed: str, words: str, chat: Chat) -> None:
    before = chat.conversation.settings
    assert words in told(chat, typed)
    assert chat.conversation.settings is before


def test_system(chat: Chat, base: Model) -> None:
    assert "There is no system message" in told(chat, "/system")
    assert told(chat, "/system be brief") == "system: be brief\n"
    told(chat, "hello")
    assert contents(chat)[0] == "be brief"
    told(chat, "/system be long")
    assert contents(chat)[:2] == ["be long", "hello"]
    assert "There is no system message" in told(chat, "/system -")
    assert contents(chat)[0] == "hello"
    assert "needs a chat template" in told(begun(base), "/system be brief")


def test_system_that_the_template_refuses(tmp_path: Path) -> None:
    with opened(tmp_path / "strict.gguf", NO_SYSTEM) as strict:
        chat = begun(strict)
        assert "no system" in told(chat, "/system be brief")
        assert chat.conversation.system is None
        assert "reply 5 tokens" in told(chat, "hello")


def test_show(begin: Begin) -> None:
    chat = begin(system="be brief")
    told(chat, "/set top_k 7")
    text = told(chat, "/show")
    for words in ("chat.gguf", "reference", "F32", "32.0 bits", "be brief", "top_k = 7", TEMPLATE):
        assert words in text
    assert f"{CONTEXT} tokens of the model's {CONTEXT}" in text and "comes first" in text


# --- the context ----------------------------------------------------------------------------------


def test_context(begin: Begin) -> None:
    chat = begin(system="be brief")
    assert f"0 of {CONTEXT} tokens" in told(chat, "/context")
    told(chat, "hello")
    text = told(chat, "/context")
    used = chat.conversation.replies[-1].position
    assert f"{used} of {CONTEXT} tokens" in text
    for words in ("system", "user", "assistant", '"hello"', "Nothing is ever left out"):
        assert words in text


def test_a_full_context_is_foretold_and_told(begin: Begin) -> None:
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


def test_a_nearly_full_context_without_a_policy(begin: Begin) -> None:
    chat = begin(max_tokens=1)
    text = told(chat, "z" * 187)
    assert "% full" in text and "/set overflow shift" in text
    assert "% full" not in told(chat, "a")  # said once
    assert "will be refused: " in told(chat, "a")
    assert "will be refused: " in told(chat, "/context")


def test_drop_oldest_names_the_system_message(begin: Begin) -> None:
    chat = begin(overflow="drop-oldest", system="s" * 60, max_tokens=30)
    assert "the system message first" in told(chat, "/context")
    told(chat, "z" * 90)
    assert 'the system message "sss' in told(chat, "/context")


def test_tokens(chat: Chat, model: Model) -> None:
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


def test_stats(chat: Chat) -> None:
    assert "replies   0\n" in told(chat, "/stats")
    told(chat, "hello")
    assert "replies   1\n" in told(chat, "/stats")
    told(chat, "/regen")
    text = told(chat, "/stats")
    uses = [reply.usage for reply in chat.conversation.replies]
    read = sum(use.prompt_tokens for use in uses if use)
    assert "replies   2\n" in text and f"{read} tokens" in text and "10 tokens" in text
    assert "weights" in text and "kv cache" in text and "on average" in text


# --- why ------------------------------------------------------------------------------------------


def test_why_tells_the_models_own_probabilities(chat: Chat, model: Model) -> None:
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
def test_why_of_what(wrong: str, chat: Chat) -> None:
    told(chat, "hello")
    assert "allowed are all, or a token's number 1..5" in told(chat, f"/why {wrong}")


def test_why_after_other_commands(chat: Chat, tmp_path: Path) -> None:
    told(chat, "one")
    expected = told(chat, "/why all")
    told(chat, "two")
    told(chat, "/undo")
    assert told(chat, "/why all") == expected
    told(chat, f"/save {tmp_path / 'a.json'}")
    told(chat, f"/load {tmp_path / 'a.json'}")
    assert "was not made in this chat" in told(chat, "/why")


# --- a base model ---------------------------------------------------------------------------------


def test_a_base_model_goes_on_with_the_text(base: Model, tmp_path: Path) -> None:
    chat = begun(base)
    told(chat, "the cat")
    told(chat, " and the dog")
    text = "".join(contents(chat)[:3])
    greedy = Sampling(temperature=0)
    assert contents(chat)[3] == "".join(c.text for c in base.generate(text, greedy, max_tokens=5))
    usage = chat.conversation.replies[-1].usage
    assert usage is not None and usage.reused_tokens > 0
    assert chat.conversation.can_go_on
    told(chat, "")
    assert contents(chat)[4] == "" != contents(chat)[5]
    told(chat, "/undo")
    assert "A full context ends the text" in told(chat, "/context")
    assert "Of 5 tokens" in told(chat, "/why")
    told(chat, f"/save {tmp_path / 'a.json'}")
    before = contents(chat)
    told(chat, "/clear")
    told(chat, f"/load {tmp_path / 'a.json'}")
    assert contents(chat) == before
    assert "do not fit the context" in told(chat, "z" * 300)
