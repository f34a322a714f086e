"""Conversions killed at random moments: is the old output or the new one there, whole?

    python benchmarks/kills.py MODEL.gguf [TIMES]

Converts MODEL to F16 over an existing output until TIMES (200) conversions were killed (SIGKILL) at
random moments; some "ended" before. "damaged" must stay 0; "left" is the most temporary files that
ever lay about at once, "litter" those that outlived the next run.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from killing import kill_many


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("times", type=int, nargs="?", default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_many(given.model.resolve(), Path(folder), "F16", given.times)
    names = ("killed", "ended", "old", "new", "damaged", "left", "litter")
    print(", ".join(f"{name} {found[name]}" for name in names))


if __name__ == "__main__":
    main()
