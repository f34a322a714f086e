"""Golden logits as files: what is kept, and the models they belong to. Needs no torch.

`tiny.npz`: of each tiny model and type, float32 logits at some positions (`mha.Q4_0`), and its
tokens (`mha.ids`). `default.npz`: of the default model on the fixed text, each position's likeliest
tokens (`ids`) with their log-probabilities (`logprobs`). `about` in both is where they come from.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accuracy import bucketed, with_rest

from edgellama.distance import agreement, divergence, log_probabilities, nmse

FOLDER = Path(__file__).parents[1] / "data" / "golden"
TINY_FILE, DEFAULT_FILE = "tiny.npz", "default.npz"
Array = np.ndarray


class Golden(NamedTuple):
    about: dict[str, Any]
    arrays: dict[str, Array]


def read(path: Path) -> Golden:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored if name != "about"}
        return Golden(json.loads(str(stored["about"])), arrays)


def write(path: Path, about: dict[str, Any], arrays: dict[str, Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays, about=np.array(json.dumps(about, indent=1)))


def from_logits(wanted: Array, got: Array) -> dict[str, float]:
    """How far logits (rows, vocab_size) are from the golden ones."""
    p, q = log_probabilities(wanted), log_probabilities(got)
    kl = divergence(p, q)
    return {
        "nmse": nmse(wanted, got),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_top": agreement(wanted, got),
    }


def from_likeliest(golden: dict[str, Array], got: Array) -> dict[str, float]:
    """The same where only the likeliest tokens are kept; rows of `got` are the first positions.

    KL over these tokens and all others as one: at most that over all. NMSE is of the kept tokens'
    log-probabilities.
    """
    ids, listed = golden["ids"][: len(got)], golden["logprobs"][: len(got)]
    p, q = with_rest(listed), bucketed(log_probabilities(got), ids)
    kl = divergence(p, q)
    return {
        "nmse": nmse(listed, q[:, :-1].astype(np.float32)),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "same_top": float((got.argmax(axis=-1) == ids[:, 0]).mean()),
    }
