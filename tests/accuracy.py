"""How far apart two runtimes are: Kullback-Leibler divergence, agreement, squared error.

Logits are (positions, vocab_size); everything is computed in float64.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TEXT = Path(__file__).parent / "data" / "english.txt"
POSITIONS = 256  # teacher-forced tokens of TEXT
REFERENCE_POSITIONS = slice(7, None, 8)  # of these, where the float64 reference is stored
TOP = 128  # likeliest tokens that a stored distribution keeps


def log_probabilities(logits: NDArray[np.float32]) -> Floats:
    """log softmax of each row."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(p: Floats, q: Floats) -> Floats:
    """KL(p || q) in nats for each row; p, q are log-probabilities over the same tokens."""
    return (np.exp(p) * (p - q)).sum(axis=-1)


def agreement(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Share of rows whose likeliest token is the same."""
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def nmse(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Squared error over the wanted values' squares, all rows together."""
    exact = wanted.astype(np.float64)
    return float(((got - exact) ** 2).sum() / (exact**2).sum())


@dataclass(frozen=True)
class Distance:
    """Of one runtime's logits from those it is compared with."""

    mean: float  # of the rows' divergences, nats
    median: float
    largest: float
    top1: float  # share of equal likeliest tokens

    def __str__(self) -> str:
        return (
            f"KL mean {self.mean:.2e}, median {self.median:.2e}, max {self.largest:.2e}; "
            f"top-1 {self.top1:.2%}"
        )


def distance(p: Floats, q: Floats) -> Distance:
    """KL(p || q) and agreement of log-probabilities."""
    kl = divergence(p, q)
    return Distance(float(kl.mean()), float(np.median(kl)), float(kl.max()), agreement(p, q))


def kept(p: Floats) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """(ids, log-probabilities) of each row's TOP likeliest tokens, the likeliest first."""
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :TOP]
    return ids.astype(np.uint32), np.take_along_axis(p, ids, axis=-1).astype(np.float32)


def bucketed(p: Floats, ids: NDArray[np.integer]) -> Floats:
    """Log-probabilities of each row's `ids`, then of all other tokens together.

    A divergence between two such rows is at most that between the whole ones.
    """
    listed = np.take_along_axis(p, ids.astype(np.int64), axis=-1)
    return with_rest(listed)


def with_rest(listed: NDArray[np.floating]) -> Floats:
    """Append the log-probability of everything that is not listed."""
    exact = listed.astype(np.float64)
    rest = np.maximum(1 - np.exp(exact).sum(axis=-1, keepdims=True), 1e-12)
    return np.concatenate([exact, np.log(rest)], axis=-1)
