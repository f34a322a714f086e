"""`edgellama info`: what a model file declares, read from its header alone; nothing is run."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from edgellama.chat import FROM_FILE, NO_TEMPLATE
from edgellama.cli.terminal import Terminal
from edgellama.config import ModelConfig
from edgellama.errors import TokenizerError, UnsupportedModelError, shown
from edgellama.estimate import estimate_shape
from edgellama.gguf import GGUF, open_gguf
from edgellama.paths import model_path
from edgellama.tokenizer import Tokenizer, tokenizer_from_gguf
from edgellama.weights import check_tensors, expected_shapes, model_config

CONFIG = (  # the fields of ModelConfig that a document repeats
    "context_length",
    "vocab_size",
    "n_layers",
    "dim",
    "ffn_dim",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "tied_output",
    "sliding_window",
)
AT = 1024  # tokens that memory is estimated at: whole blocks of a cache
CERTIFICATE = "edgellama.certificate"


def show_info(terminal: Terminal, name: str) -> None:
    with _opened(model_path(name)) as file:
        facts = inspect(file)
    if terminal.json:
        terminal.document(facts)
        return
    for label, text in _lines(facts):
        terminal.write_lines(f"{label:<11} {text}\n")
    for warning in facts["warnings"]:
        terminal.note(f"warning: {warning}")


def _opened(path: Path) -> GGUF:
    """A file, or the metadata of a folder for ONNX Runtime, which declares the weights too."""
    if not path.is_dir() or not any(path.glob("*.onnx")):
        return open_gguf(path)
    from edgellama.runtimes.onnx_folder import open_folder

    return open_folder(path, checksums=False).file


def inspect(file: GGUF) -> dict[str, Any]:
    """The document of `info --json`; `problem` says why edgellama cannot run the file, if so.

    Raises the errors of `check_tensors` for a file that contradicts itself.
    """
    facts = _declared(file)
    try:
        config = model_config(file)
        facts["warnings"] += check_tensors(file, config)
        tokenizer = tokenizer_from_gguf(file.metadata, file.path)
    except (UnsupportedModelError, TokenizerError) as error:
        facts["problem"] = str(error)
    else:
        facts["config"] = {name: getattr(config, name) for name in CONFIG}
        facts["rope"] = dataclasses.asdict(config.rope)
        facts["vocabulary"] = _vocabulary(file, tokenizer)
        facts["memory"] = _memory(file, config)
    return facts


def _vocabulary(file: GGUF, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens: Any = file.metadata["tokenizer.ggml.tokens"]  # the tokenizer has checked them
    return {
        "kind": _text(file, "tokenizer.ggml.model"),
        "pre": _text(file, "tokenizer.ggml.pre"),
        "tokens": tokenizer.vocab_size,
        "special": len(tokenizer.special_texts),
        "bos": None if tokenizer.bos is None else tokens[tokenizer.bos],
        "add_bos": tokenizer.add_bos,
        "eos": [tokens[i] for i in tokenizer.eos],
    }


def _memory(file: GGUF, config: ModelConfig) -> dict[str, Any]:
    """Bytes in the runtime that `load` takes: keys and values for 1,000 tokens, and the rest."""
    types = {name: file.tensors[name].type.name for name in expected_shapes(config)}
    context = min(config.context_length, AT)
    runtime = "onnx" if file.path.is_dir() else "cpu"
    found = estimate_shape(config, types, runtime=runtime, context=context).memory
    cache = found.pop("kv_cache")
    each = cache * 1000 // context
    return {"runtime": runtime, "fixed": sum(found.values()), "kv_per_1000_tokens": each}


def _declared(file: GGUF) -> dict[str, Any]:
    types: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    template = _text(file, "tokenizer.chat_template")
    parameters = 0
    for tensor in file.tensors.values():
        types[tensor.type.name] += 1
        parameters += tensor.n_bytes // tensor.type.size * tensor.type.block
        sizes[tensor.type.name] += tensor.n_bytes
    stored = sum(sizes.values())
    return {
        "path": str(file.path),
        "bytes": file.n_bytes,
        "format": "ONNX folder" if file.path.is_dir() else f"GGUF {file.version}",
        "architecture": _text(file, "general.architecture"),
        "name": _text(file, "general.name"),
        "license": _text(file, "general.license"),
        "parameters": parameters,
        "bits_per_weight": round(8 * stored / parameters, 3) if parameters else 0.0,
        "tensors": dict(types.most_common()),
        "bytes_by_type": {kind: sizes[kind] for kind, _ in types.most_common()},
        "tokenizer": _text(file, "tokenizer.ggml.model"),
        "chat_template": template is not None,
        "template": template,
        "template_source": FROM_FILE if template is not None else NO_TEMPLATE,
        "certificate": CERTIFICATE in file.metadata,
        "config": None,
        "rope": None,
        "vocabulary": None,
        "memory": None,
        "problem": None,
        "warnings": list(file.warnings),
    }


def _text(file: GGUF, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads: label and text; values from the file are escaped."""
    name = f"{shown(facts['name'])}, " if facts["name"] else ""
    types = ", ".join(
        f"{count} {kind} ({facts['bytes_by_type'][kind] / 1e6:,.1f} MB)"
        for kind, count in facts["tensors"].items()
    )
    lines = [
        ("file", f"{facts['path']}, {facts['bytes'] / 1e6:,.1f} MB, {facts['format']}"),
        ("model", f"{name}architecture {shown(facts['architecture'])}"),
        (
            "parameters",
            f"{facts['parameters'] / 1e6:,.1f} million, {facts['bits_per_weight']} bits each",
        ),
        ("tensors", types or "none"),
    ]
    if facts["config"]:
        lines += _config_lines(facts)
    lines.append(("chat", facts["template_source"]))
    if facts["template"] is not None:
        lines.append(("template", shown(facts["template"])))
    certificate = "yes: `edgellama verify` replays it" if facts["certificate"] else "none"
    lines.append(("certificate", certificate))
    if facts["license"]:
        lines.append(("license", shown(facts["license"])))
    if facts["problem"]:
        lines.append(("problem", facts["problem"]))
    return lines


def _config_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """About a model that edgellama runs."""
    config, words, memory = facts["config"], facts["vocabulary"], facts["memory"]
    heads = f"{config['n_heads']} heads of {config['head_dim']}, {config['n_kv_heads']} for keys"
    window = config["sliding_window"]
    seen = f", each sees the last {window}" if window else ""
    scaling = facts["rope"]["scaling"]
    turned = (
        "" if scaling == "none" else f", stretched {facts['rope']['factor']:g} times, {scaling}"
    )
    bos = shown(words["bos"]) if words["bos"] is not None else "none"
    use = "put before a text" if words["add_bos"] else "not put before a text"
    ends = ", ".join(map(shown, words["eos"])) or "none"
    pre = f", pre-tokenizer {shown(words['pre'])}" if words["pre"] else ""
    return [
        ("layers", f"{config['n_layers']} of {config['dim']}, {heads}, ffn {config['ffn_dim']}"),
        ("context", f"{config['context_length']} tokens{seen}{turned}"),
        ("vocabulary", f"{config['vocab_size']} tokens, {shown(facts['tokenizer'])}{pre}"),
        ("tokens", f"begin {bos}, {use}; end {ends}; {words['special']} special"),
        (
            "memory",
            f"{memory['fixed'] / 1e6:,.0f} MB and {memory['kv_per_1000_tokens'] / 1e6:,.1f} MB for "
            f"1,000 tokens of context, in the {memory['runtime']} runtime",
        ),
    ]
