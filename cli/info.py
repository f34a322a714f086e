"""`edgellama info`: what a model file declares, read from its header alone; nothing is run."""

from collections import Counter
from typing import Any

from edgellama.chat import FROM_FILE, NO_TEMPLATE
from edgellama.cli.terminal import Terminal
from edgellama.errors import UnsupportedModelError, shown
from edgellama.gguf import GGUF, open_gguf
from edgellama.paths import model_path
from edgellama.weights import check_tensors, model_config

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
)


def show_info(terminal: Terminal, name: str) -> None:
    with open_gguf(model_path(name)) as file:
        facts = inspect(file)
    if terminal.json:
        terminal.document(facts)
        return
    for label, text in _lines(facts):
        terminal.write(f"{label:<11} {text}\n")
    for warning in facts["warnings"]:
        terminal.note(f"warning: {warning}")


def inspect(file: GGUF) -> dict[str, Any]:
    """The document of `info --json`; `problem` says why edgellama cannot run the file, if so.

    Raises the errors of `check_tensors` for a file that contradicts itself.
    """
    facts = _declared(file)
    try:
        config = model_config(file)
        facts["warnings"] += check_tensors(file, config)
    except UnsupportedModelError as error:
        facts["problem"] = str(error)
    else:
        facts["config"] = {name: getattr(config, name) for name in CONFIG}
    return facts


def _declared(file: GGUF) -> dict[str, Any]:
    types: Counter[str] = Counter()
    template = _text(file, "tokenizer.chat_template")
    parameters = stored = 0
    for tensor in file.tensors.values():
        types[tensor.type.name] += 1
        parameters += tensor.n_bytes // tensor.type.size * tensor.type.block
        stored += tensor.n_bytes
    return {
        "path": str(file.path),
        "bytes": file.n_bytes,
        "format": f"GGUF {file.version}",
        "architecture": _text(file, "general.architecture"),
        "name": _text(file, "general.name"),
        "license": _text(file, "general.license"),
        "parameters": parameters,
        "bits_per_weight": round(8 * stored / parameters, 3) if parameters else 0.0,
        "tensors": dict(types.most_common()),
        "tokenizer": _text(file, "tokenizer.ggml.model"),
        "chat_template": template is not None,
        "template": template,
        "template_source": FROM_FILE if template is not None else NO_TEMPLATE,
        "config": None,
        "problem": None,
        "warnings": list(file.warnings),
    }


def _text(file: GGUF, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads: label and text; values from the file are escaped."""
    name = f"{shown(facts['name'])}, " if facts["name"] else ""
    types = ", ".join(f"{count} {kind}" for kind, count in facts["tensors"].items())
    lines = [
        ("file", f"{facts['path']}, {facts['bytes'] / 1e6:,.1f} MB, {facts['format']}"),
        ("model", f"{name}architecture {shown(facts['architecture'])}"),
        (
            "parameters",
            f"{facts['parameters'] / 1e6:,.1f} million, {facts['bits_per_weight']} bits each",
        ),
        ("tensors", types or "none"),
    ]
    if config := facts["config"]:
        heads = (
            f"{config['n_heads']} heads of {config['head_dim']}, {config['n_kv_heads']} for keys"
        )
        lines += [
            (
                "layers",
                f"{config['n_layers']} of {config['dim']}, {heads}, ffn {config['ffn_dim']}",
            ),
            ("context", f"{config['context_length']} tokens"),
            ("vocabulary", f"{config['vocab_size']} tokens, {shown(facts['tokenizer'])}"),
        ]
    lines.append(("chat", facts["template_source"]))
    if facts["template"] is not None:
        lines.append(("template", shown(facts["template"])))
    if facts["license"]:
        lines.append(("license", shown(facts["license"])))
    if facts["problem"]:
        lines.append(("problem", facts["problem"]))
    return lines
