"""The decode loop and stop strings, over a small runtime of its own: a bigram table of bytes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from edgellama.control import CancelToken
from edgellama.errors import Cancelled, ContextOverflow, NonFiniteError, ParameterError
from edgellama.generate import Chunk, generate
from edgellama.sampling import Sampling
from edgellama.stop import StopMatcher, checked_stops
from edgellama.tokenizer import tokenizer_from_gguf

EOS = 2
FIRST_BYTE = 3  # id of byte 0


def byte_tokenizer():
    """Byte b is id 3 + b; ids 0..2 are unknown, BOS and EOS."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": names,
            "tokenizer.ggml.scores": [0.0] * len(names),
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": EOS,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": False,
        }
    )


TOKENIZER = byte_tokenizer()
VOCAB = TOKENIZER.vocab_size


def ids_of(text):
    return [FIRST_BYTE + byte for byte in text.encode()]


class Bigram:
    """A runtime session whose logits after an id are that id's row of a table."""

    def __init__(self, table, cancel_at=None):
        self.table, self.ids, self.cancel_at = table, [], cancel_at

    @property
    def position(self):
        return len(self.ids)

    def forward(self, ids, *, all_logits=False, cancel=None):
        if cancel is not None:
            if self.cancel_at is not None and self.position + len(ids) > self.cancel_at:
                cancel.cancel()
            cancel.check("forward")
        self.ids += ids
        rows = self.table[list(ids)]
        return rows if all_logits else rows[-1]

    def truncate(self, n):
        del self.ids[n:]

    def close(self):
        self.ids = []


def seeded_table(seed=0):
    return np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)).astype(np.float32) * 3


