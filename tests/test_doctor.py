"""What `doctor` finds: on this machine as it is, and with things put in its way."""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tiny import write_tiny

import edgellama
from edgellama import doctor
from edgellama.cli.main import run
from edgellama.runtimes import kernel_cache, levels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def problems() -> dict[str, str]:
    return dict(doctor.examine().problems)


def test_this_machine() -> None:
    found = doctor.examine()
    assert found.versions["edgellama"] == edgellama.__version__
    assert found.versions["numpy"] == metadata.version("numpy")
    assert found.processor["level"] == levels.choose()[0].name
    assert found.processor["levels"] == list(levels.available())
    assert 1 <= found.processor["threads"] <= found.processor["logical"]
    assert found.memory["available"] is None or found.memory["available"] > 0
    assert found.environment["EDGELLAMA_CACHE"] == os.environ["EDGELLAMA_CACHE"]
    assert any("pull" in user for user in found.network["used_by"])


def test_it_changes_nothing_and_connects_to_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    doctor.examine()
    assert not cache.exists()


def test_caches_are_counted(cache: Path) -> None:
    models = cache / "models"
    models.mkdir(parents=True)
    size = write_tiny(models / "own.gguf").stat().st_size
    (models / "org" / "repo").mkdir(parents=True)
    size += write_tiny(models / "org" / "repo" / "file.gguf").stat().st_size
    kernels = cache / "kernels"
    kernels.mkdir()
    level = levels.choose()[0]
    current = kernel_cache._named(kernels, "norm", level)
    assert current is not None
    current.write_bytes(b"code")
    found = doctor.examine()
    assert found.caches["models"]["names"] == ["org/repo/file.gguf", "own"]
    assert found.caches["models"]["bytes"] == size
    assert found.caches["kernels"] | {"path": ""} == {
        **{"path": "", "files": 1, "bytes": 4, "writable": True},
        **{"compiled": 1, "stale": 0, "foreign": [], "shipped": None},
    }
    assert not [problem for problem, _ in found.problems if str(cache) in problem]


def test_what_does_not_belong_there_is_named(cache: Path) -> None:
    kernels = cache / "kernels"
    kernels.mkdir(parents=True)
    for name in ("notes.txt", "edgellama_norm-avx2-0123456789abcdef.o", ".edgellama_x.o.1f.tmp"):
        (kernels / name).write_bytes(b"x")
    (cache / "models").mkdir()
    (cache / "models" / ".m.gguf.00.tmp").write_bytes(b"half")
    said = problems()
    assert any("notes.txt is not edgellama's" in problem for problem in said)
    assert doctor.examine().caches["kernels"]["stale"] == 1  # which is no problem
    assert not any("avx2" in problem for problem in said)
    assert sum("left behind" in problem for problem in said) == 2
    assert all(said.values())  # each says what to do


def test_a_cache_that_cannot_be_used(cache: Path) -> None:
    cache.mkdir()
    (cache / "kernels").write_text("in the way")
    said = problems()
    place = next(problem for problem in said if "kernels" in problem)
    assert "EDGELLAMA_CACHE" in said[place]
    assert (cache / "kernels").read_text() == "in the way"


def test_a_cache_that_is_a_file(cache: Path) -> None:
    cache.write_text("in the way")
    found = doctor.examine()
    said = [problem for problem, _ in found.problems if "cannot be made" in problem]
    assert said == [
        f"{cache / kind} cannot be made: {cache} is no folder" for kind in ("models", "kernels")
    ]
    assert not found.caches["models"]["writable"] and cache.read_text() == "in the way"


