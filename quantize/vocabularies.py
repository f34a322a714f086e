"""The tokenizer files of a checkpoint's folder as GGUF metadata.

Chooses the file that holds the vocabulary, adds what the files beside it say, and fits the result
to the embedding. Knows nothing about tensors. The keys are those of llama.cpp's converter.
"""

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.bpe import PRE_TOKENIZERS
from edgellama.config import MOST_VOCAB
from edgellama.errors import require_integer, shown
from edgellama.quantize.draft import Draft, refuse, unsupported
from edgellama.quantize.sentencepiece import read_sentencepiece
from edgellama.quantize.special_tokens import (
    PADDING_NAMES,
    Folder,
    Ids,
    chat_templates,
    mark_special,
    place_added_tokens,
)
from edgellama.quantize.strict_json import read_small
from edgellama.quantize.tiktoken import is_tiktoken, read_tiktoken
from edgellama.quantize.tokenizer_json import read_tokenizer_json, vocabulary
from edgellama.vocab import NORMAL, UNUSED, vocab_from_gguf

LARGEST = 64 * 2**20  # bytes of a tokenizer.model; the largest known have 6 MB
OTHERS = ("tekken.json", "vocab.json", "spiece.model", "tiktoken.model")  # legal, not read here


def tokenizer_metadata(folder: Path, vocab_rows: int, notes: list[str]) -> dict[str, Any]:
    """The GGUF keys `tokenizer.*` of the tokenizer in `folder`, in the order to write them.

    `vocab_rows` is the number of rows of the embedding: what the tokenizer lacks becomes unused
    tokens `[PAD123]`; what it has too much is refused, except for padding tokens, which released
    models often name without having a row for them. Read are tokenizer.model (SentencePiece, or
    LLaMA 3's ranks), else tokenizer.json, and beside them tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, config.json, generation_config.json, params.json
    and chat_template.jinja. What had to be chosen is said in `notes`.

    Raises TokenizerError, naming file and place, for damaged or contradictory files,
    UnsupportedModelError for a legal tokenizer that is not known exactly.
    """
    require_integer("vocab_rows", vocab_rows, 1, MOST_VOCAB)
    files = Folder(folder)
    draft = _read_vocabulary(files, notes)
    beyond = place_added_tokens(draft, files, vocab_rows, notes)
    mark_special(draft, files)
    _drop_dead_merges(draft, notes)
    beyond = _fit(draft, beyond, vocab_rows, files, notes)
    ids = Ids(draft, files, beyond, notes)
    more = ids.keys() | _flags(draft, files, ids)
    keys = _keys(draft) | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    vocab_from_gguf(keys, draft.path)  # what is written can be read
    assert draft.model == "llama" or draft.pre in PRE_TOKENIZERS
    return keys | chat_templates(files, notes)


def _read_vocabulary(files: Folder, notes: list[str]) -> Draft:
    model, described = files.find("tokenizer.model"), files.find("tokenizer.json")
    if not model and not described and files.params:
        model = _shared_model(files, notes)
    if model:
        data = read_small(model, LARGEST)
        if not is_tiktoken(data):
            draft = read_sentencepiece(data, model)
            _check_agreement(draft, files)
            return draft
        if not described:
            version = _llama3_version(files)
            notes.append(
                f"{model.name} holds ranks only: pattern and special tokens are LLaMA {version}'s"
            )
            return read_tiktoken(data, model, version)
    if described:
        return read_tokenizer_json(files.tokenizer, described, notes)
    for name in OTHERS:
        if files.find(name):
            hint = "Put the model's tokenizer.json or tokenizer.model there"
            unsupported(f"tokenizers of this kind are not read: {name}", files.path, name, "", hint)
    hint = "Copy the tokenizer's files into the model's folder"
    refuse("there is neither a tokenizer.model nor a tokenizer.json", files.path, hint=hint)


def _shared_model(files: Folder, notes: list[str]) -> Path | None:
    """Meta's downloads have one tokenizer.model beside the folders of all sizes."""
    path = Folder(files.path.absolute().parent).find("tokenizer.model")
    if path:
        notes.append(f"the tokenizer is {path}, beside the model's folder")
    return path


def _llama3_version(files: Folder) -> str:
    """LLaMA 3.1 and later scale their rotary frequencies, and renamed some special tokens."""
    scaled = files.params.get("use_scaled_rope") or files.config.get("rope_scaling")
    return "3.1" if scaled else "3"


def _check_agreement(draft: Draft, files: Folder) -> None:
    """Words of tokenizer.model have the same ids in a tokenizer.json beside it."""
    path = files.path / "tokenizer.json"
    model = files.tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return
    ids = vocabulary(model, path)
    for i, (text, kind) in enumerate(zip(draft.tokens, draft.types, strict=True)):
        if kind == NORMAL and ids.get(text, i) != i:
            problem = f"{shown(text)} has the id {ids[text]}, and {i} in {draft.path.name}"
            hint = "Remove the file that the model was not trained with"
            refuse(problem, path, "model.vocab", hint)


