"""`diff` names the first value where two runtimes part: clean where they agree, right where not."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, tiny_weights, write_tiny

import edgellama
from edgellama.cli.main import run
from edgellama.diff import EXACT, ROUNDED, RUNTIMES, _compared, _options, diff
from edgellama.graph import decoder

CONFIG = tiny_config(n_layers=3)
KINDS = ("F16", "Q4_0", "Q8_0")
TEXT = "the and a then in on"


def needs_onnx() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `onnx`)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    for kind in (*KINDS, "F32"):
        write_tiny(folder / f"{kind}.gguf", CONFIG, kind, seed=2)
    return folder


def injected(folder: Path, kind: str, name: str, scale: float = 1.2) -> Path:
    """The same model, one of whose weights is really another."""
    weights = {name: tiny_weights(CONFIG, 2)[name] * np.float32(scale)}
    return write_tiny(folder / f"{kind}-{name}.gguf", CONFIG, kind, seed=2, weights=weights)


# --- where they agree ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cpu_and_onnx_agree(models: Path, kind: str) -> None:
    needs_onnx()
    found = diff(models / f"{kind}.gguf", text=TEXT)
    assert (found.a, found.b) == ("cpu", "onnx")
    assert found.first is None and found.tolerance <= 5e-3
    assert {node.stage for node in found.nodes} == {"unfused", "fused"}
    unfused = [node.name for node in found.nodes if node.stage == "unfused"]
    hidden = ("rope", "attn_output", "ffn_down")  # what the cpu runtime adds or keeps at once
    names = [node.output for node in decoder(CONFIG).nodes]
    assert unfused == [name for name in names if not name.endswith(hidden)]
    assert set(found.unseen) == {name for name in names if name.endswith(hidden)}


def test_onnx_shows_every_value(models: Path) -> None:
    """Unfused all of them; fused all but what is folded into its neighbour."""
    needs_onnx()
    found = diff(models / "Q4_0.gguf", a="reference", text=TEXT)
    names = [node.output for node in decoder(CONFIG).nodes]
    assert found.first is None and found.unseen == () and found.tolerance == EXACT
    unfused = [node.name for node in found.nodes if node.stage == "unfused"]
    fused = [node.name for node in found.nodes if node.stage == "fused"]
    assert unfused == names
    gone = ("attn_q", "attn_k", "attn_v", "rope")
    assert fused == [name for name in names if not name.endswith(gone)]


def test_reference_and_cpu_need_no_onnx(models: Path) -> None:
    found = diff(models / "Q8_0.gguf", a="reference", b="cpu", text=TEXT)
    assert found.first is None and len(found.nodes) == 1 + 3 * 11 + 3
    assert found.tolerance == ROUNDED["cpu"]
    exact = diff(models / "F32.gguf", a="reference", b="cpu", text=TEXT)
    assert exact.first is None and exact.tolerance == EXACT


# --- where they part -----------------------------------------------------------------------------

PLACES = [
    ("blk.1.ffn_up", "blk.1.ffn_up"),
    ("blk.2.attn_v", "blk.2.attn_v"),
    ("blk.0.attn_output", "blk.0.attn_residual"),  # the cpu runtime adds it at once
    ("blk.1.attn_norm", "blk.1.attn_norm"),
    ("output_norm", "output_norm"),
    ("token_embd", "token_embd"),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_an_error_is_reported_where_it_is(
    models: Path, tmp_path: Path, name: str, place: str
) -> None:
    needs_onnx()
    for kind in ("Q4_0", "F16"):
        other = injected(tmp_path, kind, f"{name}.weight")
        found = diff(models / f"{kind}.gguf", other, text=TEXT)
        assert found.first is not None and found.first.stage == "unfused"
        assert found.first.name == place


@pytest.mark.parametrize("name", ["blk.1.attn_k", "blk.2.attn_output", "blk.0.ffn_down"])
def test_onnx_alone_tells_every_place(models: Path, tmp_path: Path, name: str) -> None:
    """A change of one part in a thousand is seen where arithmetic is exact."""
    needs_onnx()
    other = injected(tmp_path, "F32", f"{name}.weight", 1.001)
    found = diff(models / "F32.gguf", other, a="reference", text=TEXT)
    assert found.first is not None and found.first.name == name
    assert found.before is not None and found.before.nmse <= EXACT


def test_infinity_is_where_it_begins(models: Path, tmp_path: Path) -> None:
    other = injected(tmp_path, "F32", "blk.1.ffn_gate.weight", 1e38)
    found = diff(models / "F32.gguf", other, a="reference", b="cpu", text=TEXT)
    assert found.first is not None and found.first.name == "blk.1.ffn_gate"


# --- devices -------------------------------------------------------------------------------------


def needs_no_cuda() -> None:
    needs_onnx()
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")


def half(path: Path) -> edgellama.Model:
    """A model with the graph that CUDA runs, on the CPU provider."""
    from edgellama.runtimes.onnx_lowering import Manner
    from edgellama.runtimes.ort import Ort

    model = edgellama.load(path, "onnx", context=64, threads=1)
    own: Any = model._runtime
    manner = Manner("float16", accuracy=0, candidates=8)
    model._runtime = Ort(own.folder, own.graph, own.options, manner)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_agrees_and_an_error_in_it_is_found(
    models: Path, tmp_path: Path, kind: str
) -> None:
    needs_onnx()
    other = injected(tmp_path, kind, "blk.1.ffn_up.weight")
    allowed = ROUNDED["onnx:cuda"]
    with edgellama.load(models / f"{kind}.gguf", "reference") as exact:
        ids = exact.tokenizer.encode(TEXT, bos=True)
        with half(models / f"{kind}.gguf") as same:
            found = _compared(exact, same, ids, allowed)
        assert found.first is None and {n.stage for n in found.nodes} == {"unfused", "fused"}
        assert max(node.nmse for node in found.nodes) > EXACT  # half precision really ran
        with half(other) as wrong:
            found = _compared(exact, wrong, ids, allowed)
        assert found.first is not None and found.first.name == "blk.1.ffn_up"


def test_the_cpu_may_be_named(models: Path) -> None:
    needs_onnx()
    found = diff(models / "F32.gguf", a="onnx", b="onnx:cpu", text=TEXT)
    assert (found.a, found.b) == ("onnx", "onnx") and found.tolerance == EXACT
    assert found.first is None and max(node.nmse for node in found.nodes) <= EXACT


@pytest.mark.parametrize("pair", [("reference", "onnx:cuda"), ("onnx:cuda", "cpu")])
def test_a_device_that_is_not_there(
    models: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The library's error and its reason, on either side; nothing runs elsewhere instead."""
    needs_no_cuda()
    with pytest.raises(edgellama.DeviceUnavailable, match=r"pip install 'edgellama\[cuda\]'"):
        diff(models / "F32.gguf", a=pair[0], b=pair[1], text=TEXT)
    line = ["diff", str(models / "F32.gguf"), "--a", pair[0], "--b", pair[1]]
    assert run(line) == 1
    out, err = capsys.readouterr()
    assert out == "" and "device = 'cuda': this onnxruntime was built without CUDA" in err


