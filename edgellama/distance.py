"""How far apart two runtimes are: Kullback-Leibler divergence, agreement, squared error.

Logits are (positions, vocab_size); everything is computed in float64. Knows nothing about models.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_probabilities(logits: NDArray[np.float32]) -> Floats:
    """log softmax of each row."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    normed: Floats = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return normed


def divergence(p: Floats, q: Floats) -> Floats:
    """KL(p || q) in nats for each row; p, q are log-probabilities over the same tokens."""
    each: Floats = (np.exp(p) * (p - q)).sum(axis=-1)
    return each


def agreement(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
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
