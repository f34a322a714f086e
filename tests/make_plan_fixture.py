"""Write tests/data/plan_types.json: the types that llama.cpp gives to every tensor, by file type.

    python tests/make_plan_fixture.py MODEL.gguf

MODEL is the default model. Needs the extra `llamacpp`; the tests that read the file do not.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

from tiny import tiny_config, write_tiny

from edgellama.config import ModelConfig
from edgellama.gguf import open_gguf
from edgellama.quantize.plan import FILE_TYPES

FIXTURE = Path(__file__).parent / "data" / "plan_types.json"


def shape(layers: int, dim: int, heads: int, kv: int, ffn: int, tied: bool = False) -> ModelConfig:
    """A model that is small but for what the mixes look at."""
    return tiny_config(
        n_layers=layers,
        dim=dim,
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=dim // heads,
        ffn_dim=ffn,
        tied_output=tied,
        rope=tiny_config(head_dim=dim // heads).rope,
    )


MODELS = {  # name: what it is there for
    "tied, rows of 96": shape(30, 96, 3, 1, 256, tied=True),
    "untied": shape(9, 256, 4, 2, 256),
    "four heads share": shape(17, 256, 4, 1, 256),
    "80 layers": shape(80, 256, 4, 4, 256),
    "80 layers, shared": shape(80, 256, 4, 2, 256),
    "rows of 48": shape(3, 48, 3, 3, 80),
}


def quantized(source: Path, output: Path, file_type: int) -> Path:
    """`source` quantized by llama.cpp."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, 2, True
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(parameters)
    )
    assert status == 0, (source, file_type)
    return output


def types(path: Path) -> dict[str, str]:
    with open_gguf(path) as file:
        return {name: info.type.name for name, info in file.tensors.items()}


def packed(found: dict[str, str]) -> dict[str, list[str]]:
    """Role, and the types of that role in layer 0, 1, 2...: one type if all are the same."""
    roles: dict[str, list[str]] = {}
    for name in sorted(found, key=_place):
        roles.setdefault(_place(name)[1], []).append(found[name])
    return {role: kinds[:1] if len(set(kinds)) == 1 else kinds for role, kinds in roles.items()}


def _place(name: str) -> tuple[int, str]:
    """(layer, role)"""
    if not name.startswith("blk."):
        return -1, name
    _, layer, role = name.split(".", 2)
    return int(layer), role


def silence() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(_nothing, None)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _nothing(*_: object) -> None:
    pass


def main(model: Path) -> None:
    silence()
    kept: dict[str, dict[str, dict[str, list[str]]]] = {}
    with tempfile.TemporaryDirectory() as at:
        sources = {"default": quantized(model, Path(at, "default.gguf"), FILE_TYPES["F16"][0])}
        for name, config in MODELS.items():
            sources[name] = write_tiny(Path(at, f"{name}.gguf"), config)
        for name, source in sources.items():
            kept[name] = {}
            for kind, (number, _) in FILE_TYPES.items():
                output = quantized(source, Path(at, "out"), number)
                kept[name][kind] = packed(types(output))
    FIXTURE.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    print(FIXTURE.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
