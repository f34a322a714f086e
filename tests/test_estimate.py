"""What `estimate` says against what processes really take, and against the runtimes' own sums."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import SHAPES, write
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import ParameterError
from edgellama.cli.main import run
from edgellama.estimate import ONNX_COPIES, Estimate, estimate, estimate_shape

HANG = 300.0
FILL = """
import sys
import edgellama
with edgellama.load(sys.argv[1], context=int(sys.argv[2]), threads=2) as model:
    session = model.session()
    ids = model.tokenizer.encode("All happy families are alike. " * (int(sys.argv[2]) // 4))
    session.forward(ids[: int(sys.argv[2]) - 1])
    session.forward([5])
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            print(int(line.split()[1]) * 1024, int("numba" in sys.modules))
"""
MEASURABLE = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read Linux's way"
)


def resident(path: Path, context: int) -> int:
    """Of a process that has filled the context, all its kernels in the cache."""
    for _ in range(2):
        command = [sys.executable, "-c", FILL, str(path), str(context)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
        assert done.returncode == 0, done.stderr
        size, compiled = map(int, done.stdout.split())
        if not compiled:
            return size
    raise AssertionError("kernels are compiled every time")


@MEASURABLE
@pytest.mark.parametrize("context", [512, 2048])
def test_the_default_model_takes_what_was_said(default_model: Path, context: int) -> None:
    said = estimate(default_model, context=context, threads=2).total
    assert resident(default_model, context) == pytest.approx(said, rel=0.1)


@MEASURABLE
def test_a_larger_model_takes_what_was_said(tmp_path: Path) -> None:
    """Weights of another type and shape, and more of them than of everything else."""
    config = tiny_config(vocab_size=80_000, dim=1024, tied_output=True)
    path = write_tiny(tmp_path / "large.gguf", config, {"token_embd": "F16"})
    said = estimate(path, context=128, threads=2)
    assert said.memory["weights"] > said.total / 2
    assert resident(path, 128) == pytest.approx(said.total, rel=0.1)


@pytest.mark.parametrize("types", ["F32", "Q8_0"])
@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
def test_sizes_are_those_of_the_loaded_model(tmp_path: Path, types: str, kv_type: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", tiny_config(head_dim=32), types)
    said = estimate(path, context=100, kv_type=kv_type, threads=3)
    with edgellama.load(path, context=100, kv_type=kv_type, threads=3) as model:
        memory = model.info.memory
        logits = 4 * 288  # of one token; rooms are padded
    assert said.memory["kv_cache"] == memory["kv_cache"]
    assert abs(said.memory["weights"] - memory["weights"]) <= 64
    assert logits < said.memory["scratch"] < memory["scratch"]
    assert (said.runtime, said.device, said.context) == ("cpu", "cpu", 100)


def test_reference_and_onnx_count_as_they_do(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", types="Q8_0")
    with edgellama.load(path, runtime="reference", context=64) as model:
        memory, parameters = model.info.memory, model.info.parameters
    said = estimate(path, runtime="reference", context=64)
    assert said.memory["weights"] == memory["weights"] == parameters * 4
    assert said.memory["kv_cache"] == memory["kv_cache"] and said.kv_type == "f32"
    onnx = estimate(path, runtime="onnx", context=64)
    assert onnx.memory["kv_cache"] >= 2 * estimate(path, context=64).memory["kv_cache"]
    assert onnx.notes and not onnx.device_memory


def test_a_folder_for_onnx_runtime(tmp_path: Path) -> None:
    path, folder = write_tiny(tmp_path / "tiny.gguf", types="Q8_0"), tmp_path / "tiny.onnx"
    assert run(["quantize", str(path), str(folder), "--type", "Q8_0", "--quiet"]) == 0
    said = estimate(folder, context=64)
    data = (folder / "model.onnx.data").stat().st_size
    assert said.runtime == "onnx" and said.memory["weights"] == int(ONNX_COPIES * data)
    with pytest.raises(ParameterError, match="onnx"):
        estimate(folder, runtime="cpu")


def test_a_gpu_has_memory_of_its_own() -> None:
    config = SHAPES["llama-2-7b"]
    said = estimate_shape(config, "Q4_0", device="cuda", context=2048)
    per_token = 2 * 32 * 4096 * 2
    assert said.device_memory["kv_cache"] == 2048 * per_token
    assert 0.5 < said.device_memory["weights"] / config.n_parameters < 0.7
    assert said.device_total == sum(said.device_memory.values())
    assert "weights" not in said.memory and said.runtime == "onnx"


def test_more_context_costs_keys_and_values_alone() -> None:
    config = SHAPES["llama-3-8b"]
    small, large = (estimate_shape(config, "Q4_K", context=n).memory for n in (1024, 2048))
    assert large["kv_cache"] == 2 * small["kv_cache"] == 2048 * 2 * 32 * 1024 * 2
    assert large["weights"] == small["weights"]
    assert large["scratch"] - small["scratch"] < small["kv_cache"] / 50


def test_nothing_is_too_large_to_be_estimated() -> None:
    """The rooms of a program that does not fit here are not touched."""
    config = tiny_config(
        vocab_size=128_256,
        n_layers=126,
        dim=16384,
        ffn_dim=53248,
        n_heads=128,
        n_kv_heads=8,
        head_dim=128,
        context_length=131_072,
    )
    said = estimate_shape(config, "Q8_0")
    assert 400e9 < said.memory["weights"] < 450e9
    assert said.memory["kv_cache"] == 131_072 * 2 * 126 * 8 * 128 * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": 0},
        {"context": 129},
        {"runtime": "tpu"},
        {"kv_type": "q4_0"},
        {"device": "cuda", "runtime": "cpu"},
        {"threads": 0},
    ],
)
def test_what_cannot_be_asked(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError):
        estimate_shape(tiny_config(), "F32", **wrong)  # type: ignore[arg-type]


def test_types_that_do_not_fit() -> None:
    with pytest.raises(ParameterError, match="blocks of 256"):
        estimate_shape(tiny_config(), "Q4_K")
    with pytest.raises(ParameterError, match="types"):
        estimate_shape(tiny_config(), "Q9_9")


# --- the command ----------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "tiny.gguf", "tiny", "Q4_K")
    arguments = ["estimate", str(path), "--context", "512", "--kv-type", "q8_0"]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    said = estimate(path, context=512, kv_type="q8_0")
    assert document["memory"] == said.memory and document["total"] == said.total
    assert document["path"] == str(path) and document["kv_type"] == "q8_0"

    assert run(arguments) == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("memory in all"))
    assert row.split()[-2:] == [f"{said.total / 1e6:,.1f}", "MB"]
    assert "512 tokens of context" in err

    assert run(["estimate", str(path), "--context", "99999"]) == 2
    assert "1..2048" in capsys.readouterr().err


def test_documented_table() -> None:
    """docs/cli.md shows what the function says, on whatever processor."""
    from estimates import COLUMNS, rows

    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| Llama-2 ")]
    assert len(shown) == 3
    for line, row in zip(shown, rows(), strict=True):
        cells = [cell.strip() for cell in line]
        assert len(cells) == len(COLUMNS) and cells[0] == row[0] and cells[-1] == row[-1]
        for told, found in zip(cells[1:-1], row[1:-1], strict=True):
            assert float(told) == pytest.approx(float(found), abs=0.11)


def test_totals() -> None:
    said = Estimate("cpu", "cpu", 1, 8, "f16", {"weights": 3, "kv_cache": 4})
    assert (said.total, said.device_total) == (7, 0)