@pytest.mark.parametrize(
    ("name", "value", "problem", "advice"),
    [
        ("THREADS", "0", "EDGELLAMA_THREADS is '0': ", "Correct it"),
        ("THREDS", "4", "nothing is set by EDGELLAMA_THREDS", "Did you mean EDGELLAMA_THREADS?"),
        ("QUITE_ANOTHER", "x", "nothing is set by EDGELLAMA_QUITE_ANOTHER", "Unset it"),
        ("RUNTIME", "onx", "EDGELLAMA_RUNTIME is 'onx': ", "Correct it"),
        ("INFILL", "one", "EDGELLAMA_INFILL is 'one': EDGELLAMA_INFILL must be two", "Correct it"),
        ("TEMPERATURE", "-1", "EDGELLAMA_TEMPERATURE is '-1': temperature is -1.0", "Correct it"),
        ("LOGIT_BIAS", "5=1 x", "EDGELLAMA_LOGIT_BIAS is '5=1 x': ", "Correct it"),
        ("TYPE", "Q4_KM", "EDGELLAMA_TYPE is 'Q4_KM': ", "Correct it"),
        ("RAW", "perhaps", "EDGELLAMA_RAW is 'perhaps': ", "Correct it"),
        *((name, "64", "", "") for name in ("MAX_TOKENS", "CONTEXT", "STOP", "CHUNKS", "SEED")),
        *((name, "", "", "") for name in ("THREADS", "ORDER")),
    ],
)
def test_the_environment_is_checked(
    name: str,
    value: str,
    problem: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def about() -> list[dict[str, str]]:
        assert run(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["problems"]
        return [each for each in found if "EDGELLAMA_" in each["problem"]]

    before = about()
    monkeypatch.setenv(f"EDGELLAMA_{name}", value)
    told = [each for each in about() if each not in before]
    assert len(told) == bool(problem)
    for each in told:
        assert each["problem"].startswith(problem) and each["advice"].startswith(advice)


def test_a_level_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLAMA_ISA", "sse9")
    found = doctor.examine()
    assert found.processor["level"] is None and found.processor["levels"]
    assert any("EDGELLAMA_ISA" in problem for problem, _ in found.problems)


PACKAGES = """
import json, sys
sys.path.insert(0, sys.argv[1])
from edgellama.doctor import examine
found = examine()
print(json.dumps([found.onnx, found.problems]))
"""


def other_packages(folder: Path, *names: str, module: str = "") -> list[object]:
    """What is found where these distributions are installed, as far as one can tell."""
    for name in names:
        info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    if names:
        (folder / "onnxruntime").mkdir()
        (folder / "onnxruntime" / "__init__.py").write_text(module)
    command = [sys.executable, "-c", PACKAGES, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


ONNX = """
import os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
def get_version_string():
    return "9.9"
def get_available_providers():
    return ["CPUExecutionProvider"]
"""


def test_two_onnxruntimes_hide_each_other(tmp_path: Path) -> None:
    both = ("onnxruntime", "onnxruntime-gpu")
    onnx, said = other_packages(tmp_path / "site", *both, module=ONNX)
    assert isinstance(onnx, dict) and isinstance(said, list)
    assert onnx["version"] == "9.9" and onnx["providers"] == ["CPUExecutionProvider"]
    assert onnx["telemetry"] == "off before the import" and "without CUDA" in onnx["cuda"]
    advice = next(advice for problem, advice in said if "both installed" in problem)
    assert advice.startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_an_onnxruntime_that_cannot_be_imported(tmp_path: Path) -> None:
    onnx, said = other_packages(
        tmp_path / "site", "onnxruntime", module="raise ImportError('libgone.so.1')"
    )
    assert isinstance(onnx, dict) and isinstance(said, list)
    assert onnx["version"] is None
    assert any("libgone.so.1" in problem for problem, _ in said)


# --- the command ----------------------------------------------------------------------------------


def test_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "kernels").mkdir(parents=True)
    (cache / "kernels" / "notes.txt").write_bytes(b"x")
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        *("versions", "processor", "memory", "caches", "onnx", "network", "environment"),
        "problems",
    }
    assert any("notes.txt" in entry["problem"] for entry in document["problems"])
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    shown = out.split("problems\n")[1]
    assert "notes.txt is not edgellama's" in shown and "move it away" in shown
    assert f"  python               {sys.version.split()[0]}" in out
