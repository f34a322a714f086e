"""LLaMA 3's `tokenizer.model`: a line for every token, its bytes in base64 and its rank.

Knows nothing about the other files of a checkpoint. Source: github.com/meta-llama/llama-models,
tokenizer.py, which also has the pattern and the names of the special tokens; this file has neither.
"""

import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from edgellama.bpe import alphabet
from edgellama.config import MOST_VOCAB
from edgellama.errors import shown
from edgellama.quantize.draft import Draft, refuse, unsupported
from edgellama.vocab import CONTROL, MOST_MERGES, NORMAL

LLAMA3_RANKS = 128_000
LONGEST_BYTES = 1024  # 8 times the longest of LLaMA 3
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})\r?")
# Position among the 256 special tokens -> name; the others are numbered. `3.1` is the set that
# the files of LLaMA 3.1 and later have at Hugging Face.
NAMES = {
    "3": {
        0: "begin_of_text",
        1: "end_of_text",
        6: "start_header_id",
        7: "end_header_id",
        9: "eot_id",
    },
    "3.1": {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    },
}


def is_tiktoken(data: bytes) -> bool:
    """Whether the file begins with a line of base64 and a number, as no protobuf does."""
    return _LINE.fullmatch(data[: 2 * LONGEST_BYTES].partition(b"\n")[0]) is not None


def read_tiktoken(data: bytes, path: Path, version: str = "3") -> Draft:
    """LLaMA 3's vocabulary: tokens, merges that give the same words, special tokens by name.

    Only Meta's 128,000 ranks are taken: the pattern that cuts text into words is not in the file,
    and other models write such files for other patterns. `version` is a key of NAMES.
    """
    ranks = read_ranks(data, path)
    if len(ranks) != LLAMA3_RANKS:
        problem = f"{len(ranks)} ranks; only LLaMA 3's {LLAMA3_RANKS} are known"
        hint = "The file does not say how text is cut into words; give a tokenizer.json"
        unsupported(problem, path, f"line {len(ranks)}", len(ranks), hint)
    return draft_of_ranks(ranks, path, version)


def draft_of_ranks(ranks: dict[bytes, int], path: Path, version: str = "3") -> Draft:
    """The same for any ranks, with LLaMA 3's pattern and special tokens behind them."""
    tokens = [_text(token) for token in ranks]
    names = list(special_names(version))
    base = len(tokens)
    return Draft(
        "gpt2",
        path,
        tokens + names,
        [NORMAL] * base + [CONTROL] * len(names),
        [0.0] * (base + len(names)),
        list(merges_of_ranks(ranks, path)),
        pre="llama-bpe",
        special={"bos": base, "eos": base + 1},
    )


def read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks, which are 0, 1, 2 ... without a gap."""
    lines = data.removesuffix(b"\n").split(b"\n", MOST_VOCAB)
    if len(lines) > MOST_VOCAB:
        refuse(f"more than {MOST_VOCAB} lines", path)
    found: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            problem = f"{shown(line)} is not base64, a space and a number"
            refuse(problem, path, f"line {number}")
        token, rank = _decoded(match[1], path, number), int(match[2])
        if rank != len(found):
            refuse(f"rank {rank}; expected {len(found)}", path, f"line {number}")
        if token in found:
            problem = f"{shown(token)} has the rank {found[token]} already"
            refuse(problem, path, f"line {number}")
        found[token] = rank
    for byte in range(256):
        if bytes([byte]) not in found:
            refuse(f"no token for the byte 0x{byte:02X}", path)
    return found


def _decoded(text: bytes, path: Path, number: int) -> bytes:
    try:
        token = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        refuse(f"{shown(text)} is not base64: {error}", path, f"line {number}")
    if not 0 < len(token) <= LONGEST_BYTES:
        problem = f"a token of {len(token)} bytes; expected 1..{LONGEST_BYTES}"
        refuse(problem, path, f"line {number}")
    return token


def merges_of_ranks(ranks: dict[bytes, int], path: Path) -> Iterator[str]:
    """Merge lines that make the words that ranks make: every way to halve every token.

    Ranks let any two neighbours join whose bytes together are a token, lowest rank first; a merge
    for each halving, in the order of the tokens, says just that.
    """
    count = 0
    texts = {token: _text(token) for token in ranks}
    for token in ranks:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        count += len(known)
        if count > MOST_MERGES:
            refuse(f"more than {MOST_MERGES} merges follow from the ranks", path)
        yield from (f"{texts[a]} {texts[b]}" for _, _, a, b in sorted(known))


def _text(token: bytes) -> str:
    letters = alphabet()
    return "".join([letters[byte] for byte in token])


def special_names(version: str) -> Iterator[str]:
    """The 256 special tokens behind the ranks; those without a name are reserved and numbered."""
    names, reserved = NAMES[version], 0
    for i in range(256):
        yield f"<|{names.get(i, f'reserved_special_token_{reserved}')}|>"
        reserved += i not in names
