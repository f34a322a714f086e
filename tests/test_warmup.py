"""Kernels compiled ahead of time: a process that finds them needs no compiler and no sources."""

import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny

from edgellama import ParameterError
from edgellama.cli.main import run
from edgellama.ggml import RUNNABLE
from edgellama.runtimes import kernel_cache
from edgellama.runtimes.levels import LEVELS, choose
from edgellama.runtimes.warmup import kernels_for, types_of_file, warm_up, weight_types

HANG = 120.0
ROOT = Path(__file__).parent.parent
ANSWER = """
import sys
sys.modules["numba"] = None  # not installed
import edgellama
model = edgellama.load(sys.argv[1], threads=1)
logits = model.session().forward([1, 2, 3])
print(edgellama.__file__, model.info.warnings, float(logits[0]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def shipped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of one model and of this machine's level."""
    folder = tmp_path_factory.mktemp("app") / "kernels"
    warm_up([model], into=folder, levels_wanted=[choose()[0].name])
    return folder


def answer(
    model: Path, cache: Path, kernels: Path | None, **more: str
) -> "subprocess.CompletedProcess[str]":
    """What a fresh process with an empty cache says, in which Numba cannot be imported."""
    environment = os.environ | {"EDGELLAMA_CACHE": str(cache)} | more
    environment.pop("EDGELLAMA_KERNELS", None)
    if kernels is not None:
        environment["EDGELLAMA_KERNELS"] = str(kernels)
    command = [sys.executable, "-c", ANSWER, str(model)]
    return subprocess.run(
        command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=HANG
    )


def test_with_the_folder_nothing_is_compiled(model: Path, shipped: Path, tmp_path: Path) -> None:
    for file in shipped.iterdir():
        file.chmod(0o444)
    shipped.chmod(0o555)
    before = {file.name: file.read_bytes() for file in shipped.iterdir()}
    done = answer(model, tmp_path / "cache", shipped)
    assert done.returncode == 0, done.stderr
    assert "[]" in done.stdout
    assert not (tmp_path / "cache").exists()  # not even that was needed
    assert {file.name: file.read_bytes() for file in shipped.iterdir()} == before


def test_without_it_the_missing_compiler_is_named(model: Path, tmp_path: Path) -> None:
    done = answer(model, tmp_path / "cache", None)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "DeviceUnavailable" in last and "numba" in last and "warmup --into DIR" in last


def test_an_app_without_sources(model: Path, shipped: Path, tmp_path: Path) -> None:
    """A frozen app: nothing but byte code, so the folder says which sources it is for."""
    app = tmp_path / "app"
    shutil.copytree(ROOT / "edgellama", app / "edgellama", ignore=shutil.ignore_patterns("__*__"))
    for name in ("quantize", "runtimes"):
        shutil.copytree(ROOT / name, app / "edgellama" / name)
    for name in ("edgellama", "edgellama/quantize", "edgellama/runtimes"):
        shutil.copy(ROOT / name.removeprefix("edgellama/") / "__init__.py", app / name)
    compileall.compile_dir(app, quiet=2, legacy=True)
    for source in app.rglob("*.py"):
        source.unlink()
    done = answer(model, tmp_path / "cache", shipped, PYTHONPATH=str(app))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(app))


@pytest.mark.parametrize("damage", ["flipped", "renamed", "gone"])
def test_a_damaged_file_is_passed_over(
    damage: str, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shipped, tmp_path / "kernels")
    folder.chmod(0o755)
    level = choose()[0]
    norm, rope = (next(folder.glob(f"edgellama_{name}-*.o")) for name in ("norm", "rope"))
    data = norm.read_bytes()
    norm.chmod(0o644)
    if damage == "flipped":
        norm.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "renamed":
        norm.write_bytes(rope.read_bytes())
    else:
        norm.unlink()
    monkeypatch.setattr(kernel_cache.shipped_kernels, "folder", lambda: folder)
    monkeypatch.setattr(kernel_cache, "_folder", lambda: None)
    assert list(kernel_cache.kept(["norm", "rope"], level)) == ["rope"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_folder_anybody_may_write_to_is_not_used(
    model: Path, shipped: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shipped, tmp_path / "kernels")
    folder.chmod(0o777)
    done = answer(model, tmp_path / "cache", folder)
    assert done.returncode == 1 and "DeviceUnavailable" in done.stderr


def test_another_release_is_removed(model: Path, shipped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shipped, tmp_path / "kernels")
    folder.chmod(0o755)
    (folder / "edgellama_norm-avx2-0123456789abcdef.o").write_bytes(b"old")
    (folder / "readme.txt").write_bytes(b"the app's own")
    for file in folder.iterdir():
        file.chmod(0o644)
    warmth = warm_up([model], into=folder, levels_wanted=[choose()[0].name])
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in shipped.iterdir()} | {"readme.txt"}
    assert warmth.compiled == 0 and warmth.kernels == len(names) - 2  # readme and sources


# --- which kernels --------------------------------------------------------------------------------


def test_types() -> None:
    assert weight_types([], []) == weight_types([], ["all"]) == RUNNABLE
    assert types_of_file("q8_0") == {"Q8_0", "Q6_K"}
    assert types_of_file("F16") == {"F16"}
    mixed = types_of_file("Q4_K")
    assert mixed >= {"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"} and "Q2_K" not in mixed
    with pytest.raises(ParameterError):
        types_of_file("Q9_9")


def test_types_of_a_model(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", types={"token_embd": "Q8_0", "blk.": "F16"})
    assert weight_types([path], []) == ("F32", "F16", "Q8_0")


def test_only_a_level_with_tiles_has_kernels_for_them() -> None:
    amx, avx2 = (kernels_for(["Q4_0"], LEVELS[name]) for name in ("amx", "avx2"))
    assert set(amx) - set(avx2) == {"tiles:Q4_0"}
    assert {"lead", "attention:q8_0", "linear:Q4_0", "fine:Q4_0", "embed:Q4_0"} <= set(avx2)


# --- the command ----------------------------------------------------------------------------------


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    level = choose()[0].name
    into = tmp_path / "kernels"
    arguments = ["warmup", str(model), "--into", str(into), "--levels", level.upper()]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["levels"] == [level] and document["types"] == ["F32"]
    assert document["kernels"] == len(list(into.glob("*.o")))
    assert document["folder"] == str(into)

    assert run(["warmup", str(model)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "all of them were there" in err

    assert run(["warmup", "--levels", "sse9"]) == 2
    assert "avx2" in capsys.readouterr().err or level == "neon"
    assert run(["warmup", "--types", "Q9_9"]) == 2
    assert run(["warmup", "nowhere.gguf"]) == 1
    (tmp_path / "file").write_bytes(b"")
    assert run([*arguments[:3], str(tmp_path / "file")]) == 1