def test_cuda_takes_what_it_is_asked_for() -> None:
    """Levels of accuracy and float32 in the cache are the CPU's: CUDA refuses them."""
    needs_onnx()
    from edgellama.runtimes.base import Options
    from edgellama.runtimes.onnx_containers import EIGHT_BIT
    from edgellama.runtimes.onnx_device import CUDA, Device

    asked = _options("onnx:cuda", accuracy=0)
    assert asked.pop("runtime") == "onnx" and asked["device"] == "cuda"
    manner = Device("cuda", CUDA, EIGHT_BIT).manner(Options(context=64, threads=1, **asked))
    assert manner.dtype == "float16"
    for name in RUNTIMES[:-1]:
        assert _options(name, accuracy=0)["device"] in ("auto", "cpu")


# --- refusals, and the command -------------------------------------------------------------------


def test_models_of_other_shape_are_refused(models: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", tiny_config(n_layers=1))
    with pytest.raises(edgellama.ParameterError, match="of different shape"):
        diff(models / "F32.gguf", other, a="reference", b="cpu")


def test_runtimes_that_show_nothing_are_refused(models: Path) -> None:
    with pytest.raises(edgellama.ParameterError, match=r"a = 'llama\.cpp'; allowed: cpu, onnx"):
        diff(models / "F32.gguf", a="llama.cpp")


def test_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    pair = ["--a", "reference", "--b", "cpu", "--text", str(text)]
    assert run(["diff", str(models / "F32.gguf"), *pair]) == 0
    assert "reference and cpu agree in 37 values" in capsys.readouterr().out
    other = str(injected(tmp_path, "F32", "blk.1.ffn_up.weight"))
    assert run(["diff", str(models / "F32.gguf"), other, *pair]) == 1
    told = "F32.gguf (reference) and F32-blk.1.ffn_up.weight.gguf (cpu) part at blk.1.ffn_up (unf"
    assert told in capsys.readouterr().out
    namesake = tmp_path / "F32.gguf"
    namesake.write_bytes((models / "F32.gguf").read_bytes())
    assert run(["diff", str(models / "F32.gguf"), str(namesake), *pair]) == 0
    told = f"{models / 'F32.gguf'} (reference) and {namesake} (cpu) agree in 37 values"
    assert told in capsys.readouterr().out
    assert run(["diff", str(models / "F32.gguf"), other, *pair, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["agree"] is False and document["first"]["name"] == "blk.1.ffn_up"
    assert (document["path"], document["other"]) == (str(models / "F32.gguf"), other)
    assert document["nodes"][0] == {"name": "token_embd", "stage": "unfused", "nmse": 0.0}
    for wrong in ("tpu", "cpu:cuda", "onnx:"):
        assert run(["diff", str(models / "F32.gguf"), "--a", wrong]) == 2
        said = capsys.readouterr().err
        assert f"a = '{wrong}'; allowed: cpu, onnx, reference, onnx:cpu, onnx:cuda" in said


@pytest.mark.parametrize(
    ("name", "content", "status", "said"),
    [
        ("latin.txt", b"caf\xe9", 1, "latin.txt: is not UTF-8 text: byte 233 at 3"),
        ("missing.txt", None, 1, f"missing.txt: cannot be read: {os.strerror(2)}"),
        (os.devnull, None, 1, "this is not a regular file"),
    ],
)
def test_a_text_that_cannot_be_read(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    status: int,
    said: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = ["--text", str(tmp_path / name), "--a", "reference", "--b", "cpu"]
    assert run(["diff", str(models / "F32.gguf"), *text]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_folder_is_for_the_side_of_onnx(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_onnx()
    file, folder = str(models / "Q4_0.gguf"), str(tmp_path / "Q4_0.onnx")
    assert run(["quantize", file, folder, "--type", "Q4_0", "--certificate", "none"]) == 0
    capsys.readouterr()
    for words in ([file, folder], [folder, file, "--a", "onnx", "--b", "cpu"]):
        assert run(["diff", *words]) == 0
        assert "Q4_0.onnx (onnx)" in capsys.readouterr().out
    assert run(["diff", folder]) != 0
    assert "runtime = 'cpu' runs .gguf files" in capsys.readouterr().err
