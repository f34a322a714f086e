"""The benchmarks' own parts: synthetic models, limits, and the matrix on a tiny model.

How large a figure is, no test says.
"""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import limits
import matrix
import numpy as np
import plot
import pytest
import report
import synthetic
from subject import Spec, Subject, Unavailable

import edgellama
from edgellama.ggml import RUNNABLE
from edgellama.gguf import open_gguf
from edgellama.runtimes import levels
from edgellama.runtimes.compiler import object_code

ROOT = Path(__file__).parent.parent

# --- synthetic models ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNNABLE)
def test_synthetic_opens_everywhere(kind: str, tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "model.gguf", "tiny", kind)
    reader = gguf.GGUFReader(path)
    (weight,) = (t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert weight.tensor_type.name == kind
    values = gguf.quants.dequantize(weight.data, weight.tensor_type)
    spread = 1 / np.sqrt(values.shape[1])
    assert abs(values.std() / spread - 1) < 0.1 and abs(values.mean()) < 0.2 * spread
    with edgellama.load(path, "reference", context=16) as model:
        logits = model.session().forward(model.tokenizer.encode("a text", bos=True))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


def test_synthetic_is_deterministic(tmp_path: Path) -> None:
    files = [
        synthetic.write(tmp_path / f"{i}.gguf", "tiny", "Q4_K", seed=seed).read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert files[0] == files[1] != files[2]
    assert len(list(tmp_path.iterdir())) == 3  # nothing temporary is left


def test_synthetic_needs_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PIECE", 2**16)
    tracemalloc.start()
    path = synthetic.write(tmp_path / "model.gguf", "tiny", "F32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_synthetic_falls_back_as_llama_cpp_does() -> None:
    assert synthetic._type_of((576, 576), "Q4_K") == "Q5_0"
    assert synthetic._type_of((576, 1536), "Q4_K") == "Q4_K"
    assert synthetic._type_of((576, 576), "Q8_0") == "Q8_0"
    assert synthetic._type_of((8, 100), "Q8_0") == "F16"
    assert synthetic._type_of((576,), "Q8_0") == "F32"


def test_synthetic_takes_a_vocabulary(tmp_path: Path) -> None:
    source = synthetic.write(tmp_path / "source.gguf", "tiny", "Q8_0")
    path = synthetic.cached(tmp_path / "cache", "tiny", "Q4_0", source)
    with open_gguf(source) as a, open_gguf(path) as b:
        keys = [key for key in a.metadata if key.startswith("tokenizer.")]
        assert keys and all(a.metadata[key] == b.metadata[key] for key in keys)
    written = path.stat().st_mtime_ns
    assert synthetic.cached(tmp_path / "cache", "tiny", "Q4_0", source) == path
    assert path.stat().st_mtime_ns == written


# --- limits -------------------------------------------------------------------------------------


def test_limits_are_positive_and_their_order_is_sane() -> None:
    best = levels.available()[0]
    found = limits.measure(limits.Limits(2, (best, "generic"), 2**22), rounds=2)
    assert set(found) == {"read", f"dots {best}", "dots generic"}
    assert all(0 < spread.low <= spread.median <= spread.high for spread in found.values())


def test_read_reads_everything() -> None:
    values = np.arange(1024, dtype=np.float32)
    out = np.zeros(16, np.float32)
    kernel = limits.compiled(limits.read, "generic")
    kernel(values.ctypes.data, values.nbytes, 0, out.ctypes.data)
    assert np.array_equal(out, values.reshape(-1, 16).sum(axis=0))


def test_dots_computes_every_product() -> None:
    operands = np.random.default_rng(0).integers(0, 128, limits.OPERANDS, np.uint8)
    out = np.zeros(16, np.float32)
    rows = operands.reshape(-1, 16, 4).astype(np.int64)

    def dot(*pairs: tuple[int, int]) -> np.ndarray:
        return sum((rows[i] * rows[j]).sum(axis=1) for i, j in pairs)

    limits.compiled(limits.wide_dots, "generic")(operands.ctypes.data, 1, out.ctypes.data)
    assert np.array_equal(out, dot(*((i, j) for i in range(3) for j in range(3, 7))))
    limits.compiled(limits.narrow_dots, "generic")(operands.ctypes.data, 1, out.ctypes.data)
    turns = ((at + i, at + j) for at in (0, 2, 4) for i in (0, 1) for j in (2, 3))
    assert np.array_equal(out, dot(*turns))


def test_tiles_compile_wherever_they_could_run() -> None:
    with_tiles = [level for level in levels.LEVELS.values() if level.tiles]
    assert with_tiles
    for level in with_tiles:
        assert b"tiles" in object_code("tiles", limits.tiles, level, "x86_64-unknown-linux-gnu")


# --- the matrix ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def words(folder: Path) -> list[str]:
    options = "--quick --shapes tiny --types q8_0 --runtimes edgellama onnx --threads 2 --levels"
    files = ["--folder", str(folder / "files"), "--json", str(folder / "matrix.json")]
    return [*options.split(), "generic", *files]


@pytest.fixture(scope="module")
def document(folder: Path) -> dict:
    assert matrix.main(words(folder)) == 0
    return json.loads((folder / "matrix.json").read_text())


def test_matrix_measures_everything(document: dict) -> None:
    cell = document["files"]["tiny Q8_0"]
    own, forced = cell["subjects"]["edgellama"], cell["subjects"]["edgellama (generic)"]
    for figures in (own, forced):
        for figure in ("prefill", "decode", "share_of_read", "share_of_dots"):
            assert 0 < figures[figure]["low"] <= figures[figure]["high"]
        assert set(figures["batch"]) == {"2", "4", "8"}
    assert own["first_token_seconds"]["median"] > own["load_seconds"]["median"] > 0
    assert forced["device"]["isa"] == "generic" != own["device"]["isa"]
    assert cell["ratios"]["edgellama (generic)"]["decode"]["median"] > 0
    rate = own["decode"]["low"] * cell["cost"]["read_bytes"] / 1e9
    assert own["decode_gb_per_s"]["low"] == pytest.approx(rate)


def test_matrix_knows_what_a_token_costs(document: dict) -> None:
    cost = document["files"]["tiny Q8_0"]["cost"]
    per_layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert cost["token_operations"] == 2 * 2 * per_layer
    assert cost["head_operations"] == 2 * 512 * 256
    norms = 5 * 256 * 4
    assert cost["read_bytes"] == (2 * per_layer + 512 * 256) * 34 // 32 + norms


def test_matrix_scales(document: dict) -> None:
    threads = document["by_threads"]["tiny Q8_0"]["subjects"]
    assert {"edgellama 1", "edgellama 2"} <= set(threads)
    context = document["by_context"]["tiny Q8_0"]
    assert context["positions"] == [0, 512]
    decode = context["subjects"]["edgellama q8_0"]
    assert set(decode["decode"]) == {"0", "512"}
    assert decode["share_of_empty"]["0"]["median"] == 1


def test_matrix_resumes(document: dict, folder: Path) -> None:
    """Cells that are there stay as they are; one that failed is measured again."""
    partial = json.loads(json.dumps(document))
    partial["by_context"] = {}
    partial["by_threads"]["tiny Q8_0"] = {"model": "tiny", "type": "Q8_0", "error": "a reason"}
    (folder / "matrix.json").write_text(json.dumps(partial))
    assert matrix.main([*words(folder), "--resume"]) == 0
    again = json.loads((folder / "matrix.json").read_text())
    assert again["files"] == document["files"]
    assert "subjects" in again["by_threads"]["tiny Q8_0"] and again["by_context"]
    (folder / "matrix.json").write_text(json.dumps(document))


def test_failed_cell_leaves_the_others(tmp_path: Path) -> None:
    absent = ["--quick", "--model", str(tmp_path / "absent.gguf"), "--parts", "files"]
    assert matrix.main([*absent, "--json", str(tmp_path / "m.json"), "--levels"]) == 0
    text = report.markdown(json.loads((tmp_path / "m.json").read_text()))
    assert "- absent, files: not measured: " in text


def test_report(document: dict, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["--table", str(folder / "matrix.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| tiny ")]
    assert len(rows) >= 3 * 2 + 2 + 2  # three tables of files, threads, context
    assert any(line.startswith("| model") and "first token, ms" in line for line in lines)
    if "unavailable" in document["files"]["tiny Q8_0"]["subjects"]["onnx"]:
        assert any(line.startswith("- onnx") and "not available: " in line for line in lines)


def test_plot(document: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        plot.draw(document, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(start)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"edgellama\[bench\]"):
        plot.draw({}, tmp_path / "plot.png")


# --- children -----------------------------------------------------------------------------------


def test_subject_says_why_it_cannot(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match="absent"),
        Subject(Spec(tmp_path / "absent", "edgellama", 1)),
    ):
        pass


def test_subject_that_dies_is_told(document: dict, folder: Path) -> None:
    (path,) = (folder / "files").glob("tiny-Q8_0*.gguf")
    with (
        Subject(Spec(path, "edgellama", 1, 64)) as subject,
        pytest.raises(Unavailable, match="KeyError: 'no such action'"),
    ):
        subject.ask("no such action")


@pytest.mark.parametrize("script", ["matrix.py", "limits.py", "synthetic.py"])
def test_scripts_start(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "usage:" in done.stdout
