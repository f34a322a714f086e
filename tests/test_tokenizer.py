"""Tokenizers on vocabularies small enough to check by hand: rules, special tokens, streams."""

import pytest
from hypothesis import given, settings, strategies as st
from tinyvocabs import BOTH, GPT2, LLAMA, both, gpt2, llama, streamed, texts_of

from edgellama.bpe import alphabet, split
from edgellama.errors import ParameterError, TokenizerError
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
NAMES = ["<s>", "</s>", "<unk>", "<|eot_id|>", "<|im_end|>", "<|im", "[TOOL]", "<tool>"]
MIXED = st.lists(st.sampled_from([*NAMES, "a", "b ", " ", "abc", "\u00e9", "\U0001f999"])).map(
    "".join
)
quick = settings(deadline=None)


# What text becomes


def test_what_a_tokenizer_tells() -> None:
    tokenizer = BOTH[LLAMA]
    eot = tokenizer.vocab_size - 2
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, (2, eot), True)
    assert (tokenizer.bos_text, tokenizer.eos_text) == ("<s>", "</s>")
    assert tokenizer.is_control(eot) and not tokenizer.is_control(eot + 1)
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert (BOTH[GPT2].bos, BOTH[GPT2].eos, BOTH[GPT2].add_bos) == (0, (1,), False)
    without = tokenizer_from_gguf(gpt2(bos_token_id=None, add_bos_token=True))
    assert (without.bos, without.bos_text, without.add_bos) == (None, "", False)
    assert tokenizer_from_gguf(gpt2(add_bos_token=True)).add_bos
    assert not tokenizer_from_gguf(llama(add_bos_token=False)).add_bos
    named = tokenizer_from_gguf(llama(eot_token_id=1))
    assert named.eos == (2, 1, eot)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("abc", ["\u2581ab", "c"]),  # "\u2581a" scores highest, then "\u2581ab": "abc" never forms
        ("b", ["\u2581", "b"]),
        (" ", ["\u2581\u2581"]),
        ("b a", ["\u2581", "b", "\u2581a"]),
        ("\u00e9\u00e8", ["\u2581", "\u00e9", "<0xC3>", "<0xA8>"]),
        ("a[TOOL]b", ["\u2581a", "[TOOL]", "b"]),
        ("</s>", ["\u2581", *(f"<0x{byte:02X}>" for byte in b"</s>")]),
    ],
)
def test_sentencepiece_rules(text: str, pieces: list[str]) -> None:
    assert texts_of(BOTH[LLAMA], BOTH[LLAMA].encode(text)) == pieces


def test_sentencepiece_without_a_space_in_front() -> None:
    tokenizer = tokenizer_from_gguf(llama(add_space_prefix=False))
    assert texts_of(tokenizer, tokenizer.encode("abc")) == ["abc"]
    ids = tokenizer.encode(" abc")
    assert tokenizer.decode(ids) == " abc"


def test_sentencepiece_that_trims_spaces() -> None:
    tokenizer = tokenizer_from_gguf(llama(remove_extra_whitespaces=True))
    ids = tokenizer.encode("  a   b ")
    assert texts_of(tokenizer, ids) == ["\u2581a", "\u2581", "b"]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.encode("   ") == []


def test_a_piece_that_crosses_words_is_found() -> None:
    """Text is cut into words only where no piece of this vocabulary reaches across."""
    tokens = [*llama()["tokenizer.ggml.tokens"], "b\u2581", "b\u2581a"]
    scores = [-float(i) for i in range(len(tokens) - 2)] + [1.0, 2.0]
    types = llama()["tokenizer.ggml.token_type"] + [1, 1]
    tokenizer = tokenizer_from_gguf(llama(tokens=tokens, scores=scores, token_type=types))
    assert texts_of(tokenizer, tokenizer.encode("b a a")) == ["\u2581", "b\u2581a", "\u2581a"]


