"""Conversions killed at random moments: is the old output or the new one there, whole?

    python benchmarks/kills.py MODEL.gguf [TIMES]

Converts MODEL to F16 over an existing output until TIMES (200) conversions were killed (SIGKILL) at
random moments; some "ended" before. "damaged" must stay 0; "left" is the most temporary files that
ever lay about at once, "litter" those that outlived the next run.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from killing import kill_many


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    times = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as folder:
        found = kill_many(Path(sys.argv[1]).resolve(), Path(folder), "F16", times)
    names = ("killed", "ended", "old", "new", "damaged", "left", "litter")
    print(", ".join(f"{name} {found[name]}" for name in names))


if __name__ == "__main__":
    main()
