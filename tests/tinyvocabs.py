"""GGUF metadata of two tokenizers small enough to check by hand, and what tests do with them."""

from collections.abc import Callable
from typing import Any

import pytest

from edgellama.bpe import alphabet
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf

LLAMA, GPT2 = "llama", "gpt2"
PIECES = [
    "\u2581",
    "a",
    "b",
    "c",
    "\u2581a",
    "ab",
    "\u2581ab",
    "abc",
    "bc",
    "\u2581\u2581",
    "\u00e9",
]
MERGES = ["a b", "b c", "ab c", "\u0120 a", "\u0120 \u0120", "1 2"]


def llama(**changes: Any) -> dict[str, Any]:
    """3 named tokens, 256 bytes, PIECES whose score falls with the id, <|eot_id|>, [TOOL]."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    tokens += ["<|eot_id|>", "[TOOL]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 3, 4]
    values = {
        "model": LLAMA,
        "tokens": tokens,
        "scores": [-float(i) for i in range(len(tokens))],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return keys(values | changes)


def gpt2(**changes: Any) -> dict[str, Any]:
    """3 control tokens, one user-defined, 256 bytes, the results of MERGES."""
    results = [line.replace(" ", "") for line in MERGES]
    tokens = ["<|im_start|>", "<|im_end|>", "<|im", "<tool>", *alphabet().values(), *results]
    values = {
        "model": GPT2,
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "merges": MERGES,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return keys(values | changes)


def keys(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


MAKERS: dict[str, Callable[..., dict[str, Any]]] = {LLAMA: llama, GPT2: gpt2}
BOTH = {model: tokenizer_from_gguf(make()) for model, make in MAKERS.items()}
both = pytest.mark.parametrize("tokenizer", BOTH.values(), ids=BOTH)


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = tokenizer.stream(**options)
    return "".join([stream.push(i) for i in ids] + [stream.flush()])
