"""Compare the cpu runtime with llama.cpp on a model: a table on stdout, everything as JSON.

    python benchmarks/compare.py MODEL.gguf [--against llama.cpp] [--threads N] [--rounds N]
        [--json FILE]

The same measurement as `edgellama bench`; docs/benchmarks.md tells how to build the peer.
"""

import argparse
import json
from pathlib import Path

from edgellama.cli.bench import document, introduction, table
from edgellama.measure import ROUNDS, compare


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two runtimes on one model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", default="llama.cpp")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, default=Path("comparison.json"))
    given = parser.parse_args()
    result = compare(
        given.model, ["cpu", given.against], threads=given.threads, rounds=given.rounds
    )
    print(introduction(result), table(result), sep="\n", end="")
    given.json.write_text(json.dumps(document(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
