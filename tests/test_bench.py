"""Measuring: everything is there, in order, and stoppable. How large a figure is, no test says."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import measure
from edgellama.cli.bench import document, introduction, run_bench, table
from edgellama.cli.reply import Running
from edgellama.cli.terminal import Terminal
from edgellama.measure import FIGURES, Comparison, Measured, Spread, compare

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its context is smaller than what would be measured."""
    config = tiny_config(context_length=96)
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny.gguf", config)


@pytest.fixture(scope="module")
def both(path: Path) -> Comparison:
    runtimes = ("cpu", "reference")
    return compare(path, runtimes, threads=1, context=96, rounds=3, cold_rounds=1)


def test_every_figure_of_both_runtimes(both: Comparison) -> None:
    assert list(both.runtimes) == ["cpu", "reference"]
    assert (both.prefill_tokens, both.decode_tokens, both.threads) == (96, 64, 1)
    for runtime in both.runtimes.values():
        for figure in FIGURES:
            spread = getattr(runtime, figure)
            if spread is None:
                assert figure == "peak_bytes" and sys.platform not in ("linux", "darwin")
            else:
                assert 0 < spread.low <= spread.median <= spread.high
    assert set(both.ratios) >= set(FIGURES[:4])


def test_one_runtime_has_no_ratios(path: Path) -> None:
    alone = compare(path, context=96, threads=1, rounds=1, cold_rounds=1)
    assert list(alone.runtimes) == ["cpu"] and alone.ratios == {}


def test_fresh_processes_take_nothing_from_the_folder_at_hand(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a checkout, whose folder of that name lacks the runtimes."""
    (tmp_path / "edgellama").mkdir()
    (tmp_path / "edgellama" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    alone = compare(path, ("reference",), context=96, threads=1, rounds=1, cold_rounds=1)
    assert alone.runtimes["reference"].load_seconds.low > 0


def test_runtimes_take_turns() -> None:
    """A B, B A, A B: neither always comes after the other."""
    seen: list[str] = []
    subjects = [lambda: seen.append("a") or {"x": 1.0}, lambda: seen.append("b") or {"x": 4.0}]
    steps = measure._Steps(6, edgellama.CancelToken(), None)
    results = measure.in_turns(subjects, 3, steps.next)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert results == [{"x": [1.0] * 3}, {"x": [4.0] * 3}]


def test_peak_memory_is_the_childs_own(path: Path) -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = bytes(len(ballast[::4096]))  # touched: this process is large now
    figures = measure.fresh_process(path, "cpu", 1, 96)
    del ballast
    if figures["peak_bytes"] is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 10e6 < figures["peak_bytes"] < 400e6


def test_failure_of_a_fresh_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(edgellama.EdgeLlamaError, match=r"measures cpu failed: .*absent\.gguf"):
        measure.fresh_process(tmp_path / "absent.gguf", "cpu", 1, 96)


@pytest.mark.parametrize(
    ("runtimes", "rounds"), [((), 1), (("cpu", "cpu"), 1), (("cpu",), 0), (("cpu", "a", "b"), 1)]
)
def test_bad_arguments(path: Path, runtimes: tuple[str, ...], rounds: int) -> None:
    with pytest.raises(edgellama.ParameterError):
        compare(path, runtimes, context=96, rounds=rounds)


def test_cancelled(path: Path) -> None:
    token = edgellama.CancelToken()
    timer = threading.Timer(0.5, token.cancel)
    timer.start()
    with pytest.raises(edgellama.Cancelled):
        compare(path, context=96, threads=1, rounds=1, cold_rounds=1000, cancel=token)
    timer.join()


# --- what the command shows ---------------------------------------------------------------------


def invented() -> Comparison:
    half, one, two = Spread(0.5, 0.4, 0.6), Spread(1000.0, 900.0, 1100.0), Spread(2000.0, 1.0, 9e6)
    fast = Measured({"runtime": "cpu"}, two, two, half, half, Spread(2e8, 2e8, 3e8))
    slow = Measured({"runtime": "reference"}, one, one, half, half, None)
    runtimes = {"cpu": fast, "reference": slow}
    machine = {"processor": "a processor"}
    ratios = {"decode": Spread(2.0, 1.9, 2.1)}
    return Comparison(Path("m.gguf"), machine, 2, 256, 64, 5, 3, runtimes, ratios)


def test_table() -> None:
    lines = table(invented()).splitlines()
    assert lines[0].split() == ["cpu", "reference", "ratio"]
    assert lines[2].split("  ")[-1] == "2.00 (1.90 to 2.10)"
    assert "1,000 (900 to 1,100)" in lines[2] and "500 (400 to 600)" in lines[3]
    assert "200 (200 to 300)" in lines[5] and "unknown" in lines[5]
    assert "a processor, 2 threads" in introduction(invented())


def test_document_is_json() -> None:
    text = json.loads(json.dumps(document(invented())))
    assert text["model"] == "m.gguf"
    assert text["runtimes"]["cpu"]["decode"] == {"median": 2000.0, "low": 1.0, "high": 9e6}


def test_bench_writes_one_document(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = Running(threads=1, context=96)
    run_bench(Terminal(json=True, quiet=True), str(path), against=None, how=how, rounds=1)
    out, err = capsys.readouterr()
    assert json.loads(out)["threads"] == 1 and err == ""


@pytest.mark.parametrize("runtime", ["auto", "onnx"])
def test_device_that_is_not_there(path: Path, runtime: str) -> None:
    """The message names what is missing, and what installs it."""
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime was built with CUDA")
    how = Running(runtime=runtime, device="cuda", context=96)
    with pytest.raises(edgellama.DeviceUnavailable, match=r"pip install 'edgellama\["):
        run_bench(Terminal(), str(path), against=None, how=how)
    with pytest.raises(edgellama.ParameterError, match="runtime"):
        run_bench(Terminal(), str(path), against=None, how=Running(runtime="cpu", device="cuda"))


def test_onnx_is_measured_beside_another(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")
    names = ("onnx", "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLAMA_CACHE", str(tmp_path))
        found = compare(path, names, device="cpu", context=96, threads=1, rounds=1, cold_rounds=1)
    assert tuple(found.runtimes) == names and set(found.ratios) >= set(FIGURES[:4])
    assert found.runtimes["onnx"].device["device"] == "cpu"


def test_a_folder_means_onnx(tmp_path: Path) -> None:
    """Which one is chosen shows in what is missing."""
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(edgellama.UnsupportedModelError, match="edgellama did not write"):
        run_bench(Terminal(), str(tmp_path), against=None, how=Running())


@pytest.mark.parametrize("script", ["compare.py", "import_cost.py"])
def test_scripts_start(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "--json" in done.stdout
