"""How near each runtime comes to full precision, on any texts: KL divergence and top-1.

    python benchmarks/accuracy.py MODEL.gguf TEXT [TEXT ...]

The first 256 tokens of each text, teacher-forced, against the float32 reference; llama.cpp too
where llama-cpp-python is installed.
"""

import argparse
from pathlib import Path

import edgellama
from edgellama.distance import distance, log_probabilities

POSITIONS = 256


def logits(model: str, runtime: str, texts: list[Path]) -> list:
    """float32 (positions, vocab_size) for each text."""
    with edgellama.load(model, runtime, context=POSITIONS) as loaded:
        encoded = [loaded.tokenizer.encode(text.read_text("utf-8"))[:POSITIONS] for text in texts]
        return [loaded.session().forward(ids, all_logits=True) for ids in encoded]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path, nargs="+")
    given = parser.parse_args()
    model, texts = given.model, given.texts
    reference = [log_probabilities(x) for x in logits(model, "reference", texts)]
    for runtime in ("cpu", "llama.cpp"):
        try:
            computed = logits(model, runtime, texts)
        except edgellama.DeviceUnavailable as error:
            print(f"{runtime}: {error}")
            continue
        for text, p, x in zip(texts, reference, computed, strict=True):
            print(f"{runtime}, {text.name}, {len(p)} tokens: {distance(p, log_probabilities(x))}")


if __name__ == "__main__":
    main()
