"""What `edgellama info` tells about a file beyond its config."""

import json
from pathlib import Path

import pytest
from tiny import tiny_config, write_tiny

from edgellama.cli.main import run
from edgellama.config import Rope
from edgellama.estimate import estimate


def document(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run(["info", str(path), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = Rope(16, scaling="linear", factor=4.0)
    config = tiny_config(context_length=4096, rope=rope, sliding_window=512)
    path = write_tiny(tmp_path / "m.gguf", config, {"blk.": "Q8_0"})
    found = document(path, capsys)
    said = estimate(path, context=1000).memory
    assert found["memory"] == {
        "runtime": "cpu",
        "fixed": pytest.approx(sum(said.values()) - said["kv_cache"], rel=0.01),
        "kv_per_1000_tokens": 2 * 2 * 32 * 2 * 1000,  # keys and values, layers, numbers, bytes
    }
    assert found["vocabulary"] == {
        **{"kind": "llama", "pre": None, "tokens": 288, "special": 3},
        **{"bos": "<s>", "add_bos": True, "eos": ["</s>"]},
    }
    bytes_by_type, certificate = found["bytes_by_type"], found["certificate"]
    assert isinstance(bytes_by_type, dict) and certificate is False
    assert bytes_by_type["Q8_0"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96) * 34 // 32
    assert run(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "each sees the last 512, stretched 4 times, linear" in out
    assert "begin '<s>', put before a text; end '</s>'; 3 special" in out
    assert "certificate none" in out and "in the cpu runtime" in out


def test_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = write_tiny(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    assert run(["quantize", str(source), str(path), "--type", "Q8_0", "--quiet"]) == 0
    assert document(path, capsys)["certificate"] is True


def test_a_vocabulary_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path / "m.gguf", metadata={"tokenizer.ggml.bos_token_id": 288})
    found = document(path, capsys)
    assert "bos_token_id" in str(found["problem"])
    assert found["memory"] is None and found["parameters"] and found["config"] is None
