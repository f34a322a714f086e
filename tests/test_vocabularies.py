"""Converted tokenizers give the ids of the libraries that made the files, and of llama.cpp."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizerfiles as files
import vocabs
from tiny import _write_keys

from edgellama.errors import TokenizerError
from edgellama.gguf import open_gguf
from edgellama.quantize.tiktoken import draft_of_ranks, merges_of_ranks, read_ranks
from edgellama.quantize.vocabularies import tokenizer_metadata
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text())["cases"]
ROWS = {"mistral_v3": 32_768, "smollm2": 49_152, "llama3": 128_256, "llama3_ranks": 128_256}
SMALL = len(files.PIECES)
TEXTS = [case["text"] for case in GOLDEN if len(case["text"]) < 2000]
TEXTS += ["x" + space * n + "y" for space in " \n\t\u00a0\u2581" for n in (1, 2, 3, 5, 17, 40)]
TEXTS += (DATA / "english.txt").read_text().split("\n\n")[:20]
NO_GOLDEN = ("mistral_v3", "llama3")  # the latter only as GGUF, which llama3_ranks is held to
Convert = Callable[..., dict[str, Any]]
Converted = Callable[[str], dict[str, Any]]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    def convert(rows: int, notes: list[str] | None = None, **content: Any) -> dict[str, Any]:
        folder = files.write(tmp_path, **content)
        return tokenizer_metadata(folder, rows, [] if notes is None else notes)

    return convert


def key(metadata: dict[str, Any], name: str) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}")


def source(name: str, request: pytest.FixtureRequest) -> dict[str, bytes]:
    """A vocabulary's own file where it is at hand, else one rebuilt from its GGUF metadata."""
    path = vocabs.find(name)
    if path is not None and path.suffix in (".model", ".v1", ".v3"):
        return {"tokenizer_model": path.read_bytes()}
    if path is not None and (path.parent / "smollm2.tokenizer.json").is_file():
        return {"tokenizer_json": (path.parent / "smollm2.tokenizer.json").read_bytes()}
    file, data = files.rebuilt(vocabs.metadata(name, request))
    return {file.replace(".", "_"): data}


_converted: dict[str, dict[str, Any]] = {}


@pytest.fixture
def converted(convert: Convert, request: pytest.FixtureRequest) -> Converted:
    """Metadata of a real vocabulary, converted once for all tests."""

    def converted(name: str) -> dict[str, Any]:
        if name not in _converted:
            _converted[name] = convert(ROWS.get(name, 32_000), **source(name, request))
        return _converted[name]

    return converted


@pytest.mark.parametrize("name", [name for name in vocabs.FILES if name not in NO_GOLDEN])
def test_golden_ids(name: str, converted: Converted, request: pytest.FixtureRequest) -> None:
    reference = vocabs.metadata(name, request)
    metadata = converted(name)
    for part in ("model", "pre", "tokens", "scores", "token_type", "merges"):
        if key(reference, part) is not None:
            assert list(key(metadata, part)) == list(key(reference, part)), part
    tokenizer = tokenizer_from_gguf(metadata)
    column = name.removesuffix("_ranks")
    for case in GOLDEN:
        assert tokenizer.encode(case["text"]) == case[column]["plain"], case["name"]
        if "special" in case[column]:
            ids = tokenizer.encode(case["text"], special=True)
            assert ids == case[column]["special"], case["name"]


def test_metadata_of_the_default_model(
    convert: Convert, default_model: Path, request: pytest.FixtureRequest
) -> None:
    """Every tokenizer key of a file that llama.cpp's converter wrote, and no other."""
    with open_gguf(default_model) as file:
        expected = {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": {"content": "<|im_end|>", "lstrip": False},
        "add_prefix_space": False,
        "chat_template": expected["tokenizer.chat_template"],
    }
    notes: list[str] = []
    metadata = convert(49_152, notes, tokenizer_config_json=config, **source("smollm2", request))
    assert metadata == expected
    assert notes == []


