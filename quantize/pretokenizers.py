"""What a tokenizer.json does to text before merging, recognised by exact comparison or refused.

Patterns from a file are never run, and none is guessed: other cuts give other ids, silently.
Knows nothing about vocabularies. Source: the serialized forms of the `tokenizers` library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.errors import shown
from edgellama.quantize.draft import refuse, unsupported
from edgellama.spm import SPACE

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES_ONLY = ("ByteLevel", False, False)  # maps bytes to letters; cuts nothing
_CUT_AS_GPT2 = ("ByteLevel", False, True)
_DIGITS = ("Digits", True)
# Steps -> `tokenizer.ggml.pre`.
BYTE_LEVEL: dict[tuple[Any, ...], str] = {
    (_CUT_AS_GPT2,): "gpt-2",
    (("Split", GPT2, "Isolated", False), _BYTES_ONLY): "gpt-2",
    (_DIGITS, _CUT_AS_GPT2): "smollm",
    (_DIGITS, ("Split", GPT2, "Isolated", False), _BYTES_ONLY): "smollm",
    (("Split", LLAMA3, "Isolated", False), _BYTES_ONLY): "llama-bpe",
}
KNOWN = (
    "GPT-2's pattern ('gpt-2'), single digits and GPT-2's pattern ('smollm'), "
    "LLaMA 3's pattern ('llama-bpe'), and SentencePiece's spaces"
)
_PREPEND = ("Prepend", SPACE)
_REPLACE = ("Replace", " ", SPACE)
# (normalizer, pre-tokenizer) -> (space in front of a text, only in front of some).
# Metaspace leaves out the space where the text has one already, and "first" behind special tokens.
SPACES: dict[tuple[Any, ...], tuple[bool, bool]] = {
    ((_PREPEND, _REPLACE), ()): (True, False),
    ((_REPLACE,), ()): (False, False),
    ((), (("Metaspace", SPACE, "always", False),)): (True, True),
    ((), (("Metaspace", SPACE, "first", False),)): (True, True),
    ((), (("Metaspace", SPACE, "never", False),)): (False, False),
}
_FALLBACK = (("Replace", SPACE, " "), ("ByteFallback",), ("Fuse",))
DECODERS = {
    "llama": (_FALLBACK, (*_FALLBACK, ("Strip", " ", 1, 0))),
    "gpt2": ((("ByteLevel",),),),
}


@dataclass(frozen=True)
class Cutting:
    """`model` and `pre` of the GGUF keys, and where spaces are put in front."""

    model: str
    pre: str
    add_space_prefix: bool = False
    sometimes: bool = False


def recognise(tokenizer: Mapping[str, Any], path: Path) -> Cutting:
    """Which known pre-tokenizer a tokenizer.json has.

    Raises UnsupportedModelError, showing the steps, for any other; TokenizerError for steps that
    are no objects with a type.
    """
    steps = _steps(tokenizer, "pre_tokenizer", path)
    normalizer = _steps(tokenizer, "normalizer", path)
    if steps in BYTE_LEVEL and not normalizer:
        found = Cutting("gpt2", BYTE_LEVEL[steps])
    elif (normalizer, steps) in SPACES:
        found = Cutting("llama", "default", *SPACES[normalizer, steps])
    else:
        wrong = "pre_tokenizer" if steps not in BYTE_LEVEL else "normalizer"
        value = steps if wrong == "pre_tokenizer" else normalizer
        both = f"{shown(_spelled(normalizer))} and {shown(_spelled(steps))}"
        problem = f"normalizer and pre-tokenizer are {both}, which is not supported"
        unsupported(f"{problem}; supported: {KNOWN}", path, wrong, _spelled(value))
    decoder = _steps(tokenizer, "decoder", path)
    if decoder not in DECODERS[found.model]:
        problem = f"decoder {shown(_spelled(decoder))} is not supported with this pre-tokenizer"
        unsupported(problem, path, "decoder", _spelled(decoder))
    return found


def _spelled(steps: tuple[Any, ...]) -> str:
    return " + ".join(f"{name}{arguments}" if arguments else name for name, *arguments in steps)


def _steps(tokenizer: Mapping[str, Any], key: str, path: Path) -> tuple[tuple[Any, ...], ...]:
    """A component as (type, arguments that matter...), a sequence as several."""
    component = tokenizer.get(key)
    if component is None:
        return ()
    inside = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers", "decoder": "decoders"}
    kind = _type_of(component, path, key)
    if kind != "Sequence":
        return (_step(kind, component, path, key),)
    parts = component.get(inside[key])
    if not isinstance(parts, list):
        refuse(f"a Sequence of {shown(parts)}", path, f"{key}.{inside[key]}")
    return tuple(
        _step(_type_of(part, path, place), part, path, place)
        for part, place in ((part, f"{key}[{i}]") for i, part in enumerate(parts))
    )


def _type_of(component: Any, path: Path, place: str) -> str:
    kind = component.get("type") if isinstance(component, dict) else None
    if not isinstance(kind, str):
        refuse(f"{shown(component)} is no component with a type", path, place)
    return kind


def _step(kind: str, part: Mapping[str, Any], path: Path, place: str) -> tuple[Any, ...]:
    """The type and what changes the result; what only reports offsets is left out."""
    as_decoder = kind == "ByteLevel" and place.startswith("decoder")
    values = [] if as_decoder else _arguments(kind, part)
    if not all(isinstance(value, (str, bool, int)) for value in values):
        refuse(f"{shown(dict(part))} lacks what a {shown(kind)} needs", path, place)
    return (kind, *values)


def _arguments(kind: str, part: Mapping[str, Any]) -> list[Any]:
    match kind:
        case "ByteLevel":
            return [part.get("add_prefix_space", True), part.get("use_regex", True)]
        case "Digits":
            return [part.get("individual_digits", False)]
        case "Split":
            return [_pattern(part), part.get("behavior"), part.get("invert", False)]
        case "Replace":
            return [_pattern(part), part.get("content")]
        case "Metaspace":
            return [part.get("replacement"), _scheme(part), part.get("split", True)]
        case "Prepend":
            return [part.get("prepend")]
        case "Strip":
            return [part.get("content"), part.get("start"), part.get("stop")]
    return []


def _pattern(part: Mapping[str, Any]) -> Any:
    pattern = part.get("pattern")
    if not isinstance(pattern, dict):
        return pattern
    return pattern.get("Regex", pattern.get("String"))


def _scheme(part: Mapping[str, Any]) -> Any:
    """Files of before 2024 say `add_prefix_space` only."""
    return part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
