"""Write tests/data/encode.json: hashes of what ggml's encoder makes of seeded rows.

    python tests/make_encode_fixture.py

Needs the extra `llamacpp`; the tests that read the file do not.
"""

import json
from pathlib import Path

from encode_rows import KINDS, WEIGHTED, ggml, importances, rows, sha256

FIXTURE = Path(__file__).parent / "data" / "encode.json"


def main() -> None:
    encode = ggml()
    if encode is None:
        raise SystemExit("llama-cpp-python is not installed here: nothing written")
    import llama_cpp

    values = rows()
    made = {
        "llama_cpp_python": llama_cpp.__version__,
        "rows": sha256(values),
        "importances": [sha256(weights) for weights in importances()],
        "plain": {kind: sha256(encode(kind, values, None)) for kind in KINDS},
        "weighted": {
            kind: [sha256(encode(kind, values, weights)) for weights in importances()]
            for kind in WEIGHTED
        },
    }
    FIXTURE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
