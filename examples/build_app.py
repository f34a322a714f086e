"""Freeze the chat window into an app that needs no Python, no compiler and no network.

    pip install pyinstaller
    python examples/build_app.py [MODEL] [--into DIR]

compiles the kernels that the model needs for every processor of this kind, and has PyInstaller
gather program, model and kernels in DIR/edgellama-chat. Build with the installation that is to be
shipped: kernels belong to a release of edgellama and of llvmlite.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import PyInstaller.__main__

import edgellama
from edgellama.paths import DEFAULT_MODEL, model_path
from edgellama.runtimes.warmup import warm_up

HERE = Path(__file__).parent
LEFT_OUT = (  # the compiler, other runtimes, and what others would use if it is there
    *("numba", "llama_cpp", "onnxruntime"),
    *("charset_normalizer", "yaml"),
)


def build(model: str, into: Path, levels: Sequence[str] = ()) -> Path:
    """Build the app; returns its folder."""
    work = into / "work"
    kernels = work / "kernels"
    warm_up([model], into=kernels, levels_wanted=levels)
    names = [name for name in edgellama.__all__ if not name.startswith("_")]
    homes = {getattr(edgellama, name).__module__ for name in names}  # imported when first used
    arguments = [
        str(HERE / "frozen_app.py"),
        "--name=edgellama-chat",
        "--noconfirm",
        "--log-level=WARN",
        f"--paths={HERE}",
        f"--distpath={into}",
        f"--workpath={work}",
        f"--specpath={work}",
        f"--add-data={kernels}:kernels",
        f"--add-data={model_path(model)}:model",
        *(f"--hidden-import={name}" for name in sorted(homes)),
        *(f"--exclude-module={name}" for name in LEFT_OUT),
    ]
    PyInstaller.__main__.run(arguments)
    return into / "edgellama-chat"


def main() -> None:
    parser = argparse.ArgumentParser(description="Freeze the chat window with its model.")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--into", type=Path, default=Path("dist"), help="folder of the app")
    chosen = parser.parse_args()
    app = build(chosen.model, chosen.into.absolute())
    size = sum(file.stat().st_size for file in app.rglob("*") if file.is_file())
    print(f"{app}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
