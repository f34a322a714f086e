"""What ships: the wheel holds the tree's modules and nothing else, and works installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import edgellama

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {  # root folder -> where its modules go in the wheel
    "edgellama": "edgellama",
    "quantize": "edgellama/quantize",
    "runtimes": "edgellama/runtimes",
    "cli": "edgellama/cli",
}
NOT_SOURCE = ("__pycache__", "*.egg-info")


def tree_modules(root: Path) -> set[str]:
    """Every module at any depth below the four folders, by its name in a wheel."""
    return {
        f"{target}/{path.relative_to(root / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (root / folder).rglob("*.py")
        if not path.parent.is_symlink()  # a developer's own links for an editor
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it would be checked out: nothing built lies in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "tests", "docs", "benchmarks"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns(*NOT_SOURCE)
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from it."""
    pytest.importorskip("build", reason="needs the package `build`")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_wheel_holds_exactly_the_trees_modules(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if name.endswith(".py")} == tree_modules(source)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"edgellama", f"edgellama-{edgellama.__version__}.dist-info"}
    assert "edgellama/py.typed" in names


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"edgellama-{edgellama.__version__}-py3-none-any.whl"


def test_source_distribution_holds_the_tests(source: Path, built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tests = {f"tests/{path.name}" for path in (source / "tests").glob("*.py")}
    assert tests <= names
    assert {"tests/conftest.py", "benchmarks/compare.py", "Makefile", "LICENSE"} <= names


def test_installed_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True, timeout=300)
    program = (
        "import sys, edgellama.cli.main, edgellama.quantize, edgellama.runtimes\n"
        "print(edgellama.__file__)\n"
        "print([name for name in ('quantize', 'runtimes', 'cli') if name in sys.modules])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout

    where, bare = python("-c", program).splitlines()
    assert Path(where).is_relative_to(site)
    assert bare == "[]"
    assert python("-m", "edgellama", "--version") == f"edgellama {edgellama.__version__}\n"


def test_no_module_is_loaded_under_its_bare_folder_name() -> None:
    assert not {"quantize", "runtimes", "cli"} & set(sys.modules)