def test_llama3_ranks_are_the_published_merges(
    converted: Converted, request: pytest.FixtureRequest
) -> None:
    expected = vocabs.metadata("llama3", request)
    metadata = converted("llama3_ranks")
    for name in ("tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "pre"):
        assert key(metadata, name) == key(expected, name), name
    assert key(metadata, "add_bos_token") is True


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3", "openllama_v1", "openllama_v2"])
def test_sentencepiece_agrees(
    name: str, converted: Converted, request: pytest.FixtureRequest
) -> None:
    library = pytest.importorskip("sentencepiece")
    tokenizer = tokenizer_from_gguf(converted(name))
    peer = library.SentencePieceProcessor(model_proto=source(name, request)["tokenizer_model"])
    for text in [*TEXTS, "[REFERENCE_DOC_3]a b"]:
        assert tokenizer.encode(text) == peer.encode(text), text


def peer_of(data: dict[str, Any] | bytes) -> Any:
    library = pytest.importorskip("tokenizers")
    text = data.decode() if isinstance(data, bytes) else json.dumps(data)
    return library.Tokenizer.from_str(text)


def agree(tokenizer: Tokenizer, peer: Any, texts: list[str]) -> None:
    for text in texts:
        ids = peer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == ids, text


def test_the_tokenizers_library_agrees_on_bytes(
    convert: Convert, request: pytest.FixtureRequest
) -> None:
    _, data = files.rebuilt(vocabs.metadata("smollm2", request))
    tokenizer = tokenizer_from_gguf(convert(49_152, tokenizer_json=data))
    agree(tokenizer, peer_of(data), TEXTS)


@pytest.mark.parametrize(("name", "by_length"), [("mistral_v1", True), ("openllama_v2", False)])
def test_sentencepiece_vocabularies_without_their_model_file(
    name: str, by_length: bool, convert: Convert, request: pytest.FixtureRequest
) -> None:
    """A tokenizer.json alone: scores come back from merges, and the ids are the same."""
    original = vocabs.metadata(name, request)
    parts = (key(original, part) for part in ("tokens", "scores", "token_type"))
    data = files.byte_fallback(list(zip(*parts, strict=True)), by_length=by_length)
    metadata = convert(32_000, tokenizer_json=data)
    for part in ("model", "tokens", "token_type", "unknown_token_id"):
        assert _listed(key(metadata, part)) == _listed(key(original, part)), part
    tokenizer, peer = tokenizer_from_gguf(metadata), peer_of(data)
    for case in GOLDEN:
        assert tokenizer.encode(case["text"]) == case[name]["plain"], case["name"]
    agree(tokenizer, peer, [text for text in TEXTS if "<" not in text])


@pytest.mark.parametrize("pre", files.CUTS)
@pytest.mark.parametrize("as_pairs", [False, True])
def test_byte_level_files(pre: str, as_pairs: bool, convert: Convert) -> None:
    data = files.byte_level(pre)
    if as_pairs:
        data["model"]["merges"] = [line.split(" ") for line in data["model"]["merges"]]
    metadata = convert(266, tokenizer_json=data)
    assert key(metadata, "pre") == pre
    assert key(metadata, "merges") == files.MERGES
    assert key(metadata, "tokens")[264:] == ["[TOOL]", "[PAD265]"]
    assert list(key(metadata, "token_type"))[264:] == [4, 5]
    texts = ["abc 12 123", "a[TOOL]bc  a", "<|im_start|>ab<|im_end|>", "\u00e9\n\n ab"]
    agree(tokenizer_from_gguf(metadata), peer_of(data), texts)


METASPACE = {"type": "Metaspace", "replacement": files.SPACE, "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        ({"type": "Sequence", "normalizers": [files.PREPEND, files.REPLACE]}, None, True),
        (files.REPLACE, None, False),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        (None, METASPACE | {"add_prefix_space": True}, True),
    ],
)
def test_byte_fallback_files(
    normalizer: Any, pre_tokenizer: Any, prefix: bool, convert: Convert
) -> None:
    data = files.byte_fallback(normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    notes: list[str] = []
    metadata = convert(SMALL, notes, tokenizer_json=data)
    assert key(metadata, "add_space_prefix") is prefix
    assert len(notes) == (prefix and pre_tokenizer is not None)
    assert key(metadata, "unknown_token_id") == 0
    texts = ["abc ab a", "a  a\u00e9 \u0416\n", "bcabc", "<s>"]
    texts += [] if notes else ["  ab", " "]
    agree(tokenizer_from_gguf(metadata), peer_of(data), texts)
    assert metadata["tokenizer.ggml.tokens"] == [text for text, _, _ in files.PIECES]


TOKENS = [bytes([byte]) for byte in range(256)] + [
    *(b"ab", b"aa", b"aaa", b"abab", b" a", b" ab", b"\xd0\x96", b"ba")
]


def merged(word: bytes, order: dict[bytes, int]) -> list[int]:
    """Byte-pair merging by ranks, as tiktoken's readme does it."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [order.get(a + b, 10**9) for a, b in pairwise(parts)]
        if not joined or min(joined) == 10**9:
            return [order[part] for part in parts]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_a_small_file_of_ranks() -> None:
    path = Path("tokenizer.model")
    order = read_ranks(files.ranks(TOKENS), path)
    assert list(order) == TOKENS
    draft = draft_of_ranks(order, path, "3.1")
    assert len(draft.tokens) == len(TOKENS) + 256 and len(set(draft.tokens)) == len(draft.tokens)
    named = {draft.tokens[len(TOKENS) + i] for i in (0, 1, 4, 8, 9, 10)}
    assert "<|eom_id|>" in named and "<|python_tag|>" in named
    assert draft.tokens[-1] == "<|reserved_special_token_247|>"
    assert draft.merges == list(merges_of_ranks(order, path))
    values = {"model": "gpt2", "pre": draft.pre, "tokens": draft.tokens, "merges": draft.merges}
    values["token_type"] = draft.types
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{k}": v for k, v in values.items()})
    for word in ("a", "ab", "abab", "aab", "aaaa", "baba", "abababa", "\u0416\u0416", "zab"):
        assert tokenizer.encode(word) == merged(word.encode(), order), word


def test_special_tokens_templates_and_ends(convert: Convert) -> None:
    notes: list[str] = []
    metadata = convert(
        SMALL + 4,
        notes,
        tokenizer_model=files.sentencepiece(),
        added_tokens_json={"<|im_end|>": SMALL, "[EXTRA]": SMALL + 1},
        tokenizer_config_json={
            "added_tokens_decoder": {
                str(SMALL): files.added(0, "<|im_end|>"),
                str(SMALL + 2): files.added(0, "<step>"),
            },
            "eos_token": {"content": "<|im_end|>"},
            "pad_token": "</s>",
            "add_bos_token": False,
            "add_eos_token": False,
            "chat_template": [
                {"name": "default", "template": "A"},
                {"name": "tool use", "template": "B"},
            ],
        },
        generation_config_json={"eos_token_id": [SMALL, 2, SMALL + 2]},
        config_json={"eos_token_id": 1},
    )
    assert metadata["tokenizer.ggml.tokens"][SMALL:] == [
        "<|im_end|>",
        "[EXTRA]",
        "<step>",
        f"[PAD{SMALL + 3}]",
    ]
    assert list(key(metadata, "token_type"))[SMALL:] == [3, 4, 3, 5]
    ids = [key(metadata, f"{name}_token_id") for name in ("bos", "eos", "padding", "unknown")]
    assert ids == [1, SMALL, 2, 0]
    assert [key(metadata, f"{name}_token_id") for name in ("eot", "eom")] == [2, SMALL + 2]
    assert key(metadata, "add_bos_token") is False and key(metadata, "add_eos_token") is False
    assert metadata["tokenizer.chat_template"] == "A"
    assert metadata["tokenizer.chat_template.tool_use"] == "B"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.eos == (SMALL, 2, SMALL + 2)
    assert any("'<s>' is said to end texts" in note for note in notes)
    assert any("1 unused token" in note for note in notes)


def test_files_beside_the_vocabulary(convert: Convert, tmp_path: Path) -> None:
    data = files.byte_level("gpt-2")
    template = [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": template}
    files.write(tmp_path, chat_template_jinja=b"from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    notes: list[str] = []
    metadata = convert(
        265,
        notes,
        tokenizer_json=data,
        tokenizer_config_json={"chat_template": "old"},
        special_tokens_map_json={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        config_json={"pad_token_id": -1},
    )
    assert metadata["tokenizer.chat_template"] == "from the file"
    assert metadata["tokenizer.chat_template.rag"] == "R"
    assert [key(metadata, f"{name}_token_id") for name in ("bos", "eos", "padding")] == [0, 1, None]
    assert key(metadata, "add_bos_token") is True
    assert len(notes) == 1 and "chat_template.jinja is taken" in notes[0]


def test_code_llama_infilling(convert: Convert) -> None:
    texts = [f"{files.SPACE}<{name}>" for name in ("SUF", "PRE", "MID", "EOT")]
    pieces = [*files.PIECES, *((text, 0.0, 4) for text in texts)]
    config = {"added_tokens_decoder": {}}
    for i, text in enumerate(texts, SMALL):
        config["added_tokens_decoder"][str(i)] = files.added(i, text)
    metadata = convert(
        len(pieces), tokenizer_model=files.sentencepiece(pieces), tokenizer_config_json=config
    )
    found = {name: key(metadata, f"{name}_token_id") for name in ("prefix", "suffix", "middle")}
    assert found == {"prefix": SMALL + 1, "suffix": SMALL, "middle": SMALL + 2}
    assert key(metadata, "eot_token_id") == SMALL + 3


def test_padding_without_a_row_is_left_out(convert: Convert) -> None:
    notes: list[str] = []
    content = {
        "tokenizer_model": files.sentencepiece(),
        "added_tokens_json": {"[PAD]": SMALL},
        "special_tokens_map_json": {"pad_token": "[PAD]"},
        "config_json": {"pad_token_id": SMALL},
    }
    metadata = convert(SMALL, notes, **content)
    assert len(key(metadata, "tokens")) == SMALL and key(metadata, "padding_token_id") is None
    assert notes == [f"token {SMALL}, '[PAD]', is left out: the embedding has {SMALL} rows"]
    metadata = convert(SMALL + 1, **content)
    assert key(metadata, "padding_token_id") == SMALL


def test_merges_of_added_tokens_are_left_out(convert: Convert) -> None:
    data = files.byte_level()
    data["added_tokens"].append(files.added(data["model"]["vocab"]["bc"], "bc", False))
    notes: list[str] = []
    metadata = convert(265, notes, tokenizer_json=data)
    assert "b c" not in key(metadata, "merges") and "ab c" in key(metadata, "merges")
    assert any(note.startswith("1 merges are left out") for note in notes)
    agree(tokenizer_from_gguf(metadata), peer_of(data), ["abc", "bcc a", "cbc"])


def test_the_tokenizer_beside_the_folders_of_all_sizes(tmp_path: Path) -> None:
    """As Meta's downloads of LLaMA 1 and 2 have it."""
    files.write(tmp_path, tokenizer_model=files.sentencepiece())
    folder = files.write(tmp_path / "7B", params_json={"dim": 64, "vocab_size": -1})
    notes: list[str] = []
    assert len(key(tokenizer_metadata(folder, SMALL, notes), "tokens")) == SMALL
    assert len(notes) == 1 and "tokenizer.model, beside the model's folder" in notes[0]
    (folder / "params.json").unlink()
    with pytest.raises(TokenizerError, match="there is neither"):
        tokenizer_metadata(folder, SMALL, notes)


def test_tokens_that_trim_spaces_are_noted(convert: Convert) -> None:
    data = files.byte_level()
    data["added_tokens"][1]["rstrip"] = True
    notes: list[str] = []
    convert(265, notes, tokenizer_json=data)
    assert len(notes) == 1 and notes[0].startswith("'<|im_end|>' take spaces")


@pytest.mark.parametrize("name", ["mistral_v1", "openllama_v2", "smollm2", "llama3_ranks"])
def test_llamacpp_agrees(name: str, converted: Converted, tmp_path: Path) -> None:
    """The same metadata in a file of llama.cpp's own package, read by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    metadata = converted(name)
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1}
    sizes |= {"feed_forward_length": 64, "attention.head_count": 1, "rope.dimension_count": 64}
    keys: dict[str, Any] = {f"llama.{size}": value for size, value in sizes.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    _write_keys(writer, keys | {k: _listed(value) for k, value in metadata.items()})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    peer = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    tokenizer = tokenizer_from_gguf(metadata)
    for text in TEXTS:
        ids = peer.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), text
    ids = peer.tokenize(b"a b", add_bos=True, special=False)
    assert ids == tokenizer.encode("a b", bos=tokenizer.add_bos)
    peer.close()


def _listed(value: Any) -> Any:
    return value if isinstance(value, (str, bool, int, float)) else list(value)
