"""What `import edgellama` and `edgellama --help` leave unimported: that keeps them quick."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "numpy",
    "numba",
    "llvmlite",
    "gguf",
    "tokenizers",
    "jinja2",
    "onnx",
    "onnxruntime",
    "llama_cpp",
    "huggingface_hub",
    "rich",
    "prompt_toolkit",
    "asyncio",
    "subprocess",
}


def modules_after(program: str) -> set[str]:
    program += "\nimport sys, json\nprint(json.dumps([*sys.modules]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_edgellama_is_light() -> None:
    loaded = modules_after("import edgellama")
    assert "edgellama" in loaded
    loaded -= modules_after("pass")  # an editable install imports a little at start-up
    assert not loaded & (HEAVY | {"typer", "pathlib", "dataclasses"})


def test_public_errors_are_light() -> None:
    loaded = modules_after("import edgellama; edgellama.ParameterError, edgellama.CancelToken")
    assert "edgellama.errors" in loaded
    assert not loaded & (HEAVY | {"typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    baseline = modules_after("import typer")
    loaded = modules_after(f"from edgellama.cli.main import run\nassert run({arguments!r}) == 0")
    assert "edgellama.cli.main" in loaded
    assert not (loaded - baseline) & HEAVY


def test_heavy_modules_can_be_seen() -> None:
    """The measure itself works: what is imported is found."""
    assert "numpy" in modules_after("import numpy")