def script(*steps):
    """A table under which the reply to the id before is exactly these ids, each seen once."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for before, after in pairwise(steps):
        table[before, after] = 50
    return table


def says(text, *end):
    """A session that answers "\\x01" with `text`, whose bytes differ, then the ids of `end`."""
    return Bigram(script(FIRST_BYTE + 1, *ids_of(text), *end))


START = [FIRST_BYTE + 1]
GREEDY = Sampling(temperature=0)


def reply(session, ids=START, sampling=GREEDY, **options):
    return list(generate(session, TOKENIZER, ids, sampling, **{"context": 64} | options))


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


def check_shape(chunks, session, before):
    """What holds for every reply."""
    assert [c.finish_reason is None for c in chunks[:-1]] == [True] * (len(chunks) - 1)
    assert all(c.usage is None and c.token is not None for c in chunks[:-1])
    tokens = [c.token for c in chunks if c.token is not None]
    assert chunks[-1].usage.completion_tokens == len(tokens)
    assert session.ids == [*before, *tokens][: session.position]
    assert all(c.logprob <= 1e-5 for c in chunks if c.token is not None)


def test_a_turn_ends_at_eos_which_is_not_shown():
    session = says("hey", EOS)
    chunks = reply(session)
    check_shape(chunks, session, START)
    assert [chunk.text for chunk in chunks] == ["h", "e", "y", ""]
    assert chunks[-1].token == EOS and chunks[-1].finish_reason == "stop"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.reused_tokens, usage.completion_tokens) == (1, 0, 4)
    assert usage.prefill_seconds > 0 and usage.decode_seconds > 0 and usage.dropped_tokens == 0


def test_characters_are_never_cut():
    chunks = reply(says("aé☃b", EOS))
    assert [chunk.text for chunk in chunks] == ["a", "", "é", "", "", "☃", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_replaced():
    half = FIRST_BYTE + 0xC3
    chunks = reply(Bigram(script(FIRST_BYTE + 1, *ids_of("a"), half, EOS)))
    assert text_of(chunks) == "a\ufffd" and chunks[-1].text == "\ufffd"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_max_tokens(count):
    session = says("hey", EOS)
    chunks = reply(session, max_tokens=count)
    check_shape(chunks, session, START)
    assert text_of(chunks) == "hey"[:count] and len(chunks) == count
    assert chunks[-1].finish_reason == "length"


def test_no_tokens_wanted_reads_the_prompt_only():
    """A4: 0 is no tokens, not any number."""
    session = says("hey", EOS)
    (chunk,) = reply(session, max_tokens=0)
    assert (chunk.text, chunk.token, chunk.logprob) == ("", None, None)
    assert chunk.finish_reason == "length" and session.ids == START


def test_prompt_and_reply_share_the_context():
    prompt = [*ids_of("ab"), *START]
    chunks = reply(says("hey", EOS), prompt, context=5)
    assert text_of(chunks) == "he" and chunks[-1].finish_reason == "context"
    (chunk,) = reply(says("hey", EOS), prompt, context=3)
    assert chunk.token is None and chunk.finish_reason == "context"
    session = says("hey", EOS)
    with pytest.raises(ContextOverflow) as caught:
        generate(session, TOKENIZER, prompt, GREEDY, context=2)
    assert (caught.value.need, caught.value.have) == (3, 2) and session.position == 0


def test_a_session_that_filled_up_in_the_meantime_is_not_overrun():
    session = says("hey", EOS)
    late = generate(session, TOKENIZER, START, GREEDY, context=4)
    session.forward(ids_of("abcd"))
    with pytest.raises(ContextOverflow):
        next(late)
    assert session.position == 4


def test_what_the_cache_holds_counts_as_reused():
    session = says("hey", EOS)
    session.forward(ids_of("abc"))
    usage = reply(session, history=ids_of("abc"), dropped=7)[-1].usage
    assert (usage.prompt_tokens, usage.reused_tokens, usage.dropped_tokens) == (4, 3, 7)


def test_stop_strings_are_cut_off_and_never_leak():
    session = says("abcde", EOS)
    chunks = reply(session, stop=["cd", "xyz"])
    check_shape(chunks, session, START)
    assert [chunk.text for chunk in chunks] == ["a", "b", "", ""]
    assert chunks[-1].finish_reason == "stop" and chunks[-1].token == ids_of("d")[0]
    # held back, then not a stop string after all
    assert [c.text for c in reply(says("abcde", EOS), stop=["cx"])] == ["a", "b", "", "cd", "e", ""]
    assert text_of(reply(says("abc", EOS), stop=["cd"])) == "abc"  # held back at the end


@pytest.mark.parametrize("at", [0, 1, 3])
def test_cancelled_inside_forward(at):
    session = says("abcde", EOS)
    session.cancel_at = at
    chunks = reply(session, cancel=CancelToken())
    check_shape(chunks, session, START)
    assert chunks[-1].finish_reason == "cancelled" and chunks[-1].token is None
    assert session.position == at and text_of(chunks) == "abcde"[:at]


def test_cancelled_between_tokens_shows_what_was_held_back():
    session, token, texts = says("abcde", EOS), CancelToken(), []
    for chunk in generate(
        session, TOKENIZER, START, GREEDY, context=64, cancel=token, stop=["bcx"]
    ):
        texts.append(chunk.text)
        if len(texts) == 3:
            token.cancel()
    assert texts == ["a", "", "", "bc"] and chunk.finish_reason == "cancelled"


def test_cancelled_before_the_start_does_no_work():
    session, token = says("abc", EOS), CancelToken()
    token.cancel()
    (chunk,) = reply(session, cancel=token)
    assert chunk.finish_reason == "cancelled" and session.position == 0
    with pytest.raises(Cancelled):
        session.forward(START, cancel=token)


def test_the_consumer_may_leave_at_any_token():
    session = says("abcde", EOS)
    stream = generate(session, TOKENIZER, START, GREEDY, context=64)
    tokens = [next(stream).token, next(stream).token]
    stream.close()
    assert session.ids == [*START, *tokens][: session.position] and session.position == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_repeats_its_reply_and_is_reported(seed):
    """A5."""

    def run(sampling):
        session = Bigram(seeded_table())
        chunks = reply(session, sampling=sampling, context=40)
        check_shape(chunks, session, START)
        return [chunk.token for chunk in chunks], chunks[-1].usage.seed

    tokens, used = run(Sampling(seed=seed))
    assert used == seed and run(Sampling(seed=seed))[0] == tokens
    fresh, drawn = run(Sampling())
    assert run(Sampling(seed=drawn)) == (fresh, drawn)


def test_a_cut_reply_continues_as_if_it_had_not_been_cut():
    sampling = Sampling(seed=3, logit_bias={EOS: -np.inf})
    whole = [c.token for c in reply(Bigram(seeded_table()), sampling=sampling, max_tokens=20)]
    session = Bigram(seeded_table())
    first = [c.token for c in reply(session, sampling=sampling, max_tokens=7)]
    rest = reply(session, first[-1:], sampling, max_tokens=13, history=START + first[:-1])
    assert first + [c.token for c in rest] == whole


def test_penalties_look_at_history_prompt_and_reply():
    table = np.zeros((VOCAB, VOCAB), np.float32)
    a, b, c, d = ids_of("abcd")
    table[:, [a, b, c, d]] = 4.0, 3.0, 2.0, 1.0
    sampling = Sampling(temperature=0, presence_penalty=10, penalty_window=3)
    session = Bigram(table)
    session.forward([a])
    chunks = reply(session, [b], sampling, history=[a], max_tokens=5)
    assert [chunk.token for chunk in chunks] == [c, d, a, b, c]  # the oldest of four is forgotten


def test_damaged_logits_are_an_error_at_a_known_position():
    table = script(*START, *ids_of("ab"))
    table[ids_of("b")[0], 5] = np.nan
    session = Bigram(table)
    stream = generate(session, TOKENIZER, START, GREEDY, context=64)
    assert [next(stream).text, next(stream).text] == ["a", "b"]
    with pytest.raises(NonFiniteError, match="token 5 is nan"):
        next(stream)
    assert session.position == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"stop": [""]}, r"stop\[0\] is ''"),
        ({"stop": "abc"}, "stop is 'abc'"),
        ({"stop": ["x" * 4097]}, r"stop\[0\] is 'xxx"),
        ({"stop": ["x"] * 65}, "stop is 65 strings"),
        ({"stop": [b"x"]}, r"stop\[0\]"),
        ({"ids": []}, "no tokens"),
        ({"sampling": Sampling(logit_bias={VOCAB: 1.0})}, "logit_bias id is 259"),
    ],
)
def test_arguments_are_checked_before_any_work(options, message):
    """A4, A6 and A7 of the catalogue of bad inputs."""
    session = says("abc")
    with pytest.raises(ParameterError, match=message):
        reply(session, **options)
    assert session.position == 0


def naive(text, stops):
    """Character by character: the first prefix that ends with a stop string, cut at the longest."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


