"""What making an ONNX folder takes in memory, whatever the model's size."""

from pathlib import Path

import pytest
from test_memory_use import MIB, run
from tiny import tiny_config, write_tiny

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read Linux's way"
)

FLIGHT = 32 * MIB  # of pieces of rows, and of the arrays that they become

TRANSCODE = """
from edgellama.gguf import open_gguf
from edgellama.graph import decoder
from edgellama.quantize import quantize
from edgellama.runtimes.base import Options
from edgellama.runtimes.onnx_cache import transcoded
from edgellama.weights import model_config

def transcode(path):
    with open_gguf(path) as file:
        folder, _ = transcoded(file, decoder(model_config(file)), Options(context=64, threads=1))
        folder.close()
    return folder.layout.size

transcode(sys.argv[1])
quantize(sys.argv[1], sys.argv[1] + ".onnx", "Q4_0")  # modules and kernels
before = start()
size = transcode(sys.argv[2])
print(size, status("VmHWM") - before)
before = start()
quantize(sys.argv[2], sys.argv[2] + ".onnx", "Q4_0", certificate="none")
print(status("VmHWM") - before)
"""


def test_making_a_folder_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    config = tiny_config(vocab_size=17_000, n_layers=2, dim=2048, ffn_dim=5632, tied_output=True)
    large = write_tiny(tmp_path / "large.gguf", config, "Q8_0")
    small = write_tiny(tmp_path / "small.gguf", types="Q8_0")
    size, transcoding, quantizing = run(TRANSCODE, small, large)
    assert size > 3 * FLIGHT
    assert max(transcoding, quantizing) <= FLIGHT
