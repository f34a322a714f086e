"""Do converted files mean the same here and in llama.cpp? Token by token, on twenty prompts.

    python benchmarks/agreement.py SOURCE [TYPE ...] [--text FILE]

SOURCE (a checkpoint or a GGUF file) is converted to each type; both runtimes read the file and
predict the same tokens: twenty openings from the text, and what the first file makes of them,
greedily. Where the likeliest token leads the second by twice the largest difference of any logit
there, both must choose it. What all logits of a position have in common is left out: it changes
no choice.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgellama
from edgellama.quantize import quantize

PROMPTS, OPENING, LENGTH = 20, 12, 60
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
TEXT = Path(__file__).parents[1] / "tests" / "data" / "english.txt"


def sequences(model: Path, text: str) -> list[list[int]]:
    """Twenty openings, each with its continuation."""
    found = []
    with edgellama.load(model, context=LENGTH) as loaded:
        ids = loaded.tokenizer.encode(text)
        step = (len(ids) - OPENING) // (PROMPTS - 1)
        for start in range(0, PROMPTS * step, step):
            opening = ids[start : start + OPENING]
            reply = loaded.generate(opening, edgellama.Sampling(temperature=0))
            found.append([*opening, *(c.token for c in reply if c.token is not None)][:LENGTH])
    return found


def logits(model: Path, runtime: str, prompts: list[list[int]]) -> NDArray[np.float32]:
    """float32 (tokens, vocab_size)."""
    with edgellama.load(model, runtime, context=LENGTH) as loaded:
        return np.concatenate([loaded.session().forward(p, all_logits=True) for p in prompts])


def compared(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> str:
    apart = ours.astype(np.float64) - theirs
    apart = np.abs(apart - np.median(apart, axis=1, keepdims=True)).max(axis=1)
    second, first = np.sort(theirs, axis=1)[:, -2:].T
    clear = first - second >= 2 * apart
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    return (
        f"{same.mean():.1%} same; clear at {clear.mean():.1%} of {len(clear)} positions, "
        f"of which {int((clear & ~same).sum())} differ; largest difference of a logit "
        f"{apart.max():.2f}, median {np.median(apart):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare converted files in two runtimes.")
    parser.add_argument("source", type=Path)
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--text", type=Path, default=TEXT)
    given = parser.parse_args()
    text = given.text.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        source, prompts = given.source, []
        for number, kind in enumerate(given.types):
            output = Path(folder) / f"{number}.gguf"
            quantize(source, output, kind, certificate="none")
            prompts = prompts or sequences(output, text)
            both = [logits(output, runtime, prompts) for runtime in ("cpu", "llama.cpp")]
            print(f"{kind}: {compared(*both)}", flush=True)
            if number == 0:  # the others are made from it
                source = output


if __name__ == "__main__":
    main()