few = st.text("ab", min_size=1, max_size=5)


@given(st.lists(st.text("abc", max_size=6), max_size=10), st.lists(few, max_size=4))
def test_the_stop_matcher_equals_a_naive_search(pieces, stops):
    matcher, out, stopped = StopMatcher(stops), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        whole = "".join(pieces)
        assert naive(whole, stops)[0].startswith(out)  # nothing leaks on the way
        if stopped:
            break
    assert (out + matcher.flush(), stopped) == naive("".join(pieces), stops)


def test_the_largest_stop_list_is_linear_in_time():
    """A6."""
    stops = checked_stops(["a" * 4095 + chr(0x100 + i) for i in range(64)])
    matcher = StopMatcher(stops)
    assert matcher.push("a" * 5000) == ("a" * 905, False)
    assert matcher.push("b") == ("a" * 4095 + "b", False)


@given(st.integers(0, 1000), st.lists(few, max_size=3))
def test_streamed_text_is_the_decoded_text_cut_at_the_stop(seed, stops):
    table = np.full((VOCAB, VOCAB), -30, np.float32)
    alphabet = [*ids_of("ab"), *ids_of("é☃"), EOS]  # whole and half characters
    table[:, alphabet] = np.random.default_rng(seed).standard_normal((VOCAB, len(alphabet)))
    session = Bigram(table)
    chunks = reply(session, sampling=Sampling(seed=seed), stop=stops, context=30)
    check_shape(chunks, session, START)
    decoded = TOKENIZER.decode([c.token for c in chunks if c.token is not None])
    text, stopped = naive(decoded, stops)
    assert text_of(chunks) == text
    assert (chunks[-1].finish_reason == "stop") == (stopped or chunks[-1].token == EOS)


def test_a_chunk_is_a_value():
    assert Chunk("a", 1, -0.5) == Chunk("a", 1, -0.5)
    with pytest.raises(AttributeError):
        Chunk("a", 1, -0.5).text = "b"
