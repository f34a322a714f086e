"""Arguments that are wrong or odd, in the API and on the command line.

Ids A1 to A12 are rows of the project's catalogue of bad inputs; those about sampling are in
test_sampling.py and test_generate.py, those about files of models in test_gguf_refused.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import EdgeLlamaError, ModelFormatError, ParameterError
from edgellama.machine import available_memory


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("arguments") / "tiny.gguf")


@pytest.mark.parametrize("prompt", ["", " ", " \t ", "\n", "\u3000", [1]])
def test_hardly_any_prompt(path: Path, prompt: Any) -> None:
    """A1: BOS alone, or white space: read as it is."""
    with edgellama.load(path, runtime="reference") as model:
        (chunk,) = model.generate(prompt, max_tokens=1)
        assert chunk.token is not None and chunk.usage is not None
        ids = model.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        assert chunk.usage.prompt_tokens == len(ids) and ids[0] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, n) for name in ("threads", "context") for n in (0, -1, 10**6, 2**31, 1.0, True, "2")],
)
def test_numbers_out_of_range(path: Path, name: str, value: Any) -> None:
    """A9: the range is told."""
    with pytest.raises(ParameterError, match=rf"{name} = .*allowed: an integer 1\.\.") as caught:
        edgellama.load(path, **{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("odd", "error", "words"),
    [
        ("", ParameterError, "the model is ''"),
        ("a\0b", ParameterError, r"the model is 'a\\x00b'"),
        ("https://example.org/x.gguf", ParameterError, "an address, not a local file"),
        ("file:///x.gguf", ParameterError, "an address, not a local file"),
        ("-", EdgeLlamaError, "no such file"),
        ("nowhere.gguf", EdgeLlamaError, "no such file"),
        (" tiny.gguf ", EdgeLlamaError, "no such file"),
        ("CON", EdgeLlamaError, "no such file"),
        (os.fsdecode(b"\xff\xfe.gguf"), EdgeLlamaError, "no such file"),
        ("x" * 5000, EdgeLlamaError, "too long"),
        ("~", ModelFormatError, "this is .*folder"),
        (".", ModelFormatError, "this is .*folder"),
        (os.devnull, EdgeLlamaError, "neither a regular file nor a folder"),
    ],
)
def test_paths(odd: str, error: type[Exception], words: str) -> None:
    """A10: what is wrong with it, never a traceback of another kind."""
    with pytest.raises(error, match=words) as caught:
        edgellama.load(odd)
    assert str(caught.value).isprintable()


def test_a_file_that_may_not_be_read(path: Path) -> None:
    """A10: the system's own reason."""
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("needs a file that the user cannot read")
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with pytest.raises(EdgeLlamaError, match="Permission denied"):
            edgellama.load(path)
    finally:
        path.chmod(mode)


def test_the_context_is_what_memory_holds(tmp_path: Path) -> None:
    """A9: without a wish, up to 80 % of what is available, in steps; a wish beyond is refused."""
    most = 2**24
    shape = {"head_dim": 128, "n_kv_heads": 4, "n_layers": 8, "context_length": most}
    large = write_tiny(tmp_path / "large.gguf", tiny_config(**shape))
    available, per_token = available_memory(), 2 * 8 * 4 * 128 * 2  # bytes, keys and values in f16
    if available is None or most * per_token < 2 * available:
        pytest.skip("needs to know the machine's memory, and less than 130 GB of it")
    with edgellama.load(large, runtime="reference") as model:
        context = model.info.context
    assert context % 256 == 0
    share = context * per_token / available  # which changes while others use the machine
    assert 0.4 < share < 0.9
    with pytest.raises(edgellama.OutOfMemory, match=r"large\.gguf: needs .* GiB .*80% of what is"):
        edgellama.load(large, runtime="reference", context=most)


@pytest.mark.parametrize("runtime", ["cpu", "reference", "onnx", "llama.cpp"])
def test_what_progress_raises_ends_the_load(
    runtime: str, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if runtime in ("onnx", "llama.cpp"):
        module = {"onnx": "onnxruntime", "llama.cpp": "llama_cpp"}[runtime]
        pytest.importorskip(module, reason=f"{module} is not installed")
    told = 0

    def stop(done: int, total: int, what: str) -> None:
        nonlocal told
        told += 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        edgellama.load(path, runtime=runtime, progress=stop)
    assert told == 1
    assert "".join(capfd.readouterr()) == ""


def command(path: Path, *arguments: str) -> list[str]:
    common = ["--runtime", "reference", "-t", "0", "-n", "4", "--quiet"]
    return [sys.executable, "-m", "edgellama", "run", str(path), *arguments, *common]


def test_a_prompt_that_never_ends(path: Path) -> None:
    """A12: `yes | edgellama run MODEL`."""
    code = "import sys\ntry:\n while True: sys.stdout.write('y\\n' * 4096)\nexcept OSError: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as endless:
        done = subprocess.run(
            command(path), stdin=endless.stdout, capture_output=True, text=True, timeout=120
        )
        assert endless.stdout is not None
        endless.stdout.close()
        endless.kill()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "edgellama: the prompt on stdin is longer than 16777216 bytes\n"


def test_odd_terminals(path: Path) -> None:
    """A12: the text is UTF-8 whatever the system's encoding, and as long as it is."""
    prompt = "h\u00e9llo \u65e5\u672c".encode()
    bias = {"EDGELLAMA_LOGIT_BIAS": "198=999"}  # the byte 0xC3, which is no character by itself
    odd = ({"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "1"}, {"PYTHONIOENCODING": "cp1252"})
    for settings in ({}, *odd):
        environment = os.environ | bias | settings
        done = subprocess.run(
            command(path), input=prompt, capture_output=True, timeout=120, env=environment
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("utf-8").strip() == "\ufffd" * 4
