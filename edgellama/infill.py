"""Filling in code between what stands before and behind: Code Llama's infilling prompts.

Knows nothing about models or sessions. Source: meta-llama/codellama, llama/generation.py
(infilling_prompt_tokens) and llama/tokenizer.py (encode_infilling).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.control import CancelToken
from edgellama.errors import ParameterError, UnsupportedModelError, shown
from edgellama.formats import FormatTokenizer, Guard

PIECES = {  # what the vocabulary calls a token, and the GGUF keys that may name its id
    "before": ("\u2581<PRE>", "fim_pre_token_id", "prefix_token_id"),
    "behind": ("\u2581<SUF>", "fim_suf_token_id", "suffix_token_id"),
    "middle": ("\u2581<MID>", "fim_mid_token_id", "middle_token_id"),
    "end": ("\u2581<EOT>", "eot_token_id"),
}


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The ids that part an infilling prompt, and the one that ends the answer."""

    before: int
    behind: int
    middle: int
    end: int


def infill_tokens(metadata: Mapping[str, Any], tokenizer: FormatTokenizer) -> InfillTokens | None:
    """The file's infilling tokens, by Code Llama's names for them, else by the file's own keys.

    None if one is missing, as in Code Llama 34B, its Python variants, and all other LLaMAs.
    """
    found = {part: _find(metadata, tokenizer, *names) for part, names in PIECES.items()}
    ids = [i for i in found.values() if i is not None]
    if len(set(ids)) < len(PIECES):
        return None
    return InfillTokens(*ids)


def _find(
    metadata: Mapping[str, Any], tokenizer: FormatTokenizer, name: str, *keys: str
) -> int | None:
    token = tokenizer.token_id(name)
    if token is not None:
        return token
    size = len(metadata.get("tokenizer.ggml.tokens", ()))
    values = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return next((v for v in values if type(v) is int and 0 <= v < size), None)


def infill_ids(
    tokens: InfillTokens | None,
    tokenizer: FormatTokenizer,
    prefix: str,
    suffix: str,
    *,
    suffix_first: bool = False,
    path: str | Path | None = None,
    cancel: CancelToken | None = None,
) -> list[int]:
    """The prompt's ids: BOS, before, prefix, behind, suffix, middle.

    With `suffix_first`: BOS, before, behind, suffix, middle, prefix. The suffix gets no space in
    front, unlike the prefix. Neither text can turn into one of the four tokens. Raises
    UnsupportedModelError without `tokens`, ParameterError for what is no text, Cancelled.
    """
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            problem = f"{name} is {shown(text)}; expected text"
            raise ParameterError(problem, field=name, value=text, allowed="a str")
    if tokens is None:
        raise UnsupportedModelError(
            "the vocabulary has no infilling tokens (<PRE>, <SUF>, <MID>, <EOT>): this model was "
            "not trained to fill in",
            path=path,
            where="key 'tokenizer.ggml.tokens'",
            hint="Code Llama 7B and 13B have them; their Python variants have not",
        )
    guard = Guard(tokenizer, [names[0] for names in PIECES.values()], cancel)
    first, last = guard.encode(prefix), guard.encode(suffix, continuing=True)
    start = [tokenizer.bos] if tokenizer.bos is not None else []
    if suffix_first:
        return [*start, tokens.before, tokens.behind, *last, tokens.middle, *first]
    return [*start, tokens.before, *first, tokens.behind, *last, tokens.middle]
