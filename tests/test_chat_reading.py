"""A long prompt that is read piece by piece, and what a display and a remark look like."""

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, Model, Sampling
from edgellama.cli.prefill import PIECE, ReadAhead
from edgellama.cli.reply import Reply
from edgellama.cli.report import first_screen
from edgellama.cli.terminal import Display, Terminal, colours
from edgellama.generate import Usage

LONG = list(range(10, 200)) * 4  # 760 ids: two pieces, and the rest for the reply


class Watching(Display):
    """Notes what it is told, and cancels when so many tokens are read."""

    def __init__(self, cancel: CancelToken | None = None, at: int = 0) -> None:
        super().__init__(quiet=True)
        self.seen: list[tuple[int, int, str]] = []
        self._cancel, self._at = cancel, at

    def update(self, done: int, total: int, what: str, detail: str = "") -> None:
        self.seen.append((done, total, detail))
        if self._cancel is not None and done >= self._at:
            self._cancel.cancel()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = write_tiny(tmp_path_factory.mktemp("a") / "a.gguf", tiny_config(context_length=1024))
    with edgellama.load(path, runtime="reference") as loaded:
        yield loaded


def test_reading_ahead_changes_nothing(model: Model) -> None:
    greedy = Sampling(temperature=0)
    alone = list(model.generate(LONG, greedy, max_tokens=4))
    session, display = model.session(), Watching()
    ahead = ReadAhead(session, lambda: LONG, CancelToken())
    ahead(display)
    assert session.position == 2 * PIECE and session.ids == tuple(LONG[: 2 * PIECE])
    assert [done for done, _, _ in display.seen] == [0, PIECE]
    assert display.seen[1][2] == f"(0 cached / {PIECE} processed / {len(LONG)} tokens)"
    chunks = list(session.generate(LONG, greedy, max_tokens=4))
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in alone]
    told, usage = chunks[-1].usage, alone[-1].usage
    assert told is not None and usage is not None and told.reused_tokens == 2 * PIECE
    counted = ahead.counted(Reply("", usage=told)).usage
    assert counted is not None
    assert (counted.prompt_tokens, counted.reused_tokens) == (usage.prompt_tokens, 0)
    assert counted.prefill_seconds > told.prefill_seconds


def test_only_what_is_new_is_read(model: Model) -> None:
    session = model.session()
    session.forward(LONG[:700])
    ReadAhead(session, lambda: [*LONG[:300], 5, *LONG[300:]], CancelToken())(display := Watching())
    assert session.position == 300 + PIECE
    assert [done for done, _, _ in display.seen] == [300]
    ReadAhead(session, lambda: LONG[:20], CancelToken())(display := Watching())
    assert session.position == 19 and display.seen == []


def test_a_prompt_that_is_cancelled_leaves_whole_pieces(model: Model) -> None:
    session, cancel = model.session(), CancelToken()
    ahead = ReadAhead(session, lambda: LONG, cancel)
    with pytest.raises(Cancelled):
        ahead(Watching(cancel, PIECE))
    assert session.ids == tuple(LONG[:PIECE])


# --- what a person sees ---------------------------------------------------------------------------


def usage(**more: float) -> Usage:
    numbers = dict(prompt_tokens=120, reused_tokens=20, completion_tokens=41)
    seconds = dict(prefill_seconds=0.5, decode_seconds=0.8)
    return Usage(**(numbers | seconds | more))  # type: ignore[arg-type]


def test_a_footer() -> None:
    whole = Reply("a", "stop", usage(), first_token_seconds=0.514)
    assert whole.footer(2048) == (
        "prompt 120 tokens (20 cached) 200 t/s · reply 41 tokens 50.0 t/s · first token 0.51 s · "
        "context 161/2048 · end of turn"
    )
    one = Reply("a", "length", usage(reused_tokens=0, completion_tokens=1, prefill_seconds=0))
    assert one.footer() == "prompt 120 tokens · reply 1 token · cut at max_tokens"
    cut = Reply("a", "cancelled", usage(dropped_messages=(0, 1)), interrupted=True)
    assert cut.footer().endswith("left out 2 messages · stopped")
    assert Reply("a").footer() == ""


def test_the_first_screen(model: Model) -> None:
    text = first_screen(model, None)
    for words in (
        "a.gguf",
        "parameters",
        "F32",
        "reference",
        "1024 tokens",
        "none: ",
        "base model",
    ):
        assert words in text
    if Path("/proc/self/statm").exists():
        assert "MB in use now" in text


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, False),
        ({"TERM": "", "WT_SESSION": "x"}, True),
    ],
)
def test_colours(
    variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with redirect_stderr(io.StringIO()) as err:
        assert not colours()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert colours() is coloured
        Terminal().tell([("a\x1b[2Jb", "dim"), (" c\n\x07d", "")])
    text = "\x1b[2ma[2Jb\x1b[0m c\nd\n" if coloured else "a[2Jb c\nd\n"
    assert err.getvalue() == text


def test_a_display_times_each_piece_of_work() -> None:
    display = Display(quiet=True)
    for what in ("compiling", "compiling", "loading", "compiling", "reading"):
        display.update(1, 2, what)
    assert set(display.took) == {"compiling", "loading"}
    assert all(seconds >= 0 for seconds in display.took.values())
