"""The benchmarks of conversions on tiny models: what they measure, continue and show.

How large a figure is, no test says.
"""

import json
import sys
from pathlib import Path
from typing import Any

import convert_speed
import numpy as np
import peer_quantize
import pytest
import quality
import quality_report
import synthetic
import synthetic_checkpoint
from tiny import tiny_config, write_tiny

from edgellama.gguf import open_gguf
from edgellama.quantize import quantize
from edgellama.quantize.source import open_source

WORDS = "the cat and the dog sat on a mat in the rain; " * 8


def command(monkeypatch: pytest.MonkeyPatch, script: Any, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    script.main()


def test_quality_is_measured_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "tiny.gguf", tiny_config(dim=256, n_heads=16))
    (tmp_path / "text.txt").write_text(WORDS)
    (tmp_path / "calm.txt").write_text(WORDS[::-1])
    words = [source, "--folder", tmp_path, "--json", tmp_path / "q.json", "--threads", "1"]
    words += ["--text", tmp_path / "text.txt", "--calibrate", tmp_path / "calm.txt"]
    words += ["--context", "32", "--chunks", "3", "--calibration-chunks", "3"]
    command(monkeypatch, quality, *words, "--types", "Q8_0", "--weighted")
    first = json.loads((tmp_path / "q.json").read_text())
    said = capsys.readouterr().out
    assert list(first["types"]) == ["Q8_0"] and "| Q8_0 | " in said
    command(monkeypatch, quality, *words, "--types", "Q8_0", "--weighted", "Q4_0")
    both = json.loads((tmp_path / "q.json").read_text())
    assert list(both["types"]) == ["Q8_0", "Q4_0 with importance"]
    assert both["types"]["Q8_0"] == first["types"]["Q8_0"]
    row = both["types"]["Q4_0 with importance"]["edgellama"]
    assert row["type"] == "Q4_0" and row["quality"]["chunks"] == 3
    if peer_quantize.available():
        assert all(by["llama.cpp"]["same_tensors"] for by in both["types"].values())
    with pytest.raises(SystemExit, match="of another chunks"):
        command(monkeypatch, quality, *words, "--chunks", "2", "--types", "Q8_0")


def test_the_texts_are_two() -> None:
    measured, calibrated = quality.own_texts()
    assert len(measured) > 100_000 < len(calibrated)
    assert set(measured.split("\n\n")).isdisjoint(calibrated.split("\n\n"))


def document(**theirs: Any) -> dict[str, Any]:
    names = ("perplexity", "base_perplexity", "kl_mean", "kl_median", "kl_p99", "same_top")
    figures = {name: {"value": 0.25, "error": 0.0625} for name in (*names, "delta_p_rms")}
    measured = {"context": 512, "chunks": 6, "figures": figures | {"tokens": 1530}}
    row = {"bytes": 1_500_000, "bits_per_weight": 4.5, "quality": measured}
    return {"source": "a", "text": "words", "types": {"Q4_0": {"edgellama": row, **theirs}}}


def test_table_of_qualities() -> None:
    alone = quality_report.markdown(document())
    cells = ["Q4_0", "edgellama", "1.5", "4.50", "0.25 ± 0.06"]
    assert alone.splitlines()[-1].startswith("| " + " | ".join(cells))
    same = quality_report.markdown(document(**{"llama.cpp": {"same_tensors": True}}))
    assert same.splitlines()[-1].startswith("| Q4_0 | both | ")
    other = document()["types"]["Q4_0"]["edgellama"] | {"bytes": 2_500_000}
    two = quality_report.markdown(document(**{"llama.cpp": other})).splitlines()[-2:]
    assert [line.split(" | ")[1:3] for line in two] == [["edgellama", "1.5"], ["llama.cpp", "2.5"]]


def test_plot_of_qualities(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    for name in ("a.svg", "b.svg"):
        quality_report.draw(document(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"Q4_0" in (tmp_path / "a.svg").read_bytes()


def test_checkpoint_is_the_model_of_the_same_shape(tmp_path: Path) -> None:
    """In several shards; its float16 weights are those of the GGUF file of the shape."""
    folder = synthetic_checkpoint.write_checkpoint(tmp_path / "folder", "tiny", shard_bytes=500_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    gguf = synthetic.write(tmp_path / "model.gguf", "tiny", "F16")
    with open_source(folder) as ours, open_source(gguf) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        for name, tensor in ours.tensors.items():
            assert (tensor.read() == theirs.tensors[name].read()).all()
    quantize(folder, tmp_path / "out.gguf", "Q8_0")


def test_conversions_are_timed_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "tiny", "--folder", tmp_path, "--rounds", "2", "--threads", "1"]
    command(monkeypatch, convert_speed, *words, "--json", tmp_path / "times.json", "--clean")
    found = json.loads((tmp_path / "times.json").read_text())
    assert found["same_tensors"] in (True, None)
    rounds = found["rounds"]
    assert len(rounds) == (3 if peer_quantize.available() else 2)
    assert all(one["seconds"] > 0 for name in rounds for one in rounds[name])
    assert "| edgellama, no certificate | " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


def test_the_peer_takes_importance(tmp_path: Path) -> None:
    if not peer_quantize.available():
        pytest.skip("needs the extra llamacpp")
    source = synthetic.write(tmp_path / "model.gguf", "tiny", "F16")
    with open_gguf(source) as file:
        shapes = {n: t.shape for n, t in file.tensors.items() if n.startswith("blk.1.ffn")}
    rng = np.random.default_rng(0)
    weights = {n: rng.random(s[1], np.float32) for n, s in shapes.items() if len(s) == 2}
    ours, theirs, plain = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "plain"))
    quantize(source, ours, "Q4_0", weights, certificate="none")
    peer_quantize.peer_quantize(source, theirs, 2, threads=1, importance=weights)
    peer_quantize.peer_quantize(source, plain, 2, threads=1)
    assert quality.tensors(ours) == quality.tensors(theirs) != quality.tensors(plain)


@pytest.mark.parametrize("script", [quality, convert_speed, synthetic_checkpoint])
def test_scripts_explain_themselves(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, script, "--help")
    assert "--" in capsys.readouterr().out