def _drop_dead_merges(draft: Draft, notes: list[str]) -> None:
    """Added tokens are cut out of the text first: merges that touch them can never happen."""
    pairs = zip(draft.tokens, draft.types, strict=True)
    words = {text for text, kind in pairs if kind == NORMAL}
    living = [line for line in draft.merges if _lives(line, words)]
    if len(living) < len(draft.merges):
        dead = len(draft.merges) - len(living)
        notes.append(f"{dead} merges are left out, which only make or need special tokens")
    draft.merges = living


def _lives(line: str, words: set[str]) -> bool:
    left, _, right = line.partition(" ")
    return left in words and right in words and left + right in words


def _fit(
    draft: Draft, beyond: Mapping[int, str], rows: int, files: Folder, notes: list[str]
) -> dict[int, str]:
    """As many tokens as rows; returns the padding tokens that were left out."""
    cut = dict(beyond)
    cut |= {i: draft.tokens[i] for i in range(rows, len(draft.tokens)) if i not in cut}
    unused = {i for i in cut if i < len(draft.tokens) and draft.types[i] == UNUSED}
    pad = files.named("pad")
    for i, text in sorted(cut.items()):
        if i not in unused and text != (pad and pad[0]) and not PADDING_NAMES.fullmatch(text):
            problem = f"token {i}, {shown(text)}, has no row: the embedding has {rows}"
            refuse(problem, draft.path, hint="The tokenizer must be the one of these weights")
        if i not in unused:
            notes.append(f"token {i}, {shown(text)}, is left out: the embedding has {rows} rows")
    draft.cut(rows)
    lacking = rows - len(draft.tokens)
    if lacking:
        notes.append(f"the embedding has {rows} rows; {lacking} unused tokens fill them up")
    draft.extend(rows)
    return cut


def _keys(draft: Draft) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokenizer.ggml.model": draft.model,
        "tokenizer.ggml.pre": draft.pre,
        "tokenizer.ggml.tokens": draft.tokens,
    }
    if draft.model == "llama":
        found["tokenizer.ggml.scores"] = array("f", draft.scores)
    found["tokenizer.ggml.token_type"] = array("i", draft.types)
    if draft.model == "gpt2":
        found["tokenizer.ggml.merges"] = draft.merges
    return found


def _flags(draft: Draft, files: Folder, ids: Ids) -> dict[str, bool]:
    """What is added to a text: tokenizer_config.json, else tokenizer.json, else the usual."""
    config = files.path / "tokenizer_config.json"
    template = _template(files)
    found = {"add_bos_token": draft.add_bos if template is None else _is(template[0], ids, "bos")}
    if template and template[-1]:
        found["add_eos_token"] = _is(template[-1], ids, "eos")
    for key in ("add_bos_token", "add_eos_token"):
        value = files.flag(key)
        found |= {} if value is None else {key: value}
    prefix = files.flag("add_prefix_space")
    if draft.model == "gpt2" and prefix:
        problem = "a space in front of a text is not supported with byte-level vocabularies"
        unsupported(problem, config, "add_prefix_space", True)
    found["add_space_prefix"] = draft.add_space_prefix if prefix is None else prefix
    if draft.remove_extra_whitespaces:
        found["remove_extra_whitespaces"] = True
    return found


def _is(text: str, ids: Ids, name: str) -> bool:
    return text != "" and ids.text(name) == text


def _template(files: Folder) -> tuple[str, str] | None:
    """The special tokens that tokenizer.json puts before and behind a text, "" for none.

    None if it has no template, as the first files of LLaMA 3 had none.
    """
    path = files.path / "tokenizer.json"
    processor = files.tokenizer.get("post_processor")
    if processor is None:
        return None
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        refuse(f"found {shown(processor)}; expected an object", path, "post_processor")
    found = None
    for step in steps:
        kind = step.get("type")
        if kind == "TemplateProcessing":
            found = _ends_of(step.get("single"), path)
        elif kind != "ByteLevel":  # which only reports offsets
            unsupported(f"{shown(kind)} is not supported", path, "post_processor", kind)
    return found


def _ends_of(single: Any, path: Path) -> tuple[str, str]:
    """Of a template such as `<s> $A </s>`: what stands before and behind the text."""
    if not isinstance(single, list) or not all(isinstance(part, dict) for part in single):
        refuse(f"found {shown(single)}; expected a list", path, "post_processor.single")
    texts = []
    for part in single:
        token = part.get("SpecialToken")
        text = token.get("id") if isinstance(token, dict) else None
        texts.append(text if isinstance(text, str) else "")
    if "" not in texts or len(texts) > 3:
        problem = f"the template {shown(single)} is not supported"
        unsupported(problem, path, "post_processor.single", single)
    return texts[0], texts[-1]
