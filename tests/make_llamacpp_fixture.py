"""Write tests/data/smollm2_llamacpp.npz: what llama.cpp and the reference make of a fixed text.

    python tests/make_llamacpp_fixture.py MODEL.gguf

Needs the extra `llamacpp`; the tests that read the file do not.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from accuracy import POSITIONS, REFERENCE_POSITIONS, TEXT, kept

import edgellama
from edgellama.distance import distance, log_probabilities

FIXTURE = TEXT.parent / "smollm2_llamacpp.npz"


def main(model: Path) -> None:
    p = log_probabilities(logits(model, "reference", "float64"))
    q = log_probabilities(logits(model, "llama.cpp"))
    far = distance(p, q)
    ids, logprobs = kept(q)
    reference_ids, reference_logprobs = kept(p[REFERENCE_POSITIONS])
    about = {
        "llama_cpp_python": version(),
        "model_sha256": sha256(model),
        "text_sha256": sha256(TEXT),
        "kv_type": "f16",
        "mean_kl": far.mean,
        "median_kl": far.median,
        "max_kl": far.largest,
        "top1": far.top1,
    }
    np.savez_compressed(
        FIXTURE,
        ids=ids,
        logprobs=logprobs,
        reference_ids=reference_ids,
        reference_logprobs=reference_logprobs,
        about=np.array(json.dumps(about)),
    )
    print(json.dumps(about, indent=2), FIXTURE.stat().st_size, "bytes")


def logits(path: Path, runtime: str, dtype: str | None = None) -> np.ndarray:
    with edgellama.load(path, runtime=runtime, dtype=dtype, context=POSITIONS) as model:
        ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:POSITIONS]
        return model.session().forward(ids, all_logits=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def version() -> str:
    import llama_cpp

    return llama_cpp.__version__


if __name__ == "__main__":
    main(Path(sys.argv[1]))
