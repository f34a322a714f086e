"""Sources of the converter: GGUF files, and how rows are arranged."""

import shutil

import numpy as np
import pytest
from tiny import tiny_config, tiny_weights, write_tiny

from edgellama.errors import EdgeLlamaError, ModelFormatError
from edgellama.quantize.source import SourceTensor, open_source


def test_gguf_gives_its_tensors_by_name_and_row(tmp_path):
    path = write_tiny(tmp_path / "a.gguf", types={"": "F32", "blk.0": "F16", "blk.1": "Q8_0"})
    weights = tiny_weights(tiny_config())
    with open_source(path) as source:
        assert source.kind == "gguf" and source.rope_convention == "interleaved"
        assert source.config.n_parameters == tiny_config().n_parameters
        assert list(source.tensors) == list(weights)
        for name, values in weights.items():
            tensor = source.tensors[name]
            assert tensor.shape == values.shape and tensor.row_step == 1
            tolerance = {"F32": 0, "F16": 1e-3, "Q8_0": 0.02}[tensor.type]
            np.testing.assert_allclose(tensor.read(), values, atol=tolerance, rtol=tolerance)
            np.testing.assert_array_equal(tensor.read(3, 7), tensor.read()[3:7])
            np.testing.assert_array_equal(tensor.read_bits(3, 7), tensor.read_bits()[3:7])
        assert source.tensors["token_embd.weight"].read_bits().dtype == np.float32
        assert source.tensors["blk.0.ffn_up.weight"].read_bits().dtype == np.float16
        assert source.tensors["blk.1.ffn_up.weight"].read_bits().shape == (96, 64 // 32 * 34)
        assert any("starts from quantized weights (Q8_0)" in note for note in source.notes)


def test_gguf_keeps_its_metadata_but_what_describes_the_file(tmp_path):
    extra = {"general.file_type": 0, "general.quantization_version": 2, "general.url": "here"}
    with open_source(write_tiny(tmp_path / "a.gguf", metadata=extra)) as source:
        assert source.metadata["general.url"] == "here"
        assert source.metadata["llama.block_count"] == 2
        assert source.kinds["llama.block_count"] == "u32"
        assert len(source.metadata["tokenizer.ggml.tokens"]) == 288
        assert "general.file_type" not in source.metadata
        assert "general.quantization_version" not in source.metadata
        assert not any("quantized" in note for note in source.notes)


def test_gguf_keeps_rope_factors_and_a_tied_head(tmp_path):
    config = tiny_config(tied_output=True)
    path = write_tiny(tmp_path / "a.gguf", config, rope_factors=[1.0] * 4 + [8.0] * 4)
    with open_source(path) as source:
        assert source.tensors["rope_freqs.weight"].read().tolist() == [1.0] * 4 + [8.0] * 4
        assert source.config.tied_output and "output.weight" not in source.tensors


def test_half_split_rows_become_interleaved_pairs():
    rows = np.arange(16).reshape(16, 1)
    tensor = SourceTensor("q", (16, 1), "F32", lambda a, b: rows[a:b], lambda a, b: rows[a:b], 8)
    assert tensor.arrange(tensor.read())[:, 0].tolist() == [
        *(0, 4, 1, 5, 2, 6, 3, 7),
        *(8, 12, 9, 13, 10, 14, 11, 15),
    ]
    assert tensor.arrange(tensor.read(8, 16))[:, 0].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]


def test_a_folder_of_gguf_files_is_refused_with_the_file_to_give(tmp_path):
    write_tiny(tmp_path / "model.gguf")
    with pytest.raises(ModelFormatError, match=r"Give the file itself, model\.gguf"):
        open_source(tmp_path)


def test_a_missing_source_is_an_error_of_ours(tmp_path):
    with pytest.raises(EdgeLlamaError):
        open_source(tmp_path / "none")


def test_closing_lets_the_file_go(tmp_path):
    path = write_tiny(tmp_path / "a.gguf")
    with open_source(path):
        pass
    shutil.rmtree(tmp_path)  # Windows refuses while a file is open
