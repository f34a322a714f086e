"""The interpreter ends while daemon threads compute with the onnx runtime, or load a model."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")

CODE = """
import atexit, sys, threading, time
import edgellama

def last_words():  # registered before the model is loaded, so called after all that it registers
    with model.session() as session:
        print(session.forward([1, 2, 3]).shape)

def load():
    return edgellama.load(sys.argv[1], "onnx", threads=2, context=512)

def compute():
    session = model.session()
    while True:
        begun.set()
        session.forward([5] * 16)
        session.truncate(0)

def keep_loading():
    while True:
        load().close()

if {last}: atexit.register(last_words)
model, begun = load(), threading.Event()
for work in {works}:
    threading.Thread(target=work, daemon=True).start()
if compute in {works}:
    begun.wait()
time.sleep(0.2)
"""


@pytest.mark.parametrize(
    ("works", "last"),
    [("[compute]", False), ("[compute]", True), ("[compute] * 3", False), ("[keep_loading]", True)],
)
def test_daemon_threads_end_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: str, last: bool
) -> None:
    """Nothing on stderr; and what is still called in the last thread computes as ever."""
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path))
    config = tiny_config(dim=256, ffn_dim=1024, n_layers=8, context_length=512)  # some ms a call
    path = write_tiny(tmp_path / "tiny.gguf", config)
    code = CODE.replace("{works}", works).replace("{last}", str(last))
    for _ in range(2):
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        said = "(288,)\n" if last else ""
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