def test_no_token_for_a_character() -> None:
    """Without byte tokens a run of unknown characters is one <unk>, across words too."""
    few = {"tokens": ["<unk>", "\u2581", "a"], "scores": [0.0, 0.0, 0.0], "token_type": [2, 1, 1]}
    end = {"bos_token_id": None, "eos_token_id": None}
    tokenizer = tokenizer_from_gguf(llama(**few, **end))
    assert tokenizer.encode("axya") == [1, 2, 0, 2]
    assert tokenizer.decode([1, 2, 0, 2]) == "a \u2047 a"
    known = few | {"token_type": [1, 1, 1], "unknown_token_id": None}
    tokenizer = tokenizer_from_gguf(llama(**known, **end))
    with pytest.raises(TokenizerError, match="'x'"):
        tokenizer.encode("ax")
    one = {"tokens": ["a"], "scores": [0.0], "token_type": [1], "unknown_token_id": None}
    tokenizer = tokenizer_from_gguf(llama(**one, **end, add_space_prefix=False))
    assert tokenizer.encode("aaa") == [0, 0, 0]


def test_byte_level_rules() -> None:
    tokenizer = BOTH[GPT2]
    assert texts_of(tokenizer, tokenizer.encode("abc  a12")) == [
        "abc",
        "\u0120",
        "\u0120a",
        "1",
        "2",
    ]
    assert texts_of(tokenizer, tokenizer.encode("bab")) == ["b", "ab"]
    assert texts_of(tokenizer, tokenizer.encode("a<tool>b")) == ["a", "<tool>", "b"]
    llama3 = tokenizer_from_gguf(gpt2(pre="llama-bpe"))
    assert texts_of(llama3, llama3.encode("x12")) == ["x", "12"]


def test_a_byte_without_token_is_dropped() -> None:
    metadata = gpt2()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index(alphabet()[0x04])] = "another"
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


def test_a_word_that_is_a_token_is_taken_whole_by_llama3_only() -> None:
    tokens = [*gpt2()["tokenizer.ggml.tokens"], "cab"]
    changes = {"tokens": tokens, "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4)}
    whole = tokenizer_from_gguf(gpt2(pre="llama3", **changes))
    assert texts_of(whole, whole.encode("cab")) == ["cab"]
    merged = tokenizer_from_gguf(gpt2(**changes))
    assert texts_of(merged, merged.encode("cab")) == ["c", "ab"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["I", "'ve", " 123", ",", "\u00b2", "  ", " x", "\n", "'", "VE", " \u2167"]),
        ("default", ["I", "'ve", " 123", ",", "\u00b2", "  ", " x", "\n", "'", "VE", " \u2167"]),
        (
            "smollm",
            [
                "I",
                "'ve",
                " ",
                "1",
                "2",
                "3",
                ",",
                "\u00b2",
                "  ",
                " x",
                "\n",
                "'",
                "VE",
                " ",
                "\u2167",
            ],
        ),
        (
            "llama-v3",
            ["I", "'ve", " ", "123", ",", "\u00b2", "  ", " x", "\n", "'VE", " ", "\u2167"],
        ),
    ],
)
def test_words(name: str, words: list[str]) -> None:
    assert split("I've 123,\u00b2   x\n'VE \u2167", name) == words


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe"])
@given(
    text=st.text(
        st.sampled_from(
            " \t\n\r\x1c\x85\u2028_'sS\u017faZ\u00e9\u0301\u4e001\u0661\u00bd\u2167!\u20ac"
        )
    )
)
@settings(deadline=None)
def test_words_joined_are_the_text(name: str, text: str) -> None:
    assert "".join(split(text, name)) == text


# Special tokens


@both
def test_special_tokens_only_on_request(tokenizer: Tokenizer) -> None:
    name = tokenizer.eos_text
    text = f"a{name}{name} b"
    assert not any(map(tokenizer.is_control, tokenizer.encode(text)))
    ids = tokenizer.encode(text, special=True)
    assert sum(map(tokenizer.is_control, ids)) == 2
    assert tokenizer.decode(ids, special=True) == text
    assert "".join(tokenizer.decode(ids).split()) == "ab"


@both
@given(parts=st.lists(st.tuples(MIXED, st.booleans())))
@quick
def test_parts_join_without_a_seam(tokenizer: Tokenizer, parts: list[tuple[str, bool]]) -> None:
    text = "".join(part for part, _ in parts)
    ids = tokenizer.encode_parts(parts)
    assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.encode_parts((part, False) for part, _ in parts) == tokenizer.encode(text)
    named = [part for part, special in parts if special]
    allowed = sum(tokenizer.is_control(i) for part in named for i in special_ids(tokenizer, part))
    assert sum(map(tokenizer.is_control, ids)) == allowed


def special_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, special=True)


def test_the_longest_special_token_wins() -> None:
    tokenizer = BOTH[GPT2]
    text = "<|im_end|><|im_en<tool><|im_start|>"
    found = texts_of(tokenizer, tokenizer.encode(text, special=True))
    assert found == ["<|im_end|>", "<|im", "_", "e", "n", "<tool>", "<|im_start|>"]


def test_a_user_defined_token_hides_the_control_token_inside_it() -> None:
    tokens = ["<end>", "<end><x>", *alphabet().values()]
    types = [3, 4] + [1] * 256
    tokenizer = tokenizer_from_gguf(gpt2(tokens=tokens, token_type=types, merges=[]))
    assert tokenizer.encode("<end><x><end>", special=True) == [1, 0]


@both
def test_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", bos=True) == [tokenizer.bos, *tokenizer.encode("a")]
    assert tokenizer.encode("", bos=True) == [tokenizer.bos]
    with pytest.raises(ParameterError, match="no BOS"):
        tokenizer_from_gguf(gpt2(bos_token_id=None)).encode("a", bos=True)


def test_look_alikes_cannot_be_merged_into_a_control_token() -> None:
    with pytest.raises(TokenizerError, match=r"\[0\] is '<\| im'"):
        tokenizer_from_gguf(
            gpt2(
                merges=["<| im"],
                tokens=["<|im", "<|", "im"],
                token_type=[3, 1, 1],
                eos_token_id=None,
            )
        )


# Round trips and streams


@both
@given(text=TEXT)
@quick
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert data.removeprefix(b" ") == text.encode() or data == text.encode()


@both
@given(text=MIXED)
@quick
def test_look_alikes_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(i) or tokenizer.token_text(i) == "<unk>" for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True), special=True) == text


@both
@given(data=st.data(), special=st.booleans(), continuing=st.booleans())
@quick
def test_a_stream_equals_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, special: bool, continuing: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    options = {"special": special, "continuing": continuing}
    assert streamed(tokenizer, ids, **options) == tokenizer.decode(ids, **options)


@both
def test_a_stream_holds_half_a_character_back(tokenizer: Tokenizer) -> None:
    llamas = "\U0001f999\U0001f999"
    ids = tokenizer.encode(llamas)[-8:]  # one byte each
    stream = tokenizer.stream(continuing=True)
    assert [stream.push(i) for i in ids] == ["", "", "", llamas[0]] * 2
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    each = 3 if tokenizer is BOTH[LLAMA] else 1  # SentencePiece counts bytes, GPT-2's characters
    letter = tokenizer.encode("xx")[-1]
    assert stream.push(letter) == "\ufffd" * each + "x"
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(letter) == "x"


def test_the_first_space_is_dropped_unless_the_text_goes_on() -> None:
    tokenizer = BOTH[LLAMA]
    ids = tokenizer.encode("a a")
    assert tokenizer.decode(ids) == "a a"
    assert tokenizer.decode(ids, continuing=True) == " a a"
    assert tokenizer.decode([1, *ids, 2, *ids]) == "a a a a"
